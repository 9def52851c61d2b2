"""What nodes hold of models' files: what they report, what was ordered there since, and what a load from each place takes.

Where a node never reports, the models of its Pods and of prefetches are taken for cached, as far as they are remembered. Where it
does, its word counts; an order that it does not speak of yet is believed for `FETCH_US`, a model of a living Pod always.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from engine.entities import Node, Pod
from engine.resources import ResidentModel, Tier
from engine.tasks import SECOND, Micros, PodState

if TYPE_CHECKING:
    from engine.state import State

STORE: Final = 0
"""Rank of a place: the farther, the lower."""
ON_DISK: Final = 1
IN_MEMORY: Final = 2
RANKS: Final = {str(Tier.DISK): ON_DISK, str(Tier.MEMORY): IN_MEMORY}
FETCH_US: Final = 600 * SECOND
"""How long an order to bring a model is believed though the node's reports do not speak of it."""
ASSUMED_PERMILLE: Final = (0, 800, 950)
"""Share of a load from the store that a place spares while too few loads were seen, by rank."""


def take_stock(state: State, now: Micros, node: Node, resident: Sequence[ResidentModel]) -> None:
    """A node said what it holds, those that matter most first; more than are remembered per node are cut off."""
    cluster = state.cluster
    most = state.limits.models_per_node
    found: dict[str, int] = {}
    pinned: dict[str, None] = {}
    for each in resident[:most]:
        if each.model:
            found[each.model] = max(found.get(each.model, STORE), RANKS[str(each.tier)])
            if each.pinned:
                pinned[each.model] = None
    living = {pod.model for pod in node.pods.values() if pod.state is not PodState.GONE}
    known = node.expected if node.tiers is not None else dict.fromkeys(node.models, now)
    believed: dict[str, Micros] = {
        model: since
        for model, since in known.items()
        if model not in found and (model in living or now - since < FETCH_US)
    }
    for model in node.pins:
        if model in believed and model not in found:
            pinned[model] = None
    cluster.forget_models(node)
    for model in [*reversed(found), *believed]:
        cluster.remember_model(node, model, most)
    node.tiers = {model: rank for model, rank in found.items() if model in node.models}
    node.expected = {model: since for model, since in believed.items() if model in node.models}
    for model in pinned:
        cluster.pin_model(node, model)
    for model in node.models:
        cluster.place_changed(node, model)


def learn_load(state: State, pod: Pod, spent: Micros) -> None:
    """A Pod has loaded its model from where it lay when the Pod was ordered: keep a moving average for the place."""
    rank = pod.loads_from
    if rank >= 0 and pod.model:
        known = state.loads_us[rank]
        state.loads_us[rank] = (7 * known + spent) // 8 if known else spent


def spared_permille(state: State) -> tuple[int, int, int, int]:
    """Return which share of a load from the store a place spares, in thousandths, by `engine.cluster.place_code`."""
    _, disk, memory = spared_by_rank(state)
    return 0, 1000, disk, memory  # Where a node never reported, a model counts in full.


def spared_by_rank(state: State) -> tuple[int, int, int]:
    """Return which share of a load from the store each place spares, in thousandths, by rank; as measured once all were."""
    store, disk, memory = state.loads_us
    assumed = ASSUMED_PERMILLE
    if not store:
        return assumed
    from_disk = 1000 * max(0, store - disk) // store if disk else assumed[ON_DISK]
    from_memory = 1000 * max(0, store - memory) // store if memory else max(from_disk, assumed[IN_MEMORY])
    return 0, min(from_disk, from_memory), from_memory
