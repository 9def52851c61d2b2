"""The waiting line that backfilling searches: who is the first that is small and short enough, without walking the line."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

NONE = 2**62
"""No job: larger than any run time, and than any rank."""


class SizeLine:
    """Waiting jobs that want the same number of GPUs, as a tree of the shortest run times over their ranks.

    Ranks are known before the run, so each job has its leaf from the start; a job that does not wait stands there with `NONE`.
    Coming and going cost a few steps up, and the first in rank that is no longer than a given time is found on one way down.
    """

    __slots__ = ("gpus", "leaves", "ranks", "tree")

    def __init__(self, gpus: int, ranks: Sequence[int]) -> None:
        self.gpus = gpus
        self.ranks = ranks
        """Ranks of all jobs of this size in the whole workload, ascending."""
        leaves = 1
        while leaves < len(ranks):
            leaves *= 2
        self.leaves = leaves
        self.tree: list[int] = [NONE] * (2 * leaves)

    def come(self, rank: int, estimate: int) -> None:
        """Let a job wait here."""
        tree = self.tree
        at = self.leaves + bisect_left(self.ranks, rank)
        while at and tree[at] > estimate:
            tree[at] = estimate
            at >>= 1

    def go(self, rank: int) -> None:
        """Let a waiting job leave."""
        tree = self.tree
        at = self.leaves + bisect_left(self.ranks, rank)
        before = tree[at]
        tree[at] = now = NONE
        at >>= 1
        while at and tree[at] == before:
            left, right = tree[2 * at], tree[2 * at + 1]
            now = left if left < right else right
            if now == before:
                break
            tree[at] = now
            at >>= 1

    def first(self, longest: int) -> int:
        """Return the rank of the first that takes no longer than this, or `NONE`."""
        tree = self.tree
        if tree[1] > longest:
            return NONE
        at = 1
        leaves = self.leaves
        while at < leaves:
            at *= 2
            if tree[at] > longest:
                at += 1
        return self.ranks[at - leaves]
