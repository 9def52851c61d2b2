"""Scorers that see a node and a demand as vectors of CPU and GPU: dot product, best fit and worst fit over both.

Amounts are taken in parts of the largest node that the formulas know (128 cores, 8 GPUs), so that the score of a node never depends
on which other nodes are there. The formulas serve plain numbers and arrays alike; the packing simulator uses them too.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from engine.cluster import CPU, Cluster
from engine.entities import Node
from engine.levels.scoring.protocol import Scores, open_shares, share_rows
from engine.resources import Demand

MOST_CPU_MILLI = 128_000
MOST_GPU_SHARE = 8_000
RATIO = MOST_CPU_MILLI // MOST_GPU_SHARE
"""Thousandths of a core that weigh as much as a thousandth of a GPU."""

Amount = TypeVar("Amount", int, Scores)


def dot_product(free_cpu: Amount, free_gpu: Amount, cpu: Amount, gpu: Amount) -> Amount:
    """Return hundredths: the less a node's free vector points where the demand's does, the better (Tetris, turned round)."""
    product = free_cpu * cpu + (free_gpu * gpu) * (RATIO * RATIO)
    one = MOST_CPU_MILLI * MOST_CPU_MILLI
    return (product * -50 + 100 * one) // one


def least_left(free_cpu: Amount, free_gpu: Amount, cpu: Amount, gpu: Amount) -> Amount:
    """Return hundredths: the less CPU and GPU is left after the demand, the better; both weigh the same."""
    left = (free_cpu - cpu) + (free_gpu - gpu) * RATIO
    return (left * -100 + 200 * MOST_CPU_MILLI) // (2 * MOST_CPU_MILLI)


class _Vector:
    """One of the formulas as a scorer."""

    def __init__(self, sign: int, dot: bool) -> None:
        self._sign = sign
        self._dot = dot

    def node(self, cluster: Cluster, node: Node, demand: Demand) -> int:
        """Return thousandths."""
        made = dot_product if self._dot else least_left
        score = made(node.free[CPU], sum(open_shares(node)), demand.cpu_milli, demand.gpus * demand.gpu_share)
        score = score if self._sign > 0 else 100 - score
        return min(100, max(0, score)) * 10

    def nodes(self, cluster: Cluster, demand: Demand) -> Scores:
        """Return thousandths for every node."""
        made = dot_product if self._dot else least_left
        cpu = np.asarray(demand.cpu_milli, dtype=np.int64)
        gpu = np.asarray(demand.gpus * demand.gpu_share, dtype=np.int64)
        scores = made(cluster.free[: len(cluster), CPU], share_rows(cluster).sum(axis=1), cpu, gpu)
        scores = scores if self._sign > 0 else 100 - scores
        clipped: Scores = np.clip(scores, 0, 100) * 10
        return clipped


class DotProduct(_Vector):
    """Keep nodes whose free resources look like the demand for later: the alignment of Tetris (SIGCOMM 2014) as a cost."""

    def __init__(self) -> None:
        super().__init__(1, True)


class BestFitVector(_Vector):
    """The node on which the least CPU and GPU is left."""

    def __init__(self) -> None:
        super().__init__(1, False)


class WorstFit(_Vector):
    """The node on which the most CPU and GPU is left."""

    def __init__(self) -> None:
        super().__init__(-1, False)
