"""How few GPUs does each profile need to be as quick as the best classic is with all of them?

Asked seed by seed: in one seed every profile and every size meets the same requests, and the target is what the reference
reached in that very seed. So the saving has a paired interval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from sim.study.case import StudyCase
from sim.study.plan import StudyPlan
from sim.sweep import RunRecord
from sim.sweep_table import Interval, interval

Runs = Callable[[Sequence[StudyCase]], list[RunRecord]]
FREE = "(if loads took no time)"
"""In the place of a profile: the reference with load times of next to nothing, which no use of warm models can beat by much."""
_FREE_SCALE = 0.001
_WIDEST = 4
"""Sizes are looked for up to so many times the study's."""


@dataclass(frozen=True, slots=True)
class Size:
    """The fewest GPUs of one profile."""

    profile: str
    gpus: tuple[int | None, ...]
    """By seed; None: not even the largest size tried is enough."""
    mean: Interval | None
    gpu_hours: float | None
    """Mean over seeds: GPUs times the hours that they were there."""
    saving: Interval | None
    """Share of the reference's GPUs that are not needed, seed by seed; negative: more are needed."""


@dataclass(slots=True)
class _Search:
    """Bisection for one profile and seed: `low` is known to be too few, `high` to be enough."""

    low: int
    high: int | None
    widest: int
    hours: dict[int, float]

    def next_size(self) -> int | None:
        if self.high is None:
            return None if self.low >= self.widest else min(self.widest, max(self.low + 1, self.low * 5 // 4))
        if self.low == 0:
            return self.high * 3 // 4 or None
        return None if self.high - self.low <= 1 else (self.low + self.high) // 2

    def learn(self, gpus: int, enough: bool) -> None:
        if enough:
            self.high = gpus
        else:
            self.low = gpus


def p99_completion(record: RunRecord) -> float:
    """Return the measure that sizes are compared by; infinite where nothing finished."""
    every = record.summary["completion"].get("all")
    return float(every["p99"]) if every else float("inf")


def find_sizes(plan: StudyPlan, reference: str, at_full: Mapping[tuple[str, int], RunRecord], runs: Runs) -> list[Size]:
    """Return the fewest GPUs of each profile that hold the reference's p99 completion time.

    `at_full` has the runs at the plan's size by (profile, seed). `FREE` is searched as well.
    That a profile gets no slower with a GPU more is checked where the search goes, not taken for granted: the size found holds
    the target and the one below it does not.
    """
    load = plan.size_load
    targets = {seed: p99_completion(at_full[reference, seed]) for seed in plan.all_seeds}

    def case(profile: str, seed: int, gpus: int) -> StudyCase:
        made = plan.case(reference if profile == FREE else profile, load, seed, gpus)
        return replace(made, load_scale=_FREE_SCALE) if profile == FREE else made

    known = dict(at_full)
    free = runs([case(FREE, seed, plan.gpus) for seed in plan.all_seeds])
    known.update({(FREE, seed): record for seed, record in zip(plan.all_seeds, free, strict=True)})
    searches: dict[tuple[str, int], _Search] = {}
    for (profile, seed), record in known.items():
        search = _Search(0, None, plan.gpus * _WIDEST, {})
        search.hours[plan.gpus] = _gpu_hours(record, plan.gpus)
        if p99_completion(record) <= targets[seed]:
            search.high = plan.gpus
        else:
            search.low = plan.gpus
        searches[profile, seed] = search
    while True:
        asked = [(key, size) for key, search in searches.items() if (size := search.next_size()) is not None]
        if not asked:
            break
        records = runs([case(profile, seed, size) for (profile, seed), size in asked])
        for ((profile, seed), size), record in zip(asked, records, strict=True):
            search = searches[profile, seed]
            search.hours[size] = _gpu_hours(record, size)
            search.learn(size, p99_completion(record) <= targets[seed])
    return [_size(profile, plan, searches, reference) for profile in (*plan.profiles, FREE)]


def _size(profile: str, plan: StudyPlan, searches: Mapping[tuple[str, int], _Search], reference: str) -> Size:
    found = [searches[profile, seed].high for seed in plan.all_seeds]
    known = [size for size in found if size is not None]
    if len(known) < len(found):
        return Size(profile, tuple(found), None, None, None)
    hours = [searches[profile, seed].hours[size] for seed, size in zip(plan.all_seeds, known, strict=True)]
    base = [searches[reference, seed].high or plan.gpus for seed in plan.all_seeds]
    savings = [1 - size / other for size, other in zip(known, base, strict=True)]
    return Size(profile, tuple(found), interval(known), sum(hours) / len(hours), interval(savings))


def _gpu_hours(record: RunRecord, gpus: int) -> float:
    return gpus * record.simulated_s / 3600
