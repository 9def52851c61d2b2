"""The moves that events and commands share: queueing, binding, ending attempts, charging, becoming terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine import agenda
from engine.entities import Claim, Group, Node, Pod, Task
from engine.errors import InvariantViolated
from engine.lifecycle import TaskCause, next_pod_state
from engine.states import EXCLUSIVE, NO_AFFINITY, POD_BUSY, POD_CREATING, POD_IDLE, PREFERRED, TABLE, TAKE
from engine.tasks import FailureCause, Micros, TaskState

if TYPE_CHECKING:
    from engine.state import State


def move(task: Task, cause: TaskCause) -> None:
    """Move a task along the table."""
    after = TABLE[task.state].get(cause)
    if after is None:
        raise InvariantViolated(f"task {task.req_no} is {task.state}, it cannot {cause}")
    task.state = after


def count_pending(state: State, task: Task) -> None:
    """Count a task as waiting; a tenant or group that had nothing waiting starts level with the others."""
    tenant, group = task.tenant, task.group
    state.pending += 1
    if tenant.pending == 0 and tenant.vtime < state.floor:
        tenant.vtime = state.floor
    tenant.pending += 1
    if group is not None:
        if group.pending == 0 and group.vtime < tenant.floor:
            group.vtime = tenant.floor
        group.pending += 1


def uncount_pending(state: State, task: Task) -> None:
    """Count a task as waiting no more."""
    state.pending -= 1
    task.tenant.pending -= 1
    if task.group is not None:
        task.group.pending -= 1


def charge(state: State, task: Task) -> None:
    """Charge the predicted cost of an attempt to the task's tenant and group."""
    cost = task.cost_of(task.predicted_us) or 1
    task.charged = cost
    tenant, group = task.tenant, task.group
    if tenant.vtime > state.floor:
        state.floor = tenant.vtime
    left = tenant.credit - cost * 1000 // tenant.weight  # as Account.spend, without the call
    if left < 0:
        tenant.vtime -= left
        left = 0
    tenant.credit = left
    if group is not None:
        if group.vtime > tenant.floor:
            tenant.floor = group.vtime
        group.spend(cost)


