"""Why is it waiting: every blocker of a task, with what is missing, not just the first."""

from __future__ import annotations

from engine.backlog import Backlog
from engine.cluster import BASE_COLUMNS, Cluster
from engine.entities import Node, Task
from engine.kinds import Shape, cap_of
from engine.levels.quotas import Balance, gpus_of
from engine.profile import Profile
from engine.reasons import Blocker, Reason
from engine.resources import Demand
from engine.state import State
from engine.tasks import PodState, TaskState

_COLUMN_REASONS = dict(
    zip(BASE_COLUMNS[:-1], (Reason.NO_CPU, Reason.NO_MEMORY, Reason.NO_DISK, Reason.NO_NETWORK), strict=True)
)


def blockers(state: State, backlog: Backlog, profile: Profile, req_no: str) -> tuple[Blocker, ...]:
    """Return what keeps a task from running; empty when it runs or is over. Raises KeyError for a task nobody knows."""
    task = state.tasks[req_no]
    match task.state:
        case TaskState.PENDING:
            return tuple(_waiting(state, backlog, profile, task))
        case TaskState.BACKOFF:
            until = task.retry_at or state.now
            detail = f"attempt {task.attempt} failed ({task.cause}); it is tried again at {until} us"
            return (Blocker(Reason.BACKING_OFF, detail, until=until),)
        case TaskState.BOUND:
            pods = [number for number in task.pods if number and state.pods[number].state is PodState.CREATING]
            return (Blocker(Reason.POD_CREATING, f"its Pods {pods} are being created", node=_node_of(state, task)),)
        case TaskState.STARTING:
            return (
                Blocker(
                    Reason.START_UNCONFIRMED, "its start was ordered, not yet confirmed", node=_node_of(state, task)
                ),
            )
        case TaskState.STOPPING:
            return (Blocker(Reason.STOPPING, f"it is being stopped: {task.stop_reason}", node=_node_of(state, task)),)
        case _:
            return ()


def _node_of(state: State, task: Task) -> str:
    for number in task.pods:
        if number in state.pods:
            return state.pods[number].node.name
    return ""


def _waiting(state: State, backlog: Backlog, profile: Profile, task: Task) -> list[Blocker]:
    claim = state.claims.get(task.req_no)
    if claim is not None:
        detail = f"room is being made on node {claim.node.name}: Pods {list(claim.waits_for)} must be gone first"
        return [Blocker(Reason.ROOM_CLAIMED, detail, missing=len(claim.waits_for), node=claim.node.name)]
    found: list[Blocker] = []
    tenant = task.tenant
    if tenant.max_running and tenant.running >= tenant.max_running:
        detail = f"tenant {tenant.name!r} runs {tenant.running} tasks, its limit is {tenant.max_running}"
        found.append(Blocker(Reason.TENANT_RUNNING_QUOTA, detail, missing=tenant.running - tenant.max_running + 1))
    found += _passed_over(state, backlog, profile, task)
    shape = backlog.asked.shape_of(task)
    nodes = state.cluster.nodes
    row, empty = backlog.where(task, shape)
    if row >= 0:
        nodes = [state.cluster.nodes[row]]
        detail = f"its group {task.spec.group!r} is bound to node {nodes[0].name}; only that will do"
        found.append(Blocker(Reason.GROUP_NODE, detail, nodes=len(state.cluster) - 1, node=nodes[0].name))
    if not nodes:
        found.append(Blocker(Reason.NO_NODE, "no node has joined yet"))
    found += _nodes(state.cluster, nodes, shape.demand, task, empty)
    if profile.warm_reuse and not empty:
        found += _warm(state, shape, nodes)
    fitting = sum(1 for node in nodes if not _misses(state.cluster, node, shape.demand, task, empty))
    if task.spec.members > 1:
        detail = f"its {task.spec.members} members start together or not at all; {fitting} of {len(nodes)} nodes have room for one"
        found.append(Blocker(Reason.GANG_INCOMPLETE, detail, nodes=len(nodes) - fitting))
    elif fitting:
        found.append(Blocker(Reason.ORDER, f"{fitting} nodes have room; it is decided in the next step", nodes=fitting))
    if state.pending > 1:
        found.append(Blocker(Reason.ORDER, f"{state.pending - 1} other tasks wait as well", missing=state.pending - 1))
    return found


