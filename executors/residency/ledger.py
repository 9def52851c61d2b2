"""What a bounded place keeps: the bookkeeping of every tier, without any file, device or clock.

The rule is GreedyDual-Size-Frequency: an entry is worth its uses times what it costs to bring it again, per byte, on top of the
ledger's age; the entry worth least goes, and the age grows to its worth. So the least recently and the least costly go first, and
what was worth much once is not kept for ever. Worths are whole numbers: the same calls give the same evictions everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

LEAST_COST_US = 100_000
"""Loads that are quicker count alike: their differences are noise, and the least recently used goes."""
_WORTH_SCALE = 1 << 20
"""Worth of one use that saves a microsecond per byte."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing kept: its size, what bringing it took, how often it was used, and what it is worth."""

    size_bytes: int
    cost_us: int = 0
    uses: int = 1
    worth: int = 0
    last_use: int = 0
    """Number of the ledger's call that used it last: breaks ties."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What happened to a tier so far."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    refusals: int = 0
    """Entries that found no room among what is pinned or in use."""
    bytes_in: int = 0
    bytes_evicted: int = 0


class TierLedger:
    """The entries of one tier. The sum of their sizes is never above the budget; pinned and held ones are never evicted."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.age = 0
        """Worth of what was evicted last; a new entry starts above it."""
        self.calls = 0
        self.counts = Counts()
        self._entries: dict[str, Entry] = {}
        self._pins: dict[str, None] = {}
        self._holds: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def entry(self, name: str) -> Entry | None:
        """Return what is known of an entry."""
        return self._entries.get(name)

    @property
    def pins(self) -> tuple[str, ...]:
        """The names that stay once they are here, present or not."""
        return tuple(self._pins)

    def is_safe(self, name: str) -> bool:
        """Tell whether an entry may not be evicted: it is pinned, or somebody holds it."""
        return name in self._pins or self._holds.get(name, 0) > 0

    def use(self, name: str) -> bool:
        """Note that an entry is needed now; False (a miss) when it is absent."""
        entry = self._entries.get(name)
        if entry is None:
            self.counts = replace(self.counts, misses=self.counts.misses + 1)
            return False
        self.counts = replace(self.counts, hits=self.counts.hits + 1)
        self._put(name, replace(entry, uses=entry.uses + 1))
        return True

    def order(self) -> list[str]:
        """Return the entries, the one that is worth least first."""
        return sorted(self._entries, key=lambda name: (self._entries[name].worth, self._entries[name].last_use))

    def plan(self, size_bytes: int) -> list[str] | None:
        """Return what would have to go for so many bytes, the first to go first; None when that is not enough room."""
        if size_bytes > self.budget_bytes:
            return None
        lacking = self.used_bytes + size_bytes - self.budget_bytes
        going: list[str] = []
        if lacking <= 0:
            return going
        loose = [(e.worth, e.last_use, name) for name, e in self._entries.items() if not self.is_safe(name)]
        for _, _, name in sorted(loose):
            going.append(name)
            lacking -= self._entries[name].size_bytes
            if lacking <= 0:
                return going
        return None

    def admit(self, name: str, size_bytes: int, cost_us: int = 0) -> list[str] | None:
        """Take an entry in; returns what was evicted for it, None when it was refused. What is there already is used again."""
        if size_bytes < 0:
            raise ValueError(f"size_bytes of {name!r}: {size_bytes}; a size is 0 or more")
        if name in self._entries:
            self._put(name, replace(self._entries[name], uses=self._entries[name].uses + 1))
            return []
        going = self.plan(size_bytes)
        if going is None:
            self.counts = replace(self.counts, refusals=self.counts.refusals + 1)
            return None
        for each in going:
            self.evict(each)
        self.used_bytes += size_bytes
        self.counts = replace(self.counts, bytes_in=self.counts.bytes_in + size_bytes)
        self._put(name, Entry(size_bytes, max(0, cost_us)))
        return going

    def learn(self, name: str, cost_us: int) -> None:
        """Take in what bringing an entry took in the end; nothing when it is absent."""
        entry = self._entries.get(name)
        if entry is not None:
            self._put(name, replace(entry, cost_us=max(0, cost_us)))

    def evict(self, name: str) -> None:
        """Let an entry go for the room it takes, whatever it is worth; nothing when it is absent."""
        entry = self._entries.get(name)
        if entry is None:
            return
        self.age = max(self.age, entry.worth)
        self.counts = replace(
            self.counts,
            evictions=self.counts.evictions + 1,
            bytes_evicted=self.counts.bytes_evicted + entry.size_bytes,
        )
        self.drop(name)

    def drop(self, name: str) -> bool:
        """Forget an entry that is gone for another reason; False when it was absent."""
        entry = self._entries.pop(name, None)
        if entry is None:
            return False
        self.used_bytes -= entry.size_bytes
        return True

    def pin(self, name: str) -> None:
        """Keep an entry from now on, also one that is yet to come."""
        self._pins[name] = None

    def unpin(self, name: str) -> None:
        """Let an entry be evicted like others again."""
        self._pins.pop(name, None)

    def hold(self, name: str) -> None:
        """Note one more user of an entry; it stays until each has let go."""
        self._holds[name] = self._holds.get(name, 0) + 1

    def release(self, name: str) -> None:
        """Note one user less; raises ValueError when nobody holds it."""
        held = self._holds.get(name, 0)
        if held < 1:
            raise ValueError(f"{name!r} is released more often than it was held")
        if held == 1:
            del self._holds[name]
        else:
            self._holds[name] = held - 1

    def resize(self, budget_bytes: int) -> list[str]:
        """Change the budget; returns what was evicted, and raises ValueError when what must stay is more than that."""
        kept = sum(e.size_bytes for name, e in self._entries.items() if self.is_safe(name))
        if budget_bytes < kept:
            raise ValueError(f"budget_bytes: {budget_bytes} is below the {kept} that are pinned or in use; unpin some")
        self.budget_bytes = budget_bytes
        going = self.plan(0)
        assert going is not None
        for each in going:
            self.evict(each)
        return going

    def restore(self, name: str, entry: Entry) -> None:
        """Take an entry back as an earlier ledger of the place knew it, even where that is over the budget; see `overflow`."""
        self.drop(name)
        self._entries[name] = entry
        self.used_bytes += entry.size_bytes
        self.calls = max(self.calls, entry.last_use)

    def overflow(self) -> list[str]:
        """Return what must go so that a restored ledger is within its budget; pinned and held ones are spared."""
        going: list[str] = []
        over = self.used_bytes - self.budget_bytes
        loose = [(e.worth, e.last_use, name) for name, e in self._entries.items() if not self.is_safe(name)]
        for _, _, name in sorted(loose):
            if over <= 0:
                break
            going.append(name)
            over -= self._entries[name].size_bytes
        return going

    def _put(self, name: str, entry: Entry) -> None:
        self.calls += 1
        cost_us = max(LEAST_COST_US, entry.cost_us)
        worth = self.age + entry.uses * cost_us * _WORTH_SCALE // max(1, entry.size_bytes)
        self._entries[name] = replace(entry, worth=worth, last_use=self.calls)
