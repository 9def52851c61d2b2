"""The numbers behind the pictures of the report card: calibration, coverage, learning, drift, and memory, from one replay."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from engine.tasks import SECOND
from predictors import physics
from predictors.demand import ALL, BIN_US, DemandModel
from predictors.demand import LEVELS as DEMAND_LEVELS
from predictors.features import read_request
from predictors.gentd26 import SUCCEED, Row
from predictors.memory import GpuMemoryModel
from predictors.predictor import LEVELS
from predictors.replay import PINBALL_LEVELS, Replay, Seen
from predictors.scores import sjf_gain

Series = NDArray[np.float64]

DAY_US = 86400 * SECOND
DRIFT_FACTOR = 1.5
DRIFT_SPAN = 450
SLACKS = tuple(i / 100 for i in range(0, 42, 2))
_WARM_ROWS = 3000
_MODELS = 12
_SMOOTH = 20
_BEST_SIGMA = 0.26
"""Log error of what the same user's same request takes ten minutes later: nobody can predict these times better."""
_BUCKETS = ((0, 0), (1, 2), (3, 10), (11, 50), (51, 200), (201, 10**9))


@dataclass(frozen=True, slots=True)
class Group:
    """A part of the scored requests. Shares are in per cent."""

    name: str
    requests: int
    within_90: float
    medape: float


@dataclass(frozen=True, slots=True)
class MemoryCurve:
    """Peaks made up around the arithmetic's: how many exceed a limit of so much slack over the expected peak."""

    exceed: tuple[float, ...]
    """Per cent, for each of `SLACKS` over the prediction."""
    exceed_unlearned: tuple[float, ...]
    """The same over the counted peak."""
    chosen_slack: float
    """Mean slack of the predictor's own P99, as a share of the peak that came."""
    chosen_exceed: float
    """Per cent of peaks beyond that P99."""


@dataclass(frozen=True, slots=True)
class Fan:
    """Arrivals over the next hour: what came, and quantiles said before. One entry per hour."""

    hours: tuple[float, ...]
    came: tuple[float, ...]
    low: tuple[float, ...]
    middle: tuple[float, ...]
    high: tuple[float, ...]
    levels: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Figures:
    """What the pictures of the report card show."""

    levels: tuple[float, ...]
    below: tuple[float, ...]
    """Observed shares below the quantiles at ``levels``, of the scored requests."""
    pit: tuple[float, ...]
    """Density of the scored requests over the intervals between those levels; 1 everywhere when calibrated."""
    days: tuple[Group, ...]
    models: tuple[Group, ...]
    history: tuple[Group, ...]
    """By how many requests of the model had finished before, over the whole replay."""
    advantage: tuple[tuple[int, float, bool], ...]
    """Request, by what share the challenger's loss lies below the champion's, and whether it served."""
    drift: tuple[tuple[int, float], ...]
    """Request after all run times grew by half, and the mean log error that this adds."""
    sjf: tuple[tuple[str, float], ...]
    memory: MemoryCurve
    fan: Fan | None


def figures(
    rows: Sequence[Row],
    played: Replay,
    scored: Sequence[Seen],
    gains: Sequence[tuple[str, float]],
    tell: Callable[[float], None] = lambda _fraction: None,
) -> Figures:
    """Return the figures of a replay; ``scored`` are its judged requests, ``gains`` the SJF gains already known."""
    truth = np.array([seen.row.run_us / SECOND for seen in scored])
    quantiles = np.array([seen.pinball_s for seen in scored])
    below = (truth[:, None] <= quantiles).mean(axis=0)
    edges = np.array([0.0, *PINBALL_LEVELS, 1.0])
    pit = np.diff([0.0, *below, 1.0]) / np.diff(edges)
    tell(0.2)
    drift = drift_curve([row for row in rows if row.status == SUCCEED and row.run_us > 0])
    tell(0.6)
    blurred = truth * np.exp(np.random.default_rng(0).normal(0.0, _BEST_SIGMA, len(truth)))
    sjf = (*gains, (f"the truth, blurred by {_BEST_SIGMA}", 100 * sjf_gain(truth, blurred)), ("the truth", 100.0))
    later = [seen for seen in played.seen[200:] if seen.row.status == SUCCEED and seen.row.run_us > 0]
    tell(0.8)
    return Figures(
        levels=PINBALL_LEVELS,
        below=tuple(float(share) for share in below),
        pit=tuple(float(density) for density in pit),
        days=_by_day(scored),
        models=_by_model(scored),
        history=tuple(
            _group(_bucket_name(low, high), [seen for seen in later if low <= seen.finished_before <= high])
            for low, high in _BUCKETS
        ),
        advantage=tuple(played.standing),
        drift=drift,
        sjf=sjf,
        memory=memory_curve(rows),
        fan=demand_fan(rows),
    )


def drift_curve(rows: Sequence[Row], at: float = 0.7, factor: float = DRIFT_FACTOR) -> tuple[tuple[int, float], ...]:
    """Return the mean log error that is added when all run times grow at once, smoothed over requests after that."""
    start = int(len(rows) * at)
    warm = rows[max(0, start - _WARM_ROWS) : start]
    after = rows[start : start + DRIFT_SPAN]
    slowed = [replace(row, run_us=round(row.run_us * factor)) for row in after]
    added = [now - before for now, before in zip(_log_errors(warm, slowed), _log_errors(warm, after), strict=True)]
    middle = _SMOOTH // 2
    return tuple(
        (place + middle, fmean(added[place : place + _SMOOTH])) for place in range(0, len(added) - _SMOOTH + 1, 5)
    )


