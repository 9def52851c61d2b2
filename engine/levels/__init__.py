"""The levels of the scheduling framework: small protocols, and the policies that fill them."""
