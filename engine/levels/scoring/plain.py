"""Scorers that need little: first fit, random, and kube-scheduler's balanced allocation."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import numpy as np

from engine.cluster import CPU, MEMORY, Cluster
from engine.entities import Gpu, Node
from engine.levels.scoring.draws import draw
from engine.levels.scoring.protocol import Scores, open_shares, share_rows
from engine.resources import WHOLE_GPU, Demand


class FirstFit:
    """Every node is as good as any other: the tie rule decides."""

    def node(self, cluster: Cluster, node: Node, demand: Demand) -> int:
        """Return 0."""
        return 0

    def nodes(self, cluster: Cluster, demand: Demand) -> Scores:
        """Return zeros."""
        return np.zeros(len(cluster), dtype=np.int64)


class Random:
    """A draw per node that is drawn anew whenever the node changes; without other scorers the random policy.

    The draw is keyed by the node's row and what is free there, so it needs no memory and replays alike.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def node(self, cluster: Cluster, node: Node, demand: Demand) -> int:
        """Return a draw from 0 to 999."""
        return draw(self._key(node), demand.gpus, demand.gpu_share, demand.cpu_milli) % 1000

    def nodes(self, cluster: Cluster, demand: Demand) -> Scores:
        """Return draws for every node."""
        return np.array([self.node(cluster, node, demand) for node in cluster.nodes], dtype=np.int64)

    def device(self, node: Node, demand: Demand, fitting: Sequence[Gpu]) -> Gpu:
        """Return any of the devices, each as likely."""
        return fitting[draw(self._key(node), -1) % len(fitting)]

    def _key(self, node: Node) -> int:
        return draw(self._seed, node.index, len(node.pods), *node.free, *(gpu.share_free for gpu in node.gpus))


class Balanced:
    """NodeResourcesBalancedAllocation of kube-scheduler: the more alike the used parts of CPU, memory and GPUs, the better."""

    def node(self, cluster: Cluster, node: Node, demand: Demand) -> int:
        """Return thousandths: 1000 less the standard deviation of the parts in use with the demand in place."""
        spec = node.spec
        parts = []
        shares = open_shares(node)
        if shares:
            used = len(shares) * WHOLE_GPU - sum(shares) + demand.gpus * demand.gpu_share
            parts.append(min(1000, used // len(shares)))
        if spec.cpu_milli:
            used = spec.cpu_milli - node.free[CPU] + demand.cpu_milli
            parts.append(min(1000, used * 1000 // spec.cpu_milli))
        if spec.memory_bytes:
            used = spec.memory_bytes - node.free[MEMORY] + demand.memory_bytes
            parts.append(min(1000, used * 1000 // spec.memory_bytes))
        if not parts:
            return 1000
        n, total = len(parts), sum(parts)
        return 1000 - isqrt(max(0, n * sum(part * part for part in parts) - total * total)) // n

    def nodes(self, cluster: Cluster, demand: Demand) -> Scores:
        """Return thousandths for every node."""
        n = len(cluster)
        shares = share_rows(cluster)
        count = (cluster.gpu_size[:n] >= 0).sum(axis=1)
        gpu_used = count * WHOLE_GPU - shares.sum(axis=1) + demand.gpus * demand.gpu_share
        parts = [(count > 0, np.minimum(1000, gpu_used // np.maximum(1, count)))]
        for column, amount in ((CPU, demand.cpu_milli), (MEMORY, demand.memory_bytes)):
            total = cluster.total[:n, column]
            used = total - cluster.free[:n, column] + amount
            parts.append((total > 0, np.minimum(1000, used * 1000 // np.maximum(1, total))))
        has = sum((known.astype(np.int64) for known, _ in parts), np.zeros(n, dtype=np.int64))
        total = sum((known * part for known, part in parts), np.zeros(n, dtype=np.int64))
        squares = sum((known * part * part for known, part in parts), np.zeros(n, dtype=np.int64))
        spread = np.sqrt(np.maximum(0, has * squares - total * total).astype(np.float64)).astype(np.int64)
        scores: Scores = 1000 - spread // np.maximum(1, has)
        return scores
