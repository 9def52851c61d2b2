"""Makes promises of expected totals: without bias, and with quantiles that hold as often as they say.

Quantiles are those of the last standardised errors (split conformal on a sliding window). Each promised level is moved by its own
misses, so that it comes out right in the long run whatever the demand does; sorting keeps quantiles from crossing.
"""

from __future__ import annotations

import numpy as np

from predictors.demand_series import Floats

LEVELS = (0.1, 0.5, 0.9, 0.95)
"""Quantiles that are promised."""
POOL = 2_000
"""Errors that are remembered per series."""
_ENOUGH = 60
"""Errors from which on a series stands for itself; before, it takes those of the first series."""
_STEP = 0.008
"""How fast a promised level is moved by a miss. Those up to the median stay: of counts that are mostly 0, more than a tenth is not
below a tenth's quantile, and moving would never end."""
_BIAS_FORGET = 0.998


class Calibration:
    """Learns how wrong expected totals are, for many series and one horizon."""

    def __init__(self, series: int, bins: int = 1) -> None:
        self.steps: Floats = np.where(np.asarray(LEVELS) > 0.5, _STEP * bins**-0.4, 0.0)
        """By level; windows that overlap miss together and are judged late, so longer ones are corrected in shorter steps."""
        self.pool: Floats = np.zeros((series, POOL))
        self.seen: Floats = np.zeros(series)
        self.levels: Floats = np.tile(np.asarray(LEVELS), (series, 1))
        """[series, levels]: the quantile of the pool that is taken for each promised one."""
        self.bias: Floats = np.ones((series, 2))
        """[series, (what came, what was expected)], decayed."""

    def begin(self, row: int) -> None:
        """Give a row to a new series."""
        self.seen[row] = 0.0
        self.levels[row] = LEVELS
        self.bias[row] = 1.0

    def judge(self, expected: Floats, came: Floats, promised: Floats, active: Floats) -> None:
        """Learn from totals, [series]: how wrong, how often each promise in `promised` [series, levels] held."""
        rows = np.flatnonzero(active > 0)
        if not len(rows):
            return
        place = self.seen[rows].astype(np.int64) % POOL
        self.pool[rows, place] = standardised(came[rows], expected[rows])
        self.seen[rows] += 1.0
        held = came[rows, None] <= promised[rows] + 1e-9
        moved = self.levels[rows] + self.steps * (np.asarray(LEVELS) - held)
        self.levels[rows] = np.clip(moved, 0.001, 0.9995)
        self.bias[rows, 0] = self.bias[rows, 0] * _BIAS_FORGET + came[rows]
        self.bias[rows, 1] = self.bias[rows, 1] * _BIAS_FORGET + expected[rows]

    def unbiased(self, row: int, expected: float) -> float:
        """Return a total without the bias that its series had lately."""
        came, told = self.bias[row]
        return expected * min(2.0, max(0.5, float(came) / max(float(told), 1e-9)))

    def promise(self, row: int, expected: float) -> Floats:
        """Return the quantiles at `LEVELS` of one series, never negative and never crossing."""
        source = row if self.seen[row] >= _ENOUGH else 0
        known = int(min(self.seen[source], POOL))
        if known < _ENOUGH:
            made = _unlearned(expected)
        else:
            made = restored(np.quantile(self.pool[source, :known], self.levels[source]), expected)
        return np.maximum.accumulate(np.maximum(made, 0.0))

    def quantiles(self, expected: Floats, active: Floats) -> Floats:
        """Return `promise` for every series that is active, [series, levels]; others get zeros."""
        made = np.zeros((len(expected), len(LEVELS)))
        for row in np.flatnonzero(active > 0):
            made[row] = self.promise(int(row), float(expected[row]))
        return made


def standardised(came: Floats, expected: Floats) -> Floats:
    """Return errors on a scale where busy and quiet hours are alike."""
    found: Floats = (np.log1p(came) - np.log1p(expected)) * (expected + 2.0) ** 0.25
    return found


def restored(error: Floats, expected: float) -> Floats:
    """Return what would have come for errors as `standardised` gives them."""
    found: Floats = np.expm1(np.log1p(expected) + np.clip(error / (expected + 2.0) ** 0.25, -20.0, 20.0))
    return found


def _unlearned(expected: float) -> Floats:
    """Quantiles of counts that nothing is known about yet: four times a Poisson's variance, as a normal in the square root."""
    root, normal = np.sqrt(expected + 0.375), np.asarray((-1.2816, 0.0, 1.2816, 1.6449))
    found: Floats = np.maximum(0.0, root + normal) ** 2 - 0.375
    return found
