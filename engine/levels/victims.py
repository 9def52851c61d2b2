"""What both ways of preemption share: who is placed, what stopping costs, whose Pods must go so that a demand fits."""

from __future__ import annotations

from collections.abc import Iterator

from engine.entities import Node, Pod, Task
from engine.kinds import RoomLine
from engine.resources import GpuGrant
from engine.tasks import NEVER, Micros, TaskType
from engine.turn import Turn


def placed(turn: Turn) -> Iterator[Task]:
    """Yield the tasks in Pods; a gang once per member."""
    tasks = turn.state.tasks
    for pod in turn.state.pods.values():
        for req_no in pod.tasks:
            yield tasks[req_no]


def loss_of(turn: Turn, task: Task) -> Micros:
    """Return what stopping a task loses: its work so far unless it keeps a checkpoint, and loading its model again."""
    lost = turn.now - task.started_at if task.started_at and task.spec.task_type is TaskType.GC else 0
    return lost + turn.profile.reload_us


def look_again(turn: Turn, task: Task, young_at: Micros) -> None:
    """Ask for a step when the first of the attempts that are too young to be stopped is old enough."""
    backlog = turn.backlog
    if young_at != NEVER and not turn.now < backlog.young_at <= young_at:
        backlog.young_at = young_at
        backlog.task_due(task, young_at)


def room_plan(
    turn: Turn, line: RoomLine, node: Node, found: list[tuple[int, Task, Pod]]
) -> tuple[tuple[GpuGrant, ...], list[Pod]] | None:
    """Return the devices and the Pods that must go, idle ones first, then the cheapest victims."""
    cluster = turn.state.cluster
    idle = [pod for pod in node.pods.values() if pod.number in turn.backlog.idle and not turn.is_kept(pod)]
    gone: list[Pod] = []
    grants: tuple[GpuGrant, ...] | None = None
    for pod in [*sorted(idle, key=lambda pod: (pod.idle_since, pod.number)), *(pod for _, _, pod in found)]:
        cluster.suppose(node, pod.grants, pod.demand, 1)
        gone.append(pod)
        if line.fit.fits(node):
            for spare in list(reversed(gone)):
                cluster.suppose(node, spare.grants, spare.demand, -1)
                if line.fit.fits(node):
                    gone.remove(spare)
                else:
                    cluster.suppose(node, spare.grants, spare.demand, 1)
            grants = line.fit.grants(node)
            break
    for pod in gone:
        cluster.suppose(node, pod.grants, pod.demand, -1)
    return None if grants is None else (grants, gone)
