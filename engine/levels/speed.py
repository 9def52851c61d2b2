"""Unlike GPUs: a task's new Pod goes where its predicted run is short, as far as the profile weighs that.

The prediction belongs to the task, the scores to its demand; so this is added to the scores when a task is placed.
"""

from __future__ import annotations

import numpy as np

from engine.cluster import Cluster
from engine.entities import Node, Task
from engine.fit import Fit
from engine.levels.warmth import EVERYWHERE, Spared, add_warmth


def fastest(
    cluster: Cluster, fit: Fit, task: Task, weight: int, cached_bonus: int, spared: Spared = EVERYWHERE
) -> Node | None:
    """Return the node with the best score, where a GPU model that runs the task in the shortest time adds the whole weight.

    A model that takes twice the time adds half of it, and so on; a node's GPUs count as of the model of its first one. None when
    the demand fits nowhere.
    """
    fit.refresh()
    good = fit.scores >= 0
    if not good.any():
        return None
    estimate = task.estimate
    scores = fit.scores.copy()
    if estimate is not None and estimate.serves_every_model and cluster.models:
        run_us = [max(1, estimate.duration(name).mean) for name in cluster.models]
        least = min(run_us)
        bonus = np.array([weight * least // each for each in run_us] + [0], dtype=np.int64)
        scores += bonus[cluster.gpu_model[: len(scores), 0]]
    add_warmth(cluster, spared, scores, task.spec.model, cached_bonus)
    return cluster.nodes[int(np.where(good, scores, -1).argmax())]