def _passed_over(state: State, backlog: Backlog, profile: Profile, task: Task) -> list[Blocker]:
    """Return what a queue's limit and the reservations of others add, where tasks start in exact order."""
    waiting = backlog.waiting
    if waiting is None:
        return []
    found: list[Blocker] = []
    if profile.quotas is not None and waiting.accounts is not None:
        balance = Balance(profile.quotas, list(state.tenants.values()), waiting.accounts)
        queue = balance.exceeded(task)
        if queue is not None:
            held = balance.held[balance.quotas.queues.index(queue)]
            detail = f"queue {queue.name!r} holds {held} thousandths of GPUs, its limit is {queue.limit}"
            found.append(Blocker(Reason.QUEUE_QUOTA, detail, missing=held + gpus_of(task) - queue.limit))
    other = waiting.held_back.get(task.seq, "")
    if not other and profile.backfill == "none" and waiting.blocked and waiting.blocked[0] is not task:
        other = waiting.blocked[0].req_no
    if other:
        found.append(
            Blocker(Reason.RESERVED_FOR_OTHER, f"the room it would fit in is kept for {other}, which comes before")
        )
    return found


def _warm(state: State, shape: Shape, nodes: list[Node]) -> list[Blocker]:
    pods = [pod for node in nodes for pod in node.pods.values() if pod.warm is not None and pod.warm.kind is shape.kind]
    pods = [pod for pod in pods if cap_of(pod) >= shape.need]
    if not pods:
        return [Blocker(Reason.NO_WARM_SLOT, "no Pod of its method, model and size is there")]
    busy = sum(len(pod.tasks) for pod in pods)
    slots = sum(pod.slots for pod in pods)
    return [
        Blocker(Reason.NO_WARM_SLOT, f"{len(pods)} Pods would do; {busy} of their {slots} slots are taken", missing=1)
    ]


def _nodes(cluster: Cluster, nodes: list[Node], demand: Demand, task: Task, empty: bool) -> list[Blocker]:
    """Fold the misses of all nodes: per reason how many nodes, and where the least is missing."""
    counts: dict[tuple[Reason, str], list[tuple[int, str]]] = {}
    for node in nodes:
        for reason, what, missing in _misses(cluster, node, demand, task, empty):
            counts.setdefault((reason, what), []).append((missing, node.name))
    found = []
    for (reason, what), misses in sorted(counts.items()):
        missing, name = min(misses)
        detail = f"{len(misses)} of {len(nodes)} nodes: {what}"
        if missing:
            detail += f"; the closest, {name}, lacks {missing}"
        found.append(Blocker(reason, detail, len(misses), missing, name))
    return found


def _misses(cluster: Cluster, node: Node, demand: Demand, task: Task, empty: bool) -> list[tuple[Reason, str, int]]:
    """Return everything that rules a node out: (reason, in words, how much is missing)."""
    found: list[tuple[Reason, str, int]] = []
    if not node.up:
        return [(Reason.NODE_DOWN, "lost", 0)]
    if node.draining:
        found.append((Reason.NODE_DRAINING, "draining", 0))
    if node.exclusive not in (None, task.group):
        found.append((Reason.NODE_EXCLUSIVE, "a group has it for itself", 0))
    if empty and node.pods:
        found.append((Reason.NODE_NOT_EMPTY, "not empty, and the group wants a node for itself", len(node.pods)))
    names = list(cluster.columns)
    for column, amount in cluster.amounts(demand):
        lacking = amount - node.free[column]
        if lacking > 0:
            name = names[column]
            reason = _COLUMN_REASONS.get(name, Reason.NO_EXTRA)
            found.append((reason, f"too little {name}" if name else "a resource that no node offers", lacking))
    if demand.gpus:
        found += _gpu_misses(node, demand)
    return found


def _gpu_misses(node: Node, demand: Demand) -> list[tuple[Reason, str, int]]:
    gpus = [gpu for gpu in node.gpus if gpu.open]
    if len(gpus) < demand.gpus:
        return [(Reason.NO_GPU, "too few GPUs that are well and not drained", demand.gpus - len(gpus))]
    if demand.gpu_models:
        gpus = [gpu for gpu in gpus if gpu.model in demand.gpu_models]
        if len(gpus) < demand.gpus:
            return [(Reason.NO_GPU_MODEL, f"too few GPUs of {' or '.join(demand.gpu_models)}", demand.gpus - len(gpus))]
    found = []
    shares = sorted(demand.gpu_share - gpu.share_free for gpu in gpus)[: demand.gpus]
    if shares[-1] > 0:
        found.append((Reason.NO_GPU_SHARE, "too little GPU share (thousandths)", sum(max(0, lack) for lack in shares)))
    memory = sorted(demand.gpu_memory_bytes - gpu.memory_free for gpu in gpus)[: demand.gpus]
    if memory[-1] > 0:
        found.append((Reason.NO_GPU_MEMORY, "too little GPU memory (bytes)", sum(max(0, lack) for lack in memory)))
    both = [g for g in gpus if g.share_free >= demand.gpu_share and g.memory_free >= demand.gpu_memory_bytes]
    if not found and len(both) < demand.gpus:
        found.append((Reason.NO_GPU_SHARE, "no GPU has the share and the memory together", demand.gpus - len(both)))
    return found
