"""When and where the first in line will have its room, if running jobs take as long as they are expected to.

A job that has outlived its estimate is expected to end at once. Until the promised time others may use the promised nodes if they
are gone by then, and beyond it what the first leaves over.
"""

from __future__ import annotations

from sim.jobs.nodes import BEST_FIT, WORST_FIT, Nodes, Pieces

Promise = tuple[int, int, int, int]
"""(time, promised nodes as bits, the one of them on which something is left over or -1, how many GPUs that is)."""
Ends = list[tuple[int, int]]
"""(expected end, job) of running jobs, ascending."""
_NO_ROOM = "a job of {} GPUs finds no room though everything ends; report this with the workload"


def on_any(gpus: int, now: int, ends: Ends, gpus_of: list[int], free: int) -> Promise:
    """Promise GPUs wherever they are; what is left over counts for the whole cluster."""
    at = now
    for expected, job in ends:
        if free >= gpus and expected > at:
            break
        free += gpus_of[job]
        at = max(at, expected)
    return at, 0, -1, free - gpus


def on_one(
    gpus: int, now: int, ends: Ends, gpus_of: list[int], nodes: Nodes, node_of: list[int], pieces: dict[int, Pieces]
) -> Promise:
    """Promise the first node to have room; of several at that moment, the one that the placement prefers."""
    free = nodes.free.copy()
    found: list[int] = []
    at = now
    for expected, job in ends:
        if expected > at:
            if found:
                break
            at = expected
        node = node_of[job]
        if node >= 0:
            room = free[node] = free[node] + gpus_of[job]
            if room >= gpus:
                found.append(node)
            continue
        for node, amount in pieces[job]:
            free[node] += amount
            if free[node] >= gpus:
                found.append(node)
    if not found:
        raise AssertionError(_NO_ROOM.format(gpus))
    best = found[0]
    for node in found:
        if (_taste(nodes.placement, free[node]), node) < (_taste(nodes.placement, free[best]), best):
            best = node
    return at, 1 << best, best, free[best] - gpus


def _taste(placement: int, free: int) -> int:
    if placement == BEST_FIT:
        return free
    return -free if placement == WORST_FIT else 0


def on_several(
    gpus: int, now: int, ends: Ends, gpus_of: list[int], nodes: Nodes, node_of: list[int], pieces: dict[int, Pieces]
) -> Promise:
    """Promise whole nodes, and one more for the remainder."""
    free = nodes.free.copy()
    position, count = 0, len(ends)
    while position < count:
        at = max(ends[position][0], now)
        while position < count and ends[position][0] <= at:
            job = ends[position][1]
            where = node_of[job]
            if where >= 0:
                free[where] += gpus_of[job]
            else:
                for node, amount in pieces[job]:
                    free[node] += amount
            position += 1
        found = _whole(gpus, nodes.per_node, free)
        if found is not None:
            return at, found[0], found[1], found[2]
    raise AssertionError(_NO_ROOM.format(gpus))


def _whole(gpus: int, per_node: int, free: list[int]) -> tuple[int, int, int] | None:
    """Return the nodes, the one with the remainder, and what that one leaves over; None: no room yet."""
    whole, rest = divmod(gpus, per_node)
    empty = [node for node, amount in enumerate(free) if amount == per_node]
    if len(empty) < whole:
        return None
    closed = 0
    for node in empty[:whole]:
        closed |= 1 << node
    if not rest:
        return closed, -1, 0
    best = -1
    for node, amount in enumerate(free):
        if amount >= rest and not closed >> node & 1 and (best < 0 or amount > free[best]):
            best = node
    return None if best < 0 else (closed | 1 << best, best, free[best] - rest)
