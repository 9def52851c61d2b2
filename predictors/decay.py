"""Means that forget: one bounded table of exponentially decayed averages, the memory of every learned number here."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator

Cell = list[float]
"""``[weight, weighted sum, time of the last touch in seconds]``."""


class DecayedMeans:
    """Averages by key whose observations lose weight with age.

    ``memory_s`` is the time constant: an observation of that age weighs 1/e. ``limit`` bounds the keys; the one that was updated
    longest ago leaves first.
    """

    __slots__ = ("cells", "limit", "memory_s")

    def __init__(self, memory_s: float, limit: int) -> None:
        if memory_s <= 0 or limit < 1:
            raise ValueError(f"DecayedMeans: memory_s and limit must be positive, got {memory_s} and {limit}")
        self.memory_s = memory_s
        self.limit = limit
        self.cells: dict[Hashable, Cell] = {}

    def __len__(self) -> int:
        return len(self.cells)

    def shrunk(self, key: Hashable, now_s: float, towards: float, strength: float) -> float:
        """Return the mean pulled ``towards`` a prior that counts as ``strength`` observations."""
        cell = self.cells.get(key)
        if cell is None:
            return towards
        weight, total, at_s = cell
        if now_s > at_s:
            decay = math.exp((at_s - now_s) / self.memory_s)
            weight *= decay
            total *= decay
        return (total + strength * towards) / (weight + strength)

    def weight(self, key: Hashable, now_s: float) -> float:
        """Return how many fresh observations the key's history is worth."""
        cell = self.cells.get(key)
        if cell is None:
            return 0.0
        return cell[0] * math.exp(min(0.0, cell[2] - now_s) / self.memory_s)

    def add(self, key: Hashable, now_s: float, value: float, weight: float = 1.0) -> None:
        """Add one observation; a time before the key's last one counts as that last time."""
        cell = self.cells.pop(key, None)
        if cell is None:
            self.cells[key] = [weight, weight * value, now_s]
            if len(self.cells) > self.limit:
                del self.cells[next(iter(self.cells))]
            return
        at_s = cell[2]
        if now_s > at_s:
            decay = math.exp((at_s - now_s) / self.memory_s)
            cell[0] *= decay
            cell[1] *= decay
            cell[2] = now_s
        cell[0] += weight
        cell[1] += weight * value
        self.cells[key] = cell

    def fade(self, key: Hashable, keep: float) -> None:
        """Let a key's observations count for a share of what they did."""
        cell = self.cells.get(key)
        if cell is not None:
            cell[0] *= keep
            cell[1] *= keep

    def rows(self) -> Iterator[tuple[Hashable, Cell]]:
        """Yield every key with its cell, the longest untouched first."""
        yield from self.cells.items()
