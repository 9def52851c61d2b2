"""Forecasts demand: arrivals and run time per task type and per model over the next 5, 15 and 60 minutes, learned online.

A series is a row of arrays; row 0 is everything together. A bin of five minutes is closed at a time; what a forecast promised is
judged when its window has passed, its run times an hour later, when they are known.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.tasks import SECOND, Micros
from predictors.demand_calibration import LEVELS, Calibration
from predictors.demand_series import BIN_S, HORIZONS, WEEK, Drawn, Floats, History
from predictors.demand_stack import Stack

__all__ = ["ALL", "HORIZONS_US", "LEVELS", "Demand", "DemandModel"]

ALL = "all"
"""The key of everything together."""
BIN_US: Micros = BIN_S * SECOND
HORIZONS_US: tuple[Micros, ...] = tuple(bins * BIN_US for bins in HORIZONS)
WORK_RING = 64
_SETTLE = 12
"""Bins after a window before its run times are judged."""
_RATE_FORGET = 0.995
"""How fast run time per arrival is forgotten, per task that ended."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What one series expects over one horizon."""

    horizon_us: Micros
    arrivals: float
    """Mean, without bias."""
    arrival_quantiles: tuple[float, ...]
    """At `LEVELS`."""
    run_us: float
    """Mean of the run times of what arrives, all together."""
    run_us_quantiles: tuple[float, ...]


@dataclass(slots=True)
class Promise:
    """One forecast of all series, until it is judged."""

    bin: int
    drawn: Drawn
    point: Floats
    arrivals: Floats
    work: Floats
    """Run time in seconds."""
    active: Floats
    arrival_quantiles: Floats
    work_quantiles: Floats


