"""Ordering a Pod for a task: the same for single tasks, gangs and claimed room."""

from __future__ import annotations

from engine.backlog import Shape
from engine.commands import CreatePod, Notify
from engine.entities import Node, Task
from engine.resources import GpuGrant
from engine.tasks import TaskState
from engine.turn import Turn


def create_pod(
    turn: Turn, task: Task, node: Node, grants: tuple[GpuGrant, ...], shape: Shape, rank: int = 0, attempt: int = 0
) -> None:
    """Order a Pod for a task."""
    spec = task.spec
    turn.order(
        CreatePod(
            turn.state.next_pod,
            node.name,
            spec.method,
            spec.model,
            grants,
            shape.demand,
            shape.slots,
            task.req_no,
            attempt or task.attempt + 1,
            rank,
        )
    )
    if rank == 0:
        turn.order(Notify(task.req_no, TaskState.BOUND, task.attempt, "", "", "", node.name, turn.now))
