"""Measures what a trace asks for over time: how bursty its arrivals are, how heavy its tail, how many GPUs it wants at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.tasks import SECOND

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

WINDOWS_S = (("1min", 60), ("10min", 600), ("1h", 3600))
_FEWEST_WINDOWS = 10
"""Fewer windows than this say nothing of dispersion."""
_TAIL_SHARE = 0.01
_FEWEST_TAIL = 20


@dataclass(frozen=True, slots=True)
class Burst:
    """How unevenly tasks arrive. A Poisson process has a `gap_cv` and dispersions of 1."""

    gap_cv: float | None
    """Standard deviation of the gaps between arrivals over their mean; None for fewer than three arrivals."""
    dispersion: dict[str, float]
    """Variance over mean of the counts per window, for windows of which the trace holds at least ten."""
    peak_to_mean: dict[str, float]
    ties: float
    """Share of arrivals at the same instant as the one before."""


@dataclass(frozen=True, slots=True)
class Tail:
    """How unequal the tasks are."""

    index: float | None
    """Hill's estimate over the longest percent of run times: below 2 the variance does not settle, below 1 not even the mean."""
    squared_cv: float | None
    """Variance of run times over their squared mean; 1 for exponential ones."""
    top_share: float
    """Share of all GPU time that the biggest percent of tasks takes."""


def burst(at: Ints) -> Burst:
    """Measure arrivals, given in microseconds and in order."""
    seconds = (at - at[0]) / SECOND if len(at) else at / SECOND
    gaps = np.diff(seconds)
    dispersion, peaks = {}, {}
    for name, window_s in WINDOWS_S:
        if len(seconds) and seconds[-1] >= _FEWEST_WINDOWS * window_s:
            counts = np.bincount((seconds // window_s).astype(np.int64))
            dispersion[name] = float(counts.var() / counts.mean())
            peaks[name] = float(counts.max() / counts.mean())
    cv = float(gaps.std() / gaps.mean()) if len(gaps) > 1 and gaps.mean() > 0 else None
    return Burst(cv, dispersion, peaks, float((gaps == 0).mean()) if len(gaps) else 0.0)


def tail(work_s: Floats, gpu_seconds: Floats) -> Tail:
    """Measure how much of the work few tasks bring."""
    count = max(_FEWEST_TAIL, math.ceil(len(work_s) * _TAIL_SHARE))
    index = None
    if len(work_s) > 10 * _FEWEST_TAIL:
        longest = np.sort(work_s)[-count - 1 :]
        if longest[0] > 0:
            mean_log = float(np.log(longest[1:] / longest[0]).mean())
            index = 1 / mean_log if mean_log > 0 else None
    mean = float(work_s.mean()) if len(work_s) else 0.0
    squared = float(work_s.var()) / mean**2 if mean > 0 else None
    total = float(gpu_seconds.sum())
    biggest = np.sort(gpu_seconds)[-max(1, math.ceil(len(gpu_seconds) * _TAIL_SHARE)) :]
    return Tail(index, squared, float(biggest.sum()) / total if total > 0 else 0.0)


def wanted_by_hour(at: Ints, work: Ints, gpus: Floats) -> Floats:
    """Return the mean number of GPUs wanted in each hour from the first to the last arrival, if nothing ever waited.

    Times are in microseconds; `gpus` counts whole GPUs with fractions. The last hour counts as far as it goes.
    """
    if not len(at):
        return np.zeros(0)
    begin, end = int(at.min()), int(at.max())
    moments = np.concatenate([at, at + work]).astype(np.float64) - begin
    steps = np.concatenate([gpus, -gpus])
    order = np.argsort(moments, kind="stable")
    moments = moments[order]
    level = np.cumsum(steps[order])
    area = np.concatenate([[0.0], np.cumsum(level[:-1] * np.diff(moments))])
    hour = 3600 * SECOND
    length = max(end - begin, 1)
    edges = np.append(np.arange(0, length, hour, dtype=np.float64), length)
    wanted: Floats = np.diff(np.interp(edges, moments, area)) / np.diff(edges)
    return wanted
