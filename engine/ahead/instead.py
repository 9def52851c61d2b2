"""What would let a waiting task start now: the changes that each by itself would do.

`why` names what is in the way; this names the ways around it that are open: room that another node has, a Pod that is idle with
another model, a limit, urgency, or the GPU that is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from engine.entities import Gpu, Node, Pod, Task
from engine.profile import Profile
from engine.resources import WHOLE_GPU, Demand
from engine.state import State
from engine.tasks import URGENT_PRIORITY, Affinity, PodState, TaskState

GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Instead:
    """One change that would do."""

    kind: str
    """``affinity``, ``tenant_limit``, ``warm_model``, ``urgent_lane``, ``gpu_memory`` or ``gpu``."""
    detail: str
    """The rest of the sentence *It would start now if ...*."""
    node: str = ""
    model: str = ""
    gpu_memory_bytes: int = 0
    """What must be free, on each GPU."""


def would_start_if(state: State, profile: Profile, req_no: str) -> tuple[Instead, ...]:
    """Return every change that alone would let a waiting task start now; empty for one that does not wait.

    Raises KeyError for a task nobody knows.
    """
    task = state.tasks[req_no]
    if task.state is not TaskState.PENDING or not task.admitted or req_no in state.claims or task.spec.members > 1:
        return ()
    demand = _demand(task)
    nodes = [node for node in state.cluster.nodes if node.up and not node.draining]
    bound = _bound_to(task)
    usual = [node for node in nodes if bound is None or node is bound]
    if _limited(task):
        # Nothing else helps as long as the tenant may run no more.
        if _served(state, task, usual, demand):
            limit = f"tenant {task.tenant.name!r} were allowed to run more than {task.tenant.max_running} tasks"
            return (Instead("tenant_limit", limit),)
        return ()
    return tuple(_instead(state, profile, task, demand, nodes, usual, bound))


def _instead(
    state: State, profile: Profile, task: Task, demand: Demand, nodes: list[Node], usual: list[Node], bound: Node | None
) -> Iterator[Instead]:
    spec = task.spec
    if bound is not None:
        others = [node for node in nodes if node is not bound]
        free = _served(state, task, others, demand)
        if free is not None:
            how = f"its group {spec.group!r} were not bound to node {bound.name}: there is room on {free.name}"
            yield Instead("affinity", how, node=free.name)
    for node in usual:
        pod = _idle_elsewise(node, task, demand)
        if pod is not None:
            what = f"model {spec.model!r}" if spec.model else f"method {spec.method!r}"
            holds = pod.model or pod.method
            how = f"{what} were warm on node {node.name}: an idle Pod there holds {holds!r}"
            yield Instead("warm_model", how, node=node.name, model=spec.model)
            break
    if profile.preempt and not task.urgent:
        running = _stoppable(state, profile, usual, demand)
        if running:
            how = f"its priority were {URGENT_PRIORITY} or more: of the running ordinary tasks {running} may be stopped for it"
            yield Instead("urgent_lane", how)
    if demand.gpus:
        yield _more_gpu(usual, demand)


def _demand(task: Task) -> Demand:
    shape = task.shape
    demand: Demand = task.spec.demand if shape is None else shape.demand
    return demand


def _bound_to(task: Task) -> Node | None:
    """Return the only node that will do for a task of a strict or exclusive group."""
    group = task.group
    strict = task.spec.affinity in (Affinity.STRICT, Affinity.EXCLUSIVE)
    return group.node if group is not None and strict else None


def _limited(task: Task) -> bool:
    tenant = task.tenant
    return tenant.max_running > 0 and tenant.running >= tenant.max_running


def _served(state: State, task: Task, nodes: list[Node], demand: Demand) -> Node | None:
    """Return a node with a free warm slot or room for a task."""
    spec = task.spec
    for node in nodes:
        if node.exclusive is not None and node.exclusive is not task.group:
            continue
        for pod in node.pods.values():
            same = (pod.method, pod.model, pod.slots) == (spec.method, spec.model, spec.slots)
            if same and pod.usable and len(pod.tasks) < pod.slots and pod.state is not PodState.CREATING:
                return node
        if all(node.free[column] >= amount for column, amount in state.cluster.amounts(demand)) and _room(node, demand):
            return node
    return None


def _room(node: Node, demand: Demand) -> bool:
    return sum(_fits(gpu, demand) for gpu in node.gpus) >= demand.gpus


def _fits(gpu: Gpu, demand: Demand) -> bool:
    return _will_do(gpu, demand) and gpu.share_free >= demand.gpu_share and gpu.memory_free >= demand.gpu_memory_bytes


def _will_do(gpu: Gpu, demand: Demand) -> bool:
    return gpu.open and (not demand.gpu_models or gpu.model in demand.gpu_models)


def _idle_elsewise(node: Node, task: Task, demand: Demand) -> Pod | None:
    """Return an idle Pod of another model in whose place the task's Pod could stand."""
    for pod in node.pods.values():
        if pod.tasks or not pod.usable or pod.state not in (PodState.IDLE, PodState.READY):
            continue
        if (pod.method, pod.model) == (task.spec.method, task.spec.model) or len(pod.grants) < demand.gpus:
            continue
        if all(
            grant.share >= demand.gpu_share
            and grant.memory_bytes + node.by_uuid[grant.uuid].memory_free >= demand.gpu_memory_bytes
            and _will_do(node.by_uuid[grant.uuid], demand)
            for grant in pod.grants[: demand.gpus]
        ):
            return pod
    return None


def _stoppable(state: State, profile: Profile, nodes: list[Node], demand: Demand) -> int:
    """Return how many running ordinary tasks may be stopped whose Pods hold enough GPUs."""
    count = 0
    for node in nodes:
        for pod in node.pods.values():
            if len(pod.grants) < demand.gpus or any(grant.share < demand.gpu_share for grant in pod.grants):
                continue
            for name in pod.tasks:
                other = state.tasks[name]
                young = state.now < other.started_at + profile.min_run_us
                spared = other.urgent or not other.spec.preemptible or young
                worn = other.preemptions >= state.limits.preemptions_per_task
                count += other.state is TaskState.RUNNING and not spared and not worn
    return count


def _more_gpu(nodes: list[Node], demand: Demand) -> Instead:
    """Return the GPU, or the memory on one, that is missing."""
    need = demand.gpu_memory_bytes
    size = f" of {need / GIB:.1f} GiB" if need else ""
    model = f" of model {' or '.join(demand.gpu_models)}" if demand.gpu_models else ""
    for node in nodes:
        shared = [gpu for gpu in node.gpus if _will_do(gpu, demand) and gpu.share_free >= demand.gpu_share]
        if len(shared) >= demand.gpus and need:
            short = sorted(max(0, need - gpu.memory_free) for gpu in shared)[demand.gpus - 1]
            if short:
                how = f"{short / GIB:.1f} GiB more GPU memory were free on node {node.name}"
                return Instead("gpu_memory", how, node=node.name, gpu_memory_bytes=need)
    free = max((sum(_fits(gpu, demand) for gpu in node.gpus) for node in nodes), default=0)
    more = max(1, demand.gpus - free)
    part = "" if demand.gpu_share == WHOLE_GPU else f" ({demand.gpu_share} thousandths of it)"
    how = f"{more} more GPU{'s' if more > 1 else ''}{model}{size} were free{part}"
    return Instead("gpu", how, gpu_memory_bytes=need)
