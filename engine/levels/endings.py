"""When what is in Pods is expected to end: what reservations are made of.

A running task ends when its estimate says, and no later than its run limit allows; one that has outlived its estimate is expected
to need as long again as it overran. While nothing changes on a node, expected ends only move backwards.
"""

from __future__ import annotations

from engine.entities import Node, Pod, Task
from engine.resources import Demand, GpuGrant
from engine.tasks import NEVER, Micros, PodState, TaskState
from engine.turn import Turn

Release = tuple[Micros, int, tuple[GpuGrant, ...], Demand]
"""(when, number of the Pod, what becomes free then); a claim has the number 0."""


def run_of(task: Task) -> Micros:
    """Return how long a waiting task will run by its prediction, less what a checkpoint holds, at most its run limit."""
    left = max(1, task.predicted_us - task.kept_us)
    limit = task.spec.run_limit_us
    return left if limit is None else min(left, limit)


def releases(turn: Turn, node: Node) -> list[Release]:
    """Return what becomes free on a node and when, the soonest first."""
    state = turn.state
    found = [(ends_at(turn, pod), pod.number, pod.grants, pod.demand) for pod in node.pods.values()]
    for claim in state.claims.values():
        if claim.node is node:
            found.append((turn.now + run_of(state.tasks[claim.req_no]), 0, claim.grants, claim.demand))
    found.sort(key=_by_time)
    return found


def _by_time(release: Release) -> tuple[Micros, int]:
    return release[0], release[1]


def ends_at(turn: Turn, pod: Pod) -> Micros:
    """Return when a Pod is expected to be gone if nobody else uses it; NEVER for one that is kept."""
    soon = turn.now + 1
    if pod.state is PodState.STOPPING or pod.claimed_by:
        return soon
    if pod.tasks:
        tasks = turn.state.tasks
        return max([_task_ends_at(turn, tasks[req_no], pod) for req_no in pod.tasks])
    if turn.is_kept(pod):
        return NEVER
    if turn.profile.reclaim_idle:
        return soon
    return max(soon, max(pod.created_at, pod.idle_since) + turn.limits.idle_ttl_us)


def _task_ends_at(turn: Turn, task: Task, pod: Pod) -> Micros:
    now = turn.now
    if task.state is TaskState.STOPPING:
        return now + 1
    began = task.started_at or task.ordered_at or pod.created_at
    end = began + max(1, task.predicted_us - task.kept_us)
    if end <= now:
        end = now + max(1, now - end)
    limit = task.spec.run_limit_us
    if limit is not None:
        end = min(end, began + limit)
    return max(end, now + 1)
