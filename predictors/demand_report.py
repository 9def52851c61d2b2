"""The report card of the demand forecast: a trace replayed bin by bin, judged beside the forecasts it is made from.

The scale of every error is that of the 24 h naive forecast on the very same bins: 1 is as good as looking a day back. A forecast is
judged by what it said when its window began; nothing of the window, and no run time before its task had ended, was known then.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.tasks import SECOND
from predictors.demand import ALL, BIN_US, LEVELS, Demand, DemandModel
from predictors.demand_series import DAY, EXPERTS, HORIZONS, WEEK
from predictors.gentd26 import FAILED, SUCCEED, Row, read_rows

Progress = Callable[[float, str], None]
BEGIN_SHARE = 0.3
"""Judging begins after this share of the bins: until then there was less than a week to look back at."""
_TOP_MODELS = 5
_SHOWN = ("last", "moving average 0.35", "24 h ago", "7 d ago", "Holt-Winters", "Poisson regression")


@dataclass(frozen=True, slots=True)
class Horizon:
    """One series over one horizon."""

    minutes: int
    bins: int
    """That were judged."""
    mean: float
    """Arrivals in the window, on average."""
    mase: float
    """Mean absolute error of the P50 over that of the 24 h naive."""
    mase_mean: float
    """The same of the mean without bias."""
    mase_of: dict[str, float]
    """The same of forecasts that the ensemble is made from."""
    bias: float
    """Of the mean, as a share of what came."""
    coverage: dict[str, float]
    """Share of windows in which not more came than each quantile said."""
    work_mase: float
    """Of the run time of what arrives."""
    work_bias: float
    work_coverage: dict[str, float]


@dataclass(frozen=True, slots=True)
class Series:
    """One series."""

    key: str
    arrivals: int
    horizons: tuple[Horizon, ...]


@dataclass(frozen=True, slots=True)
class DemandCard:
    """Everything that the replay showed."""

    trace: str
    totals: bool
    """Windows were judged as a whole; else the last five minutes of each."""
    bins: int
    judged_from: float
    """Share of the bins before judging began."""
    series: tuple[Series, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def table(self) -> str:
        """Return the card as text."""
        what = "arrivals in all of the window" if self.totals else "arrivals in the last 5 minutes of the window"
        lines = [
            f"{self.trace}: {what}, MASE on the 24 h naive; judged after the first {self.judged_from:.0%} of the bins",
            "",
        ]
        head = f"{'series':<34}{'min':>4}{'mean':>8}{'MASE':>7}{'bias':>8}{'P90':>7}{'P95':>7}   " + "".join(
            f"{name[:10]:>11}" for name in _SHOWN
        )
        lines += [head + f"{'work MASE':>11}{'P95':>7}"]
        for series in self.series:
            for each in series.horizons:
                own = f"{series.key[:33]:<34}{each.minutes:>4}{each.mean:>8.2f}{each.mase:>7.3f}{each.bias:>+8.1%}"
                own += f"{each.coverage['0.9']:>7.1%}{each.coverage['0.95']:>7.1%}   "
                own += "".join(f"{each.mase_of[name]:>11.3f}" for name in _SHOWN)
                lines.append(own + f"{each.work_mase:>11.3f}{each.work_coverage['0.95']:>7.1%}")
        return "\n".join(lines)


def run(path: Path, progress: Progress | None = None, *, totals: bool = True, models: int = _TOP_MODELS) -> DemandCard:
    """Replay GenTD26's request trace; raises ValueError naming the column or the line that cannot be read."""
    return report(read_rows(path), path.name, progress, totals=totals, models=models)


