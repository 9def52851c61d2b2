"""The room on nodes of equal size: which are free by how much, kept so that a choice costs no search.

For every amount of free GPUs there is one integer whose bits are the nodes that have it. The lowest set bit is the node with the
lowest number, so best fit, first fit and worst fit with ties to the lowest number are a few operations on integers, whether there
are ten nodes or ten thousand.
"""

from __future__ import annotations

from random import Random
from typing import Final

BEST_FIT: Final = 0
FIRST_FIT: Final = 1
WORST_FIT: Final = 2
RANDOM: Final = 3
PLACEMENTS = {"best-fit": BEST_FIT, "first-fit": FIRST_FIT, "worst-fit": WORST_FIT, "random": RANDOM}

Pieces = list[tuple[int, int]]
"""(node, GPUs there)."""


class Nodes:
    """Free GPUs by node. Jobs that need no more than a node go on one; larger ones on whole nodes and a remainder on one more."""

    __slots__ = ("count", "free", "levels", "per_node", "placement", "random", "total_free")

    def __init__(self, count: int, per_node: int, placement: int, seed: int) -> None:
        self.count = count
        self.per_node = per_node
        self.placement = placement
        self.free: list[int] = [per_node] * count
        self.levels: list[int] = [0] * (per_node + 1)
        """Nodes, as bits, by how much of them is free."""
        self.levels[per_node] = (1 << count) - 1
        self.total_free = count * per_node
        self.random = Random(seed)

    def pick(self, gpus: int, closed: int = 0) -> int:
        """Return the node for a job that fits on one, or -1. `closed` are nodes, as bits, that will not do."""
        levels = self.levels
        found = 0
        if self.placement == BEST_FIT:
            for level in range(gpus, self.per_node + 1):
                found = levels[level] & ~closed if closed else levels[level]
                if found:
                    break
        elif self.placement == WORST_FIT:
            for level in range(self.per_node, gpus - 1, -1):
                found = levels[level] & ~closed if closed else levels[level]
                if found:
                    break
        else:
            found = self.holding(gpus) & ~closed
            if self.placement == RANDOM and found:
                return self._any_of(found)
        return (found & -found).bit_length() - 1

    def holding(self, gpus: int) -> int:
        """Return the nodes, as bits, with at least so many free GPUs."""
        found = 0
        for level in self.levels[gpus:]:
            found |= level
        return found

    def _any_of(self, nodes: int) -> int:
        skip = self.random.randrange(nodes.bit_count())
        for _ in range(skip):
            nodes &= nodes - 1
        return (nodes & -nodes).bit_length() - 1

    def take(self, node: int, gpus: int) -> None:
        """Take GPUs of a node; a negative number gives them back."""
        before = self.free[node]
        after = before - gpus
        bit = 1 << node
        self.levels[before] ^= bit
        self.levels[after] |= bit
        self.free[node] = after
        self.total_free -= gpus

    def pick_whole(self, gpus: int, closed: int = 0) -> Pieces | None:
        """Return whole nodes for a job larger than one, and for the remainder the one with the most free; None: no room."""
        per_node = self.per_node
        whole, rest = divmod(gpus, per_node)
        empty = self.levels[per_node] & ~closed
        if empty.bit_count() < whole:
            return None
        pieces: Pieces = []
        for _ in range(whole):
            low = empty & -empty
            empty ^= low
            pieces.append((low.bit_length() - 1, per_node))
        if rest:
            for level in range(per_node, rest - 1, -1):
                found = empty if level == per_node else self.levels[level] & ~closed
                if found:
                    pieces.append(((found & -found).bit_length() - 1, rest))
                    break
            else:
                return None
        return pieces
