"""Warm nodes before cold ones: a new Pod goes where its model's files lie near, as far as the profile weighs that.

What a place is worth is the share of a load from the store that it spares, as loads were measured; so a disk that is hardly faster
than the store draws nobody. Where a node never reported its caches, models that were ordered there count in full.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.cluster import Cluster, place_code
from engine.entities import Node
from engine.fit import Fit
from engine.state import State
from engine.stock import spared_permille

Spared = tuple[int, int, int, int]
"""Share of a load from the store that a place spares, in thousandths, by `engine.cluster.place_code`."""
EVERYWHERE: Spared = (0, 1000, 1000, 1000)
"""Wherever a node holds a model, it counts in full."""
FEW = 32
"""Nodes that are looked at one by one; more of them all at once."""


def warmest(state: State, fit: Fit, best: Node, model: str, bonus: int) -> Node:
    """Return the node with the best score plus bonus among those that hold the model and `best`, which is the best without."""
    cluster = state.cluster
    rows = cluster.cached.get(model)
    if not rows:
        return best
    spared = spared_permille(state)
    own = spared[place_code(best, model)]
    if own == 1000:
        return best
    top = (fit.score(best) * 1000 + bonus * own, -best.index)
    if len(rows) > FEW:
        worths = fit.scores * 1000 + bonus * np.array(spared, dtype=np.int64)[cluster.places(model)]
        rows = {int(np.where(fit.scores >= 0, worths, -1).argmax()): None}
    for row in rows:
        score = int(fit.scores[row])
        if score < 0:
            continue
        node = cluster.nodes[row]
        worth = (score * 1000 + bonus * spared[place_code(node, model)], -row)
        if worth > top:
            best, top = node, worth
    return best


def add_warmth(cluster: Cluster, spared: Spared, scores: npt.NDArray[np.int64], model: str, bonus: int) -> None:
    """Add to the scores of nodes that hold a model what that is worth."""
    if bonus and model in cluster.cached:
        scores += bonus * np.array(spared, dtype=np.int64)[cluster.places(model)] // 1000
