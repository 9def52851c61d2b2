"""What must hold between two steps, computed anew from the state by a checker that trusts none of its counters."""

from __future__ import annotations

from engine.entities import Pod
from engine.errors import InvariantViolated
from engine.resources import WHOLE_GPU
from engine.state import State
from engine.tasks import TERMINAL_STATES, Affinity, PodState, TaskState

_PLACED = (TaskState.BOUND, TaskState.STARTING, TaskState.RUNNING, TaskState.STOPPING)
_STARTED = (TaskState.STARTING, TaskState.RUNNING, TaskState.STOPPING)


def check(state: State) -> None:
    """Raise InvariantViolated with everything that is wrong."""
    wrong = [*_resources(state), *_arrays(state), *_tasks(state), *_pods(state), *_counters(state), *_groups(state)]
    if state.agenda:
        wrong.append(f"the agenda still holds {len(state.agenda)} items")
    if wrong:
        raise InvariantViolated("; ".join(wrong))


def _resources(state: State) -> list[str]:
    """Nothing is given twice: what Pods hold fits what nodes have, and what is free is what is left."""
    wrong = []
    cluster = state.cluster
    for node in cluster.nodes:
        claims = [c for c in state.claims.values() if c.node is node]
        free = cluster.totals(node.spec)
        physical = list(free)
        for pod in node.pods.values():
            for column, amount in cluster.amounts(pod.demand):
                free[column] -= amount
                physical[column] -= amount
        for claim in claims:
            for column, amount in cluster.amounts(claim.demand):
                free[column] -= amount
        if free != node.free[: len(free)]:
            wrong.append(f"node {node.name}: free is {node.free}, Pods and claims leave {free}")
        if min(physical, default=0) < 0:
            wrong.append(f"node {node.name}: Pods hold more than it has: {physical}")
        for gpu in node.gpus:
            held = [g for pod in node.pods.values() for g in pod.grants if g.uuid == gpu.uuid]
            claimed = [g for claim in claims for g in claim.grants if g.uuid == gpu.uuid]
            if sum(g.share for g in held) > WHOLE_GPU or sum(g.memory_bytes for g in held) > gpu.memory_bytes:
                wrong.append(f"GPU {gpu.uuid} of {node.name} is given twice")
            if gpu.share_free != WHOLE_GPU - sum(g.share for g in held + claimed):
                wrong.append(f"GPU {gpu.uuid} of {node.name}: share_free is {gpu.share_free}")
            if gpu.memory_free != gpu.memory_bytes - sum(g.memory_bytes for g in held + claimed):
                wrong.append(f"GPU {gpu.uuid} of {node.name}: memory_free is {gpu.memory_free}")
        if not node.up and node.pods:
            wrong.append(f"node {node.name} is lost, but has Pods")
    return wrong


def _arrays(state: State) -> list[str]:
    """The arrays say what the plain values say."""
    wrong = []
    cluster = state.cluster
    for node in cluster.nodes:
        row = node.index
        if cluster.free[row, : len(node.free)].tolist() != node.free:
            wrong.append(f"node {node.name}: the array of free amounts differs")
        shares = [gpu.share_free if gpu.open else -1 for gpu in node.gpus]
        if (
            cluster.gpu_share[row, : len(shares)].tolist() != shares
            or (cluster.gpu_share[row, len(shares) :] != -1).any()
        ):
            wrong.append(f"node {node.name}: the array of GPU shares differs")
        if bool(cluster.is_open[row]) != (node.up and not node.draining):
            wrong.append(f"node {node.name}: the array of open nodes differs")
        if node.cordoned and not node.draining:
            wrong.append(f"node {node.name}: it is cordoned and yet takes work")
        if cluster.pods[row] != len(node.pods):
            wrong.append(f"node {node.name}: the array of Pod counts differs")
    return wrong


def _tasks(state: State) -> list[str]:
    """Every task is in one place: waiting, placed in Pods that know it, or over."""
    wrong = []
    for task in state.tasks.values():
        where = f"task {task.req_no} ({task.state})"
        if (task.state in TERMINAL_STATES) != (task.req_no in state.terminal):
            wrong.append(f"{where}: terminal, but not in the list of terminal tasks, or the other way round")
        if task.state not in TERMINAL_STATES and not task.admitted:
            wrong.append(f"{where}: neither admitted nor rejected")
        if task.state is TaskState.BACKOFF and task.retry_at is None:
            wrong.append(f"{where}: nobody decided when it is tried again")
        if task.state in _STARTED and not task.live:
            wrong.append(f"{where}: started, but no member of it lives")
        if task.state not in _STARTED and task.live:
            wrong.append(f"{where}: not started, but a member of it lives")
        if task.state not in _PLACED and any(task.req_no in pod.tasks for pod in state.pods.values()):
            wrong.append(f"{where}: has a slot")
        if task.state is TaskState.BOUND and any(not number for number in task.pods):
            wrong.append(f"{where}: only part of the gang is bound")
        if task.state in _PLACED:
            for rank, number in enumerate(task.pods):
                lives = bool(task.live >> rank & 1) or task.state is TaskState.BOUND
                pod = state.pods.get(number)
                if lives and (pod is None or pod.tasks.get(task.req_no) != rank):
                    wrong.append(f"{where}: member {rank} lives, but its Pod {number} does not know it")
        if task.cancel_requested and task.state in (TaskState.PENDING, TaskState.BOUND, TaskState.BACKOFF):
            wrong.append(f"{where}: cancelled, but waiting")
    return wrong


