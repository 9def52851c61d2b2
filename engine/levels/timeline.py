"""What is free on one node from now on, as counts over time: for nodes on which only whole GPUs are given, where counts are exact.

Devices of such a node can stand in for each other, so whether something fits is a matter of numbers, and the earliest time is one
pass over the moments at which anything changes. Where GPUs are shared, `reservations` plays the node forward device by device.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from engine.entities import Node
from engine.resources import WHOLE_GPU, Demand, GpuGrant
from engine.tasks import NEVER, Micros

Need = list[tuple[int, int]]
"""(column, amount); column 0 is whole GPUs, the cluster's columns follow."""


def is_uniform(node: Node) -> bool:
    """Tell whether every GPU of a node can stand in for every other, and only whole ones are taken."""
    first = node.gpus[0] if node.gpus else None
    for gpu in node.gpus:
        assert first is not None
        if gpu.model != first.model or gpu.memory_bytes != first.memory_bytes or not gpu.open:
            return False
        if gpu.share_free % WHOLE_GPU:
            return False
    return all(grant.share == WHOLE_GPU for pod in node.pods.values() for grant in pod.grants)


class Timeline:
    """Free amounts between moments. Reservations are taken out of it as they are made."""

    __slots__ = ("_free", "_times")

    def __init__(self, node: Node, now: Micros) -> None:
        self._times: list[Micros] = [now]
        self._free: list[list[int]] = [[sum(gpu.share_free for gpu in node.gpus) // WHOLE_GPU, *node.free]]

    def release(self, at: Micros, need: Need) -> None:
        """Note that something becomes free; calls come in the order of time."""
        if at == NEVER:
            return
        if at != self._times[-1]:
            self._times.append(at)
            self._free.append(list(self._free[-1]))
        free = self._free[-1]
        for column, amount in need:
            free[column] += amount

    def take(self, start: Micros, end: Micros, need: Need) -> None:
        """Take a need out over a span."""
        first, last = self._cut(start), self._cut(end)
        for free in self._free[first:last]:
            for column, amount in need:
                free[column] -= amount

    def _cut(self, at: Micros) -> int:
        """Return the interval that begins at a time, made if none does."""
        times = self._times
        index = bisect_left(times, at)
        if index == len(times) or times[index] != at:
            times.insert(index, at)
            self._free.insert(index, list(self._free[index - 1]))
        return index

    def earliest(self, need: Need, run_us: Micros, soon: Micros, before: Micros) -> Micros:
        """Return the first time from `soon` on, but before `before`, at which a need fits for so long; else NEVER."""
        times, free = self._times, self._free
        index = bisect_right(times, soon) - 1
        start, count = soon, len(times)
        while True:
            here = free[index]
            fits = True
            for column, amount in need:
                if here[column] < amount:
                    fits = False
                    break
            index += 1
            if fits:
                if index == count or times[index] >= start + run_us:
                    return start
            elif index == count or times[index] >= before:
                return NEVER
            else:
                start = times[index]

    def holds(self, need: Need, start: Micros, end: Micros) -> bool:
        """Tell whether a need fits over a span."""
        times, free = self._times, self._free
        index = max(0, bisect_right(times, start) - 1)
        while index < len(times) and times[index] < end:
            here = free[index]
            for column, amount in need:
                if here[column] < amount:
                    return False
            index += 1
        return True

    def offers(self, need: Need, most: int, soon: Micros, before: Micros) -> list[Micros]:
        """Return when one, two, ... `most` of a need first fit, if nothing is reserved."""
        found: list[Micros] = []
        for at, here in zip(self._times, self._free, strict=True):
            if at >= before:
                break
            count = min((here[column] // amount for column, amount in need if amount), default=most)
            while len(found) < min(count, most):
                found.append(max(at, soon))
            if len(found) == most:
                break
        return found


def need_of(amounts: Sequence[tuple[int, int]], demand: Demand, count: int = 1) -> Need:
    """Return a demand, or several of it, as columns and amounts."""
    need = [(column + 1, amount * count) for column, amount in amounts]
    if demand.gpus:
        need.insert(0, (0, demand.gpus * count))
    return need


def held_by(amounts: Sequence[tuple[int, int]], grants: Sequence[GpuGrant]) -> Need:
    """Return what a Pod or a claim holds, as columns and amounts."""
    need = [(column + 1, amount) for column, amount in amounts]
    if grants:
        need.append((0, len(grants)))
    return need
