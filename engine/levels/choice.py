"""The choices that placing by lines and placing in exact order share: which node, and how a task gets a slot of a warm Pod."""

from __future__ import annotations

from engine.commands import Notify
from engine.entities import Node, Pod, Task
from engine.kinds import RoomLine, Shape
from engine.levels.speed import fastest
from engine.levels.warmth import warmest
from engine.making import start_task
from engine.states import BOUND, POD_CREATING
from engine.stock import spared_permille
from engine.turn import Turn


def bind_warm(turn: Turn, task: Task, pod: Pod) -> None:
    """Give a task a slot of a Pod: start it, or let it wait for a Pod that is being created."""
    attempt = task.attempt + 1
    if pod.state is POD_CREATING:
        turn.order(Notify(task.req_no, BOUND, attempt, "", "", "", pod.node.name, turn.now, 0, pod.number))
    else:
        turn.start(start_task(task.req_no, attempt, pod.number, pod.node.name, 0, task.checkpoint), task, pod)


def choose_node(turn: Turn, line: RoomLine, task: Task, shape: Shape) -> Node | None:
    """Return the node for a new Pod: the group's, else the best by score with a bonus where the model is cached."""
    backlog, cluster, fit = turn.backlog, turn.state.cluster, line.fit
    group = task.group
    if line.node >= 0:
        node = cluster.nodes[line.node]
        return node if node.exclusive in (None, group) and fit.fits(node) else None
    best = fit.best(task.seq)
    if best is None:
        return None
    if group is not None and group.node is not None and backlog.prefers_group_node(task) and fit.score(group.node) >= 0:
        return group.node
    bonus, weight = turn.profile.cached_model_bonus, turn.profile.gpu_speed_weight
    if weight:
        return fastest(cluster, fit, task, weight, bonus, spared_permille(turn.state))
    return warmest(turn.state, fit, best, task.spec.model, bonus) if bonus else best


def room_version(turn: Turn) -> tuple[int, int, int]:
    """Return what changes whenever making room may go where it did not."""
    cluster = turn.state.cluster
    return turn.backlog.idle_pods.version, cluster.version, turn.state.deployed
