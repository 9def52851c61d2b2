"""Join a busy Pod, or start another: a batch makes everybody in it slower, a new Pod costs its load.

Whoever joins waits longer for its own result and lets the others wait longer for theirs, by what one more in a Pod was measured to
cost (`Estimate.marginal_permille`). Where that is more than the load of another Pod on a node with room, the other Pod is started.
Nobody who ranks before the task is passed over, and nobody is moved: with no room, or nothing measured, tasks join.
"""

from __future__ import annotations

from engine.entities import Node, Pod, Task
from engine.levels.choice import choose_node
from engine.lines import Rank
from engine.tasks import Micros
from engine.turn import Turn


def node_instead(turn: Turn, rank: Rank, task: Task, pod: Pod) -> Node | None:
    """Return the node for a new Pod that is worth its load, None where the task had better join the Pod."""
    if not turn.profile.weigh_company or not pod.tasks or task.spec.members > 1 or task.alone:
        return None
    estimate, group = task.estimate, task.group
    if estimate is None or not estimate.marginal_permille:
        return None
    if group is not None and group.node is not None and turn.backlog.prefers_group_node(task):
        return None
    slower_us = company_us(turn, task, pod, estimate.marginal_permille)
    if slower_us <= 0 or _is_passed_over(turn, rank, task):
        return None
    node = choose_node(turn, task.lines[-1], task, task.shape)
    return node if node is not None and load_us(turn, node) < slower_us else None


def company_us(turn: Turn, task: Task, pod: Pod, marginal_permille: int) -> Micros:
    """Return how much longer all in a Pod wait for their results when a task joins it.

    The task itself is slowed by everybody who is there for as long as both run, and slows everybody in turn.
    """
    total = 0
    for req_no in pod.tasks:
        other = turn.state.tasks[req_no]
        ran_us = turn.now - other.started_at if other.started_at else 0
        left_us = max(other.predicted_us - ran_us, other.predicted_us // 10)
        total += 2 * min(task.predicted_us, left_us) * marginal_permille // 1000
    return total


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
