"""A finished plan: plain records, and the same as JSON and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sim.planner.objectives import Objective, shown
from sim.planner.request import PlanRequest, Pool, gpus_of, pool_text
from sim.planner.search import Fewest
from sim.planner.theory import Comparison
from sim.planner.trials import Estimate, Trial, Verdict, binding, other_days
from sim.prices import HOURS_PER_MONTH


@dataclass(frozen=True, slots=True)
class Sway:
    """What one assumption does to the objective at the answer: its value lower and higher than assumed."""

    name: str
    low_label: str
    low: float
    low_kept: bool
    high_label: str
    high: float
    high_kept: bool
    base: float
    """With the same seeds, as assumed."""

    @property
    def width(self) -> float:
        """How far the two ends lie apart."""
        ends = (self.low, self.high, self.base)
        return max(ends) - min(ends) if not any(math.isinf(end) for end in ends) else math.inf


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """What another profile would need, and what it does on the answer's cluster."""

    profile: str
    gpus: int | None
    cost: float | None
    value: float
    """Of the objective, on the answer's cluster."""
    kept: bool
    why: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer, and what a planner asks next."""

    request: PlanRequest
    workload: str
    workload_digest: str
    pure: tuple[Fewest, ...]
    mixes: tuple[Trial, ...] = ()
    untried: int = 0
    """Promising cheaper mixes that the budget left out."""
    curve: tuple[Trial, ...] = ()
    """Every cluster that was simulated under the profile, by cost."""
    answer: Trial | None = None
    """None: nothing that is on offer keeps the objectives, or too little of it."""
    below: Trial | None = None
    """One GPU less of the answer."""
    above: Trial | None = None
    load: float = math.inf
    """Offered load of the answer: its share of time that the work alone takes."""
    sways: tuple[Sway, ...] = ()
    hours: tuple[Mapping[str, float], ...] = ()
    warnings: tuple[str, ...] = ()
    theory: Comparison | None = None
    policies: tuple[PolicyRow, ...] = ()
    within_reach: str = ""
    """Where there is no answer: a weaker objective that has one, and its cluster."""
    runs: int = 0
    reused: int = 0
    """Of the runs, those that a store had already."""

    @property
    def number(self) -> int:
        """Which objective is nearest to its limit at the answer."""
        return 0 if self.answer is None else binding(self.request.objectives, self.answer)

    @property
    def objective(self) -> Objective:
        """The objective that is nearest to its limit."""
        return self.request.objectives[self.number]

    def sentence(self) -> str:
        """Return the answer in one line."""
        request, answer = self.request, self.answer
        promised = " and ".join(str(each) for each in request.objectives)
        if answer is None:
            reach = f"; within reach: {self.within_reach}" if self.within_reach else ""
            return (
                f"no answer for {promised} with {request.base.profile}: "
                + "; ".join(each.why for each in self.pure)
                + reach
            )
        cost = request.cost(answer.pool)
        level = f"{request.confidence:.0%}"
        estimate = answer.estimates[self.number]
        days = self.other_days()
        if days is None:
            apart = ""
        else:
            apart = f" ({shown(days[0], self.objective.unit)} to {shown(days[1], self.objective.unit)} on other days like these)"
        line = (
            f"{pool_text(answer.pool)} ({money(cost, request.currency)}/h) keep {promised} with {answer.profile}: "
            f"{self.objective.name} {shown(estimate.mean, self.objective.unit)}, {level} interval "
            f"{_between(estimate, self.objective.unit)} over {answer.seeds} seeds{apart}"
        )
        if self.below is None:
            return line + "; fewer is none"
        worst = binding(request.objectives, self.below)
        less, unit = self.below.estimates[worst], request.objectives[worst].unit
        verdict = {
            Verdict.MISSES: "misses",
            Verdict.UNCLEAR: "is too close to call",
            Verdict.HOLDS: "holds as well",
        }[self.below.verdict]
        return line + (
            f"; {pool_text(self.below.pool)} {verdict}: {request.objectives[worst].name} {shown(less.mean, unit)} "
            f"({_between(less, unit)})"
        )

    def other_days(self) -> tuple[float, float] | None:
        """Return the interval of the objective if recorded hours were drawn anew; None where every seed has arrivals of its own."""
        recorded = self.request.base.trace is not None or self.request.workload is not None
        if self.answer is None or not recorded:
            return None
        return other_days(self.objective, self.answer, self.number, self.request.confidence)

    def value(self, trial: Trial) -> float:
        """Return the mean of the answer's nearest objective in another trial."""
        return trial.estimates[self.number].mean

    def front(self) -> list[Trial]:
        """Return the trials that no other beats in both cost and value, by cost."""
        best, found = math.inf, []
        for trial in self.curve:
            if self.value(trial) < best:
                best = self.value(trial)
                found.append(trial)
        return found

    def to_json(self) -> dict[str, Any]:
        """Return plain values; an infinite value (a task that is never served) is None."""
        request = self.request
        values = {
            "schema": 1,
            "answer": None if self.answer is None else self._trial(self.answer),
            "sentence": self.sentence(),
            "within_reach": self.within_reach,
            "other_days": self.other_days(),
            "below": None if self.below is None else self._trial(self.below),
            "above": None if self.above is None else self._trial(self.above),
            "alternatives": [self._fewest(each) for each in self.pure],
            "mixes": [self._trial(trial) for trial in self.mixes],
            "mixes_untried": self.untried,
            "curve": [self._trial(trial) for trial in self.curve],
            "pareto": [pool_text(trial.pool) for trial in self.front()],
            "sensitivity": [asdict(each) for each in self.sways],
            "hours": [dict(row) for row in self.hours],
            "warnings": list(self.warnings),
            "theory": None if self.theory is None else asdict(self.theory),
            "policies": [asdict(row) for row in self.policies],
            "offered_load": self.load,
            "workload": {"name": self.workload, "digest": self.workload_digest},
            "request": request.to_json(),
            "config_hash": request.digest(),
            "seeds": [request.base.seed + number for number in range(request.seeds)],
        }
        plain: dict[str, Any] = finite(values)
        return plain

    def _fewest(self, each: Fewest) -> dict[str, Any]:
        return {
            "gpu_model": each.model,
            "gpus": each.count,
            "bound": each.bound,
            "trial": None if each.trial is None else self._trial(each.trial),
            "why": each.why,
            "not_monotone": list(each.breaches),
        }

    def _trial(self, trial: Trial) -> dict[str, Any]:
        request = self.request
        objectives = zip(request.objectives, trial.estimates, strict=True)
        return {
            "pool": dict(trial.pool),
            "gpus": gpus_of(trial.pool),
            "profile": trial.profile,
            "cost_per_hour": request.cost(trial.pool),
            "cost_per_month": request.cost(trial.pool) * HOURS_PER_MONTH,
            "verdict": trial.verdict.value,
            "seeds": trial.seeds,
            "busy": trial.mean("busy"),
            "loading": trial.mean("loading"),
            "lost": trial.mean("lost"),
            "objectives": [
                {
                    "objective": str(objective),
                    "limit": objective.limit,
                    "unit": objective.unit,
                    "mean": estimate.mean,
                    "low": estimate.low,
                    "high": estimate.high,
                    "values": list(estimate.values),
                }
                for objective, estimate in objectives
            ],
        }


