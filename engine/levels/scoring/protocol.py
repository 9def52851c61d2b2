"""What a scorer is: how good a node is for a demand that fits there. Larger is better; thousandths, whole numbers, never below 0.

Each comes twice, for one node in plain integers and for many rows in numpy, and both give the same number: the first refreshes a
node that changed, the second fills a cache. Whole numbers make that exact on every machine. A score may depend on the node's own
row and on the demand only: a cache looks again at a node when that node changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from engine.cluster import Cluster
from engine.entities import Gpu, Node
from engine.resources import WHOLE_GPU, Demand

Scores = npt.NDArray[np.int64]


@runtime_checkable
class Scorer(Protocol):
    """Scores nodes for a demand."""

    def node(self, cluster: Cluster, node: Node, demand: Demand) -> int:
        """Return the score of one node."""
        ...

    def nodes(self, cluster: Cluster, demand: Demand) -> Scores:
        """Return int64[n] scores of all nodes."""
        ...


@runtime_checkable
class DeviceScorer(Protocol):
    """A scorer that also says which device of the node a shared Pod takes."""

    def device(self, node: Node, demand: Demand, fitting: Sequence[Gpu]) -> Gpu:
        """Return one of the devices (at least one) that have the share and the memory."""
        ...


def open_shares(node: Node) -> list[int]:
    """Return the free share of every device that new work may use, never below 0."""
    return [max(0, g.share_free) for g in node.gpus if g.open]


def fitting_devices(node: Node, demand: Demand) -> list[Gpu]:
    """Return the devices that have the share and the memory for one GPU of a demand."""
    share, memory, models = demand.gpu_share, demand.gpu_memory_bytes, demand.gpu_models
    return [
        g
        for g in node.gpus
        if g.share_free >= share and g.memory_free >= memory and g.open and (not models or g.model in models)
    ]


def share_rows(cluster: Cluster) -> Scores:
    """Return int64[n, gpus]: free shares, 0 where a device is absent, closed or claimed."""
    shares: Scores = np.maximum(0, cluster.gpu_share[: len(cluster)])
    return shares


def fitting_rows(cluster: Cluster, demand: Demand) -> npt.NDArray[np.bool_]:
    """Return bool[n, gpus]: the devices that have the share and the memory for one GPU of a demand."""
    n = len(cluster)
    fitting = (cluster.gpu_share[:n] >= demand.gpu_share) & (cluster.gpu_memory[:n] >= demand.gpu_memory_bytes)
    if demand.gpu_models:
        fitting &= np.isin(cluster.gpu_model[:n], [cluster.model(name) for name in demand.gpu_models])
    return fitting


def is_shared(demand: Demand) -> bool:
    """Tell whether a demand takes a part of one device."""
    return demand.gpus == 1 and demand.gpu_share < WHOLE_GPU
