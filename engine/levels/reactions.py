"""What follows from the facts of a step: the agenda that the fold wrote, and whatever is due by now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine import agenda
from engine.commands import DeletePod, StartTask
from engine.entities import Claim, Node, Pod, Task
from engine.levels import fleet
from engine.levels.admission import admit
from engine.levels.creation import create_pod
from engine.levels.ordering import AGED, ORDINARY
from engine.levels.unloading import unload
from engine.making import notify
from engine.reasons import Reason
from engine.states import FINISHED, PENDING, RUNNING
from engine.stopping import stop
from engine.tasks import LAST_ATTEMPT, NEVER, NOT_RETRYABLE, Affinity, FailureCause, Micros, PodState, TaskState
from engine.turn import Turn

_STARTED = (TaskState.STARTING, TaskState.RUNNING)


def work_off(turn: Turn) -> None:
    """Work off the agenda in the order of the facts; what it calls for may add to it."""
    items = turn.state.agenda
    index = 0
    while index < len(items):
        code, item = items[index]
        index += 1
        REACTIONS[code](turn, item)
    items.clear()


def work_off_due(turn: Turn) -> None:
    """Look at every task and Pod that is due."""
    backlog = turn.backlog
    backlog.promote(turn.now)
    for item in backlog.timers.take_due(turn.now):
        if isinstance(item, Task):
            _task_due(turn, item)
        else:
            _pod_due(turn, item)
    if backlog.overdue:
        _let_idle_go(turn)
    if turn.state.agenda:
        work_off(turn)


def _let_idle_go(turn: Turn) -> None:
    """Let Pods go that have been idle for too long; those that a deployment keeps are looked at again in every step."""
    if turn.profile.warm_ahead and fleet.is_fresh(turn):
        return  # Who goes is decided with the forecast, when capacity is checked.
    overdue = turn.backlog.overdue
    for number in sorted(overdue):
        pod = overdue[number]
        if pod.tasks or pod.state not in (PodState.READY, PodState.IDLE):
            del overdue[number]
        elif pod.idle_since + turn.limits.idle_ttl_us > turn.now:
            del overdue[number]
            turn.backlog.timers.watch_pod(pod, pod.idle_since + turn.limits.idle_ttl_us)
        elif not turn.is_kept(pod):
            del overdue[number]
            turn.delete(pod, Reason.IDLE)


def _submitted(turn: Turn, task: Task) -> None:
    if not task.admitted and task.state is PENDING:
        admit(turn, task)


def _cancel(turn: Turn, task: Task) -> None:
    if task.state in (TaskState.PENDING, TaskState.BACKOFF, TaskState.BOUND):
        turn.tell(task, TaskState.CANCELLED, Reason.CANCELLED)
    elif task.state in _STARTED or task.state is TaskState.STOPPING:
        stop(turn, task, Reason.CANCELLED)


def _ended(turn: Turn, task: Task) -> None:
    """Decide what follows an attempt without a result: cancelled, again at once, again later, or dead."""
    if task.state is not TaskState.BACKOFF or task.retry_at is not None:
        return
    if task.cancel_requested:
        turn.tell(task, TaskState.CANCELLED, Reason.CANCELLED)
        return
    if _is_too_late(turn, task):
        turn.tell(task, TaskState.DEAD, Reason.START_DEADLINE, "it had not started by its start deadline")
        return
    if task.stop_reason == Reason.PREEMPTED and task.cause is None:
        turn.tell(task, TaskState.PENDING, Reason.PREEMPTED)
        return
    cause = task.cause or (FailureCause.TIMED_OUT if task.stop_reason == Reason.RUN_LIMIT else FailureCause.CRASHED)
    why = f"{cause}: {task.detail}" if task.detail else str(cause)
    if cause in NOT_RETRYABLE:
        turn.tell(task, TaskState.DEAD, Reason.NOT_RETRYABLE, why)
        return
    attempts = min(task.spec.max_attempts, turn.limits.attempts, LAST_ATTEMPT.get(cause, turn.limits.attempts))
    if task.failures + 1 >= attempts:
        turn.tell(task, TaskState.DEAD, Reason.ATTEMPTS_USED, f"in the last of {attempts} attempts: {why}")
        return
    wait = min(turn.limits.backoff_us << min(task.failures, 40), turn.limits.backoff_cap_us)
    turn.tell(task, TaskState.BACKOFF, Reason.RETRY, why, turn.now + wait)


def _pod_started(turn: Turn, pod: Pod) -> None:
    """Start the tasks that waited for a Pod; where a gang waits for others as well, it goes on waiting."""
    if pod.state is PodState.GONE:
        return
    usable = pod.usable
    for req_no in list(pod.tasks):
        task = turn.state.tasks[req_no]
        if task.state is not TaskState.BOUND:
            continue
        if not usable:
            turn.tell(task, TaskState.PENDING, Reason.DRAINED)
            continue
        pods = [turn.state.pods[number] for number in task.pods if number]
        if len(pods) < task.spec.members or any(p.state is PodState.CREATING for p in pods):
            continue
        if task.spec.members == 1 and _hand_over(turn, pod, task):
            continue
        for rank, each in enumerate(pods):
            turn.order(StartTask(req_no, task.attempt, each.number, each.node.name, rank, task.checkpoint))
    if not usable and not pod.tasks:
        turn.delete(pod, Reason.DRAINED)


def _hand_over(turn: Turn, pod: Pod, task: Task) -> bool:
    """Let an urgent task have the slot that an ordinary one waited for: to start that one would be to stop it at once."""
    if turn.profile.ordering.rank(task, turn.now)[0] != ORDINARY:
        return False
    urgent = turn.backlog.next_for(pod, AGED)
    if urgent is None:
        return False
    turn.tell(task, TaskState.PENDING, Reason.OUTRANKED, f"{urgent.req_no} is urgent and takes the slot")
    turn.order(StartTask(urgent.req_no, urgent.attempt + 1, pod.number, pod.node.name, 0, urgent.checkpoint))
    return True


def _doomed(turn: Turn, pod: Pod) -> None:
    turn.delete(pod, Reason.GPU_LOST)


def _stop_rest(turn: Turn, task: Task) -> None:
    if task.state in _STARTED:
        stop(turn, task, Reason.GANG_FAILED)


def _running(turn: Turn, task: Task) -> None:
    pod = turn.state.pods.get(task.pods[0]) if task.pods else None
    node = pod.node.name if pod is not None else ""
    turn.news(notify(task.req_no, RUNNING, task.attempt, turn.now, node=node))


def _capacity(turn: Turn, _: object) -> None:
    turn.check_capacity = True


def _finished(turn: Turn, task: Task) -> None:
    turn.news(notify(task.req_no, FINISHED, task.attempt, turn.now, result=task.result))


def _orphan(turn: Turn, number: int) -> None:
    turn.count(Reason.UNKNOWN_POD)
    turn.order(DeletePod(number, Reason.UNKNOWN_POD))


def _roomy(turn: Turn, claim: Claim) -> None:
    """Use claimed room once it is free, if the node and the devices are still good for it."""
    state = turn.state
    if state.claims.get(claim.req_no) is not claim or claim.waits_for:
        return
    task = state.tasks[claim.req_no]
    spoilt = task.spec.affinity is Affinity.EXCLUSIVE and claim.node.exclusive is None and claim.node.pods
    if spoilt or not claim_holds(claim):
        turn.tell(task, TaskState.PENDING, Reason.NODE_DOWN)
        return
    create_pod(turn, task, claim.node, claim.grants, claim.demand)


def claim_holds(claim: Claim) -> bool:
    """Tell whether claimed room may still be used."""
    node = claim.node
    if not node.up or node.draining:
        return False
    return all(grant.uuid in node.by_uuid and node.by_uuid[grant.uuid].open for grant in claim.grants)


def _node_changed(turn: Turn, node: Node) -> None:
    """Let idle Pods go that may not be used again, and drop claims that cannot be kept."""
    for claim in [c for c in turn.state.claims.values() if c.node is node and not claim_holds(c)]:
        turn.tell(turn.state.tasks[claim.req_no], TaskState.PENDING, Reason.NODE_DOWN)
    for pod in list(node.pods.values()):
        _pod_unused(turn, pod)


def _pod_unused(turn: Turn, pod: Pod) -> None:
    if not pod.tasks and not pod.usable and pod.state in (PodState.READY, PodState.IDLE):
        turn.delete(pod, Reason.ROOM if pod.claimed_by else Reason.DRAINED)


def _task_due(turn: Turn, task: Task) -> None:
    """Start a retry whose time has come; give a task up that has not started in time."""
    if task.req_no in turn.state.terminal:
        return
    waits = task.state in (TaskState.PENDING, TaskState.BACKOFF, TaskState.BOUND)
    if waits and _is_too_late(turn, task):
        turn.tell(task, TaskState.DEAD, Reason.START_DEADLINE, "it had not started by its start deadline")
    elif task.state is TaskState.BACKOFF and task.retry_at is not None and task.retry_at <= turn.now:
        turn.tell(task, TaskState.PENDING, Reason.RETRY)


def _is_too_late(turn: Turn, task: Task) -> bool:
    """Tell whether a task missed its start deadline; one that started once has kept it, whatever became of that attempt."""
    return task.deadline is not None and task.deadline <= turn.now and not task.began_at


def _pod_due(turn: Turn, pod: Pod) -> None:
    """Look at a Pod: is it late, is a task in it late, is it idle for too long? Then say when to look again."""
    pod.check_at = NEVER
    now, limits, state = turn.now, turn.limits, turn.state
    if pod.state is PodState.GONE or pod.state is PodState.STOPPING:
        return
    due: list[Micros] = []
    if pod.state is PodState.CREATING:
        due.append(pod.created_at + limits.pod_start_us)
    elif not pod.tasks:
        if pod.idle_since + limits.idle_ttl_us <= now:
            turn.backlog.overdue[pod.number] = pod
        else:
            due.append(pod.idle_since + limits.idle_ttl_us)
    for req_no in list(pod.tasks):
        task = state.tasks[req_no]
        if task.state is TaskState.STARTING:
            due.append(task.ordered_at + limits.start_us)
        elif task.state is TaskState.STOPPING:
            grace = limits.grace_us if task.stop_reason == Reason.PREEMPTED else 0
            due.append(task.stopping_since + grace + limits.stop_us)
        elif task.state is TaskState.RUNNING and task.spec.run_limit_us is not None:
            at = task.started_at + task.spec.run_limit_us
            if at <= now:
                stop(turn, task, Reason.RUN_LIMIT)
                due.append(now + limits.stop_us)
            else:
                due.append(at)
    if due and min(due) <= now:
        turn.delete(pod, Reason.UNRESPONSIVE)
    elif due:
        turn.backlog.timers.watch_pod(pod, min(due))


REACTIONS: dict[int, Callable[[Turn, Any], None]] = {
    agenda.SUBMITTED: _submitted,
    agenda.CANCEL: _cancel,
    agenda.ENDED: _ended,
    agenda.POD_STARTED: _pod_started,
    agenda.DOOMED: _doomed,
    agenda.STOP_REST: _stop_rest,
    agenda.RUNNING: _running,
    agenda.FINISHED: _finished,
    agenda.ORPHAN: _orphan,
    agenda.ROOMY: _roomy,
    agenda.NODE_CHANGED: _node_changed,
    agenda.POD_UNUSED: _pod_unused,
    agenda.CAPACITY: _capacity,
    agenda.UNLOAD: unload,
}
