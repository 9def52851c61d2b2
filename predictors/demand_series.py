"""What a demand forecast is made from: the recent history of many series, the simple forecasts, and the regression's features.

All series are rows of the same arrays, so that a bin costs a few numpy calls however many there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

BIN_S = 300
DAY, WEEK = 86_400 // BIN_S, 7 * 86_400 // BIN_S
RING = WEEK + 64
"""Bins that are remembered: a week, and the windows around its far end."""
HORIZONS = (1, 3, 12)
"""In bins: the next 5, 15 and 60 minutes."""
RATES = (0.6, 0.35, 0.2, 0.1, 0.05, 0.02)
"""Of the moving averages."""
EXPERTS = (
    "last",
    "mean 15 min",
    "mean 30 min",
    "mean 1 h",
    *(f"moving average {rate}" for rate in RATES),
    "24 h ago",
    "24 h ago, smooth",
    "24 h ago, smoother",
    "7 d ago",
    "7 d ago, smooth",
    "day's shape",
    "week's shape",
    "both shapes",
    "Holt-Winters",
    "Poisson regression",
)
"""The ensemble, in the order of its columns; "24 h ago" and "7 d ago" are the seasonal naives."""
POISSON = EXPERTS.index("Poisson regression")
_RECENT = (1, 2, 3, 6, 12, 24)
_HINGES = (1.0, 2.0, 2.8)
FEATURES = 1 + len(_RECENT) + len(RATES) + 5 + 3 + len(_HINGES) + 6
FIRST_WEIGHT = 1 + len(_RECENT) + 1
"""The feature with which the regression begins: the moving average of rate 0.35."""
_HW_LEVEL, _HW_SEASON = 0.3, 0.15
_LEAST_RATIO, _MOST_RATIO = 0.25, 4.0


@dataclass(slots=True)
class Drawn:
    """What is known before a window: per series a row."""

    experts: Floats
    """[series, experts], arrivals per bin; the column of the regression is left 0."""
    features: Floats
    """[series, features]."""
    most: Floats
    """[series]: no regression may expect more."""


class History:
    """Counts per bin of many series: cumulative sums in a ring, moving averages, and the seasons of Holt-Winters."""

    def __init__(self, series: int, bin_index: int) -> None:
        self.bin = bin_index
        """Bins before this one are closed."""
        self.cumulative: Floats = np.zeros((series, RING))
        """[series, ring]: the count of all bins before the one that the place stands for."""
        self.averages: Floats = np.zeros((series, len(RATES)))
        self.level: Floats = np.zeros(series)
        self.season: Floats = np.ones((series, DAY))
        """[series, bins of a day]: how many times its level a series has there."""
        self.age: Floats = np.zeros(series)
        """Bins since each series began."""

    def begin(self, row: int) -> None:
        """Give a row to a new series."""
        self.cumulative[row] = 0.0
        self.averages[row] = 0.0
        self.level[row] = 0.0
        self.season[row] = 1.0
        self.age[row] = 0.0

    def close(self, counts: Floats) -> None:
        """Close the bin with its counts, [series]."""
        here = self.bin % RING
        self.cumulative[:, (self.bin + 1) % RING] = self.cumulative[:, here] + counts
        fresh = (self.age == 0) & (counts > 0)
        self.averages += np.asarray(RATES) * (counts[:, None] - self.averages)
        slot = self.bin % DAY
        self.level += _HW_LEVEL * (counts / np.maximum(self.season[:, slot], 0.05) - self.level)
        ratio = np.clip((counts + 0.1) / (self.level + 0.1), 0.05, 8.0)
        self.season[:, slot] += _HW_SEASON * (ratio - self.season[:, slot])
        if fresh.any():
            self.averages[fresh] = counts[fresh, None]
            self.level[fresh] = counts[fresh]
        self.age += (self.age > 0) | (counts > 0)
        self.bin += 1

    def mean(self, begin: int, end: int) -> Floats:
        """Return counts per bin over closed bins, [series]; parts that lie further back than the ring count as empty."""
        end = min(end, self.bin)
        begin = max(begin, self.bin - RING + 1)
        width = max(1, end - begin)
        if end <= begin:
            return np.zeros(len(self.level))
        found: Floats = (self.cumulative[:, end % RING] - self.cumulative[:, begin % RING]) / width
        return found

    def draw(self, begin: int, end: int) -> Drawn:
        """Return experts and features for the mean count per bin over the coming bins from `begin` to before `end`."""
        now, averages = self.bin, self.averages
        recent = [self.mean(now - bins, now) for bins in _RECENT]
        steady = averages[:, 2]
        had_day, had_week = self.age > DAY, self.age > WEEK

        def ago(period: int, around: int, known: npt.NDArray[np.bool_]) -> Floats:
            return np.where(known, self.mean(begin - period - around, end - period + around), steady)

        day, day_smooth, day_smoother = (ago(DAY, around, had_day) for around in (0, 3, 12))
        week, week_smooth = (ago(WEEK, around, had_week) for around in (0, 6))
        day_level = np.where(had_day, self.mean(now - DAY - 6, now - DAY + 6), steady)
        week_level = np.where(had_week, self.mean(now - WEEK - 6, now - WEEK + 6), steady)
        by_day = day_smoother * _ratio(steady, day_level)
        by_week = np.where(had_week, week_smooth * _ratio(steady, week_level), steady)
        slots = np.arange(begin, end) % DAY
        winters = self.level * self.season[:, slots].mean(axis=1)
        experts = np.empty((len(steady), len(EXPERTS)))
        experts[:, 0], experts[:, 1], experts[:, 2], experts[:, 3] = recent[0], recent[2], recent[3], recent[4]
        experts[:, 4 : 4 + len(RATES)] = averages
        rest = (day, day_smooth, day_smoother, week, week_smooth, by_day, by_week, (by_day + by_week) / 2, winters)
        for place, column in enumerate(rest, start=4 + len(RATES)):
            experts[:, place] = column
        experts[:, POISSON] = 0.0
        features = self._features(recent, (day, day_smooth, day_smoother, week, week_smooth), (day_level, week_level))
        most = 6.0 * np.maximum.reduce([*recent, day_smoother, averages[:, -1]]) + 3.0
        return Drawn(experts, features, most)

    def _features(self, recent: list[Floats], seasons: tuple[Floats, ...], levels: tuple[Floats, ...]) -> Floats:
        series = len(self.level)
        made = np.empty((series, FEATURES))
        made[:, 0] = 1.0
        columns = [*recent, *self.averages.T, *seasons, *levels, self.mean(self.bin - DAY, self.bin)]
        made[:, 1 : 1 + len(columns)] = np.log1p(np.stack(columns, axis=1))
        at = 1 + len(columns)
        quick = np.log1p(self.averages[:, 1])
        for place, knot in enumerate(_HINGES):
            made[:, at + place] = np.maximum(0.0, quick - knot)
        turn = 2 * np.pi * (self.bin % DAY) / DAY
        made[:, at + len(_HINGES) :] = [f(k * turn) * 0.5 for k in (1, 2, 3) for f in (np.sin, np.cos)]
        return made


def _ratio(now: Floats, then: Floats) -> Floats:
    return np.clip((now + 0.5) / (then + 0.5), _LEAST_RATIO, _MOST_RATIO)
