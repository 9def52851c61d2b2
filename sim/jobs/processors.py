"""The room where a job's GPUs may lie anywhere, as processors of a batch cluster do: whole sets of nodes at a time.

A job on a hundred nodes is a handful of integers: nodes, as bits, of which it holds the same number of GPUs. To take or give back
costs a few operations per amount that a node can have free, however many nodes there are.
"""

from __future__ import annotations

from random import Random

from sim.jobs.nodes import BEST_FIT, FIRST_FIT, WORST_FIT, Pieces

Groups = list[tuple[int, int]]
"""(nodes as bits, GPUs on each)."""


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
        if self.placement == FIRST_FIT:
            groups = self._first(gpus)
        elif self.placement == BEST_FIT:
            groups = self._by_level(gpus, range(1, self.per_node + 1))
        elif self.placement == WORST_FIT:
            groups = self._by_level(gpus, range(self.per_node, 0, -1))
        else:
            groups = self._drawn(gpus)
        levels = self.levels
        for nodes, amount in groups:
            left = nodes
            for level in range(amount, self.per_node + 1):
                here = levels[level] & left
                if here:
                    levels[level] ^= here
                    levels[level - amount] |= here
                    left ^= here
                    if not left:
                        break
        self.total_free -= gpus
        return groups

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
            if there <= gpus:
                groups.append((nodes, level))
                gpus -= there
            else:
                whole, rest = divmod(gpus, level)
                if whole:
                    first = _lowest(nodes, whole)
                    groups.append((first, level))
                    nodes ^= first
                if rest:
                    groups.append((nodes & -nodes, rest))
                return groups
            if not gpus:
                return groups
        return groups

    def _first(self, gpus: int) -> Groups:
        """Empty nodes from the lowest number on."""
        levels = self.levels
        if self.per_node == 1:
            return [(_lowest(levels[1], gpus), 1)]
        low, high = 0, self.count
        while low < high:
            middle = (low + high) // 2
            below = (1 << (middle + 1)) - 1
            there = 0
            for level in range(1, self.per_node + 1):
                there += level * (levels[level] & below).bit_count()
            if there < gpus:
                low = middle + 1
            else:
                high = middle
        below = (1 << low) - 1
        groups: Groups = []
        for level in range(1, self.per_node + 1):
            nodes = levels[level] & below
            if nodes:
                groups.append((nodes, level))
                gpus -= level * nodes.bit_count()
        groups.append((1 << low, gpus))
        return groups

    def _drawn(self, gpus: int) -> Groups:
        """Empty nodes in a random order."""
        free = {node: level for level in range(1, self.per_node + 1) for node in numbers(self.levels[level])}
        order = sorted(free)
        self.random.shuffle(order)
        groups: Groups = []
        for node in order:
            amount = min(gpus, free[node])
            groups.append((1 << node, amount))
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