def report(
    rows: Sequence[Row], name: str, progress: Progress | None = None, *, totals: bool = True, models: int = _TOP_MODELS
) -> DemandCard:
    """Replay rows in order of submission; series are everything, the task types, and the `models` most asked for."""
    if not rows:
        raise ValueError("the trace holds no request")
    keys = [ALL, *_keys(rows, models)]
    begin = rows[0].submitted_us // BIN_US
    bins = int(rows[-1].submitted_us // BIN_US - begin)
    if bins < 2 * DAY:
        raise ValueError(
            f"the trace spans {bins * BIN_US // SECOND // 3600} h; a demand forecast needs two days to be judged"
        )
    replay = _Replay(DemandModel(len(keys) + 1, totals=totals), keys, int(begin), bins)
    replay.run(rows, progress)
    judged_from = BEGIN_SHARE if bins > 1.5 * WEEK else 0.5
    found = tuple(
        Series(key, int(replay.counts[place].sum()), tuple(replay.judge(place, nth, judged_from) for nth in range(3)))
        for place, key in enumerate(keys)
    )
    return DemandCard(name, totals, bins, judged_from, found)


def _keys(rows: Sequence[Row], models: int) -> list[str]:
    asked: dict[str, int] = {}
    for row in rows:
        asked[row.model] = asked.get(row.model, 0) + 1
    top = sorted(asked, key=lambda model: (-asked[model], model))[:models]
    return ["type:GC", *(f"model:text_to_image/{model}" for model in top)]


class _Replay:
    """The trace bin by bin, with every forecast that was made on the way."""

    def __init__(self, model: DemandModel, keys: list[str], begin: int, bins: int) -> None:
        self.model = model
        self.keys = keys
        self.begin, self.bins = begin, bins
        self.counts = np.zeros((len(keys), bins))
        self.work = np.zeros((len(keys), bins))
        self.said: list[list[tuple[Demand, ...] | None]] = []
        """By bin, by series: what was expected at its beginning."""
        self.experts = np.zeros((bins, len(HORIZONS), len(keys), len(EXPERTS)), dtype=np.float32)

    def run(self, rows: Sequence[Row], progress: Progress | None) -> None:
        under_way: list[tuple[int, int, int, int, tuple[str, ...]]] = []
        known = set(self.keys)
        at = 0
        for number in range(self.bins):
            self._close(number, under_way)
            while at < len(rows) and rows[at].submitted_us // BIN_US - self.begin <= number:
                row = rows[at]
                own = tuple(key for key in ("type:GC", f"model:text_to_image/{row.model}") if key in known)
                place = self.model.arrived(own, row.submitted_us)
                ran = row.run_us if row.status in (SUCCEED, FAILED) else 0
                for series in (0, *(self.keys.index(key) for key in own)):
                    self.counts[series, number] += 1
                    self.work[series, number] += ran / SECOND
                if ran:
                    heapq.heappush(under_way, (row.submitted_us + ran, at, place, ran, own))
                at += 1
            if progress is not None and number % 256 == 0:
                progress(number / self.bins, f"bin {number} of {self.bins}")

    def _close(self, number: int, under_way: list[tuple[int, int, int, int, tuple[str, ...]]]) -> None:
        now = (self.begin + number) * BIN_US
        while under_way and under_way[0][0] <= now:
            _, _, place, ran, own = heapq.heappop(under_way)
            self.model.finished(own, place, ran, None)
        self.model.advance(now)
        self.said.append([self.model.forecast(key) for key in self.keys])
        for nth, promises in enumerate(self.model.promises):
            if promises:
                for place, key in enumerate(self.keys):
                    if key in self.model.rows:
                        self.experts[number, nth, place] = promises[-1].drawn.experts[self.model.rows[key]]

    def judge(self, place: int, nth: int, judged_from: float) -> Horizon:
        width = HORIZONS[nth]
        first = max(round(self.bins * judged_from), DAY)
        judged = [number for number in range(first, self.bins - width + 1) if self.said[number][place] is not None]
        span = (0, width) if self.model.totals else (width - 1, width)
        came, ran = (_windows(series[place], judged, span) for series in (self.counts, self.work))
        naive = [_windows(series[place], [n - DAY for n in judged], span) for series in (self.counts, self.work)]
        said = [each[nth] for each in (self.said[number][place] for number in judged) if each is not None]
        quantiles = np.array([each.arrival_quantiles for each in said])
        work = np.array([each.run_us_quantiles for each in said]) / SECOND
        mean, work_mean = np.array([each.arrivals for each in said]), np.array([each.run_us for each in said]) / SECOND
        scale, work_scale = float(np.abs(came - naive[0]).mean()) or 1.0, float(np.abs(ran - naive[1]).mean()) or 1.0
        own = self.experts[judged, nth, place] * (span[1] - span[0])
        half = LEVELS.index(0.5)
        return Horizon(
            width * 5,
            len(judged),
            float(came.mean()),
            float(np.abs(came - quantiles[:, half]).mean()) / scale,
            float(np.abs(came - mean).mean()) / scale,
            {name: float(np.abs(came - own[:, column]).mean()) / scale for column, name in enumerate(EXPERTS)},
            float((mean - came).mean() / max(came.mean(), 1e-9)),
            {f"{level:g}": float((came <= quantiles[:, at]).mean()) for at, level in enumerate(LEVELS)},
            float(np.abs(ran - work[:, half]).mean()) / work_scale,
            float((work_mean - ran).mean() / max(ran.mean(), 1e-9)),
            {f"{level:g}": float((ran <= work[:, at] + 1e-9).mean()) for at, level in enumerate(LEVELS)},
        )


def _windows(series: Any, begins: Sequence[int], span: tuple[int, int]) -> Any:
    whole = np.concatenate([[0.0], np.cumsum(series)])
    at = np.asarray(begins)
    return whole[np.minimum(at + span[1], len(series))] - whole[np.maximum(at + span[0], 0)]
