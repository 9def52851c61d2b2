"""Luck for the forward run: the same few draws for every task in every run, so that two runs differ only by what has changed.

A task's run time is lognormal through its predicted P50 and P90. Each task has a row of `DRAWS` stratified normal deviates that
depends on its sequence number alone (common random numbers).
"""

from __future__ import annotations

from math import log
from statistics import NormalDist
from typing import Final

import numpy as np
import numpy.typing as npt

from engine.tasks import Estimate, Micros

Floats = npt.NDArray[np.float64]

DRAWS: Final = 16
ROWS: Final = 1024
SPREAD_UNKNOWN: Final = 0.8
"""Standard deviation of the logarithm of a run time that nobody predicted."""
_Z90: Final = NormalDist().inv_cdf(0.9)
_GOLDEN: Final = 0x9E3779B97F4A7C15
_NORMAL: Final = NormalDist()


def _table() -> Floats:
    """Return `ROWS` permutations of the mid-quantiles of the normal distribution."""
    levels = np.array([_NORMAL.inv_cdf((draw + 0.5) / DRAWS) for draw in range(DRAWS)])
    rng = np.random.Generator(np.random.PCG64(20))
    return rng.permuted(np.tile(levels, (ROWS, 1)), axis=1)


NORMALS: Final = _table()


def row_of(seq: int) -> int:
    """Return a task's row of deviates."""
    return ((seq * _GOLDEN) >> 40) % ROWS


def shape_of(estimate: Estimate | None, gpu_model: str, fallback_us: float) -> tuple[float, float]:
    """Return (mean, standard deviation) of the logarithm of a run time in microseconds; without an estimate, of the fallback."""
    if estimate is None or not estimate.serves_every_model:
        return log(max(1.0, fallback_us)), SPREAD_UNKNOWN
    quantiles = estimate.duration(gpu_model)
    middle = max(1, quantiles.p50)
    return log(middle), max(0.0, log(max(middle, quantiles.p90) / middle) / _Z90)


def remaining(mean: float, sigma: float, elapsed_us: Micros, row: int) -> Floats:
    """Return draws of what is left of a run that has taken `elapsed_us`: F(t | T > elapsed)."""
    deviates = NORMALS[row]
    if elapsed_us <= 0:
        drawn: Floats = np.exp(mean + sigma * deviates)
        return drawn
    if sigma <= 1e-6:
        return np.full(DRAWS, max(np.exp(mean) - elapsed_us, 0.02 * elapsed_us))
    passed = _NORMAL.cdf((log(elapsed_us) - mean) / sigma)
    if passed > 0.999:
        # It has outlived all that was foreseen: about as long again as a quarter of what it took.
        levels = np.array([_NORMAL.cdf(float(z)) for z in deviates])
        late: Floats = -0.25 * elapsed_us * np.log1p(-levels)
        return late
    left = [
        np.exp(mean + sigma * _NORMAL.inv_cdf(passed + (1 - passed) * _NORMAL.cdf(float(z)))) - elapsed_us
        for z in deviates
    ]
    return np.maximum(np.array(left, dtype=np.float64), 0.0)
