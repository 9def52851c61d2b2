"""Level 6, elasticity: keep the Pods that deployments want warm, and advise how many nodes to have."""

from __future__ import annotations

from engine.cluster import pick_gpus
from engine.commands import CreatePod, ScaleNodes
from engine.entities import Deployment
from engine.kinds import RoomLine
from engine.levels import fleet
from engine.levels.room import make_room
from engine.reasons import Reason
from engine.tasks import PodState
from engine.turn import Turn


def keep_warm(turn: Turn) -> None:
    """Create the Pods that deployments lack; where there is no room, idle Pods that nobody keeps go."""
    if not turn.profile.keep_deployed:
        return
    for deployment in turn.state.deployments.values():
        lacking = deployment.pods - turn.kept_pods(deployment)
        while lacking > 0 and _create(turn, deployment):
            lacking -= 1
        if lacking > 0:
            _make_room(turn, deployment)


def _create(turn: Turn, d: Deployment) -> bool:
    node = turn.backlog.asked.fit(d.demand).best()
    grants = pick_gpus(node, d.demand) if node is not None else None
    if node is None or grants is None:
        return False
    turn.order(CreatePod(turn.state.next_pod, node.name, d.method, d.model, grants, d.demand, d.slots))
    return True


def _make_room(turn: Turn, d: Deployment) -> None:
    """Let idle Pods go for one more Pod of a deployment, unless some are going already."""
    backlog = turn.backlog
    if not turn.profile.reclaim_idle or not backlog.idle:
        return
    if any(pod.state is PodState.STOPPING and pod.reason == Reason.DEPLOYED for pod in turn.state.pods.values()):
        return
    found = make_room(turn, None, backlog.loose_line(d.demand))
    for pod in found[2] if found is not None else ():
        turn.delete(pod, Reason.DEPLOYED)


def advise(turn: Turn) -> None:
    """Ask for more nodes when work that fits nowhere has waited long; for fewer when nothing waits and nodes are empty."""
    profile, state = turn.profile, turn.state
    if turn.check_capacity:
        fleet.check(turn)
    if not profile.scale_after_us or state.fleet.config is not None:
        return
    cluster = state.cluster
    if state.pending == 0:
        if state.wanted_nodes == 0:
            return
        used = max(1, int((cluster.pods[: len(cluster)] > 0).sum()))
        if used < min(state.wanted_nodes, int(cluster.is_open[: len(cluster)].sum())):
            turn.count(Reason.IDLE)
            turn.order(ScaleNodes(used, Reason.IDLE))
        return
    stuck = [line for line in turn.backlog.open_rooms if line.live and not line.active and _is_late(turn, line)]
    if not stuck:
        return
    up = int(cluster.is_open[: len(cluster)].sum())
    have = sum(cluster.cards.values())
    gpus = sum(line.live * line.members * line.fit.demand.gpus * line.fit.demand.gpu_share for line in stuck)
    per_node = max(1000, 1000 * have // max(1, len(cluster)))
    wanted = min(profile.scale_nodes_max, up + max(1, -(-gpus // per_node)))
    if wanted > max(state.wanted_nodes, up):
        turn.count(Reason.PENDING_WORK)
        turn.order(ScaleNodes(wanted, Reason.PENDING_WORK))


def _is_late(turn: Turn, line: RoomLine) -> bool:
    head = line.head()
    return head is not None and head[1].submitted_at + turn.profile.scale_after_us <= turn.now
