"""Which Pod of its model a task joins, and when it gets one more of them instead: sharing a Pod slows everybody in it down.

What share of a run every other member of a Pod adds was measured (`Estimate.marginal_permille`), or else the profile says so with
`slot_slowdown_permille`. Joining a Pod then costs what the newcomer and the others run longer; one more Pod costs a load, and maybe
the load of the model that goes for it. Where no Pod is idle and no room is left, the fullest one is joined instead: so others empty
themselves for the models that wait.
"""

from __future__ import annotations

from engine.entities import Node, Pod, Task
from engine.kinds import RoomLine, WarmLine
from engine.lines import Rank
from engine.tasks import Micros, PodState
from engine.turn import Turn

MOST_PODS = 16
"""How many Pods are compared for one task; where more have a free slot, the usual choice is as good."""


def choose_pod(turn: Turn, line: WarmLine, task: Task, usual: Pod) -> tuple[Pod, Micros]:
    """Return the Pod that a task joins, and what that costs: the cheapest, or the fullest while room is scarce."""
    if not turn.profile.slot_slowdown_permille or usual.slots == 1:
        return usual, 0
    creating = usual.state is PodState.CREATING
    if not usual.tasks and not creating:
        return usual, 0
    room: RoomLine = task.lines[-1]
    packs = not creating and not turn.backlog.idle and room.fit.best() is None
    best, least = usual, 0 if packs else cost_of(turn, task, usual)
    seen = 0
    for warm in line.kind.sets:
        if warm.cap < line.need:
            continue
        for row, pods in warm.by_node.items():
            if line.node >= 0 and row != line.node:
                continue
            seen += len(pods)
            if seen > MOST_PODS:
                return usual, 0 if packs else cost_of(turn, task, usual)
            for pod in pods.values():
                if pod is usual or pod.node.exclusive not in (None, task.group):
                    continue
                if packs:
                    if pod.state is not PodState.CREATING and _fuller(pod, best):
                        best = pod
                    continue
                cost = cost_of(turn, task, pod)
                if cost < least or (cost == least and best is not usual and pod.number < best.number):
                    best, least = pod, cost
    return best, least


def _fuller(pod: Pod, other: Pod) -> bool:
    return (-len(pod.tasks), pod.number) < (-len(other.tasks), other.number)


def cost_of(turn: Turn, task: Task, pod: Pod) -> Micros:
    """Return what joining a Pod costs: the wait until it has started, and how much longer everybody in it runs.

    The newcomer and each other slow each other down for as long as both run.
    """
    tasks, now = turn.state.tasks, turn.now
    slowed = 0
    for req_no in pod.tasks:
        other = tasks[req_no]
        ran = now - other.started_at if other.started_at else 0
        slowed += 2 * min(task.predicted_us, max(other.predicted_us - ran, other.predicted_us // 8))
    estimate = task.estimate
    permille = estimate.marginal_permille if estimate is not None else 0
    cost = slowed * (permille or turn.profile.slot_slowdown_permille) // 1000
    if pod.state is PodState.CREATING:
        cost += max(0, pod.created_at + turn.backlog.idle_pods.load_us(pod) - now)
    return cost


def wants_another(turn: Turn, rank: Rank, task: Task, cost_us: Micros) -> bool:
    """Tell whether one more Pod of a task's model costs less than sharing: a load where room is free, else several loads.

    Free room is left to those who rank before the task and wait for it.
    """
    if not cost_us:
        return False
    node = task.lines[-1].fit.best()
    if node is not None:
        return cost_us > load_us(turn, node) and not _is_passed_over(turn, rank, task)
    first = turn.backlog.idle_pods.first()
    return first is not None and cost_us > turn.profile.widen_loads * turn.backlog.idle_pods.load_us(first)


def load_us(turn: Turn, node: Node) -> Micros:
    """Return what a load takes on a node, as learned there; what the profile takes for usual where nothing was."""
    learned = [gpu.load_us for gpu in node.gpus if gpu.load_us]
    return min(learned) if learned else turn.profile.reload_us


def _is_passed_over(turn: Turn, rank: Rank, task: Task) -> bool:
    """Tell whether somebody who ranks before the task looks for room, too."""
    for line in turn.backlog.active:
        if line.live:
            head = line.head()
            if head is not None and head[1] is not task and head[0] < rank:
                return True
    return False
