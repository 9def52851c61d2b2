"""The study of the platform's own workload: which profile serves GenTD26 best, by how much, and is it luck?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine import profiles
from sim import likeness
from sim.paired import Difference, difference
from sim.simulate import Progress
from sim.study import scaled
from sim.study.case import StudyCase
from sim.study.plan import OURS, StudyPlan, profile_text, with_tie
from sim.study.sizes import Size, find_sizes, p99_completion
from sim.sweep import RunRecord, run_sweep
from sim.sweep_table import MEASURES, Interval, interval
from sim.workload import Workload

FIT = (
    "gap_cv",
    "dispersion_1min",
    "dispersion_10min",
    "dispersion_1h",
    "peak_to_mean_1h",
    "seconds_p50",
    "seconds_p99",
    "model_top_1",
    "model_top_10",
    "lru_16",
)
_FIT_HOURS = 24.0
"""Dispersion over an hour takes many hours to measure: the fit is that of at least so many, drawn as those of the study are."""


@dataclass(frozen=True, slots=True)
class Standing:
    """One profile at one load."""

    load: float
    profile: str
    figures: dict[str, Interval]
    differences: tuple[Difference, ...]
    """From the reference at this load, seed by seed; empty for the reference itself and for a single seed."""


@dataclass(frozen=True, slots=True)
class TieEffect:
    """What the tie rule moves for one profile: mean p99 completion by rule."""

    profile: str
    by_tie: dict[str, Interval]

    @property
    def best(self) -> str:
        """The rule with the lowest mean."""
        return min(self.by_tie, key=lambda tie: self.by_tie[tie].mean)

    @property
    def worst(self) -> str:
        """The rule with the highest mean."""
        return max(self.by_tie, key=lambda tie: self.by_tie[tie].mean)


@dataclass(frozen=True, slots=True)
class Study:
    """Everything that the study found."""

    plan: StudyPlan
    fit: dict[str, tuple[float, Interval]]
    """Statistic -> (of the days as they were, of the scaled workload over seeds at the load of the sizes)."""
    references: dict[float, str]
    """By load: the classic with the lowest mean p99 completion."""
    standings: tuple[Standing, ...]
    ties: tuple[TieEffect, ...]
    ties_missing: str
    """Why there is no comparison of tie rules; empty where there is one."""
    sizes: tuple[Size, ...]
    runs: tuple[RunRecord, ...]

    def size_of(self, profile: str) -> Size | None:
        """Return the size found for a profile."""
        return next((size for size in self.sizes if size.profile == profile), None)

    def standing(self, profile: str, load: float) -> Standing | None:
        """Return a profile's figures at a load."""
        return next((each for each in self.standings if (each.profile, each.load) == (profile, load)), None)


def run_study(
    plan: StudyPlan,
    store: Path | None = None,
    jobs: int | None = None,
    on_progress: Progress | None = None,
) -> Study:
    """Run the study; raises `ValueError` naming the field and the remedy. With a store it can be interrupted and taken up again."""
    steps = _Steps(on_progress)
    loads = sorted({*plan.loads, plan.size_load})
    keys = [(load, seed, profile) for load in loads for seed in plan.all_seeds for profile in plan.profiles]
    cases = [plan.case(profile, load, seed) for load, seed, profile in keys]
    done = _Done(store, jobs)
    records = done.runs(cases, steps.part(0.0, 0.45, "loads"))
    by_key = dict(zip(keys, records, strict=True))
    references = {load: _reference(plan, load, by_key) for load in loads}
    standings = [
        _standing(plan, load, profile, references[load], by_key) for load in loads for profile in plan.profiles
    ]
    ties, missing = _ties(plan, done, steps.part(0.45, 0.65, "tie rules"))
    at_full = {
        (profile, seed): by_key[plan.size_load, seed, profile] for profile in plan.profiles for seed in plan.all_seeds
    }
    sizing = steps.part(0.65, 1.0, "sizes")
    sizes = find_sizes(plan, references[plan.size_load], at_full, lambda wanted: done.runs(wanted, sizing))
    return Study(
        plan=plan,
        fit=_fit(plan),
        references=references,
        standings=tuple(standings),
        ties=ties,
        ties_missing=missing,
        sizes=tuple(sizes),
        runs=tuple(done.records.values()),
    )