def settle(task: Task, run_us: Micros) -> None:
    """Replace the predicted cost by the true one: charge the rest, or give credit for what was not used."""
    more = task.cost_of(run_us) - task.charged
    task.charged = 0
    task.tenant.spend(more * 1000 // task.tenant.weight)
    if task.group is not None:
        task.group.spend(more)


def unplace(state: State, task: Task) -> None:
    """Count a task as placed no more; an exclusive group without a placed task leaves its node to others."""
    tenant, group = task.tenant, task.group
    tenant.running -= 1
    if tenant.max_running:
        state.watch.tenant_changed(tenant)
    if group is not None:
        group.placed -= 1
        if not group.placed and group.node is not None and group.node.exclusive is group:
            unbind_group(state, group)


def begin_attempt(state: State, task: Task, attempt: int) -> None:
    """Take a task out of the queue for an attempt."""
    task.attempt = attempt
    task.pods = [0] * task.spec.members
    task.live = task.rank_started = task.done = 0
    task.cause = None
    task.detail = task.stop_reason = task.result = ""
    task.progress_done = task.progress_total = 0
    task.started_at = task.ordered_at = 0
    tenant, group = task.tenant, task.group
    state.pending -= 1
    tenant.pending -= 1
    tenant.running += 1
    if group is not None:
        group.pending -= 1
        group.placed += 1
    charge(state, task)
    if state.claims and task.req_no in state.claims:
        drop_claim(state, state.claims[task.req_no])  # was counted when the room was claimed
    else:
        state.placed += 1
        state.watch.leaves(task)


def bind_rank(state: State, task: Task, pod: Pod, rank: int) -> None:
    """Give a slot of a Pod to a member of a task, and bind the task's group to the node."""
    task.pods[rank] = pod.number
    pod.tasks[task.req_no] = rank
    if pod.state is not POD_CREATING and pod.state is not POD_BUSY:
        pod.state = next_pod_state(pod.state, TAKE)
    state.watch.pod_changed(pod)
    group = task.group
    if group is None or group.node is pod.node:
        return
    affinity = task.spec.affinity
    if affinity is NO_AFFINITY:
        return
    if group.node is not None:
        if affinity is PREFERRED or rank > 0:
            return
        unbind_group(state, group)
    bind_group(state, group, pod.node, exclusive=affinity is EXCLUSIVE)


def bind_group(state: State, group: Group, node: Node, exclusive: bool) -> None:
    """Bind a group to a node, to which its tasks go from now on; an exclusive group sends the others away."""
    if exclusive:
        for other in list(node.groups.values()):
            unbind_group(state, other)
    group.node = node
    node.groups[group.seq] = group
    if exclusive and node.exclusive is None:
        node.exclusive = group
        _exclusive_changed(state, node)
    state.watch.regrouped(group)


def unbind_group(state: State, group: Group) -> None:
    """Let a group go from its node."""
    node = group.node
    if node is None:
        return
    group.node = None
    node.groups.pop(group.seq, None)
    if node.exclusive is group:
        node.exclusive = None
        _exclusive_changed(state, node)
    state.watch.regrouped(group)


def _exclusive_changed(state: State, node: Node) -> None:
    state.cluster.put(node)
    for pod in node.pods.values():
        state.watch.pod_changed(pod)


def release_rank(state: State, task: Task, rank: int, now: Micros) -> None:
    """Free the slot that a member of a task has, if it still has one."""
    pod = state.pods.get(task.pods[rank])
    if pod is None or pod.tasks.pop(task.req_no, None) is None:
        return
    if pod.state is POD_BUSY and not pod.tasks:
        pod.state = POD_IDLE
        pod.idle_since = now
        if not pod.usable:
            state.agenda.append((agenda.POD_UNUSED, pod))
        if pod.check_at > now + state.limits.idle_ttl_us:
            state.watch.check_pod(pod, now + state.limits.idle_ttl_us)
    state.watch.pod_changed(pod)


def release_ranks(state: State, task: Task, now: Micros) -> None:
    """Free every slot a task has."""
    for rank, number in enumerate(task.pods):
        if number:
            release_rank(state, task, rank, now)
    task.pods = []


def end_rank(state: State, task: Task, rank: int, now: Micros) -> None:
    """Take in that a member ended without a result; with the last one the attempt is over."""
    release_rank(state, task, rank, now)
    task.live &= ~(1 << rank)
    if task.live == 0:
        end_attempt(state, task, now)
    elif task.state is not TaskState.STOPPING:
        state.agenda.append((agenda.STOP_REST, task))


def end_attempt(state: State, task: Task, now: Micros) -> None:
    """Take in that an attempt is over without a result; the engine decides what follows."""
    move(task, TaskCause.END)
    release_ranks(state, task, now)
    task.live = 0
    ran_us = now - task.started_at if task.started_at else 0
    task.ran_us += ran_us
    if task.kept_until and task.started_at:
        task.kept_us += max(0, task.kept_until - task.started_at)
    task.kept_until = 0
    settle(task, ran_us)
    unplace(state, task)
    task.pending_since = now
    count_pending(state, task)
    state.agenda.append((agenda.ENDED, task))


def fail(task: Task, cause: FailureCause, detail: str, pod: Pod | None, peak_bytes: int = 0) -> None:
    """Note why an attempt fails; the first cause holds. Running out of memory raises what the next attempt asks for."""
    if task.cause is None:
        task.cause = cause
        task.detail = detail
    if cause is FailureCause.OUT_OF_MEMORY:
        had = pod.demand.gpu_memory_bytes if pod is not None else task.spec.demand.gpu_memory_bytes
        task.memory_floor = max(task.memory_floor, had * 6 // 5, peak_bytes)
        task.alone = True
        task.shape = None


def leave_for_good(state: State, task: Task, now: Micros, cause: TaskCause) -> None:
    """Make a task terminal from wherever it is (not from a started attempt)."""
    was = task.state
    move(task, cause)
    if was is TaskState.BOUND:
        release_ranks(state, task, now)
        settle(task, 0)
        unplace(state, task)
    elif task.admitted:
        uncount_pending(state, task)
        if was is TaskState.PENDING:
            claim = state.claims.get(task.req_no)
            if claim is not None:
                drop_claim(state, claim)
            else:
                state.watch.leaves(task)
    forget_in_time(state, task, now)


def forget_in_time(state: State, task: Task, now: Micros) -> None:
    """Keep a terminal task's identity for a while, and let its group go when it was the last."""
    task.finished_at = now
    task.live = 0
    state.outcomes[task.state] = state.outcomes.get(task.state, 0) + 1
    state.terminal[task.req_no] = None
    if len(state.terminal) > state.limits.remembered:
        oldest, _ = state.terminal.popitem(last=False)
        del state.tasks[oldest]
    group = task.group
    if group is None:
        return
    group.live -= 1
    if group.live:
        return
    key = (group.tenant.name, group.name)
    state.idle_groups[key] = None
    if len(state.idle_groups) > state.limits.groups:
        oldest_key, _ = state.idle_groups.popitem(last=False)
        unbind_group(state, state.groups.pop(oldest_key))


def revive_group(state: State, task: Task) -> None:
    """Count a task as live in its group."""
    group = task.group
    if group is None:
        return
    if group.live == 0:
        state.idle_groups.pop((group.tenant.name, group.name), None)
    group.live += 1


def drop_claim(state: State, claim: Claim) -> None:
    """Give back claimed room; Pods that stood in it and were not stopped yet may be used again."""
    del state.claims[claim.req_no]
    state.cluster.release(claim.node, claim.grants, claim.demand)
    for number in claim.waits_for:
        pod = state.pods.get(number)
        if pod is not None:
            pod.claimed_by = ""
            state.watch.pod_changed(pod)
