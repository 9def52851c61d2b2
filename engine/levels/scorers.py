"""The scorers of the placement level by name, and the two that the profiles have always had: load balance and best fit."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import numpy as np

from engine.cluster import CPU, MEMORY, Cluster
from engine.entities import Node
from engine.levels.scoring.devices import Clustering, Packing
from engine.levels.scoring.fragmentation import Typical
from engine.levels.scoring.gradient import Fgd
from engine.levels.scoring.plain import Balanced, FirstFit, Random
from engine.levels.scoring.protocol import Scorer, Scores
from engine.levels.scoring.vectors import BestFitVector, DotProduct, WorstFit
from engine.resources import Demand

__all__ = ["SCORERS", "BestFit", "Scorer", "Scores", "Spread", "scorer"]


class Spread:
    """Load balance: the larger the free fraction of GPUs, CPU and memory, the better (LeastAllocated of kube-scheduler)."""

    def node(self, cluster: Cluster, node: Node, demand: Demand) -> int:
        """Return thousandths, the mean over what the node has at all."""
        parts = total = 0
        gpus = [g.share_free for g in node.gpus if g.open]
        if gpus:
            parts, total = parts + 1, total + max(0, sum(gpus)) // len(gpus)
        spec = node.spec
        if spec.cpu_milli:
            parts, total = parts + 1, total + max(0, node.free[CPU]) * 1000 // spec.cpu_milli
        if spec.memory_bytes:
            parts, total = parts + 1, total + max(0, node.free[MEMORY]) * 1000 // spec.memory_bytes
        return total // max(1, parts)

    def nodes(self, cluster: Cluster, demand: Demand) -> Scores:
        """Return thousandths for every node."""
        n = len(cluster)
        share = cluster.gpu_share[:n]
        is_open = cluster.gpu_size[:n] >= 0
        count = is_open.sum(axis=1)
        gpu = np.maximum(0, np.where(is_open, share, 0).sum(axis=1)) // np.maximum(1, count)
        cpu_total, memory_total = cluster.total[:n, CPU], cluster.total[:n, MEMORY]
        cpu = np.maximum(0, cluster.free[:n, CPU]) * 1000 // np.maximum(1, cpu_total)
        memory = np.maximum(0, cluster.free[:n, MEMORY]) * 1000 // np.maximum(1, memory_total)
        parts = (count > 0).astype(np.int64) + (cpu_total > 0) + (memory_total > 0)
        scores: Scores = ((count > 0) * gpu + (cpu_total > 0) * cpu + (memory_total > 0) * memory) // np.maximum(
            1, parts
        )
        return scores


class BestFit:
    """Keep large room whole: the less GPU share (CPU, where a node has no GPU) is left on the node, the better."""

    def node(self, cluster: Cluster, node: Node, demand: Demand) -> int:
        """Return thousandths of the node that are in use."""
        gpus = [g.share_free for g in node.gpus if g.open]
        if gpus:
            return 1000 - max(0, sum(gpus)) // len(gpus)
        return 1000 - max(0, node.free[CPU]) * 1000 // max(1, node.spec.cpu_milli)

    def nodes(self, cluster: Cluster, demand: Demand) -> Scores:
        """Return thousandths for every node."""
        n = len(cluster)
        is_open = cluster.gpu_size[:n] >= 0
        count = is_open.sum(axis=1)
        gpu = np.maximum(0, np.where(is_open, cluster.gpu_share[:n], 0).sum(axis=1)) // np.maximum(1, count)
        cpu = np.maximum(0, cluster.free[:n, CPU]) * 1000 // np.maximum(1, cluster.total[:n, CPU])
        scores: Scores = 1000 - np.where(count > 0, gpu, cpu)
        return scores


SCORERS: dict[str, Scorer] = {
    "spread": Spread(),
    "best_fit": BestFit(),
    "first_fit": FirstFit(),
    "worst_fit": WorstFit(),
    "best_fit_vector": BestFitVector(),
    "dot_product": DotProduct(),
    "balanced": Balanced(),
    "packing": Packing(),
    "clustering": Clustering(),
    "fgd": Fgd(),
    "random": Random(),
}
"""Name in `[placement] scorers` -> scorer."""


def scorer(name: str, typical: Sequence[Typical] = ()) -> Scorer:
    """Return the scorer of that name; `fgd` goes by the typical shapes, where there are some.

    A name with a colon is a scorer of one's own, ``module:Class``: the module is imported. Raises ValueError when that fails.
    """
    if name == "fgd" and typical:
        return Fgd(typical)
    if ":" not in name:
        return SCORERS[name]
    module, _, class_name = name.partition(":")
    try:
        made = getattr(import_module(module), class_name)()
    except (ImportError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"placement.scorers: {name!r} cannot be made ({error}); the module must be on PYTHONPATH and hold the class"
        ) from error
    if not isinstance(made, Scorer):
        raise ValueError(f"placement.scorers: {name!r} is no scorer; it needs the methods node and nodes")
    return made