def memory_curve(rows: Sequence[Row], count: int = 4000, seed: int = 1) -> MemoryCurve:
    """Return how often peaks exceed their limit by its slack.

    The trace has no peaks: each model is given a family, and a size and activations that are off the arithmetic's by a tenth and a
    quarter; each request one of three picture sizes and a peak with a log error of .02.
    """
    random = np.random.default_rng(seed)
    model, traits = GpuMemoryModel(), dict[str, tuple[str, float, float]]()
    peaks, expected, counted, p99 = [], [], [], []
    for row in rows[-count:]:
        if row.model not in traits:
            name = "sdxl" if random.random() < 0.4 else "sd15"
            traits[row.model] = (name, float(np.exp(random.normal(0, 0.1))), float(np.exp(random.normal(0, 0.25))))
        name, heavier, hungrier = traits[row.model]
        side = int(random.choice([512, 768, 1024]))
        request = read_request({**row.features(), "family": name, "width": side})
        family = physics.FAMILIES[name]
        weights = family.weights_bytes * heavier
        activations = family.activation_per_pixel * side * side * request.batch * hungrier
        peak = (weights + activations) * float(np.exp(random.normal(0, 0.02)))
        at_s = row.submitted_us / SECOND
        peaks.append(peak)
        expected.append(model.expected_bytes(request, at_s))
        counted.append(physics.peak_bytes(family, pixels=side * side, rows=request.batch))
        p99.append(model.packed_bytes(request, at_s))
        model.learn(request, at_s, int(peak))
    came, guess, plain, limit = (np.array(values, dtype=np.float64) for values in (peaks, expected, counted, p99))
    return MemoryCurve(
        exceed=tuple(100 * float((came > guess * (1 + slack)).mean()) for slack in SLACKS),
        exceed_unlearned=tuple(100 * float((came > plain * (1 + slack)).mean()) for slack in SLACKS),
        chosen_slack=100 * float((limit / came - 1).mean()),
        chosen_exceed=100 * float((came > limit).mean()),
    )


def demand_fan(rows: Sequence[Row], last_hours: int = 72) -> Fan | None:
    """Return what the demand forecast said of every hour to come over the last hours of a trace; None when that is too short."""
    end_us = rows[-1].submitted_us
    begin_us = max(rows[0].submitted_us + DAY_US, end_us - last_hours * 3600 * SECOND)
    demand = DemandModel(most_series=2)
    said: list[tuple[int, tuple[float, float, float]]] = []
    levels = tuple(min(DEMAND_LEVELS, key=lambda level: abs(level - wanted)) for wanted in (0.05, 0.5, 0.95))
    places = tuple(DEMAND_LEVELS.index(level) for level in levels)
    hour_us = 3600 * SECOND
    next_us = begin_us // hour_us * hour_us + hour_us
    for row in rows:
        while next_us <= row.submitted_us:
            demand.advance(next_us)
            forecast = demand.forecast(ALL)
            if forecast is not None:
                found = next((one for one in forecast if one.horizon_us == hour_us), None)
                if found is not None:
                    low, middle, high = (found.arrival_quantiles[place] for place in places)
                    said.append((next_us, (low, middle, high)))
            next_us += hour_us
        demand.arrived((), row.submitted_us)
    submitted = np.array([row.submitted_us for row in rows])
    said = [(at_us, quantiles) for at_us, quantiles in said if at_us + hour_us <= end_us - BIN_US]
    if len(said) < 3:
        return None
    came = [float(np.searchsorted(submitted, at + hour_us) - np.searchsorted(submitted, at)) for at, _ in said]
    return Fan(
        hours=tuple((at_us - said[0][0]) / hour_us for at_us, _ in said),
        came=tuple(came),
        low=tuple(quantiles[0] for _, quantiles in said),
        middle=tuple(quantiles[1] for _, quantiles in said),
        high=tuple(quantiles[2] for _, quantiles in said),
        levels=(levels[0], levels[1], levels[2]),
    )


def _log_errors(warm: Sequence[Row], after: Sequence[Row]) -> list[float]:
    played = Replay(10**18)
    played.run([*warm, *after])
    return [math.log(seen.row.run_us / SECOND / seen.quantiles_s[6]) for seen in played.seen[len(warm) :]]


def _by_day(scored: Sequence[Seen]) -> tuple[Group, ...]:
    days: dict[int, list[Seen]] = {}
    for seen in scored:
        days.setdefault((seen.row.submitted_us - scored[0].row.submitted_us) // DAY_US, []).append(seen)
    return tuple(_group(f"day {day + 1}", group) for day, group in sorted(days.items()))


def _by_model(scored: Sequence[Seen]) -> tuple[Group, ...]:
    most = [model for model, _ in Counter(seen.row.model for seen in scored).most_common(_MODELS)]
    groups = [_group(model, [seen for seen in scored if seen.row.model == model]) for model in most]
    rest = [seen for seen in scored if seen.row.model not in most]
    return (*groups, _group("all others", rest)) if rest else tuple(groups)


def _group(name: str, seen: Sequence[Seen]) -> Group:
    if not seen:
        return Group(name, 0, math.nan, math.nan)
    low, high = LEVELS.index(0.05), LEVELS.index(0.95)
    truth = np.array([one.row.run_us / SECOND for one in seen])
    quantiles = np.array([one.quantiles_s for one in seen])
    inside = (truth >= quantiles[:, low]) & (truth <= quantiles[:, high])
    off = np.abs(quantiles[:, 6] - truth) / truth
    return Group(name, len(seen), 100 * float(inside.mean()), 100 * float(np.median(off)))


def _bucket_name(low: int, high: int) -> str:
    if low == high:
        return "none"
    return f"{low} to {high}" if high < 10**9 else f"{low - 1}+"
