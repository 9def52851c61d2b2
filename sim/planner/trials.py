"""Does a cluster keep the objectives? Simulates it with one seed after another until that is clear, or the seeds are used up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np

from sim.planner.objectives import Objective
from sim.planner.request import PlanRequest, Pool
from sim.planner.runs import Runs

_FAR = 4.0
"""With a value so many times past the limit, or the limit so many times past the value, one seed is enough to search on."""
_BATCHES = (1, 3)
"""Seeds that are made together: first one, then three in all, then two more at a time, whatever the number of processes."""


class Verdict(Enum):
    """What the seeds say."""

    HOLDS = "holds"
    """The whole interval of every objective keeps its limit."""
    MISSES = "misses"
    """The whole interval of some objective is past its limit."""
    UNCLEAR = "too close to call"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measure over seeds with the interval of its mean, by Student's t."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]
    """By seed, in order."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What was found of one cluster under one profile."""

    pool: Pool
    profile: str
    verdict: Verdict
    estimates: tuple[Estimate, ...]
    """By objective."""
    figures: tuple[Mapping[str, Any], ...]
    """By seed."""

    @property
    def seeds(self) -> int:
        """How many seeds were run."""
        return len(self.figures)

    @property
    def holds(self) -> bool:
        """Whether every objective is kept for certain."""
        return self.verdict is Verdict.HOLDS

    def mean(self, name: str) -> float:
        """Return the mean over seeds of a figure such as ``busy``."""
        return sum(float(figures[name]) for figures in self.figures) / len(self.figures)


def other_days(objective: Objective, trial: Trial, number: int, confidence: float) -> tuple[float, float] | None:
    """Return the interval of an objective's value if the recorded hours were drawn anew (`sim.planner.resampling`)."""
    errors = [objective.error(figures["classes"]) for figures in trial.figures]
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return None
    half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(sum(error * error for error in known) / len(known))
    mean = trial.estimates[number].mean
    return max(0.0, mean - half), mean + half


def binding(objectives: Sequence[Objective], trial: Trial) -> int:
    """Return which objective is nearest to its limit, or farthest past it."""
    ratios = [each.ratio(estimate.mean) for each, estimate in zip(objectives, trial.estimates, strict=True)]
    return max(range(len(ratios)), key=lambda number: (ratios[number], -number))


class Trials:
    """Judges clusters, each once; `on_trial` hears of every new one."""

    def __init__(self, request: PlanRequest, runs: Runs, on_trial: Callable[[Trial], None] | None = None) -> None:
        self._request = request
        self._runs = runs
        self._known: dict[tuple[Pool, str], Trial] = {}
        self._on_trial = on_trial

    def judge(self, pool: Pool, profile: str | None = None, *, full: bool = False) -> Trial:
        """Return the verdict on a cluster; `full` runs every seed even if fewer would do."""
        name = profile or self._request.base.profile
        found = self._known.get((pool, name))
        if found is not None and (not full or self._final(found)):
            return found
        count = 0 if found is None else found.seeds
        while True:
            count = self._next(count)
            trial = self._trial(pool, name, count)
            clear = trial.verdict is not Verdict.UNCLEAR
            if self._final(trial) or (clear and not full):
                break
        if found is None and self._on_trial is not None:
            self._on_trial(trial)
        self._known[pool, name] = trial
        return trial

    def prepare(self, pools: Sequence[Pool], profile: str | None = None, seeds: int | None = None) -> None:
        """Run clusters that will be judged, all of them together, so that every process has something to do."""
        request = self._request
        name = profile or request.base.profile
        numbers = range(seeds or request.seeds)
        self._runs.of([request.config(pool, number, profile=name) for pool in pools for number in numbers])

    def prepare_changes(self, pool: Pool, seeds: int, changes: Sequence[dict[str, Any]]) -> None:
        """Run a cluster under several changed configurations, all of them together."""
        numbers = range(min(seeds, self._request.seeds))
        self._runs.of([self._request.config(pool, number, **each) for each in changes for number in numbers])

    def repeat(self, pool: Pool, seeds: int, **changes: Any) -> Trial:
        """Return a trial of exactly so many seeds with a changed configuration; it is not remembered."""
        return self._trial(pool, self._request.base.profile, min(seeds, self._request.seeds), **changes)

    def all(self, profile: str | None = None) -> list[Trial]:
        """Return every trial under a profile, in the order in which they were first made."""
        name = profile or self._request.base.profile
        return [trial for (_, under), trial in self._known.items() if under == name]

    def _next(self, count: int) -> int:
        for step in _BATCHES:
            if count < step:
                return min(step, self._request.seeds)
        return min(count + 2, self._request.seeds)

    def _final(self, trial: Trial) -> bool:
        """Whether more seeds would tell nothing: none is left, or luck plays no part."""
        same = trial.seeds > 1 and all(figures == trial.figures[0] for figures in trial.figures)
        return trial.seeds >= self._request.seeds or same

    def _trial(self, pool: Pool, profile: str, seeds: int, **changes: Any) -> Trial:
        request = self._request
        configs = [request.config(pool, number, profile=profile, **changes) for number in range(seeds)]
        figures = self._runs.of(configs)
        estimates = tuple(
            estimate([each.value(run["classes"]) for run in figures], request.confidence) for each in request.objectives
        )
        return Trial(pool, profile, _verdict(request.objectives, estimates), estimates, tuple(figures))


def estimate(values: Sequence[float], confidence: float) -> Estimate:
    """Return the mean and its interval; endless on both sides for a single value, and infinite where any value is."""
    count = len(values)
    if any(math.isinf(value) for value in values):
        finite = [value for value in values if not math.isinf(value)]
        return Estimate(math.inf, min(finite) if finite else math.inf, math.inf, tuple(values))
    mean = sum(values) / count
    if count < 2:
        return Estimate(mean, 0.0, math.inf, tuple(values))
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    half = student(confidence, count - 1) * spread / math.sqrt(count)
    return Estimate(mean, max(0.0, mean - half), mean + half, tuple(values))


@cache
def student(confidence: float, degrees: int) -> float:
    """Return the value that Student's t with so many degrees of freedom stays within with this probability.

    With t = sqrt(degrees) tan(x) the density becomes cos(x)^(degrees - 1), which is summed and read backwards.
    """
    angles = np.linspace(0.0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (degrees - 1)
    total = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2)))
    return math.sqrt(degrees) * math.tan(float(np.interp(confidence, total / total[-1], angles)))


def _verdict(objectives: Sequence[Objective], estimates: Sequence[Estimate]) -> Verdict:
    pairs = list(zip(objectives, estimates, strict=True))
    if len(estimates[0].values) == 1:
        worst = max(each.ratio(found.mean) for each, found in pairs)
        if worst > _FAR:
            return Verdict.MISSES
        return Verdict.HOLDS if worst < 1 / _FAR else Verdict.UNCLEAR
    if all(each.kept(found.high) for each, found in pairs):
        return Verdict.HOLDS
    return Verdict.MISSES if any(not each.kept(found.low) for each, found in pairs) else Verdict.UNCLEAR
