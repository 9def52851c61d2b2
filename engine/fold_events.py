"""How each event changes the state. Reports of old attempts, duplicates and unknown names change nothing and are counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from engine import agenda, capacity
from engine import events as ev
from engine.entities import Deployment, Gpu, Node, Pod, Task
from engine.errors import InvalidEvent
from engine.faults import GPU_FAULTS, forget_faults, note_fault, note_success, recall_faults, rest
from engine.fold_tasks import (
    end_attempt,
    end_rank,
    fail,
    forget_in_time,
    move,
    release_rank,
    revive_group,
    settle,
    unbind_group,
    unplace,
)
from engine.lifecycle import PodCause, TaskCause, next_pod_state
from engine.states import FINISH, START, STARTING
from engine.stock import learn_load, take_stock
from engine.tasks import FailureCause, Micros, PodState, TaskState

if TYPE_CHECKING:
    from engine.state import State

_ACTIVE = (TaskState.STARTING, TaskState.RUNNING, TaskState.STOPPING)


# --- customers --------------------------------------------------------------------------------------------------------


def task_submitted(state: State, now: Micros, e: ev.TaskSubmitted) -> None:
    """A new request, unless its reqNo is known."""
    if state.resting:
        end_rests(state, now)
    spec = e.task
    if spec.req_no in state.tasks:
        state.ignore(e)
        return
    tenant = state.tenant(spec.tenant)
    group = state.group(tenant, spec.group)
    task = Task(spec, state.next_seq, tenant, group, now, e.estimate)
    state.next_seq += 1
    state.tasks[spec.req_no] = task
    revive_group(state, task)
    state.agenda.append((agenda.SUBMITTED, task))


def cancel_requested(state: State, now: Micros, e: ev.TaskCancelRequested) -> None:
    """The result is not wanted any more; from here on none is delivered."""
    task = state.tasks.get(e.req_no)
    if task is None or task.cancel_requested or task.req_no in state.terminal:
        state.ignore(e)
        return
    task.cancel_requested = True
    state.agenda.append((agenda.CANCEL, task))


def task_estimated(state: State, now: Micros, e: ev.TaskEstimated) -> None:
    """A better estimate; a waiting task is put into its line anew."""
    task = state.tasks.get(e.req_no)
    if task is None or task.req_no in state.terminal:
        state.ignore(e)
        return
    waits = task.admitted and task.state is TaskState.PENDING and task.req_no not in state.claims
    if waits:
        state.watch.leaves(task)
    task.take_estimate(e.estimate)
    if waits:
        state.watch.waits(task)
    for number in task.pods:
        if number in state.pods:
            state.watch.pod_changed(state.pods[number])


def task_revived(state: State, now: Micros, e: ev.TaskRevived) -> None:
    """A dead task starts over, with its attempts given back and without its start deadline."""
    task = state.tasks.get(e.req_no)
    if task is None or task.state is not TaskState.DEAD:
        state.ignore(e)
        return
    del state.terminal[task.req_no]
    state.outcomes[TaskState.DEAD] -= 1
    move(task, TaskCause.REVIVE)
    task.failures = 0
    task.admitted = False
    task.deadline = None
    task.cancel_requested = False
    task.retry_at = None
    task.submitted_at = now
    task.group = state.group(task.tenant, task.spec.group)
    revive_group(state, task)
    state.agenda.append((agenda.SUBMITTED, task))


# --- operators --------------------------------------------------------------------------------------------------------


def tenant_configured(state: State, now: Micros, e: ev.TenantConfigured) -> None:
    """A tenant's weight and limits."""
    if e.weight < 1:
        raise InvalidEvent(f"TenantConfigured.weight: {e.weight} for {e.tenant!r}; use a whole number of at least 1")
    tenant = state.tenant(e.tenant)
    tenant.weight, tenant.max_pending, tenant.max_running = e.weight, e.max_pending, e.max_running
    state.watch.tenant_changed(tenant)


def model_deployed(state: State, now: Micros, e: ev.ModelDeployed) -> None:
    """Warm Pods are wanted for a model, maybe by a personalised one that shares them with others."""
    state.deployed += 1
    if e.adapter:
        state.deployments.pop((e.method, e.adapter), None)  # from when personalised models had Pods of their own
    known = state.deployments.get((e.method, e.model))
    wanted = {} if known is None else dict(known.wanted)
    wanted[e.adapter] = e.pods
    state.deployments[e.method, e.model] = Deployment(e.model, e.method, e.demand, e.slots, wanted)


