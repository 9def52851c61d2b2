"""Making room: which idle Pods of which node must go so that a demand fits there."""

from __future__ import annotations

from engine.backlog import RoomLine
from engine.cluster import pick_gpus
from engine.entities import Node, Pod, Task
from engine.resources import GpuGrant
from engine.turn import Turn

MOST_NODES = 32
"""How many nodes are tried for one task."""


def make_room(turn: Turn, task: Task, line: RoomLine) -> tuple[Node, tuple[GpuGrant, ...], list[Pod]] | None:
    """Return a node, the devices and the idle Pods that must go, those idle longest first; None when that makes no room."""
    backlog = turn.backlog
    tried: dict[int, None] = {}
    for pod in backlog.oldest_idle():
        node = pod.node
        if node.index in tried or (line.node >= 0 and node.index != line.node):
            continue
        if node.exclusive not in (None, task.group) or (node.exclusive is not None and line.node < 0):
            continue
        if len(tried) >= MOST_NODES:
            return None
        tried[node.index] = None
        found = _try_empty(turn, line, node) if line.fit.empty else _try_node(turn, line, node)
        if found is not None:
            return node, found[0], found[1]
    return None


def _try_node(turn: Turn, line: RoomLine, node: Node) -> tuple[tuple[GpuGrant, ...], list[Pod]] | None:
    cluster, demand = turn.state.cluster, line.fit.demand
    version = cluster.version
    idle = sorted(
        (p for p in node.pods.values() if p.number in turn.backlog.idle), key=lambda p: (p.idle_since, p.number)
    )
    victims: list[Pod] = []
    grants: tuple[GpuGrant, ...] | None = None
    for pod in idle:
        if turn.is_kept(pod, victims):
            continue
        cluster.release(node, pod.grants, pod.demand)
        victims.append(pod)
        if line.fit.fits(node):
            for spare in list(victims):
                cluster.take(node, spare.grants, spare.demand)
                if line.fit.fits(node):
                    victims.remove(spare)
                else:
                    cluster.release(node, spare.grants, spare.demand)
            grants = pick_gpus(node, demand)
            break
    for pod in victims:
        cluster.take(node, pod.grants, pod.demand)
    cluster.version = version
    return None if grants is None else (grants, victims)


def _try_empty(turn: Turn, line: RoomLine, node: Node) -> tuple[tuple[GpuGrant, ...], list[Pod]] | None:
    """Let every Pod of a node go, if all of them are idle, for a group that wants the node for itself."""
    victims = list(node.pods.values())
    if any(p.number not in turn.backlog.idle or turn.is_kept(p, [v for v in victims if v is not p]) for p in victims):
        return None
    cluster = turn.state.cluster
    version = cluster.version
    for pod in victims:
        cluster.release(node, pod.grants, pod.demand)
    grants = pick_gpus(node, line.fit.demand) if line.fit.fits(node) else None
    for pod in victims:
        cluster.take(node, pod.grants, pod.demand)
    cluster.version = version
    return None if grants is None else (grants, victims)