def _pods(state: State) -> list[str]:
    wrong = []
    for pod in state.pods.values():
        where = f"Pod {pod.number} ({pod.state})"
        if len(pod.tasks) > pod.slots + _beyond(state, pod):
            wrong.append(f"{where}: {len(pod.tasks)} tasks in {pod.slots} slots")
        if pod.state is PodState.GONE or pod.node.pods.get(pod.number) is not pod:
            wrong.append(f"{where}: gone, or unknown to its node")
        if pod.state is PodState.BUSY and not pod.tasks:
            wrong.append(f"{where}: busy without a task")
        if pod.state in (PodState.READY, PodState.IDLE) and pod.tasks:
            wrong.append(f"{where}: has tasks")
        for req_no, rank in pod.tasks.items():
            task = state.tasks.get(req_no)
            if task is None or rank >= len(task.pods) or task.pods[rank] != pod.number:
                wrong.append(f"{where}: holds a slot for {req_no}, which is not there")
        if pod.claimed_by and pod.number not in getattr(state.claims.get(pod.claimed_by), "waits_for", ()):
            wrong.append(f"{where}: claimed by {pod.claimed_by}, which waits for no such Pod")
    for claim in state.claims.values():
        task = state.tasks.get(claim.req_no)
        if task is None or task.state is not TaskState.PENDING:
            wrong.append(f"claim of {claim.req_no}: its task does not wait")
        if not claim.waits_for:
            wrong.append(f"claim of {claim.req_no}: it waits for nothing")
        wrong += [f"claim of {claim.req_no}: Pod {n} is gone" for n in claim.waits_for if n not in state.pods]
    return wrong


def _beyond(state: State, pod: Pod) -> int:
    """Return how many tasks may be in a Pod beyond its slots: urgent ones that say so."""
    inside = [task for req_no in pod.tasks if (task := state.tasks.get(req_no)) is not None and task.urgent]
    most = max((task.spec.urgent_slots for task in inside), default=0)
    return min(most, pod.slots, len(inside))


def _counters(state: State) -> list[str]:
    wrong = []
    tasks = state.tasks.values()
    waiting = [t for t in tasks if t.admitted and t.state in (TaskState.PENDING, TaskState.BACKOFF)]
    placed = [t for t in tasks if t.state in _PLACED]
    if state.pending != len(waiting):
        wrong.append(f"{state.pending} tasks are counted as waiting, {len(waiting)} wait")
    for tenant in state.tenants.values():
        if tenant.pending != sum(1 for t in waiting if t.tenant is tenant):
            wrong.append(f"tenant {tenant.name}: pending is {tenant.pending}")
        if tenant.running != sum(1 for t in placed if t.tenant is tenant):
            wrong.append(f"tenant {tenant.name}: running is {tenant.running}")
        if tenant.max_running and tenant.running > tenant.max_running and not tenant.vtime:
            wrong.append(f"tenant {tenant.name}: runs more than it may")
    for name, count, most in (
        ("pending", state.pending, state.limits.pending),
        ("remembered", len(state.terminal), state.limits.remembered),
        ("groups", len(state.idle_groups), state.limits.groups),
        ("claims", len(state.claims), state.limits.claims),
    ):
        if count > most and name != "pending":
            wrong.append(f"{name}: {count} is more than the limit {most}")
    return wrong


def _groups(state: State) -> list[str]:
    wrong = []
    live = [t for t in state.tasks.values() if t.state not in TERMINAL_STATES]
    for (tenant, name), group in state.groups.items():
        mine = [t for t in live if t.group is group]
        if group.live != len(mine):
            wrong.append(f"group {tenant}/{name}: live is {group.live}, {len(mine)} live")
        if group.placed != sum(1 for t in mine if t.state in _PLACED):
            wrong.append(f"group {tenant}/{name}: placed is {group.placed}")
        if group.pending != sum(1 for t in mine if t.admitted and t.state in (TaskState.PENDING, TaskState.BACKOFF)):
            wrong.append(f"group {tenant}/{name}: pending is {group.pending}")
        if group.node is not None and group.node.groups.get(group.seq) is not group:
            wrong.append(f"group {tenant}/{name}: its node does not know it")
    for task in live:
        if task.state in _STARTED and task.group is not None and task.group.node is not None:
            kind = task.spec.affinity
            nodes = {state.pods[n].node.name for r, n in enumerate(task.pods) if task.live >> r & 1}
            if kind is Affinity.EXCLUSIVE and any(
                state.cluster.by_name[n].exclusive not in (None, task.group) for n in nodes
            ):
                wrong.append(f"task {task.req_no}: on a node that another group has for itself")
    return wrong
