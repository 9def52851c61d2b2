"""Fragmentation gradient descent (FGD) as a scorer: put a Pod where it makes the least free GPU useless for the usual work."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.cluster import CPU, Cluster
from engine.entities import Gpu, Node
from engine.levels.scoring.fragmentation import Fragmentation, Typical
from engine.levels.scoring.protocol import Scores, fitting_devices, fitting_rows, is_shared, share_rows
from engine.resources import WHOLE_GPU, Demand

EIGHTHS = tuple(
    Typical(count, gpus=gpus, gpu_share=share)
    for gpus, share, count in (
        (1, 125, 10),
        (1, 250, 20),
        (1, 500, 20),
        (1, 1000, 40),
        (2, 1000, 4),
        (4, 1000, 4),
        (8, 1000, 2),
    )
)
"""The usual work when a profile does not say: parts of a GPU, single GPUs, and some training on several."""


class Fgd:
    """Weng et al., USENIX ATC 2023, section 4.2: the node, and the device on it, where fragmentation grows least.

    A node's GPUs count as of the model of its first open one.
    """

    def __init__(self, typical: Sequence[Typical] = EIGHTHS) -> None:
        self._measure = Fragmentation(typical)

    def node(self, cluster: Cluster, node: Node, demand: Demand) -> int:
        """Return thousandths: 500 where fragmentation stays the same."""
        fitting = fitting_devices(node, demand) if demand.gpus else []
        if len(fitting) < demand.gpus:
            return 0
        if is_shared(demand):
            decrease = max(self._decreases(node, demand, fitting))
        else:
            taken = taken_devices(demand, fitting)
            decrease = self._decrease(node, demand, {id(gpu): demand.gpu_share for gpu in taken})
        return self._measure.score(decrease) * 10

    def nodes(self, cluster: Cluster, demand: Demand) -> Scores:
        """Return thousandths for every node."""
        n = len(cluster)
        if demand.gpus > 1 and demand.gpu_share < WHOLE_GPU:
            return np.array([self.node(cluster, node, demand) for node in cluster.nodes], dtype=np.int64)
        measure = self._measure
        shares = share_rows(cluster)
        model = self._model_rows(cluster)
        cpu = cluster.free[:n, CPU]
        steps = np.array(measure.cpu_steps, dtype=np.int64)
        free = (shares == WHOLE_GPU).sum(axis=1)
        before = self._of(model, np.searchsorted(steps, cpu, side="right"), shares, free)
        after = np.searchsorted(steps, cpu - demand.cpu_milli, side="right")
        fits = fitting_rows(cluster, demand)
        if is_shared(demand):
            table = measure.share_table
            column, step = model[:, None], after[:, None]
            fewer = free[:, None] - (shares == WHOLE_GPU)
            sums = table[column, step, shares].sum(axis=1)[:, None] - table[column, step, shares]
            sums = (
                sums + table[column, step, np.maximum(0, shares - demand.gpu_share)] - self._wholes(column, step, fewer)
            )
            left = np.where(fits, sums, np.iinfo(np.int64).max // 4).min(axis=1)
        else:
            taken = fits & (np.cumsum(fits, axis=1) <= demand.gpus) if demand.gpus else np.zeros_like(fits)
            left = self._of(model, after, np.where(taken, 0, shares), free - taken.sum(axis=1))
        scores = np.searchsorted(np.array(measure.steps, dtype=np.int64), before - left, side="right") * 10
        enough = fits.sum(axis=1) >= demand.gpus
        result: Scores = np.where(enough, scores, 0)
        return result

    def device(self, node: Node, demand: Demand, fitting: Sequence[Gpu]) -> Gpu:
        """Return the device with the best score, the first among equals."""
        measure = self._measure
        scores = [measure.score(decrease) for decrease in self._decreases(node, demand, fitting)]
        return fitting[scores.index(max(scores))]

    def _decreases(self, node: Node, demand: Demand, fitting: Sequence[Gpu]) -> list[int]:
        seen: dict[int, int] = {}
        found = []
        for gpu in fitting:
            if gpu.share_free not in seen:
                seen[gpu.share_free] = self._decrease(node, demand, {id(gpu): demand.gpu_share})
            found.append(seen[gpu.share_free])
        return found

    def _decrease(self, node: Node, demand: Demand, taken: dict[int, int]) -> int:
        measure = self._measure
        gpus = [gpu for gpu in node.gpus if gpu.open]
        model = measure.model(gpus[0].model) if gpus else 0
        cpu = node.free[CPU]
        before = measure.of(model, measure.cpu_class(cpu), [gpu.share_free for gpu in gpus])
        after = [gpu.share_free - taken.get(id(gpu), 0) for gpu in gpus]
        return before - measure.of(model, measure.cpu_class(cpu - demand.cpu_milli), after)

    def _model_rows(self, cluster: Cluster) -> Scores:
        n = len(cluster)
        if not n:
            return np.zeros(0, dtype=np.int64)
        known = np.array([self._measure.model(name) for name in cluster.models] + [0], dtype=np.int64)
        is_open = cluster.gpu_size[:n] >= 0
        first = is_open.argmax(axis=1)
        rows = np.arange(n)
        model: Scores = np.where(is_open.any(axis=1), known[cluster.gpu_model[rows, first]], 0)
        return model

    def _of(self, model: Scores, cpu_class: Scores, shares: Scores, free: Scores) -> Scores:
        sums = self._measure.share_table[model[:, None], cpu_class[:, None], shares].sum(axis=1)
        of: Scores = sums - self._wholes(model, cpu_class, free)
        return of

    def _wholes(self, model: Scores, cpu_class: Scores, free: Scores) -> Scores:
        table = self._measure.whole_table
        wholes: Scores = free * table[model, cpu_class, np.minimum(free, table.shape[2] - 1)]
        return wholes


def taken_devices(demand: Demand, fitting: Sequence[Gpu]) -> Sequence[Gpu]:
    """Return what `pick_gpus` takes without advice: whole devices in their order, parts of the fullest ones."""
    if demand.gpu_share < WHOLE_GPU:
        fitting = sorted(fitting, key=lambda gpu: (gpu.share_free, gpu.memory_free))
    return fitting[: demand.gpus]
