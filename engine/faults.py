"""A GPU that fails one piece of work after another takes no more of it until an operator says so.

Only what speaks of the device counts (`GPU_FAULTS`), once for each Pod or task, within a window, and with no success in between.
Since a broken model fails everywhere, at most a quarter of the GPUs is cordoned this way, and never the last that takes work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.entities import Gpu, Node
from engine.resources import GpuGrant
from engine.tasks import FailureCause, Micros

if TYPE_CHECKING:
    from engine.state import State

GPU_FAULTS = frozenset({FailureCause.GPU_LOST, FailureCause.HUNG, FailureCause.NOT_FINITE})
"""Causes that may be the device's own."""
_SHARE = 4
"""One GPU in so many may be cordoned by its faults, or rest, at one time; the first always may."""


def note_fault(state: State, now: Micros, node: Node, grants: Sequence[GpuGrant], source: str) -> bool:
    """Count a fault of the GPUs under a Pod; tell whether one of them was cordoned for it. `source` is who saw it, counted once."""
    limits = state.limits
    cordoned = False
    for grant in grants:
        gpu = node.by_uuid.get(grant.uuid)
        if gpu is not None and gpu.drained and (node.name, grant.uuid) not in state.resting:
            continue
        seen = state.faults.setdefault((node.name, grant.uuid), [])
        while seen and seen[0][0] <= now - limits.gpu_faults_us:
            del seen[0]
        if source in [who for _at, who in seen]:
            continue
        seen.append((now, source))
        del seen[: -limits.gpu_faults]
        cordoned |= gpu is not None and _cordon(state, node, gpu, seen)
    return cordoned


def rest(state: State, now: Micros, node: Node, grants: Sequence[GpuGrant]) -> bool:
    """Give the GPUs under a Pod that hung nothing new for a while, where others take work; tell whether that was done."""
    rests = False
    for grant in grants:
        gpu = node.by_uuid.get(grant.uuid)
        if gpu is not None and gpu.open and _may_go(state, gpu):
            gpu.drained = True
            state.resting[node.name, grant.uuid] = now + state.limits.gpu_rest_us
            rests = True
    return rests


def recall_faults(state: State, now: Micros, node: Node) -> None:
    """Keep GPUs cordoned that went away after faults and have come back."""
    for gpu in node.gpus:
        seen = state.faults.get((node.name, gpu.uuid))
        if seen and not gpu.drained and seen[0][0] > now - state.limits.gpu_faults_us:
            _cordon(state, node, gpu, seen)


def note_success(state: State, node: Node, grants: Sequence[GpuGrant]) -> None:
    """Forget the faults of GPUs that have just done their work, unless they are cordoned for them."""
    for grant in grants:
        if not is_cordoned(state, node, grant.uuid):
            state.faults.pop((node.name, grant.uuid), None)


def forget_faults(state: State, node: str, uuid: str) -> None:
    """Let a GPU begin anew: an operator has said that it is well, or has drained it himself."""
    state.faults.pop((node, uuid), None)
    state.resting.pop((node, uuid), None)


def is_cordoned(state: State, node: Node, uuid: str) -> bool:
    """Tell whether a GPU is cordoned because of its faults, not by an operator."""
    gpu = node.by_uuid.get(uuid)
    seen = state.faults.get((node.name, uuid))
    if (node.name, uuid) in state.resting:
        return False
    return gpu is not None and gpu.drained and seen is not None and len(seen) >= state.limits.gpu_faults


def _cordon(state: State, node: Node, gpu: Gpu, seen: list[tuple[Micros, str]]) -> bool:
    if len(seen) < state.limits.gpu_faults or not _may_go(state, gpu):
        return False
    gpu.drained = True
    state.resting.pop((node.name, gpu.uuid), None)
    return True


def _may_go(state: State, gpu: Gpu) -> bool:
    gone = 0
    others = 0
    in_all = 0
    for node in state.cluster.nodes:
        for each in node.gpus:
            in_all += 1
            if each is not gpu and ((node.name, each.uuid) in state.resting or is_cordoned(state, node, each.uuid)):
                gone += 1
            elif node.up and not node.draining and each is not gpu and each.open:
                others += 1
    return others > 0 and (gone == 0 or (gone + 1) * _SHARE <= in_all)
