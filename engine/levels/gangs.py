"""Gangs: several Pods of one task that start together or not at all."""

from __future__ import annotations

from engine.backlog import RoomLine, Shape
from engine.cluster import pick_gpus
from engine.commands import Notify, StartTask
from engine.entities import Node, Pod, Task
from engine.levels.creation import create_pod
from engine.resources import GpuGrant
from engine.tasks import PodState, TaskState
from engine.turn import Turn


def place_gang(turn: Turn, line: RoomLine, task: Task, shape: Shape) -> bool:
    """Place all members of a gang, in warm Pods where there are some; place none when one finds no room."""
    warm = _warm_pods(turn, line, task, shape)
    places = _new_places(turn, line, task, task.spec.members - len(warm))
    if places is None:
        return False
    attempt = task.attempt + 1
    if not places and all(pod.state is not PodState.CREATING for pod in warm):
        for rank, pod in enumerate(warm):
            turn.order(StartTask(task.req_no, attempt, pod.number, pod.node.name, rank, task.checkpoint))
        return True
    for rank, pod in enumerate(warm):
        turn.order(
            Notify(
                task.req_no, TaskState.BOUND, attempt, "", "", "", pod.node.name, turn.now, pod=pod.number, rank=rank
            )
        )
    for rank, (node, grants) in enumerate(places, start=len(warm)):
        create_pod(turn, task, node, grants, shape.demand, rank, attempt)
    return True


def _warm_pods(turn: Turn, line: RoomLine, task: Task, shape: Shape) -> list[Pod]:
    if not turn.profile.warm_reuse or line.fit.empty:
        return []
    found = []
    for warm in shape.kind.sets:
        if warm.cap >= shape.need:
            for row, pods in warm.by_node.items():
                if line.node in (-1, row):
                    found += [pod for pod in pods.values() if pod.node.exclusive in (None, task.group)]
    found.sort(key=lambda pod: (pod.state is PodState.CREATING, pod.offered, pod.number))
    return found[: task.spec.members]


def _new_places(turn: Turn, line: RoomLine, task: Task, members: int) -> list[tuple[Node, tuple[GpuGrant, ...]]] | None:
    """Try the members out one after the other; everything is given back in the end, the orders take it again."""
    cluster, fit = turn.state.cluster, line.fit
    version = cluster.version
    places: list[tuple[Node, tuple[GpuGrant, ...]]] | None = []
    with cluster.trial():
        for _ in range(members):
            node: Node | None
            if line.node >= 0:
                node = cluster.nodes[line.node]
                if node.exclusive not in (None, task.group) or not fit.fits(node):
                    node = None
            elif fit.empty and places:
                node = places[0][0] if fit.fits(places[0][0]) else None
            else:
                node = fit.best()
            grants = pick_gpus(node, fit.demand) if node is not None else None
            if node is None or grants is None:
                places = None
                break
            cluster.take(node, grants, fit.demand)
            places.append((node, grants))  # type: ignore[union-attr]
    cluster.version = version
    return places