class DemandModel:
    """Learns and forecasts up to `most_series` series; the one heard of longest ago makes room for a new one."""

    def __init__(self, most_series: int = 96, *, totals: bool = True) -> None:
        if most_series < 2:
            raise ValueError(f"most_series: must be at least 2, got {most_series}")
        self.most_series = most_series
        self.totals = totals
        """Expect what arrives in all of a window; else what arrives in the last bin of it."""
        self.rows: dict[str, int] = {ALL: 0}
        """Series by key, the one heard of last at the end."""
        self.history: History | None = None
        self.stacks = [Stack(most_series) for _ in HORIZONS]
        self.arrivals = [Calibration(most_series, bins) for bins in HORIZONS]
        self.work = [Calibration(most_series, bins) for bins in HORIZONS]
        self.counts: Floats = np.zeros(most_series)
        """[series], in the open bin."""
        self.run_us: Floats = np.zeros((most_series, WORK_RING))
        """[series, bins]: run time of what arrived, by arrival; expected until it is known."""
        self.rates: Floats = np.zeros((most_series, 2))
        """[series, (run time in us, tasks)], decayed."""
        self.promises: list[deque[Promise]] = [deque() for _ in HORIZONS]

    # --- learning -----------------------------------------------------------------------------------------------------

    def advance(self, now: Micros) -> bool:
        """Close the bins that are over at `now`; tell whether there were any."""
        current = now // BIN_US
        if self.history is None:
            self.history = History(self.most_series, current)
            return False
        if current <= self.history.bin:
            return False
        if current - self.history.bin > WEEK:
            self._skip(current)
        while self.history.bin < current:
            self._close(self.history)
        return True

    def arrived(self, keys: Sequence[str], now: Micros, run_us: Micros | None = None) -> int:
        """Count an arrival into everything and the series of `keys`; return its bin, for `finished`.

        `run_us` is what it is expected to run; None: as those before.
        """
        self.advance(now)
        assert self.history is not None
        place = self.history.bin % WORK_RING
        for key in (ALL, *keys):
            row = self._row(key)
            self.counts[row] += 1.0
            self.run_us[row, place] += self._run_us(row) if run_us is None else run_us
        return self.history.bin

    def finished(self, keys: Sequence[str], arrived_bin: int, run_us: Micros, expected_us: Micros | None) -> None:
        """Learn what a task ran that arrived in a bin; `expected_us` is what was told at its arrival."""
        recent = self.history is not None and self.history.bin - arrived_bin < WORK_RING
        for key in (ALL, *keys):
            row = self.rows.get(key)
            if row is None:
                continue
            if recent:
                before = self._run_us(row) if expected_us is None else expected_us
                place = arrived_bin % WORK_RING
                self.run_us[row, place] = max(0.0, self.run_us[row, place] + run_us - before)
            self.rates[row] = self.rates[row] * _RATE_FORGET + (run_us, 1.0)

    def _run_us(self, row: int) -> float:
        total, tasks = self.rates[row] if self.rates[row, 1] >= 1.0 else self.rates[0]
        return float(total / tasks) if tasks > 0 else 0.0

    def _row(self, key: str) -> int:
        row = self.rows.pop(key, None)
        if row is None:
            if len(self.rows) + 1 < self.most_series or (key == ALL and not self.rows):
                row = len(self.rows)
            else:
                row = self.rows.pop(next(name for name in self.rows if name != ALL))
            self._begin(row)
        self.rows[key] = row
        return row

    def _begin(self, row: int) -> None:
        if self.history is not None:
            self.history.begin(row)
        for stack in self.stacks:
            stack.begin(row)
        for calibration in (*self.arrivals, *self.work):
            calibration.begin(row)
        self.counts[row] = 0.0
        self.run_us[row] = 0.0
        self.rates[row] = 0.0
        for promises in self.promises:
            for promise in promises:
                promise.active[row] = 0.0

    # --- bins ---------------------------------------------------------------------------------------------------------

    def _skip(self, current: int) -> None:
        """Nothing was heard for more than a week: what was before it is forgotten, what was learned stays."""
        history = self.history = History(self.most_series, current - 1)
        history.age[: len(self.rows)] = 1.0
        self.counts[:] = 0.0
        self.run_us[:] = 0.0
        for promises in self.promises:
            promises.clear()

    def _close(self, history: History) -> None:
        history.close(self.counts)
        self.counts = np.zeros(self.most_series)
        self.run_us[:, history.bin % WORK_RING] = 0.0
        for place, bins in enumerate(HORIZONS):
            self._judge(place, bins, history.bin)
            self._promise(place, bins, history)

    def _promise(self, place: int, bins: int, history: History) -> None:
        begin, end = self._window(history.bin, bins)
        drawn = history.draw(begin, end)
        stack = self.stacks[place]
        stack.regress(drawn)
        point = stack.combine(drawn)
        active = (history.age > 0).astype(np.float64)
        arrivals = point * (end - begin)
        own = self.rates[:, 1] >= 1.0
        rates = np.where(own, self.rates[:, 0], self.rates[0, 0])
        tasks = np.where(own, self.rates[:, 1], max(1.0, float(self.rates[0, 1])))
        work = arrivals * rates / tasks / SECOND
        quantiles = self.arrivals[place].quantiles(arrivals, active), self.work[place].quantiles(work, active)
        self.promises[place].append(Promise(history.bin, drawn, point, arrivals, work, active, *quantiles))

    def _window(self, now: int, bins: int) -> tuple[int, int]:
        return (now, now + bins) if self.totals else (now + bins - 1, now + bins)

    def _judge(self, place: int, bins: int, now: int) -> None:
        """Learn from the promises whose windows are over: counts at once, run times when they are known."""
        promises = self.promises[place]
        if len(promises) >= bins:
            promise = promises[-bins]
            begin, end = self._window(promise.bin, bins)
            assert self.history is not None
            came = self.history.mean(begin, end)
            self.stacks[place].learn(promise.drawn, promise.point, came, promise.active)
            total = came * (end - begin)
            self.arrivals[place].judge(promise.arrivals, total, promise.arrival_quantiles, promise.active)
        if len(promises) >= bins + _SETTLE:
            promise = promises.popleft()
            begin, end = self._window(promise.bin, bins)
            ran = self.run_us[:, np.arange(begin, end) % WORK_RING].sum(axis=1) / SECOND
            self.work[place].judge(promise.work, ran, promise.work_quantiles, promise.active)

    # --- forecasting --------------------------------------------------------------------------------------------------

    def forecast(self, key: str = ALL) -> tuple[Demand, ...] | None:
        """Return what a series expects from the end of the last closed bin on, by horizon; None before anything is known."""
        row = self.rows.get(key)
        if row is None or self.history is None or not self.promises[0]:
            return None
        found = []
        for place, horizon_us in enumerate(HORIZONS_US):
            promise = self.promises[place][-1]
            if not promise.active[row]:
                return None
            arrivals, seconds = float(promise.arrivals[row]), float(promise.work[row])
            found.append(
                Demand(
                    horizon_us,
                    self.arrivals[place].unbiased(row, arrivals),
                    tuple(promise.arrival_quantiles[row].tolist()),
                    self.work[place].unbiased(row, seconds) * SECOND,
                    tuple((promise.work_quantiles[row] * SECOND).tolist()),
                )
            )
        return tuple(found)
