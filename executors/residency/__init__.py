"""Which models lie where: one rule of eviction for every tier, the tiers themselves, and what is let in at all.

A model's bytes come from the file store to the node's disk, from there into its memory, and from there to a Pod's device. Each
place is a tier with a budget; `ledger` decides what stays, `disk`, `pages` and `shelf` are the places, `weights` refuses files
that must not be loaded.
"""
