"""Scorers that look at the devices of a node: GPU packing and GPU clustering."""

from __future__ import annotations

import numpy as np

from engine.cluster import Cluster
from engine.entities import Node
from engine.levels.scoring.protocol import Scores, fitting_devices, fitting_rows, open_shares, share_rows
from engine.levels.scoring.vectors import MOST_GPU_SHARE
from engine.resources import WHOLE_GPU, Demand


class Packing:
    """Devices that are in use first, then free devices of nodes in use, then nodes of which no device is in use.

    Score: 50 to 100 hundredths when only devices in use are taken, the fuller the better; 33 to 50 when free ones are needed, the
    fewer the better; up to 33 on a node that is not in use, the fewer devices it has the better. A demand without GPUs: 0.
    """

    def node(self, cluster: Cluster, node: Node, demand: Demand) -> int:
        """Return thousandths."""
        if not demand.gpus:
            return 0
        shares = open_shares(node)
        free = shares.count(WHOLE_GPU)
        if free == len(shares):
            return max(33 - free, free) * 10
        used = sorted(g.share_free for g in fitting_devices(node, demand) if g.share_free < WHOLE_GPU)[: demand.gpus]
        fresh = demand.gpus - len(used)
        if fresh:
            return max(33, 50 - fresh) * 10
        return max(50, 100 - sum(share // 10 for share in used) // 10) * 10

    def nodes(self, cluster: Cluster, demand: Demand) -> Scores:
        """Return thousandths for every node."""
        n = len(cluster)
        if not demand.gpus:
            return np.zeros(n, dtype=np.int64)
        shares = share_rows(cluster)
        free = (shares == WHOLE_GPU).sum(axis=1)
        count = (cluster.gpu_size[:n] >= 0).sum(axis=1)
        fits = fitting_rows(cluster, demand) & (shares < WHOLE_GPU)
        order = np.sort(np.where(fits, shares, WHOLE_GPU), axis=1)[:, : demand.gpus]
        taken = order < WHOLE_GPU
        fresh = demand.gpus - taken.sum(axis=1)
        rest = (np.where(taken, order, 0) // 10).sum(axis=1)
        score = np.where(fresh > 0, np.maximum(33, 50 - fresh), np.maximum(50, 100 - rest // 10))
        scores: Scores = np.where(free == count, np.maximum(33 - free, free), score) * 10
        return scores


class Clustering:
    """Keep Pods of one kind (a shared GPU, one GPU, two GPUs ...) together, and fill nodes up.

    Score: 75 to 100 hundredths on a node where only Pods of this kind are, 50 to 75 where others are too, 25 to 50 on a node
    without GPU Pods, up to 25 on a node of other kinds; the fuller the node the better within each. A demand without GPUs: 0.
    """

    def node(self, cluster: Cluster, node: Node, demand: Demand) -> int:
        """Return thousandths."""
        if not demand.gpus:
            return 0
        full = max(0, 25 * (MOST_GPU_SHARE - sum(open_shares(node))) // MOST_GPU_SHARE)
        kinds = {kind_of(pod.demand) for pod in node.pods.values()}
        kinds.discard(0)
        if kind_of(demand) in kinds:
            return (full + (75 if len(kinds) == 1 else 50)) * 10
        return (full + (0 if kinds else 25)) * 10

    def nodes(self, cluster: Cluster, demand: Demand) -> Scores:
        """Return thousandths for every node."""
        return np.array([self.node(cluster, node, demand) for node in cluster.nodes], dtype=np.int64)


def kind_of(demand: Demand) -> int:
    """Return the kind of a demand: 0 without GPUs, -1 for a part of one GPU, else its number of GPUs."""
    if demand.gpus == 1 and demand.gpu_share < WHOLE_GPU:
        return -1
    return demand.gpus
