"""A node's two places where model files may already lie: its disk and its memory. Both forget the least recently used first."""

from __future__ import annotations

from collections import OrderedDict
from enum import StrEnum


class Source(StrEnum):
    """Where a model load found its bytes, the farthest first."""

    REMOTE = "remote"
    DISK = "disk"
    MEMORY = "memory"


class ByteCache:
    """An LRU set of named byte counts with a capacity."""

    __slots__ = ("_entries", "_pins", "capacity_bytes", "used_bytes")

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._entries: OrderedDict[str, int] = OrderedDict()
        self._pins: dict[str, None] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def touch(self, name: str) -> bool:
        """Mark an entry as just used; False when it is absent."""
        if name not in self._entries:
            return False
        self._entries.move_to_end(name)
        return True

    def put(self, name: str, size_bytes: int) -> None:
        """Add an entry, pushing out the least recently used that is not pinned; one that finds no room is not kept."""
        if self.touch(name) or size_bytes > self.capacity_bytes:
            return
        self._entries[name] = size_bytes
        self.used_bytes += size_bytes
        if self._pins:
            self._push_out(name)
        while self.used_bytes > self.capacity_bytes:
            _, freed = self._entries.popitem(last=False)
            self.used_bytes -= freed

    def _push_out(self, newest: str) -> None:
        for each in [each for each in self._entries if each not in self._pins]:
            if self.used_bytes <= self.capacity_bytes:
                return
            self.drop(each)
        if self.used_bytes > self.capacity_bytes:
            self.drop(newest)

    def drop(self, name: str) -> None:
        """Let an entry go, if it is there."""
        self.used_bytes -= self._entries.pop(name, 0)

    def pin(self, name: str) -> None:
        """Keep an entry from now on, also one that is yet to come."""
        self._pins[name] = None

    def unpin(self, name: str) -> None:
        """Let an entry be pushed out like others."""
        self._pins.pop(name, None)

    def is_pinned(self, name: str) -> bool:
        """Tell whether an entry stays."""
        return name in self._pins

    @property
    def has_pins(self) -> bool:
        """Tell whether anything stays."""
        return bool(self._pins)

    def entries(self) -> list[tuple[str, int]]:
        """Return the entries with their sizes, the last used one first."""
        return list(reversed(self._entries.items()))

    def clear(self) -> None:
        """Forget everything, as a machine that was lost does."""
        self._entries.clear()
        self._pins.clear()
        self.used_bytes = 0
