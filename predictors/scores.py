"""How good predictions are: errors, ranks, calibration, and what a scheduler gains from them."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Series = NDArray[np.float64]

SERVERS = (4, 16)
LOADS = (0.7, 0.9)
_SEEDS = 3


@dataclass(frozen=True, slots=True)
class PointScores:
    """Errors of one point prediction per task. Shares are in per cent."""

    mape: float
    medape: float
    mae_s: float
    log_rmse: float
    r2: float
    spearman: float
    """NaN for a constant; R2 too is NaN where the truth is one."""
    sjf_gain: float
    """What shortest-predicted-first gains over FIFO, as a share of what the truth would gain."""


def point_scores(truth_s: Series, predicted_s: Series, mean_s: Series | None = None) -> PointScores:
    """Score predicted against true seconds.

    R2 and SJF gain are those of ``mean_s`` where it is given: means minimise squares and order queues.
    """
    relative = np.abs(predicted_s - truth_s) / truth_s
    best = predicted_s if mean_s is None else mean_s
    spread = float(np.square(truth_s - truth_s.mean()).sum())
    return PointScores(
        mape=100 * float(relative.mean()),
        medape=100 * float(np.median(relative)),
        mae_s=float(np.abs(predicted_s - truth_s).mean()),
        log_rmse=float(np.sqrt(np.square(np.log(predicted_s / truth_s)).mean())),
        r2=1.0 - float(np.square(best - truth_s).sum()) / spread if spread > 0.0 else float("nan"),
        spearman=spearman(truth_s, predicted_s),
        sjf_gain=100 * sjf_gain(truth_s, best),
    )


def spearman(left: Series, right: Series) -> float:
    """Return the rank correlation, ties by their mean rank; NaN when one side is constant."""
    ranks_left, ranks_right = _ranks(left), _ranks(right)
    if ranks_left.std() == 0.0 or ranks_right.std() == 0.0:
        return float("nan")
    return float(np.corrcoef(ranks_left, ranks_right)[0, 1])


def pinball(truth_s: Series, quantiles_s: Series, levels: Sequence[float]) -> float:
    """Return the mean quantile loss in seconds; ``quantiles_s`` has shape (tasks, levels)."""
    over = truth_s[:, None] - quantiles_s
    level = np.array(levels)[None, :]
    return float(np.maximum(level * over, (level - 1.0) * over).mean())


def auc(happened: NDArray[np.bool_], chance: Series) -> float:
    """Return the chance that a case that happened was given more than one that did not; NaN when there is only one kind."""
    positives = int(happened.sum())
    negatives = len(happened) - positives
    if not positives or not negatives:
        return float("nan")
    return float((_ranks(chance)[happened].sum() - positives * (positives - 1) / 2) / (positives * negatives))


def sjf_gain(truth_s: Series, predicted_s: Series) -> float:
    """Return the share of the oracle's cut in mean waiting that ordering by a prediction achieves.

    Non-preemptive queues of 4 and 16 servers at loads of .7 and .9, Poisson arrivals, three seeds, the same for all orders.
    """
    shares = []
    for servers in SERVERS:
        for load in LOADS:
            gap = float(truth_s.mean()) / (servers * load)
            for seed in range(_SEEDS):
                random = np.random.default_rng(seed)
                order = random.permutation(len(truth_s))
                truth, predicted = truth_s[order], predicted_s[order]
                arrivals = np.cumsum(random.exponential(gap, len(truth)))
                fifo = _mean_wait(arrivals, truth, np.zeros(len(truth)), servers)
                ours = _mean_wait(arrivals, truth, predicted, servers)
                oracle = _mean_wait(arrivals, truth, truth, servers)
                if fifo > oracle:
                    shares.append((fifo - ours) / (fifo - oracle))
    return float(np.mean(shares)) if shares else float("nan")


def _mean_wait(arrivals: Series, run_s: Series, keys: Series, servers: int) -> float:
    arrive, run, key = arrivals.tolist(), run_s.tolist(), keys.tolist()
    free = [0.0] * servers
    waiting: list[tuple[float, int]] = []
    total, next_in, count = 0.0, 0, len(arrive)
    for _ in range(count):
        at = free[0]
        if not waiting:
            at = max(at, arrive[next_in])
        while next_in < count and arrive[next_in] <= at:
            heapq.heappush(waiting, (key[next_in], next_in))
            next_in += 1
        _, chosen = heapq.heappop(waiting)
        total += at - arrive[chosen]
        heapq.heapreplace(free, at + run[chosen])
    return total / count


def _ranks(values: Series) -> Series:
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2.0)[where].astype(np.float64)