def model_undeployed(state: State, now: Micros, e: ev.ModelUndeployed) -> None:
    """No warm Pod is kept for a model, unless others share them; those that are idle go in time."""
    known = state.deployments.get((e.method, e.model))
    if known is None or e.adapter not in known.wanted:
        if e.adapter and state.deployments.pop((e.method, e.adapter), None) is not None:
            state.deployed += 1  # from when personalised models had Pods of their own
        else:
            state.ignore(e)
        return
    state.deployed += 1
    wanted = dict(known.wanted)
    del wanted[e.adapter]
    if wanted:
        state.deployments[e.method, e.model] = Deployment(e.model, e.method, known.demand, known.slots, wanted)
    else:
        del state.deployments[e.method, e.model]


def drain_requested(state: State, now: Micros, e: ev.NodeDrainRequested) -> None:
    """Nothing new starts on the node or GPU; groups bound to a draining node go elsewhere."""
    if _set_drain(state, e, e.node, e.gpu, True) and e.gpu is None and not e.leaving:
        state.cluster.by_name[e.node].cordoned = True


def node_uncordoned(state: State, now: Micros, e: ev.NodeUncordoned) -> None:
    """The node or GPU takes work again."""
    if _set_drain(state, e, e.node, e.gpu, False) and e.gpu is None:
        state.cluster.by_name[e.node].cordoned = False


def _set_drain(state: State, event: ev.Event, name: str, uuid: str | None, drain: bool) -> bool:
    node = state.cluster.by_name.get(name)
    if node is None or (uuid is not None and uuid not in node.by_uuid):
        state.ignore(event)
        return False
    if uuid is None:
        node.draining = drain
        if drain:
            for group in list(node.groups.values()):
                unbind_group(state, group)
    else:
        node.by_uuid[uuid].drained = drain
    if uuid is not None and (state.faults or state.resting):
        forget_faults(state, name, uuid)
    _touch(state, node)
    return True


def end_rests(state: State, now: Micros) -> None:
    """Let GPUs that have rested long enough take work again."""
    for name, uuid in [key for key, until in state.resting.items() if until <= now]:
        del state.resting[name, uuid]
        node = state.cluster.by_name[name]
        gpu = node.by_uuid.get(uuid)
        if gpu is not None and gpu.drained:
            gpu.drained = False
            _touch(state, node)


def _touch(state: State, node: Node) -> None:
    """Tell everyone that what a node or its GPUs may be used for has changed."""
    state.cluster.put(node)
    for pod in node.pods.values():
        pod.look_at_devices()
        state.watch.pod_changed(pod)
    for group in node.groups.values():
        state.watch.regrouped(group)
    state.agenda.append((agenda.NODE_CHANGED, node))


# --- agents: nodes ----------------------------------------------------------------------------------------------------


def node_joined(state: State, now: Micros, e: ev.NodeJoined) -> None:
    """A new node, or a known one after a restart: its Pods are gone unless it names them."""
    node = state.cluster.by_name.get(e.node.name)
    if node is None:
        node = state.cluster.add(e.node)
    else:
        for pod in [p for p in node.pods.values() if p.number not in e.pods]:
            pod_gone(state, now, pod, FailureCause.NODE_LOST, "its node was restarted")
        node.up = True
        node.draining = node.cordoned
        state.cluster.describe(node, e.node)
        _doom_pods(state, node)
        if state.faults:
            recall_faults(state, now, node)
    for number in e.pods:
        if number not in node.pods:
            state.agenda.append((agenda.ORPHAN, number))
    _touch(state, node)


def model_unload_requested(state: State, now: Micros, e: ev.ModelUnloadRequested) -> None:
    """An operator wants a model off a node that is up."""
    node = state.cluster.by_name.get(e.node)
    if node is None or not node.up or not e.model:
        state.ignore(e)
        return
    state.agenda.append((agenda.UNLOAD, e))


