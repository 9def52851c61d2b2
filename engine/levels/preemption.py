"""Level 5, preemption: stop ordinary work for urgent work, only when the gain is larger than the loss.

Gain: the waiting that an urgent task is saved, times its weight. Loss: the work that the stopped tasks lose, plus loading models
again. A training keeps its checkpoint and loses little; a generation starts over. Victims wait again, and no retry is used up. An
attempt that has hardly begun is let be for a while, and is never stopped in the step that ordered its start.
"""

from __future__ import annotations

from heapq import nsmallest

from engine.entities import Pod, Task
from engine.kinds import RoomLine, Shape
from engine.levels.by_rank import preempt_by_rank
from engine.levels.room import claim
from engine.levels.urgent_slots import let_urgent_in
from engine.levels.victims import look_again, loss_of, placed, room_plan
from engine.reasons import Reason
from engine.stopping import stop
from engine.tasks import NEVER, Micros, PodState, TaskState
from engine.turn import Turn

MOST_VICTIMS = 64
"""How many running tasks, the cheapest first, are considered in one step."""


def preempt(turn: Turn) -> None:
    """Let urgent tasks in beside others, stop tasks for those that outrank them, and ordinary ones for patient urgent ones."""
    let_urgent_in(turn)
    waiting = turn.backlog.waiting
    if waiting is not None and (turn.profile.ordering.preemptive or turn.profile.quotas is not None):
        preempt_by_rank(turn, waiting)
    if not turn.profile.preempt or not turn.backlog.urgent:
        return
    if turn.now < turn.backlog.preempt_at:
        _later(turn)
        return
    victims: list[tuple[int, int, Task]] | None = None
    young_at: Micros = NEVER
    left = turn.limits.preemptions_per_step
    lines = [
        line
        for line in turn.backlog.room_lines.values()
        if line.live
        and not line.active
        and line.members == 1
        and (head := line.head()) is not None
        and _may_preempt(turn, head[1])
    ]
    for line in sorted(lines, key=lambda line: line.key):
        while left > 0:
            head = line.head()
            if head is None or not _may_preempt(turn, head[1]):
                break
            if victims is None:
                victims, young_at = _victims(turn)
            stopped = _preempt_for(turn, head[1], line, victims)
            if not stopped:
                turn.backlog.preempt_at = turn.now + turn.limits.look_us
                look_again(turn, head[1], max(young_at, turn.backlog.preempt_at))
                break
            left -= stopped
            victims = [v for v in victims if v[2].state in (TaskState.RUNNING, TaskState.STARTING)]
            if head[1].line_ticket:
                break


def _later(turn: Turn) -> None:
    """See to it that there is a step when preemption may be thought about again."""
    backlog = turn.backlog
    if backlog.preempt_armed_for != backlog.preempt_at:
        for line in backlog.room_lines.values():
            head = line.head() if line.live and not line.active else None
            if head is not None and head[1].urgent:
                backlog.preempt_armed_for = backlog.preempt_at
                backlog.task_due(head[1], backlog.preempt_at)
                return


def _may_preempt(turn: Turn, task: Task) -> bool:
    return task.urgent and task.pending_since + turn.profile.preempt_patience_us <= turn.now


def _victims(turn: Turn) -> tuple[list[tuple[int, int, Task]], Micros]:
    """Return (loss, sequence number, task) of the tasks that may be stopped, the cheapest first, and when there will be more."""
    most, now = turn.limits.preemptions_per_task, turn.now
    least = max(turn.profile.min_run_us, 1)
    young_at = NEVER
    found: list[tuple[int, int, Task]] = []
    for task in placed(turn):
        state = task.state
        if (
            (state is TaskState.RUNNING or state is TaskState.STARTING)
            and not task.urgent
            and task.preemptions < most
            and task.spec.preemptible
            and task.spec.members == 1
            and not task.cancel_requested
        ):
            old_at = (task.started_at or task.ordered_at) + least
            if old_at > now:
                young_at = min(young_at, old_at)
            else:
                found.append((loss_of(turn, task), task.seq, task))
    return nsmallest(MOST_VICTIMS, found), young_at


def _remaining(turn: Turn, task: Task) -> Micros:
    """Return how long a task still runs by its prediction; one that has outlived it is taken to need a tenth more."""
    predicted = task.predicted_us
    elapsed = turn.now - task.started_at if task.started_at else 0
    return max(predicted - elapsed, predicted // 10)


def _preempt_for(turn: Turn, task: Task, line: RoomLine, victims: list[tuple[int, int, Task]]) -> int:
    """Stop what must go for one urgent task, if that pays; return how many tasks were stopped."""
    if not victims:
        return 0
    gain = min(_remaining(turn, each) for _, _, each in victims) * turn.profile.urgent_weight
    shape = task.shape
    pods = turn.state.pods
    for loss, _, victim in victims:
        pod = pods[victim.pods[0]]
        if (
            pod.warm.kind is not shape.kind
            or pod.warm.cap < shape.need
            or not pod.usable
            or line.node not in (-1, pod.node.index)
        ):
            continue
        if pod.node.exclusive not in (None, task.group) or line.fit.empty:
            continue
        if _is_freeing(turn, shape):
            return 0
        if loss >= gain:
            break
        stop(turn, victim, Reason.PREEMPTED, keep_checkpoint=True)
        return 1
    return _preempt_room(turn, task, line, victims, gain)


def _is_freeing(turn: Turn, shape: Shape) -> bool:
    """Tell whether a slot of this kind is being freed already."""
    return any(
        task.state is TaskState.STOPPING and task.stop_reason == Reason.PREEMPTED
        for task in placed(turn)
        if turn.state.pods[task.pods[0]].warm.kind is shape.kind
    )


def _preempt_room(turn: Turn, task: Task, line: RoomLine, victims: list[tuple[int, int, Task]], gain: int) -> int:
    """Claim the room of Pods on one node whose only tasks are victims, together with idle Pods there."""
    if line.fit.empty or len(turn.state.claims) >= turn.limits.claims:
        return 0
    by_node: dict[int, list[tuple[int, Task, Pod]]] = {}
    for loss, _, victim in victims:
        pod = turn.state.pods[victim.pods[0]]
        node = pod.node
        if len(pod.tasks) > 1 or not pod.usable or pod.state is not PodState.BUSY or line.node not in (-1, node.index):
            continue
        if node.exclusive not in (None, task.group) or (node.exclusive is not None and line.node < 0):
            continue
        by_node.setdefault(node.index, []).append((loss, victim, pod))
    for row, found in by_node.items():
        node = turn.state.cluster.nodes[row]
        plan = room_plan(turn, line, node, found)
        if plan is None or sum(loss for loss, _, pod in found if pod in plan[1]) >= gain:
            continue
        grants, gone = plan
        claim(turn, task, node, grants, line.fit.demand, gone)
        stopped = [victim for _, victim, pod in found if pod in gone]
        for victim in stopped:
            stop(turn, victim, Reason.PREEMPTED, keep_checkpoint=True)
        return len(stopped)
    return 0
