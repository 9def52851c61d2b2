"""Where a demand fits and how well: a vector over nodes that is looked at again only where nodes changed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.cluster import Cluster, pick_gpus
from engine.entities import Node
from engine.levels.scorers import Scorer
from engine.levels.scoring.draws import draw
from engine.levels.scoring.protocol import DeviceScorer, fitting_devices, is_shared
from engine.resources import WHOLE_GPU, Demand, GpuGrant, GpuSpec

TIES = ("first", "last", "name", "random")
"""Which of several best nodes is taken: the one that joined first or last, the smallest name, or any (drawn by the task)."""


class Fit:
    """The masked scores of all nodes for one demand; -1 where it does not fit.

    With `empty`, only nodes without any Pod count (for a group that wants a node for itself). Nodes that a group has for itself
    never count here: its own tasks look at their node directly, by `fits`.
    """

    __slots__ = (
        "_amounts",
        "_cluster",
        "_cursor",
        "_devices",
        "_epoch",
        "_names",
        "_scorers",
        "_tie",
        "demand",
        "empty",
        "scores",
    )

    def __init__(
        self,
        cluster: Cluster,
        demand: Demand,
        scorers: tuple[tuple[Scorer, int], ...],
        empty: bool = False,
        tie: str = "first",
    ) -> None:
        self.demand = demand
        self.empty = empty
        self._tie = tie
        self._names: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        advice = [each for each, _ in scorers if isinstance(each, DeviceScorer)] if is_shared(demand) else []
        self._devices = advice[0] if advice else None
        self._cluster = cluster
        self._amounts = cluster.amounts(demand)
        self._scorers = tuple(pair for pair in scorers if pair[1])
        self._epoch = -1
        self._cursor = 0
        self.scores: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def refresh(self) -> None:
        """Look again at every node that changed since the last call."""
        cluster = self._cluster
        changes = cluster.changes
        if self._epoch == cluster.epoch and len(self.scores) == len(cluster):
            new = len(changes) - self._cursor
            if new == 0:
                return
            if new * 8 < len(cluster) or new < 16:
                scores, nodes = self.scores, cluster.nodes
                for row in dict.fromkeys(changes[self._cursor :]) if new > 1 else changes[self._cursor :]:
                    scores[row] = self._score(nodes[row])
                self._cursor = len(changes)
                return
        self._refill()
        self._epoch = cluster.epoch
        self._cursor = len(changes)

    def best(self, key: int = 0) -> Node | None:
        """Return the best node, or None when none fits; the tie rule decides between equals, where it draws by `key`."""
        self.refresh()
        if not len(self.scores):
            return None
        row = int(self.scores.argmax())
        if self.scores[row] < 0:
            return None
        return self._cluster.nodes[row if self._tie == "first" else self._among(row, key)]

    def grants(self, node: Node) -> tuple[GpuGrant, ...] | None:
        """Choose devices of a node as the scorers advise; None when too few fit."""
        if self._devices is None:
            return pick_gpus(node, self.demand)
        fitting = fitting_devices(node, self.demand)
        if not fitting:
            return None
        gpu = self._devices.device(node, self.demand, fitting)
        return (GpuGrant(gpu.uuid, self.demand.gpu_share, self.demand.gpu_memory_bytes),)

    def score(self, node: Node) -> int:
        """Return a node's masked score as of the last refresh."""
        return int(self.scores[node.index])

    def fits(self, node: Node) -> bool:
        """Tell whether the demand fits on a node now, whoever has the node for itself."""
        if not node.up or node.draining:
            return False
        free = node.free
        for column, amount in self._amounts:
            if free[column] < amount:
                return False
        demand = self.demand
        need = demand.gpus
        if need:
            share, memory, models = demand.gpu_share, demand.gpu_memory_bytes, demand.gpu_models
            for g in node.gpus:
                if g.share_free >= share and g.memory_free >= memory and (not models or g.model in models) and g.open:
                    need -= 1
                    if need == 0:
                        return True
            return False
        return True

    def _among(self, row: int, key: int) -> int:
        """Return the row that the tie rule takes among those with the score of a row."""
        rows = np.flatnonzero(self.scores == self.scores[row])
        if self._tie == "last":
            return int(rows[-1])
        if self._tie == "random":
            return int(rows[draw(key, len(rows)) % len(rows)])
        if len(self._names) != len(self.scores):
            order = sorted(range(len(self.scores)), key=lambda at: self._cluster.nodes[at].name)
            self._names = np.empty(len(order), dtype=np.int64)
            self._names[order] = np.arange(len(order))
        return int(rows[self._names[rows].argmin()])

    def _score(self, node: Node) -> int:
        if node.exclusive is not None or (self.empty and node.pods) or not self.fits(node):
            return -1
        cluster, demand = self._cluster, self.demand
        return sum(weight * scorer.node(cluster, node, demand) for scorer, weight in self._scorers)

    def _refill(self) -> None:
        cluster, demand = self._cluster, self.demand
        n = len(cluster)
        good = cluster.is_open[:n] & (cluster.exclusive[:n] < 0)
        if self.empty:
            good &= cluster.pods[:n] == 0
        for column, amount in self._amounts:
            good &= cluster.free[:n, column] >= amount
        if demand.gpus:
            fitting = (cluster.gpu_share[:n] >= demand.gpu_share) & (cluster.gpu_memory[:n] >= demand.gpu_memory_bytes)
            if demand.gpu_models:
                fitting &= np.isin(cluster.gpu_model[:n], [cluster.model(name) for name in demand.gpu_models])
            good &= fitting.sum(axis=1) >= demand.gpus
        scores = np.zeros(n, dtype=np.int64)
        for scorer, weight in self._scorers:
            scores += weight * scorer.nodes(cluster, demand)
        self.scores = np.where(good, scores, -1)


def possible(cluster: Cluster, demand: Demand, members: int = 1, together: bool = False) -> bool:
    """Tell whether the known nodes could ever hold this many Pods of a demand, were they empty, up and well.

    With `together` one node must hold them all.
    """
    have = 0
    for node in cluster.nodes:
        count = places_on(cluster, node, demand, members)
        have = max(have, count) if together else have + count
        if have >= members:
            return True
    return False


def places_on(cluster: Cluster, node: Node, demand: Demand, most: int = 1) -> int:
    """Return how many Pods of a demand, at most `most`, a node could ever hold."""
    totals = cluster.totals(node.spec)
    count = min((totals[column] // amount for column, amount in cluster.amounts(demand)), default=most)
    if demand.gpus and count:
        count = min(count, _gpu_places(node.spec.gpus, demand, most))
    return min(count, most)


def _gpu_places(gpus: tuple[GpuSpec, ...], demand: Demand, most: int) -> int:
    """Return how many Pods (at most `most`) the empty devices of a node hold, each Pod on `gpus` different ones."""
    places = []
    for gpu in gpus:
        if gpu.memory_bytes < demand.gpu_memory_bytes or (demand.gpu_models and gpu.model not in demand.gpu_models):
            continue
        by_memory = most
        if demand.gpu_share < WHOLE_GPU and demand.gpu_memory_bytes:
            by_memory = gpu.memory_bytes // demand.gpu_memory_bytes
        places.append(min(most, WHOLE_GPU // demand.gpu_share, by_memory))
    count = most
    while count and sum(min(place, count) for place in places) < count * demand.gpus:
        count -= 1
    return count