def csv_text(plan: Plan) -> str:
    """Return one line per cluster that was simulated: cost, verdict, and each objective's mean and interval."""
    request = plan.request
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    heads = [offer.gpu_model for offer in request.offers]
    for objective in request.objectives:
        heads += [objective.name, f"{objective.name} low", f"{objective.name} high"]
    writer.writerow(
        [
            "answer",
            "profile",
            *heads,
            "cost_per_hour",
            "currency",
            "verdict",
            "seeds",
            "busy",
            "loading",
            "first_seed",
            "config_hash",
        ]
    )
    for trial in plan.curve:
        counts = dict(trial.pool)
        cells: list[Any] = [counts.get(offer.gpu_model, 0) for offer in request.offers]
        for estimate in trial.estimates:
            cells += [_cell(estimate.mean), _cell(estimate.low), _cell(estimate.high)]
        chosen = "yes" if plan.answer is not None and trial.pool == plan.answer.pool else ""
        cells += [f"{request.cost(trial.pool):.6g}", request.currency, trial.verdict.value, trial.seeds]
        cells += [_cell(trial.mean("busy")), _cell(trial.mean("loading")), request.base.seed, request.digest()]
        writer.writerow([chosen, trial.profile, *cells])
    return buffer.getvalue()


def money(amount: float, currency: str) -> str:
    """Write an amount for people."""
    return f"{amount:,.2f} {currency}" if amount < 1000 else f"{amount:,.0f} {currency}"


def finite(value: Any) -> Any:
    """Return plain values with None for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(each) for each in value]
    return value


def costs(request: PlanRequest, pool: Pool) -> tuple[float, float]:
    """Return a cluster's cost per hour and per month of 730 hours."""
    per_hour = request.cost(pool)
    return per_hour, per_hour * HOURS_PER_MONTH


def _between(estimate: Estimate, unit: str) -> str:
    if math.isinf(estimate.high):
        return f"from {shown(estimate.low, unit)}"
    return f"{shown(estimate.low, unit)} to {shown(estimate.high, unit)}"


def _cell(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else ""