class _Done:
    """The runs of one study; what one part of it has run, another does not run again."""

    def __init__(self, store: Path | None, jobs: int | None) -> None:
        self._store, self._jobs = store, jobs
        self.records: dict[StudyCase, RunRecord] = {}

    def runs(self, cases: Sequence[StudyCase], on_progress: Progress | None) -> list[RunRecord]:
        missing = [case for case in dict.fromkeys(cases) if case not in self.records]
        self.records.update(zip(missing, run_sweep(missing, self._store, self._jobs, on_progress), strict=True))
        return [self.records[case] for case in cases]


class _Steps:
    """Maps the progress of the study's parts onto one bar that never goes back."""

    def __init__(self, report: Progress | None) -> None:
        self._report = report
        self._furthest = 0.0

    def part(self, begin: float, end: float, name: str) -> Progress | None:
        if self._report is None:
            return None
        report = self._report

        def tell(share: float, text: str) -> None:
            self._furthest = max(self._furthest, begin + (end - begin) * share)
            report(self._furthest, f"{name}: {text}")

        return tell


_Key = tuple[float, int, str]
"""(load, seed, profile)."""


def _reference(plan: StudyPlan, load: float, runs: Mapping[_Key, RunRecord]) -> str:
    """Return the classic with the lowest mean p99 completion: of the engine's own profiles but ours; files are challengers."""
    known = [profile for profile in plan.profiles if profile in profiles.NAMES]
    classics = [profile for profile in known if profile != OURS] or known or list(plan.profiles)
    return min(classics, key=lambda name: sum(p99_completion(runs[load, seed, name]) for seed in plan.all_seeds))


def _standing(plan: StudyPlan, load: float, profile: str, reference: str, runs: Mapping[_Key, RunRecord]) -> Standing:
    figures, differences = {}, []
    for name, measure in MEASURES.items():
        ours = _values(plan, load, profile, measure, runs)
        if ours is None:
            continue
        figures[name] = interval(ours)
        theirs = _values(plan, load, reference, measure, runs)
        if profile != reference and theirs is not None and plan.seeds > 1:
            differences.append(difference(profile, name, list(zip(theirs, ours, strict=True))))
    return Standing(load, profile, figures, tuple(differences))


def _values(
    plan: StudyPlan, load: float, profile: str, measure: Any, runs: Mapping[_Key, RunRecord]
) -> list[float] | None:
    try:
        return [
            float(measure(runs[load, seed, profile].summary, runs[load, seed, profile].world))
            for seed in plan.all_seeds
        ]
    except (KeyError, ZeroDivisionError, ValueError):
        return None


def _ties(plan: StudyPlan, done: _Done, on_progress: Progress | None) -> tuple[tuple[TieEffect, ...], str]:
    if not plan.ties:
        return (), "not asked for"
    texts = {(profile, tie): with_tie(profile, tie) for profile in plan.profiles for tie in plan.ties}
    for (profile, tie), text in list(texts.items()):
        try:
            same = profiles.load(text) == profiles.load(profile_text(profile))
        except ValueError as error:
            return (), f"the profile {profile} takes no tie rule {tie!r}: {error}"
        if same:
            texts[profile, tie] = profile
    keys = [(profile, tie, seed) for seed in plan.all_seeds for profile, tie in texts]
    cases = [plan.case(texts[profile, tie], plan.size_load, seed) for profile, tie, seed in keys]
    records = done.runs(cases, on_progress)
    found: dict[str, dict[str, list[float]]] = {}
    for (profile, tie, _), record in zip(keys, records, strict=True):
        found.setdefault(profile, {}).setdefault(tie, []).append(p99_completion(record))
    effects = tuple(
        TieEffect(profile, {tie: interval(values) for tie, values in by_tie.items()})
        for profile, by_tie in found.items()
    )
    return effects, ""


def _fit(plan: StudyPlan) -> dict[str, tuple[float, Interval]]:
    window = scaled.window(plan.trace, plan.first_day, plan.last_day)
    own = likeness.measure(Workload("as it was", window.arrivals))
    cases = [plan.case(plan.profiles[0], plan.size_load, seed) for seed in plan.all_seeds]
    made = [likeness.measure(replace(case, hours=max(_FIT_HOURS, case.hours)).workload()) for case in cases]
    return {
        name: (own[name], interval([each[name] for each in made]))
        for name in FIT
        if name in own and all(name in each for each in made)
    }
