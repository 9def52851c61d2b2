"""Ordering attempts to stop: for cancels, run limits, preemption and broken gangs alike."""

from __future__ import annotations

from engine.commands import StopTask
from engine.entities import Task
from engine.reasons import Reason
from engine.turn import Turn


def stop(turn: Turn, task: Task, reason: Reason, keep_checkpoint: bool = False) -> None:
    """Stop every member of a task's attempt that has not ended."""
    grace = turn.limits.grace_us if keep_checkpoint else 0
    turn.count(reason)
    for rank, number in enumerate(task.pods):
        if task.live >> rank & 1:
            node = turn.state.pods[number].node.name
            turn.order(StopTask(task.req_no, task.attempt, number, node, rank, grace, reason, keep_checkpoint))
