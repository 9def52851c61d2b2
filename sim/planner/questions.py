"""What a planner asks of an answer: how firm it is, when it is tight, and whether another policy would save GPUs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from sim.planner.objectives import shown
from sim.planner.request import PlanRequest, gpus_of, pool_text
from sim.planner.results import Plan, PolicyRow, Sway
from sim.planner.search import Fewest, Search
from sim.planner.trials import Trial, Trials, Verdict, binding

_SWAY_SEEDS = 3
_KNEE = 3.0
"""One GPU less that makes the value so many times as large is a knee."""
_TIGHT = 0.05
_FEW = 5
_DAY_H, _WEEK_H = 24.0, 168.0

_Ends = tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]


def sways_of(request: PlanRequest, trials: Trials, answer: Trial, heard: Callable[[str], None]) -> tuple[Sway, ...]:
    """Vary one assumption at a time at the answer, with the seeds of the answer; the widest first."""
    number = binding(request.objectives, answer)
    objective = request.objectives[number]
    seeds = min(_SWAY_SEEDS, answer.seeds)
    base = sum(answer.estimates[number].values[:seeds]) / seeds
    found = []
    assumptions = _assumptions(request)
    trials.prepare_changes(answer.pool, seeds, [changes for ends in assumptions.values() for _, changes in ends])
    for name, ends in assumptions.items():
        values, kept = [], []
        for label, changes in ends:
            trial = trials.repeat(answer.pool, seeds, **changes) if changes else None
            value = base if trial is None else trial.estimates[number].mean
            values.append(value)
            kept.append(objective.kept(value))
            heard(f"{name}, {label}: {objective.name} {shown(value, objective.unit)}")
        (low, _), (high, _) = ends
        found.append(Sway(name, low, values[0], kept[0], high, values[1], kept[1], base))
    return tuple(sorted(found, key=lambda sway: (-sway.width, sway.name)))


def _assumptions(request: PlanRequest) -> dict[str, _Ends]:
    base = request.base
    if base.mtbf_hours is None:
        failures: _Ends = (("none", {}), ("each node fails once a day", {"mtbf_hours": _DAY_H}))
    else:
        failures = (
            ("a quarter as often", {"mtbf_hours": base.mtbf_hours * 4}),
            ("four times as often", {"mtbf_hours": base.mtbf_hours / 4}),
        )
    return {
        "arrival rate": (
            ("-20%", {"rate_scale": base.rate_scale * 0.8}),
            ("+20%", {"rate_scale": base.rate_scale * 1.2}),
        ),
        "number of models": (
            ("half", {"model_scale": base.model_scale * 0.5}),
            ("twice", {"model_scale": base.model_scale * 2}),
        ),
        "load times": (
            ("half", {"load_scale": base.load_scale * 0.5}),
            ("twice", {"load_scale": base.load_scale * 2}),
        ),
        "failures": failures,
        "prediction error": (("run times known", {"forecaster": "oracle"}), ("no predictions", {"forecaster": "none"})),
    }


def headroom(answer: Trial) -> tuple[Mapping[str, float], ...]:
    """Return the hours of the day that occur: tasks per hour, busy, loading and free shares, the fullest such hour, p99 waiting."""
    by_hour: dict[float, list[Mapping[str, float]]] = {}
    for figures in answer.figures:
        for row in figures["hours"]:
            by_hour.setdefault(row["hour"], []).append(row)
    found = []
    for hour, rows in sorted(by_hour.items()):
        mean = {name: sum(row[name] for row in rows) / len(rows) for name in ("tasks", "busy", "loading", "p99_wait")}
        fullest = max(row["fullest"] for row in rows)
        found.append({"hour": hour, **mean, "free": max(0.0, 1 - mean["busy"] - mean["loading"]), "fullest": fullest})
    return tuple(found)


def other_policies(
    request: PlanRequest,
    trials: Trials,
    answer: Trial,
    found: Fewest,
    search: Search,
    enter: Callable[[str], None],
) -> tuple[PolicyRow, ...]:
    """Return what each other profile needs of the model that the base's profile does best with."""
    number = binding(request.objectives, answer)
    rows = []
    for profile in request.policies:
        if profile == request.base.profile:
            continue
        enter(f"asking for {profile}")
        there = trials.judge(answer.pool, profile)
        needed = search.fewest(found.model, found.count or 1, profile)
        cost = None if needed.trial is None else request.cost(needed.trial.pool)
        rows.append(PolicyRow(profile, needed.count, cost, there.estimates[number].mean, there.holds, needed.why))
    return tuple(rows)


