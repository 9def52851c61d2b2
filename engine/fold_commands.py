"""How each command changes the state: an order is taken for begun the moment it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from engine.commands import (
    CreatePod,
    DeletePod,
    Notify,
    PrefetchModel,
    ReleaseModel,
    Room,
    ScaleNodes,
    StartTask,
    StopTask,
)
from engine.entities import Claim, Node, Pod, Task
from engine.fold_tasks import (
    begin_attempt,
    bind_rank,
    count_pending,
    drop_claim,
    leave_for_good,
    move,
    release_ranks,
    settle,
    unplace,
)
from engine.lifecycle import PodCause, TaskCause, next_pod_state
from engine.reasons import Reason
from engine.states import (
    ADMIT,
    BACK_OFF,
    BACKOFF,
    BIND,
    BOUND,
    CANCEL,
    CANCELLED,
    DEAD,
    DIE,
    FINISHED,
    ORDER_START,
    PENDING,
    REJECT,
    REJECTED,
    REQUEUE,
    RUNNING,
)
from engine.tasks import Micros, TaskState

if TYPE_CHECKING:
    from engine.state import State


def create_pod(state: State, now: Micros, c: CreatePod) -> None:
    """A Pod exists and holds its devices from the order on."""
    node = state.cluster.by_name[c.node]
    pod = Pod(c.pod, node, c.method, c.model, c.slots, c.demand, c.grants)
    pod.created_at = now
    state.next_pod = max(state.next_pod, c.pod + 1)
    task = state.tasks.get(c.req_no) if c.req_no else None
    if task is not None and task.state is TaskState.PENDING:
        begin_attempt(state, task, c.attempt)
    state.pods[c.pod] = pod
    node.pods[c.pod] = pod
    state.cluster.take(node, c.grants, c.demand)
    tiers = node.tiers
    if tiers is not None:
        pod.loads_from = tiers.get(c.model, 0)
    _expect(state, node, c.model, now)
    state.watch.check_pod(pod, now + state.limits.pod_start_us)
    if task is not None:
        move(task, TaskCause.BIND)
        bind_rank(state, task, pod, c.rank)
    else:
        state.watch.pod_changed(pod)


def delete_pod(state: State, now: Micros, c: DeletePod) -> None:
    """A Pod takes no task any more; what it holds stays taken until it is gone."""
    pod = state.pods.get(c.pod)
    if pod is None:
        return
    pod.state = next_pod_state(pod.state, PodCause.DELETE)
    pod.reason = c.reason
    pod.stopping_since = now
    state.watch.pod_changed(pod)


def start_task(state: State, now: Micros, c: StartTask) -> None:
    """An attempt (or one member of it) is on its way to its Pod."""
    start_in(state, now, c, state.tasks[c.req_no], state.pods[c.pod])


def start_in(state: State, now: Micros, c: StartTask, task: Task, pod: Pod) -> None:
    """As `start_task`, where its task and Pod are at hand."""
    if task.state is PENDING:
        begin_attempt(state, task, c.attempt)
    move(task, ORDER_START)
    if not task.pods[c.rank]:
        bind_rank(state, task, pod, c.rank)
    task.live |= 1 << c.rank
    task.ordered_at = now
    if pod.check_at > now + state.limits.start_us:
        state.watch.check_pod(pod, now + state.limits.start_us)


def stop_task(state: State, now: Micros, c: StopTask) -> None:
    """An attempt was told to stop; its slot stays taken until it has."""
    task = state.tasks[c.req_no]
    move(task, TaskCause.ORDER_STOP)
    if not task.stop_reason:
        task.stop_reason = c.reason
    task.stopping_since = now
    state.watch.check_pod(state.pods[c.pod], now + c.grace_us + state.limits.stop_us)


def prefetch_model(state: State, now: Micros, c: PrefetchModel) -> None:
    """A node will soon have the model in its cache."""
    node = state.cluster.by_name[c.node]
    _expect(state, node, c.model, now)
    if c.pin:
        state.cluster.pin_model(node, c.model)


def release_model(state: State, now: Micros, c: ReleaseModel) -> None:
    """A node's cache may evict the model, or has to."""
    node = state.cluster.by_name[c.node]
    state.cluster.unpin_model(node, c.model)
    if c.drop and not any(pod.model == c.model for pod in node.pods.values()):
        state.cluster.forget_model(node, c.model)


def _expect(state: State, node: Node, model: str, now: Micros) -> None:
    """Take a model for cached on a node from the order on."""
    if model and node.tiers is not None and model not in node.tiers:
        node.expected[model] = now
    state.cluster.remember_model(node, model, state.limits.models_per_node)


def scale_nodes(state: State, now: Micros, c: ScaleNodes) -> None:
    """The number of nodes asked for."""
    if c.nodes > state.wanted_nodes:
        state.fleet.note_asked(now, c.nodes)
    state.wanted_nodes = c.nodes


def pend(state: State, now: Micros, c: Notify, task: Task) -> None:
    """As `notify` of PENDING, where its task is at hand."""
    if c.room is not None:
        _claim(state, task, c.room)
        return
    if task.state is BOUND:
        move(task, REQUEUE)
        release_ranks(state, task, now)
        settle(task, 0)
        unplace(state, task)
        count_pending(state, task)
    elif task.state is BACKOFF:
        move(task, REQUEUE)
        task.retry_at = None
        if c.reason == Reason.PREEMPTED:
            task.preemptions += 1
    elif not task.admitted:
        move(task, ADMIT)
        task.admitted = True
        count_pending(state, task)
        if task.deadline is not None:
            state.watch.task_due(task, task.deadline)
    else:
        drop_claim(state, state.claims[task.req_no])
    task.pending_since = now
    state.watch.waits(task)


def _claim(state: State, task: Task, room: Room) -> None:
    node = state.cluster.by_name[room.node]
    claim = Claim(task.req_no, node, room.grants, room.demand)
    state.placed += 1
    state.watch.leaves(task)
    state.claims[task.req_no] = claim
    state.cluster.take(node, room.grants, room.demand)
    for number in room.pods:
        pod = state.pods[number]
        claim.waits_for[number] = None
        pod.claimed_by = task.req_no
        state.watch.pod_changed(pod)


def notify(state: State, now: Micros, c: Notify) -> None:
    """Decisions about a task that need no other order are made by telling them; the rest is news only."""
    told = c.state
    if told is FINISHED or told is RUNNING:
        return
    task = state.tasks[c.req_no]
    if told is PENDING:
        pend(state, now, c, task)
    elif told is BOUND and c.pod:
        if task.state is PENDING:
            begin_attempt(state, task, c.attempt)
        move(task, BIND)
        bind_rank(state, task, state.pods[c.pod], c.rank)
    elif told is BACKOFF:
        move(task, BACK_OFF)
        task.failures += 1
        task.retry_at = c.until
        state.watch.task_due(task, c.until)
    elif told is CANCELLED:
        leave_for_good(state, task, now, CANCEL)
    elif told is DEAD:
        leave_for_good(state, task, now, DIE)
    elif told is REJECTED:
        state.outcomes[f"rejected {c.reason}"] = state.outcomes.get(f"rejected {c.reason}", 0) + 1
        leave_for_good(state, task, now, REJECT)


COMMAND_FOLDS: dict[type, Callable[[State, Micros, Any], None]] = {
    CreatePod: create_pod,
    DeletePod: delete_pod,
    StartTask: start_task,
    StopTask: stop_task,
    PrefetchModel: prefetch_model,
    ReleaseModel: release_model,
    ScaleNodes: scale_nodes,
    Notify: notify,
}