def node_reported(state: State, now: Micros, e: ev.NodeReported) -> None:
    """What the DevicePlugin sees: Pods on devices that are gone or ill are doomed."""
    if state.resting:
        end_rests(state, now)
    node = state.cluster.by_name.get(e.node)
    if node is None or not node.up:
        state.ignore(e)
        return
    if e.resident is not None:
        take_stock(state, now, node, e.resident)
    if tuple(e.gpus) == node.spec.gpus:
        return
    spec = node.spec
    state.cluster.describe(
        node,
        type(spec)(
            spec.name,
            e.gpus,
            spec.cpu_milli,
            spec.memory_bytes,
            spec.disk_bytes,
            spec.network_bps,
            spec.extra,
            spec.labels,
        ),
    )
    _doom_pods(state, node)
    if state.faults:
        recall_faults(state, now, node)
    _touch(state, node)


def _doom_pods(state: State, node: Node) -> None:
    for pod in node.pods.values():
        if pod.doomed is None and any(_is_lost(node.by_uuid[grant.uuid]) for grant in pod.grants):
            pod.doomed = FailureCause.GPU_LOST
            state.agenda.append((agenda.DOOMED, pod))


def _is_lost(gpu: Gpu) -> bool:
    return not gpu.present or not gpu.healthy


def node_lost(state: State, now: Micros, e: ev.NodeLost) -> None:
    """The node and everything on it are fenced; groups bound to it go elsewhere."""
    node = state.cluster.by_name.get(e.node)
    if node is None or not node.up:
        state.ignore(e)
        return
    node.up = False
    state.cluster.forget_models(node)
    for pod in list(node.pods.values()):
        pod_gone(state, now, pod, FailureCause.NODE_LOST, e.reason or f"node {e.node} was lost")
    for group in list(node.groups.values()):
        unbind_group(state, group)
    _touch(state, node)


# --- agents: Pods -----------------------------------------------------------------------------------------------------


def pod_started(state: State, now: Micros, e: ev.PodStarted) -> None:
    """A Pod takes tasks from now on."""
    pod = state.pods.get(e.pod)
    if pod is None or pod.state is not PodState.CREATING:
        state.ignore(e)
        return
    pod.state = next_pod_state(pod.state, PodCause.START)
    learn_load(state, pod, now - pod.created_at)
    if pod.model:
        for grant in pod.grants:
            gpu = pod.node.by_uuid[grant.uuid]
            spent = now - pod.created_at
            gpu.load_us = (3 * gpu.load_us + spent) // 4 if gpu.load_us else spent
    if pod.tasks:
        pod.state = next_pod_state(pod.state, PodCause.TAKE)
    pod.idle_since = now
    state.watch.pod_changed(pod)
    state.watch.check_pod(pod, now + state.limits.idle_ttl_us)
    state.agenda.append((agenda.POD_STARTED, pod))


def pod_stopped(state: State, now: Micros, e: ev.PodStopped) -> None:
    """A Pod is known to be gone; attempts in it have failed."""
    pod = state.pods.get(e.pod)
    if pod is None:
        state.ignore(e)
        return
    pod_gone(state, now, pod, e.cause, e.detail)


def pod_gone(state: State, now: Micros, pod: Pod, cause: FailureCause, detail: str) -> None:
    """Free what a Pod held, and end the attempts in it."""
    pod.state = next_pod_state(pod.state, PodCause.STOP)
    del state.pods[pod.number]
    del pod.node.pods[pod.number]
    state.cluster.release(pod.node, pod.grants, pod.demand)
    state.watch.pod_changed(pod)
    if pod.doomed is not None:
        cause = pod.doomed
    if cause in GPU_FAULTS and note_fault(state, now, pod.node, pod.grants, f"pod {pod.number}"):
        _touch(state, pod.node)
    if cause is FailureCause.HUNG and rest(state, now, pod.node, pod.grants):
        _touch(state, pod.node)
    for req_no, rank in list(pod.tasks.items()):
        task = state.tasks[req_no]
        del pod.tasks[req_no]
        fail(task, cause, detail, pod)
        if task.state is TaskState.BOUND:
            end_attempt(state, task, now)
        else:
            end_rank(state, task, rank, now)
    claim = state.claims.get(pod.claimed_by)
    if claim is not None:
        claim.waits_for.pop(pod.number, None)
        if not claim.waits_for:
            state.agenda.append((agenda.ROOMY, claim))


# --- agents: attempts -------------------------------------------------------------------------------------------------


def _attempt(
    state: State, e: ev.TaskStarted | ev.TaskProgressed | ev.TaskFinished | ev.TaskFailed | ev.TaskStopped
) -> Task | None:
    """Return the task if the report is about an attempt that is under way; else count it."""
    task = state.tasks.get(e.req_no)
    if task is None or task.attempt != e.attempt or e.rank < 0 or not task.live >> e.rank & 1:
        state.ignore(e)
        return None
    return task


