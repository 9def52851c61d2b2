"""Makes promises of expected totals: without bias, and with quantiles that hold as often as they say.

Quantiles are those of the last standardised errors (split conformal on a sliding window). Each promised level is moved by its own
misses, so that it comes out right in the long run whatever the demand does; sorting keeps quantiles from crossing.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort

import numpy as np

from predictors.demand_series import Floats

LEVELS = (0.1, 0.5, 0.9, 0.95)
"""Quantiles that are promised."""
_NORMAL = (-1.2816, 0.0, 1.2816, 1.6449)
"""The normal distribution's quantiles at `LEVELS`."""
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
        self._sorted: dict[int, list[float]] = {}

    def begin(self, row: int) -> None:
        """Give a row to a new series."""
        self.seen[row] = 0.0
        self._sorted.pop(row, None)
        self.levels[row] = LEVELS
        self.bias[row] = 1.0

    def judge(self, expected: Floats, came: Floats, promised: Floats, active: Floats) -> None:
        """Learn from totals, [series]: how wrong, how often each promise in `promised` [series, levels] held."""
        rows = np.flatnonzero(active > 0)
        if not len(rows):
            return
        for row, error in zip(rows.tolist(), standardised(came[rows], expected[rows]).tolist(), strict=True):
            self._remember(row, error)
        held = came[rows, None] <= promised[rows] + 1e-9
        moved = self.levels[rows] + self.steps * (np.asarray(LEVELS) - held)
        self.levels[rows] = np.clip(moved, 0.001, 0.9995)
        self.bias[rows, 0] = self.bias[rows, 0] * _BIAS_FORGET + came[rows]
        self.bias[rows, 1] = self.bias[rows, 1] * _BIAS_FORGET + expected[rows]

    def unbiased(self, row: int, expected: float) -> float:
        """Return a total without the bias that its series had lately."""
        came, told = self.bias[row]
        return expected * min(2.0, max(0.5, float(came) / max(float(told), 1e-9)))

    def promise(self, row: int, expected: float) -> list[float]:
        """Return the quantiles at `LEVELS` of one series, never negative and never crossing."""
        source = row if self.seen[row] >= _ENOUGH else 0
        errors = self._sorted_errors(source)
        found: list[float] = []
        least = 0.0
        for place, level in enumerate(self.levels[source].tolist()):
            if len(errors) < _ENOUGH:
                made = _unlearned(expected, _NORMAL[place])
            else:
                made = restored(_quantile(errors, level), expected)
            least = max(least, made)
            found.append(least)
        return found

    def _sorted_errors(self, row: int) -> list[float]:
        """Return the errors that are remembered, ascending: kept beside the pool, and made anew after a restore."""
        errors = self._sorted.get(row)
        if errors is None:
            errors = self._sorted[row] = sorted(self.pool[row, : int(min(self.seen[row], POOL))].tolist())
        return errors

    def _remember(self, row: int, error: float) -> None:
        errors = self._sorted_errors(row)
        place = int(self.seen[row]) % POOL
        if self.seen[row] >= POOL:
            del errors[bisect_left(errors, float(self.pool[row, place]))]
        insort(errors, error)
        self.pool[row, place] = error
        self.seen[row] += 1.0

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


def restored(error: float, expected: float) -> float:
    """Return what would have come for an error as `standardised` gives it."""
    return math.expm1(math.log1p(expected) + min(20.0, max(-20.0, error / (expected + 2.0) ** 0.25)))


def _quantile(ascending: list[float], level: float) -> float:
    at = level * (len(ascending) - 1)
    below = int(at)
    if below + 1 >= len(ascending):
        return ascending[-1]
    return ascending[below] + (at - below) * (ascending[below + 1] - ascending[below])


def _unlearned(expected: float, normal: float) -> float:
    """Return a quantile of a count that nothing is known about yet: four times a Poisson's variance, normal in the square root."""
    return max(0.0, math.sqrt(expected + 0.375) + normal) ** 2 - 0.375
