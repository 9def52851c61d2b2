"""Making room: which idle Pods of which node must go so that a demand fits there."""

from __future__ import annotations

from collections.abc import Sequence

from engine.cluster import pick_gpus
from engine.commands import Notify, PrefetchModel, Room
from engine.entities import Node, Pod, Task
from engine.fit import Fit
from engine.kinds import RoomLine
from engine.reasons import Reason
from engine.resources import Demand, GpuGrant
from engine.tasks import TaskState
from engine.turn import Turn

MOST_NODES = 32
"""How many nodes are tried for one task."""
MOST_PODS = 8 * MOST_NODES
"""How many idle Pods are looked at for one task."""
FIRST_PODS = 8
"""How many of them are sorted out first: mostly one of them does."""


def claim(
    turn: Turn, task: Task, node: Node, grants: tuple[GpuGrant, ...], demand: Demand, pods: Sequence[Pod]
) -> None:
    """Claim room for a task; the Pods in it that are idle go at once, the others when their tasks have stopped."""
    room = Room(node.name, grants, demand, tuple(pod.number for pod in pods))
    turn.count(Reason.ROOM_CLAIMED)
    detail = f"room is being made on node {node.name}"
    turn.order(
        Notify(
            task.req_no,
            TaskState.PENDING,
            task.attempt,
            Reason.ROOM_CLAIMED,
            detail,
            "",
            node.name,
            turn.now,
            room=room,
        )
    )
    for pod in pods:
        if not pod.tasks:
            turn.delete(pod, Reason.ROOM)
    model = task.spec.model
    if model and model not in node.models:
        turn.order(PrefetchModel(node.name, model))


def make_room(turn: Turn, task: Task | None, line: RoomLine) -> tuple[Node, tuple[GpuGrant, ...], list[Pod]] | None:
    """Return a node, the devices and the idle Pods that must go; None when that makes no room."""
    idle_pods = turn.backlog.idle_pods
    tried: dict[int, None] = {}
    seen = 0
    for most in (FIRST_PODS, MOST_PODS):
        few = idle_pods.first_few(most)
        for pod in few[seen:]:
            node = pod.node
            if idle_pods.pays_for_load(pod, turn.now):
                continue
            if node.index in tried or (line.node >= 0 and node.index != line.node):
                continue
            if node.exclusive not in (None, task.group if task is not None else None) or (
                node.exclusive is not None and line.node < 0
            ):
                continue
            if len(tried) >= MOST_NODES:
                return None
            tried[node.index] = None
            found = _try_empty(turn, line, node) if line.fit.empty else _try_node(turn, line, node)
            if found is not None:
                return node, found[0], found[1]
        if len(few) < most:
            break
        seen = most
    return None


def _try_node(turn: Turn, line: RoomLine, node: Node) -> tuple[tuple[GpuGrant, ...], list[Pod]] | None:
    cluster, demand = turn.state.cluster, line.fit.demand
    idle_pods = turn.backlog.idle_pods
    idle = [
        pod for pod in node.pods.values() if pod.number in idle_pods.pods and not idle_pods.pays_for_load(pod, turn.now)
    ]
    idle.sort(key=idle_pods.order)
    victims: list[Pod] = []
    grants: tuple[GpuGrant, ...] | None = None
    for pod in idle:
        if turn.is_kept(pod, victims):
            continue
        cluster.suppose(node, pod.grants, pod.demand, 1)
        victims.append(pod)
        if line.fit.fits(node):
            for spare in list(victims):
                cluster.suppose(node, spare.grants, spare.demand, -1)
                if line.fit.fits(node):
                    victims.remove(spare)
                else:
                    cluster.suppose(node, spare.grants, spare.demand, 1)
            grants = pick_gpus(node, demand)
            break
    for pod in victims:
        cluster.suppose(node, pod.grants, pod.demand, -1)
    return None if grants is None else (grants, victims)


def _try_empty(turn: Turn, line: RoomLine, node: Node) -> tuple[tuple[GpuGrant, ...], list[Pod]] | None:
    """Let every Pod of a node go, if all of them are idle, for a group that wants the node for itself."""
    victims = list(node.pods.values())
    if any(p.number not in turn.backlog.idle or turn.is_kept(p, [v for v in victims if v is not p]) for p in victims):
        return None
    cluster = turn.state.cluster
    for pod in victims:
        cluster.suppose(node, pod.grants, pod.demand, 1)
    grants = pick_gpus(node, line.fit.demand) if line.fit.fits(node) else None
    for pod in victims:
        cluster.suppose(node, pod.grants, pod.demand, -1)
    return None if grants is None else (grants, victims)


def has_room(turn: Turn, node: Node, fit: Fit, count: int) -> bool:
    """Tell whether a node's plain values have room for `count` Pods of a demand."""
    return room_for(turn, node, fit, count) == count


def room_for(turn: Turn, node: Node, fit: Fit, most: int) -> int:
    """Return for how many Pods of a demand, at most `most`, a node's plain values have room."""
    cluster = turn.state.cluster
    taken: list[tuple[GpuGrant, ...]] = []
    while len(taken) < most and fit.fits(node):
        grants = fit.grants(node)
        assert grants is not None
        cluster.suppose(node, grants, fit.demand, -1)
        taken.append(grants)
    for grants in taken:
        cluster.suppose(node, grants, fit.demand, 1)
    return len(taken)
