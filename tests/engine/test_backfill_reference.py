"""Backfill job by job against a plain model of it: one pool of processors, everything planned anew at every event.

The model knows counts only and shares no code with the engine. Run times are the estimates, or upper bounds of them.
"""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from engine.resources import Demand

PLAIN = '[ordering]\npolicy = "fifo"\nbackfill = "{}"\n[binding]\nwarm_reuse = false\n'
PROCESSORS = 12

Job = tuple[str, float, float, float, int]
"""(name, when it comes, how long it runs, how long it is believed to run, processors)."""


def jobs_of(seed: int, exact: bool, count: int = 60) -> list[Job]:
    draw = Random(seed)
    at, jobs = 0.0, []
    for i in range(count):
        at += round(draw.expovariate(1 / 6), 3)
        runs = round(1 + draw.expovariate(1 / 25), 3)
        believed = runs if exact else round(runs * draw.uniform(1.001, 4), 3)
        jobs.append((f"j{i}", at, runs, believed, draw.choice((1, 1, 2, 3, 5, 8, 12))))
    return jobs


class Pool:
    """Free processors over time."""

    def __init__(self, now: float, running: dict[str, tuple[float, int]]) -> None:
        self.now = now
        self.steps = [(end, size) for end, size in running.values()]
        self.free = PROCESSORS - sum(size for _, size in self.steps)

    def at(self, time: float) -> int:
        return self.free + sum(change for when, change in self.steps if when <= time)

    def earliest(self, size: int, span: float) -> float:
        for start in sorted({self.now, *(when for when, _ in self.steps if when > self.now)}):
            moments = [start, *(when for when, _ in self.steps if start < when < start + span)]
            if all(self.at(moment) >= size for moment in moments):
                return start
        raise AssertionError("a job larger than the pool")

    def take(self, start: float, span: float, size: int) -> None:
        if start <= self.now:
            self.free -= size
        else:
            self.steps.append((start, -size))
        self.steps.append((start + span, size))


def planned(jobs: list[Job], reservations: int) -> dict[str, float]:
    """Return when each job starts if the first so many that wait have reservations (0: nobody passes the first one)."""
    begun: dict[str, float] = {}
    running: dict[str, tuple[float, int]] = {}
    truly: dict[str, float] = {}
    waiting: list[Job] = []
    coming = sorted(jobs, key=lambda job: job[1])
    while coming or waiting:
        times = [job[1] for job in coming[:1]] + list(truly.values())
        now = min(times)
        for name in [name for name, end in truly.items() if end <= now]:
            del truly[name], running[name]
        while coming and coming[0][1] <= now:
            waiting.append(coming.pop(0))
        pool, made = Pool(now, running), 0
        for job in list(waiting):
            name, _, runs, believed, size = job
            start = pool.earliest(size, believed)
            if start <= now:
                pool.take(now, believed, size)
                begun[name], truly[name] = now, now + runs
                running[name] = (now + believed, size)
                waiting.remove(job)
            elif made < reservations:
                pool.take(start, believed, size)
                made += 1
            elif not reservations:
                break
    return begun


def engine_starts(world: Any, jobs: list[Job]) -> dict[str, float]:
    world.node(gpus=PROCESSORS)
    for name, at, runs, believed, size in jobs:
        world.job(name, at, runs, believed=believed, demand=Demand(gpus=size))
    return {name: times[0] for name, times in world.run().begun.items()}


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "upper bounds"])
@pytest.mark.parametrize(("mode", "reservations"), [("none", 0), ("easy", 1), ("conservative", 1_000)])
@pytest.mark.parametrize("seed", range(3))
def test_every_job_starts_when_the_plain_model_says(
    clockwork: Any, mode: str, reservations: int, seed: int, exact: bool
) -> None:
    jobs = jobs_of(seed, exact)
    wanted = planned(jobs, reservations)
    found = engine_starts(clockwork(PLAIN.format(mode)), jobs)
    assert found == pytest.approx(wanted, abs=0.01)


def test_the_modes_differ_on_these_jobs() -> None:
    jobs = jobs_of(0, exact=False)
    assert len({tuple(sorted(planned(jobs, n).items())) for n in (0, 1, 1_000)}) == 3


@pytest.mark.parametrize("seed", range(4))
def test_with_exact_predictions_nobody_starts_later_than_first_promised_under_conservative_backfill(
    clockwork: Any, seed: int
) -> None:
    """What a job is promised when it comes (the plan of that moment) is kept to the end."""
    jobs = jobs_of(seed, exact=True)
    found = engine_starts(clockwork(PLAIN.format("conservative")), jobs)
    for count in range(1, len(jobs) + 1, 7):
        until_then = planned(jobs[:count], 1_000)  # later arrivals change nothing for earlier ones
        for name, at in until_then.items():
            assert found[name] <= at + 0.01
