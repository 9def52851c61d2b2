"""The room where a job's GPUs may lie anywhere, as processors of a batch cluster do: whole sets of nodes at a time.

A job on a hundred nodes is a handful of integers: nodes, as bits, of which it holds the same number of GPUs. To take or give back
costs a few operations per amount that a node can have free, however many nodes there are.
"""

from __future__ import annotations

from random import Random

from sim.jobs.nodes import BEST_FIT, FIRST_FIT, WORST_FIT, Pieces

Groups = list[tuple[int, int]]
"""(nodes as bits, GPUs on each)."""

_FEW = 3
"""Up to so many nodes' worth of GPUs are looked for one node at a time; more by halving."""


class Processors:
    """Free GPUs by node, taken a few here and a few there."""

    __slots__ = ("count", "levels", "per_node", "placement", "random", "total_free")

    def __init__(self, count: int, per_node: int, placement: int, seed: int) -> None:
        self.count = count
        self.per_node = per_node
        self.placement = placement
        self.levels: list[int] = [0] * (per_node + 1)
        """Nodes, as bits, by how much of them is free."""
        self.levels[per_node] = (1 << count) - 1
        self.total_free = count * per_node
        self.random = Random(seed)

    def take(self, gpus: int) -> Groups:
        """Take so many GPUs; there are enough."""
        self.total_free -= gpus
        if self.placement == FIRST_FIT:
            return self._first(gpus)
        if self.placement == BEST_FIT:
            return self._by_level(gpus, range(1, self.per_node + 1))
        if self.placement == WORST_FIT:
            return self._by_level(gpus, range(self.per_node, 0, -1))
        return self._drawn(gpus)

    def _from(self, level: int, nodes: int, amount: int) -> tuple[int, int]:
        """Take an amount of each of these nodes, all of which have `level` free."""
        self.levels[level] ^= nodes
        self.levels[level - amount] |= nodes
        return nodes, amount

    def give(self, groups: Groups) -> None:
        """Give back what `take` returned."""
        levels = self.levels
        for nodes, amount in groups:
            left = nodes
            for level in range(self.per_node - amount, -1, -1):
                here = levels[level] & left
                if here:
                    levels[level] ^= here
                    levels[level + amount] |= here
                    self.total_free += amount * here.bit_count()
                    left ^= here
                    if not left:
                        break

    def _by_level(self, gpus: int, order: range) -> Groups:
        """Empty the nodes with the least free first, or those with the most."""
        groups: Groups = []
        for level in order:
            nodes = self.levels[level]
            if not nodes:
                continue
            there = nodes.bit_count() * level
            if there > gpus:
                whole, rest = divmod(gpus, level)
                if whole:
                    first = _lowest(nodes, whole)
                    nodes ^= first
                    groups.append(self._from(level, first, level))
                if rest:
                    groups.append(self._from(level, nodes & -nodes, rest))
                return groups
            groups.append(self._from(level, nodes, level))
            gpus -= there
            if not gpus:
                return groups
        return groups

    def _first(self, gpus: int) -> Groups:
        """Empty nodes from the lowest number on."""
        levels, per_node = self.levels, self.per_node
        if per_node == 1:
            return [self._from(1, _lowest(levels[1], gpus), 1)]
        groups: Groups = []
        if gpus > _FEW * per_node:
            gpus -= self._below(self._reach(gpus), groups)
        while gpus > 0:
            bit = level = 0
            for each in range(1, per_node + 1):
                nodes = levels[each]
                if nodes:
                    first = nodes & -nodes
                    if not bit or first < bit:
                        bit, level = first, each
            amount = level if level < gpus else gpus
            groups.append(self._from(level, bit, amount))
            gpus -= amount
        return groups

    def _reach(self, gpus: int) -> int:
        """Return how many nodes from the lowest number on have fewer than so many GPUs free together, at most."""
        low, high = 0, self.count
        while low < high:
            middle = (low + high) // 2
            below = (1 << (middle + 1)) - 1
            there = 0
            for level in range(1, self.per_node + 1):
                there += level * (self.levels[level] & below).bit_count()
            if there < gpus:
                low = middle + 1
            else:
                high = middle
        return low

    def _below(self, number: int, groups: Groups) -> int:
        """Take all that is free on the nodes below a number; return how much that was."""
        below, taken = (1 << number) - 1, 0
        for level in range(1, self.per_node + 1):
            nodes = self.levels[level] & below
            if nodes:
                groups.append(self._from(level, nodes, level))
                taken += level * nodes.bit_count()
        return taken

    def _drawn(self, gpus: int) -> Groups:
        """Empty nodes in a random order."""
        free = {node: level for level in range(1, self.per_node + 1) for node in numbers(self.levels[level])}
        order = sorted(free)
        self.random.shuffle(order)
        groups: Groups = []
        for node in order:
            amount = min(gpus, free[node])
            groups.append(self._from(free[node], 1 << node, amount))
            gpus -= amount
            if not gpus:
                break
        return groups


def numbers(nodes: int) -> list[int]:
    """Return the numbers of nodes that are given as bits, ascending."""
    found = []
    while nodes:
        low = nodes & -nodes
        found.append(low.bit_length() - 1)
        nodes ^= low
    return found


def spelled_out(groups: Groups) -> Pieces:
    """Return (node, GPUs there), by node."""
    return sorted((node, amount) for nodes, amount in groups for node in numbers(nodes))


def _lowest(nodes: int, count: int) -> int:
    """Return the nodes with the lowest numbers, so many of them."""
    low, high = 0, nodes.bit_length()
    while low < high:
        middle = (low + high) // 2
        if (nodes & ((1 << (middle + 1)) - 1)).bit_count() < count:
            low = middle + 1
        else:
            high = middle
    return nodes & ((1 << (low + 1)) - 1)
