"""The shape of the predictor's errors: a pool of recent standardised residuals that turns a centre and a scale into quantiles."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

PSEUDO = 64
"""Normal residuals a new pool starts with; the first real ones replace them, one by one."""
NORMAL_SPREAD = 1.9
"""A normal residual over the exponential of the mean log of its size has this standard deviation: exp(0.635)."""
_GRID = 48
_REFRESH = 16
_REFRESH_QUANTILES = 8
_SETTLED = 500


class ResidualPool:
    """The last ``limit`` standardised residuals, kept sorted; its quantiles are split-conformal and never cross.

    Beyond the extreme residuals the tail goes on exponentially with the mean excess of the outer twentieth.
    """

    __slots__ = ("_grid", "_grid_age", "_latest", "_latest_age", "_order", "_outer", "_pseudo", "_sorted", "limit")

    def __init__(self, limit: int = 2000) -> None:
        if limit < PSEUDO:
            raise ValueError(f"ResidualPool: limit must be at least {PSEUDO}, got {limit}")
        self.limit = limit
        normal = NormalDist(0.0, NORMAL_SPREAD)
        start = [normal.inv_cdf((i + 0.5) / PSEUDO) for i in range(PSEUDO)]
        # 37 is odd, so this visits every one, high and low in turn: whichever have been replaced, the rest stay balanced.
        self._order: deque[float] = deque(start[i * 37 % PSEUDO] for i in range(PSEUDO))
        self._sorted = start
        self._pseudo = PSEUDO
        self._grid: NDArray[np.float64] | None = None
        self._grid_age = 0
        self._latest: dict[tuple[float, ...], tuple[float, ...]] = {}
        self._latest_age = 0
        self._outer: list[float | None] = [None, None]
        """Mean excess below and above, as far as they were asked for since the last residual."""

    def __len__(self) -> int:
        return len(self._sorted)

    @property
    def learned(self) -> int:
        """Return the number of real residuals in the pool."""
        return len(self._order) - self._pseudo

    @property
    def largest(self) -> float:
        """Return the largest residual in the pool."""
        return self._sorted[-1]

    def add(self, residual: float) -> None:
        """Add one residual; the oldest leaves when the pool is full or still holds one of those it started with."""
        if self._pseudo or len(self._order) >= self.limit:
            oldest = self._order.popleft()
            del self._sorted[bisect_left(self._sorted, oldest)]
            self._pseudo = max(0, self._pseudo - 1)
        self._latest_age += 1
        if self._latest_age >= _REFRESH_QUANTILES or len(self._order) < _SETTLED:
            self._latest.clear()
            self._latest_age = 0
        self._outer = [None, None]
        self._order.append(residual)
        insort(self._sorted, residual)
        self._grid_age += 1
        if self._grid_age >= _REFRESH or self._pseudo:
            self._grid = None

    def quantile(self, level: float) -> float:
        """Return the residual below which a new one falls with probability ``level`` (0 < level < 1)."""
        values = self._sorted
        count = len(values)
        place = (count + 1) * level - 1.0
        if place >= count - 1:
            return values[-1] + self._excess() * max(0.0, -math.log((count + 1) * (1.0 - level)))
        if place <= 0.0:
            return values[0] - self._excess(low=True) * max(0.0, -math.log((count + 1) * level))
        low = int(place)
        return min(values[low + 1], values[low] + (place - low) * (values[low + 1] - values[low]))

    def quantiles(self, levels: tuple[float, ...]) -> tuple[float, ...]:
        """Return `quantile` at several levels; a settled pool works them out at every eighth residual only."""
        found = self._latest.get(levels)
        if found is None:
            found = self._latest[levels] = tuple(self.quantile(level) for level in levels)
        return found

    def below(self, residual: float) -> float:
        """Return the share of residuals below one: the inverse of `quantile`, in (0, 1)."""
        values = self._sorted
        count = len(values)
        if residual >= values[-1]:
            return 1.0 - math.exp(-min(600.0, (residual - values[-1]) / self._excess())) / (count + 1)
        if residual < values[0]:
            return math.exp(-min(600.0, (values[0] - residual) / self._excess(low=True))) / (count + 1)
        high = bisect_right(values, residual)
        step = values[high] - values[high - 1]
        part = (residual - values[high - 1]) / step if step > 0.0 else 0.0
        return (high + part) / (count + 1)

    def beyond(self, residual: float, level: float) -> float:
        """Return the quantile of those residuals that exceed ``residual``."""
        return self.all_beyond(residual, (level,))[0]

    def all_beyond(self, residual: float, levels: Sequence[float]) -> list[float]:
        """Return several quantiles of those residuals that exceed ``residual``."""
        if residual >= self._sorted[-1]:
            excess = self._excess()
            return [residual - excess * math.log(1.0 - level) for level in levels]
        rest, values, found = 1.0 - self.below(residual), self._sorted, []
        count = len(values)
        for level in levels:
            of_all = 1.0 - rest * (1.0 - level)
            place = (count + 1) * of_all - 1.0
            if 0.0 < place < count - 1:
                low = int(place)
                under, over = values[low], values[low + 1]
                value = under + (place - low) * (over - under)
                if value > over:
                    value = over
            else:
                value = self.quantile(of_all)
            found.append(value if value > residual else residual)
        return found

    def smear(self, scale: float) -> float:
        """Return the mean of exp(scale x residual): what turns a log-space centre into a mean."""
        grid = self._grid if self._grid is not None else self._new_grid()
        return float(np.add.reduce(np.exp(grid * scale))) / _GRID

    def smears(self, scales: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return `smear` of each scale."""
        grid = self._grid if self._grid is not None else self._new_grid()
        means: NDArray[np.float64] = np.exp(grid * scales[:, None]).mean(axis=1)
        return means

    def _new_grid(self) -> NDArray[np.float64]:
        self._grid = np.array([self.quantile((i + 0.5) / _GRID) for i in range(_GRID)])
        self._grid_age = 0
        return self._grid

    def state(self) -> dict[str, object]:
        """Return the pool as plain values, oldest first."""
        grid = None if self._grid is None else self._grid.tolist()
        latest = [[list(levels), list(found)] for levels, found in self._latest.items()]
        return {
            "pseudo": self._pseudo,
            "order": list(self._order),
            "grid": grid,
            "grid_age": self._grid_age,
            "latest": latest,
            "latest_age": self._latest_age,
        }

    def restore(
        self,
        pseudo: int,
        order: Iterable[float],
        grid: list[float] | None,
        grid_age: int,
        latest: list[list[list[float]]],
        latest_age: int,
    ) -> None:
        """Take over a saved pool."""
        self._order = deque(order)
        self._sorted = sorted(self._order)
        self._outer = [None, None]
        self._pseudo = pseudo
        self._latest = {tuple(levels): tuple(found) for levels, found in latest}
        self._latest_age = latest_age
        self._grid = None if grid is None else np.array(grid)
        self._grid_age = grid_age

    def _excess(self, low: bool = False) -> float:
        kept = self._outer[not low]
        if kept is not None:
            return kept
        values = self._sorted
        outer = max(2, len(values) // 20)
        if low:
            excess = max(1e-3, values[outer] - sum(values[:outer]) / outer)
        else:
            excess = max(1e-3, sum(values[-outer:]) / outer - values[-outer - 1])
        self._outer[not low] = excess
        return excess
