"""Ordering a Pod for a task: the same for single tasks, gangs and claimed room."""

from __future__ import annotations

from engine.commands import CreatePod, Notify
from engine.entities import Node, Task
from engine.resources import Demand, GpuGrant
from engine.tasks import TaskState
from engine.turn import Turn


def create_pod(
    turn: Turn, task: Task, node: Node, grants: tuple[GpuGrant, ...], demand: Demand, rank: int = 0, attempt: int = 0
) -> None:
    """Order a Pod for a task (or one member of it), and tell that the task is bound."""
    spec = task.spec
    number = turn.state.next_pod
    slots = 1 if task.alone and demand.gpus else spec.slots
    attempt = attempt or task.attempt + 1
    turn.order(CreatePod(number, node.name, spec.method, spec.model, grants, demand, slots, spec.req_no, attempt, rank))
    if rank == 0:
        turn.news(Notify(task.req_no, TaskState.BOUND, attempt, "", "", "", node.name, turn.now))
