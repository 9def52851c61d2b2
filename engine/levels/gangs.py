"""Gangs: several Pods of one task that start together or not at all."""

from __future__ import annotations

from engine.commands import Notify, StartTask
from engine.entities import Node, Pod, Task
from engine.fit import places_on
from engine.kinds import RoomLine, Shape
from engine.levels.creation import create_pod
from engine.levels.reservations import Plan
from engine.levels.room import room_for
from engine.levels.topology import close_together
from engine.resources import GpuGrant
from engine.tasks import Affinity, Micros, PodState, TaskState
from engine.turn import Turn

Places = list[tuple[Node, tuple[GpuGrant, ...]]]


def place_gang(turn: Turn, line: RoomLine, task: Task, shape: Shape) -> bool:
    """Place all members of a gang, in warm Pods where there are some; place none when one finds no room."""
    warm = _warm_pods(turn, line, task, shape)
    places = _new_places(turn, line, task, task.spec.members - len(warm))
    if places is None:
        return False
    _begin(turn, task, shape, warm, places)
    return True


def _begin(turn: Turn, task: Task, shape: Shape, warm: list[Pod], places: Places) -> None:
    """Start a gang in warm Pods, or bind it to them and to those that are created."""
    attempt = task.attempt + 1
    if not places and all(pod.state is not PodState.CREATING for pod in warm):
        for rank, pod in enumerate(warm):
            turn.order(StartTask(task.req_no, attempt, pod.number, pod.node.name, rank, task.checkpoint))
        return
    for rank, pod in enumerate(warm):
        turn.order(
            Notify(
                task.req_no, TaskState.BOUND, attempt, "", "", "", pod.node.name, turn.now, pod=pod.number, rank=rank
            )
        )
    for rank, (node, grants) in enumerate(places, start=len(warm)):
        create_pod(turn, task, node, grants, shape.demand, rank, attempt)


def place_gang_within(turn: Turn, line: RoomLine, task: Task, shape: Shape, plan: Plan, run_us: Micros) -> bool:
    """Place a gang as `place_gang` does, on nodes where it delays no reservation."""
    warm = [pod for pod in _warm_pods(turn, line, task, shape) if pod.node.index not in plan.rows]
    version = turn.state.cluster.version
    places = _allowed_places(turn, line, task, task.spec.members - len(warm), plan, run_us)
    turn.state.cluster.version = version
    if places is None:
        return False
    _begin(turn, task, shape, warm, places)
    for pod in warm:
        plan.changed(pod.node)
    for node, _ in places:
        plan.changed(node)
    return True


def _allowed_places(turn: Turn, line: RoomLine, task: Task, members: int, plan: Plan, run_us: Micros) -> Places | None:
    cluster, fit, group = turn.state.cluster, line.fit, task.group
    fit.refresh()
    rows = [row for row, score in enumerate(fit.scores.tolist()) if score >= 0] if line.node < 0 else [line.node]
    rows.sort(key=lambda row: (-int(fit.scores[row]), row))
    one = line.node >= 0 or (group is not None and task.spec.affinity in (Affinity.STRICT, Affinity.EXCLUSIVE))
    places: Places = []
    for row in rows:
        node = cluster.nodes[row]
        if node.exclusive not in (None, group):
            continue
        most = 1 if fit.empty else members - len(places)
        count = room_for(turn, node, fit, most)
        while count and not plan.allows(node, fit, count, run_us):
            count -= 1
        if one and count < members:
            continue
        with cluster.trial():
            for _ in range(count):
                grants = fit.grants(node)
                assert grants is not None
                cluster.take(node, grants, fit.demand)
                places.append((node, grants))
        if len(places) == members:
            return places
    return places if len(places) == members else None  # none may be needed


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


def _new_places(turn: Turn, line: RoomLine, task: Task, members: int) -> Places | None:
    """Return a place for each of the members, or None. Whatever is tried out is given back; the orders take it again."""
    cluster, group = turn.state.cluster, task.group
    version = cluster.version
    if line.node >= 0:
        node = cluster.nodes[line.node]
        places = _on_one(turn, line, node, members) if node.exclusive in (None, group) else None
    elif group is not None and task.spec.affinity in (Affinity.STRICT, Affinity.EXCLUSIVE):
        places = _together(turn, line, members)
    else:
        places = close_together(turn, line, members) if turn.profile.compact_gangs and members else None
        if places is None:
            places = _anywhere(turn, line, task, members)
    cluster.version = version
    return places


def _on_one(turn: Turn, line: RoomLine, node: Node, members: int) -> Places | None:
    """Place all members on one node."""
    cluster, fit = turn.state.cluster, line.fit
    places: Places = []
    with cluster.trial():
        for _ in range(members):
            grants = fit.grants(node) if fit.fits(node) else None
            if grants is None:
                return None
            cluster.take(node, grants, fit.demand)
            places.append((node, grants))
    return places


def _together(turn: Turn, line: RoomLine, members: int) -> Places | None:
    """Place all members on the best node that has room for all of them."""
    fit, cluster = line.fit, turn.state.cluster
    fit.refresh()
    rows = [row for row, score in enumerate(fit.scores.tolist()) if score >= 0]
    rows.sort(key=lambda row: (-int(fit.scores[row]), row))
    for row in rows:
        node = cluster.nodes[row]
        if places_on(cluster, node, fit.demand, members) >= members:
            places = _on_one(turn, line, node, members)
            if places is not None:
                return places
    return None


def _anywhere(turn: Turn, line: RoomLine, task: Task, members: int) -> Places | None:
    """Place each member on the best node that is left, and in the end on the node that its group has for itself."""
    cluster, fit, group = turn.state.cluster, line.fit, task.group
    places: Places = []
    with cluster.trial():
        for _ in range(members):
            node = fit.best(task.seq)
            if node is None and group is not None and group.node is not None and group.node.exclusive is group:
                node = group.node if fit.fits(group.node) else None
            grants = fit.grants(node) if node is not None else None
            if node is None or grants is None:
                return None
            cluster.take(node, grants, fit.demand)
            places.append((node, grants))
    return places
