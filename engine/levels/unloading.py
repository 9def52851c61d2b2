"""An operator wants a model off a node: its idle Pods go, and its files, unless somebody uses them."""

from __future__ import annotations

from engine.commands import ReleaseModel
from engine.events import ModelUnloadRequested
from engine.reasons import Reason
from engine.tasks import PodState
from engine.turn import Turn


def unload(turn: Turn, request: ModelUnloadRequested) -> None:
    """Let idle Pods with the model go that no deployment keeps, and its files."""
    node = turn.state.cluster.by_name[request.node]
    for pod in list(node.pods.values()):
        idle = not pod.tasks and not pod.claimed_by and pod.state in (PodState.READY, PodState.IDLE)
        if pod.model == request.model and idle and not turn.is_kept(pod):
            turn.delete(pod, Reason.IDLE)
    turn.order(ReleaseModel(node.name, request.model, drop=True))
