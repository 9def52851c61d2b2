"""A Pod's place in host memory for what left its device: coming back is a copy, where a file would be read and checked again."""

from __future__ import annotations

from typing import Generic, TypeVar

from executors.residency.ledger import Counts, TierLedger

Kept = TypeVar("Kept")


class HostTier(Generic[Kept]):
    """Things by name within a budget: the one worth least goes first, one that finds no room is not kept. Not for threads."""

    def __init__(self, budget_bytes: int) -> None:
        self._ledger = TierLedger(budget_bytes)
        self._kept: dict[str, Kept] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def has_room(self, size_bytes: int) -> bool:
        """Tell whether something of this size would be kept, so that nobody copies what would not."""
        return size_bytes > 0 and self._ledger.plan(size_bytes) is not None

    def put(self, name: str, kept: Kept, size_bytes: int, cost_us: int) -> bool:
        """Keep something that took `cost_us` to make; False when it finds no room."""
        self._ledger.drop(name)
        self._kept.pop(name, None)
        going = self._ledger.admit(name, size_bytes, cost_us)
        if going is None:
            return False
        for each in going:
            del self._kept[each]
        self._kept[name] = kept
        return True

    def take(self, name: str) -> Kept | None:
        """Take something out; None (a miss) when it is not here."""
        if not self._ledger.use(name):
            return None
        self._ledger.drop(name)
        return self._kept.pop(name)

    def drop(self, name: str) -> None:
        """Forget something, if it is here."""
        self._ledger.drop(name)
        self._kept.pop(name, None)

    @property
    def used_bytes(self) -> int:
        """What all of it takes."""
        return self._ledger.used_bytes

    @property
    def counts(self) -> Counts:
        """What happened here so far."""
        return self._ledger.counts