def warnings_of(made: Plan) -> tuple[str, ...]:
    """Return what a planner should know before ordering."""
    found = [*_knee(made), *_firmness(made)]
    for each in made.pure:
        found += [f"not monotone: {breach}" for breach in each.breaches]
    if made.untried:
        found.append(f"{made.untried} cheaper mixes were promising but not tried; raise --mixes to try more")
    return tuple(found)


def _knee(made: Plan) -> list[str]:
    """Return where waiting begins to grow steeply.

    Of many servers with utilisation 1 - b / sqrt(n), a share of 1 / (1 + b F(b) / f(b)) of the arrivals waits, F and f the normal
    distribution and density (Halfin and Whitt, 1981): half of them at b = 0.5.
    """
    answer, below, request = made.answer, made.below, made.request
    if answer is None:
        return []
    objective, found = made.objective, []
    if below is not None:
        here, there = made.value(answer), made.value(below)
        if there > max(_KNEE * here, objective.limit / 10):
            found.append(
                f"knee: with one GPU less {objective.name} goes from {shown(here, objective.unit)} to "
                f"{shown(there, objective.unit)}; one failed GPU has the same effect, so plan a spare"
            )
    gpus = gpus_of(answer.pool)
    knee = 1 - 0.5 / math.sqrt(gpus)
    full = [row for row in made.hours if row["fullest"] > knee]
    if full:
        worst = max(full, key=lambda row: (row["fullest"], -row["hour"]))
        found.append(
            f"knee: in the fullest hour (at {worst['hour']:02.0f}:00) {worst['fullest']:.0%} of the GPUs run or load; beyond "
            f"{knee:.0%} (1 - 1/(2 sqrt({gpus}))) more than half of what arrives has to wait"
        )
    for sway in made.sways:
        if sway.name == "arrival rate" and not sway.high_kept:
            found.append(
                f"no room for growth: with 20% more arrivals {objective.name} is {shown(sway.high, objective.unit)}"
            )
    if request.cost(answer.pool) == 0:
        found.append("the price of the answer is 0: check --gpu or the price list")
    return found


def _firmness(made: Plan) -> list[str]:
    answer, objective, found = made.answer, made.objective, []
    if answer is None:
        return []
    estimate = answer.estimates[made.number]
    if objective.limit * (1 - _TIGHT) < estimate.high <= objective.limit:
        found.append(f"tight: the interval ends within {_TIGHT:.0%} of the limit")
    if made.below is not None and made.below.verdict is Verdict.UNCLEAR:
        found.append(f"{pool_text(made.below.pool)} may hold too: more --seeds would tell")
    tail = objective.tail
    tasks = float(answer.figures[0]["classes"][objective.selector]["count"])
    if tail is not None and tasks * tail < _FEW:
        found.append(
            f"{tasks:.0f} tasks are few for {objective.name}: it is decided by the slowest {max(1, round(tasks * tail))} of them"
        )
    if answer.mean("lost"):
        found.append(f"{answer.mean('lost'):.3g} tasks per run were never served, within what the objective allows")
    days = made.other_days()
    if days is None:
        return found
    same = len(set(estimate.values)) == 1
    luck = "which plays no part here" if same else "such as tenants, urgency, loads and failures"
    found.append(f"the arrivals are the recorded ones: seeds vary luck alone, {luck}")
    if not objective.kept(days[1]):
        found.append(
            f"on other days like these {objective.name} may be as high as {shown(days[1], objective.unit)}: the answer is firm "
            "for the recorded arrivals only"
        )
    return found