def task_started(state: State, now: Micros, e: ev.TaskStarted) -> None:
    """A member of an attempt runs; with the last one the task runs."""
    task = _attempt(state, e)
    if task is None or task.rank_started >> e.rank & 1:
        return
    task.rank_started |= 1 << e.rank
    if not task.started_at:
        task.started_at = max(now, 1)
        if not task.began_at:
            task.began_at = task.started_at
    if task.state is STARTING and task.rank_started == task.whole:
        move(task, START)
        state.agenda.append((agenda.RUNNING, task))
        limit = task.spec.run_limit_us
        if limit is not None:
            for number in task.pods:
                state.watch.check_pod(state.pods[number], task.started_at + limit)


def task_progressed(state: State, now: Micros, e: ev.TaskProgressed) -> None:
    """Steps that are behind an attempt, never fewer than before, and what a later attempt can go on from if this one is lost."""
    task = _attempt(state, e)
    if task is None:
        return
    if e.done > task.progress_done:
        task.progress_done, task.progress_total = e.done, e.total
    if e.checkpoint and e.rank == 0 and e.checkpoint != task.checkpoint:
        task.checkpoint = e.checkpoint
        task.kept_until = now


def task_finished(state: State, now: Micros, e: ev.TaskFinished) -> None:
    """A member has its result; with the last one the task has. After a cancel the result is dropped."""
    task = _attempt(state, e)
    if task is None:
        return
    if state.faults:
        pod = state.pods.get(task.pods[e.rank])
        if pod is not None:
            note_success(state, pod.node, pod.grants)
    release_rank(state, task, e.rank, now)
    bit = 1 << e.rank
    task.live &= ~bit
    task.done |= bit
    if e.rank == 0:
        task.result = e.result
    if task.live:
        return
    if task.done != task.whole or task.cancel_requested:
        end_attempt(state, task, now)
        return
    move(task, FINISH)
    settle(task, e.run_us or (now - task.started_at if task.started_at else 0))
    unplace(state, task)
    task.pods = []
    state.agenda.append((agenda.FINISHED, task))
    forget_in_time(state, task, now)


def task_failed(state: State, now: Micros, e: ev.TaskFailed) -> None:
    """A member failed in a Pod that lives on."""
    task = _attempt(state, e)
    if task is None:
        return
    pod = state.pods.get(task.pods[e.rank])
    fail(task, e.cause, e.detail, pod, e.peak_gpu_memory_bytes)
    if e.cause in GPU_FAULTS and pod is not None and note_fault(state, now, pod.node, pod.grants, e.req_no):
        _touch(state, pod.node)
    end_rank(state, task, e.rank, now)


def task_stopped(state: State, now: Micros, e: ev.TaskStopped) -> None:
    """A member stopped, maybe with a checkpoint."""
    task = _attempt(state, e)
    if task is None:
        return
    if e.checkpoint and e.rank == 0:
        task.checkpoint = e.checkpoint
        task.kept_until = now
    end_rank(state, task, e.rank, now)


EVENT_FOLDS: dict[type, Callable[[State, Micros, Any], None]] = {
    ev.TaskSubmitted: task_submitted,
    ev.TaskCancelRequested: cancel_requested,
    ev.TaskEstimated: task_estimated,
    ev.TaskRevived: task_revived,
    ev.TenantConfigured: tenant_configured,
    ev.ModelDeployed: model_deployed,
    ev.ModelUndeployed: model_undeployed,
    ev.NodeDrainRequested: drain_requested,
    ev.NodeUncordoned: node_uncordoned,
    ev.NodeJoined: node_joined,
    ev.ModelUnloadRequested: model_unload_requested,
    ev.NodeReported: node_reported,
    ev.NodeLost: node_lost,
    ev.PodStarted: pod_started,
    ev.PodStopped: pod_stopped,
    ev.TaskStarted: task_started,
    ev.TaskProgressed: task_progressed,
    ev.TaskFinished: task_finished,
    ev.TaskFailed: task_failed,
    ev.TaskStopped: task_stopped,
    capacity.DemandForecast: capacity.demand_forecast,
    capacity.FleetConfigured: capacity.fleet_configured,
    capacity.CapacityChecked: capacity.capacity_checked,
}
