"""Models before they are needed: deployed ones stay where their Pods are, those of tasks that wait go where room comes next.

What is done here follows from the state and the step's own orders alone, without a clock of its own: a replay does the same. A node
that holds a model, or was told to fetch it, is not told again, so looking in every step costs nothing where there is nothing to do.
"""

from __future__ import annotations

from typing import Final

from engine.commands import Notify, PrefetchModel, ReleaseModel
from engine.entities import Deployment, Pod, Task
from engine.resources import Demand
from engine.tasks import Micros, PodState, TaskState
from engine.turn import Turn

MOST_ORDERS: Final = 32
"""Orders to bring or release models in one step; the next step goes on."""
MOST_PODS: Final = 64
"""Pods that are looked at for where room comes next."""


def look_ahead(turn: Turn) -> None:
    """Bring models near and release those that nobody keeps."""
    left = MOST_ORDERS
    if turn.profile.keep_deployed and (turn.state.deployments or turn.state.cluster.pinning):
        left = _keep_near(turn, left)
    if turn.profile.prefetch_ahead and turn.state.pending and left:
        _bring_ahead(turn, left)


# --- deployments ------------------------------------------------------------------------------------------------------


def _keep_near(turn: Turn, left: int) -> int:
    """Pin deployed personalised models where their base's Pods are, and release what nobody deploys any more."""
    state = turn.state
    wanted: dict[str, None] = {}
    for deployment in state.deployments.values():
        for model in deployment.wanted:
            wanted[model or deployment.model] = None
        left = _pin(turn, deployment, left)
    pinning = [state.cluster.nodes[row] for row in sorted(state.cluster.pinning)]
    stale = [(node, model) for node in pinning if node.up for model in node.pins if model not in wanted]
    for node, model in stale[:left]:
        turn.order(ReleaseModel(node.name, model))
        left -= 1
    return left


def _pin(turn: Turn, deployment: Deployment, left: int) -> int:
    models = [model for model in deployment.wanted if model]
    if not models:
        return left
    for pod in turn.backlog.by_model.get((deployment.method, deployment.model), {}).values():
        node = pod.node
        for model in models:
            if left and pod.usable and model not in node.pins:
                turn.order(PrefetchModel(node.name, model, True))
                left -= 1
    return left


# --- who has to wait --------------------------------------------------------------------------------------------------


def _bring_ahead(turn: Turn, left: int) -> None:
    """Bring the models of tasks that began to wait in this step to where room for them is expected soonest.

    Only while few tasks wait per Pod, so that their turn comes soon, and only models that no node holds.
    """
    state = turn.state
    if state.pending > turn.profile.prefetch_ahead * max(1, len(state.pods)):
        return
    soon: list[Pod] | None = None
    taken: dict[int, None] = {}
    for command in list(turn.commands):
        if type(command) is not Notify or command.state is not TaskState.PENDING or command.room is not None:
            continue
        task = state.tasks.get(command.req_no)
        if task is None or task.state is not TaskState.PENDING or task.shape is None:
            continue
        absent = [m for m in (task.spec.model, *task.spec.adapters) if m and m not in state.cluster.cached]
        if not absent:
            continue
        if soon is None:
            soon = _ending_soon(turn)
        pod = _room_for(turn, task, soon, taken)
        if pod is None:
            continue
        taken[pod.number] = None
        for model in absent:
            if left:
                turn.order(PrefetchModel(pod.node.name, model))
                left -= 1


def _ending_soon(turn: Turn) -> list[Pod]:
    """Return Pods that others may follow, those first whose tasks are expected to end first."""
    ends: list[tuple[Micros, int, Pod]] = []
    for pod in turn.state.pods.values():
        if len(ends) >= MOST_PODS:
            break
        if pod.node.up and not pod.node.draining and pod.devices_open and pod.state is not PodState.GONE:
            ends.append((_end(turn, pod), pod.number, pod))
    ends.sort(key=_when)
    return [end[2] for end in ends]


def _when(end: tuple[Micros, int, Pod]) -> tuple[Micros, int]:
    return end[0], end[1]


def _end(turn: Turn, pod: Pod) -> Micros:
    latest = turn.now
    for req_no in pod.tasks:
        task = turn.state.tasks[req_no]
        latest = max(latest, (task.started_at or turn.now) + task.predicted_us)
    return latest


def _room_for(turn: Turn, task: Task, soon: list[Pod], taken: dict[int, None]) -> Pod | None:
    """Return the Pod whose place a task is likely to get; of its own model if there is one."""
    demand = task.shape.demand
    group = task.group
    home = group.node if group is not None else None
    own = turn.backlog.by_model.get((task.spec.method, task.spec.model), {})
    for pod in soon:
        if own and pod.number not in own:
            continue
        if home is not None and pod.node is not home:
            continue
        if pod.node.exclusive not in (None, group) or (not own and pod.number in taken):
            continue
        if own or _would_fit(pod, demand):
            return pod
    return None


def _would_fit(pod: Pod, demand: Demand) -> bool:
    """Tell whether a Pod's devices would do for a demand."""
    if len(pod.grants) < demand.gpus:
        return False
    for grant in pod.grants[: demand.gpus]:
        gpu = pod.node.by_uuid[grant.uuid]
        if gpu.memory_bytes < demand.gpu_memory_bytes:
            return False
        if demand.gpu_models and gpu.model not in demand.gpu_models:
            return False
        if grant.share < demand.gpu_share:
            return False
    return True
