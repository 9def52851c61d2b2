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

    __slots__ = ("_entries", "capacity_bytes", "used_bytes")

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._entries: OrderedDict[str, int] = OrderedDict()

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
        """Add an entry, pushing out the least recently used; one larger than the cache is not kept."""
        if self.touch(name) or size_bytes > self.capacity_bytes:
            return
        self._entries[name] = size_bytes
        self.used_bytes += size_bytes
        while self.used_bytes > self.capacity_bytes:
            _, freed = self._entries.popitem(last=False)
            self.used_bytes -= freed

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self.used_bytes = 0
