"""Models before they are needed: deployed ones stay where their Pods are, those of the tasks next in line go where room comes next.

Looked at about once in `LOOK_EVERY_US` and at once when a deployment changed, with a bound on everything; an order that fails costs
nothing but a slower load later. A node that holds a model, or was told to fetch it, is not told again.
"""

from __future__ import annotations

from typing import Final

from engine.commands import PrefetchModel, ReleaseModel
from engine.entities import Deployment, Pod, Task
from engine.lines import Rank
from engine.resources import Demand
from engine.tasks import SECOND, Micros, PodState
from engine.turn import Turn

LOOK_EVERY_US: Final = 2 * SECOND
MOST_ORDERS: Final = 32
"""Orders to bring or release models in one look."""
MOST_PODS: Final = 512
"""Pods that are looked at for where room comes next."""


class Near:
    """When was looked last. Not part of the state: a snapshot has the next step look."""

    __slots__ = ("_deployed", "_look_at")

    def __init__(self) -> None:
        self._look_at: Micros = -1
        self._deployed = -1
        """The version of the deployments whose models were brought near last."""

    def look_anew(self) -> None:
        """Look in the next step, as an engine would that begins from a snapshot."""
        self._look_at = self._deployed = -1

    def look_ahead(self, turn: Turn) -> None:
        """Bring models near and release those that nobody keeps, if it is time to."""
        state = turn.state
        if self._deployed == state.deployed and turn.now < self._look_at:
            return
        self._look_at = turn.now + LOOK_EVERY_US
        self._deployed = state.deployed
        left = MOST_ORDERS
        if turn.profile.keep_deployed:
            left = _keep_near(turn, left)
        if turn.profile.prefetch_ahead and state.pending and left:
            _bring_next(turn, left)


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
    stale = [(node, model) for node in pinning for model in node.pins if model not in wanted]
    for node, model in stale[:left]:
        if node.up:
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


# --- who comes next ---------------------------------------------------------------------------------------------------


def _bring_next(turn: Turn, left: int) -> None:
    """For the tasks that come next, each of another model: bring it to the node where the soonest room for it comes."""
    soon = _ending_soon(turn)
    taken: dict[int, None] = {}
    for _, task in _next_in_line(turn)[: turn.profile.prefetch_ahead]:
        pod = _room_for(turn, task, soon, taken)
        if pod is None:
            continue
        taken[pod.number] = None
        node = pod.node
        for model in (task.spec.model, *task.spec.adapters):
            if model and model not in node.models and left:
                turn.order(PrefetchModel(node.name, model))
                left -= 1


def _next_in_line(turn: Turn) -> list[tuple[Rank, Task]]:
    """Return the first waiting task of each kind, in order."""
    found: list[tuple[Rank, Task]] = []
    for kind in turn.backlog.kinds_waiting:
        first: tuple[Rank, Task] | None = None
        for line in kind.lines.values():
            head = line.head() if line.live else None
            if head is not None and (first is None or head[0] < first[0]):
                first = head
        if first is not None:
            found.append(first)
    found.sort(key=_rank)
    return found


def _rank(head: tuple[Rank, Task]) -> Rank:
    return head[0]


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
        began = task.started_at or turn.now
        latest = max(latest, began + task.predicted_us)
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
