"""Do the promised times hold? Plays a workload through the production engine, looks ahead as production does, and keeps the score.

Each task's first promise, made at the next look after it came, is compared with when it started and ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Final

from engine import profiles
from engine.ahead.foresight import Foresight, Promise
from engine.commands import Command, Notify
from engine.events import Event, TaskFinished, TaskStarted
from engine.scheduler import Engine
from engine.tasks import SECOND, TERMINAL_STATES, Micros, TaskState
from sim.configuration import ConfigError, SimulationConfig
from sim.simulate import simulate
from sim.workload import Workload

LOADS: Final = (0.6, 0.7, 0.8, 0.9, 1.0)
HORIZONS_S: Final = (10, 60, 300, 1_800)
LOOK_US: Final = 30 * SECOND
"""How often to look ahead, in simulated time: a task has its first promise so much after it came, at most."""
LEARNING: Final = 500
"""First promises that are not scored: with them the factors are learned."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A promise and what came of it."""

    promise: Promise
    urgent: bool
    started_at: Micros
    finished_at: Micros

    @property
    def held(self) -> bool:
        """Tell whether the P90 of the finish held."""
        return self.finished_at <= self.promise.finish_p90


@dataclass(slots=True)
class PromiseScore:
    """How promises did in one run."""

    load: float
    seed: int
    outcomes: list[Outcome] = field(default_factory=list)
    looks: int = 0
    looking_s: float = 0.0
    wall_s: float = 0.0
    lately: float = float("nan")
    """Share that held over the last 1,000, as the platform itself says."""

    def coverage(self, name: str, outcomes: Sequence[Outcome] | None = None) -> float:
        """Return the share of promises of one quantile that held."""
        outcomes = self.outcomes if outcomes is None else outcomes
        real = "finished_at" if name.startswith("finish") else "started_at"
        held = sum(getattr(each, real) <= getattr(each.promise, name) for each in outcomes)
        return held / len(outcomes) if outcomes else float("nan")

    def by_horizon(self) -> dict[str, tuple[int, float]]:
        """Return (promises, share whose P90 of the finish held) by how far ahead that lay, in seconds."""
        parts: dict[str, list[Outcome]] = {}
        for each in self.outcomes:
            ahead_s = (each.promise.finish_p90 - each.promise.made_at) / SECOND
            edge = next((str(limit) for limit in HORIZONS_S if ahead_s <= limit), "more")
            parts.setdefault(edge, []).append(each)
        return {
            edge: (len(part), self.coverage("finish_p90", part))
            for edge in (*map(str, HORIZONS_S), "more")
            if (part := parts.get(edge))
        }

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        waits = sorted((each.started_at - each.promise.made_at) / SECOND for each in self.outcomes)
        widths = sorted((each.promise.finish_p90 - each.promise.finish_p50) / SECOND for each in self.outcomes)
        middle = len(self.outcomes) // 2
        return {
            "load": self.load,
            "seed": self.seed,
            "promises": len(self.outcomes),
            "coverage": {
                name: round(self.coverage(name), 4) for name in ("start_p50", "start_p90", "finish_p50", "finish_p90")
            },
            "last_1000": round(self.lately, 4),
            "by_horizon_s": {edge: [count, round(share, 4)] for edge, (count, share) in self.by_horizon().items()},
            "urgent": round(self.coverage("finish_p90", [each for each in self.outcomes if each.urgent]), 4),
            "median_wait_s": round(waits[middle], 1) if waits else None,
            "mean_wait_s": round(sum(waits) / len(waits), 1) if waits else None,
            "median_p90_minus_p50_s": round(widths[middle], 1) if widths else None,
            "looks": self.looks,
            "look_ms": round(1e3 * self.looking_s / self.looks, 2) if self.looks else None,
            "wall_s": round(self.wall_s, 1),
        }


def told(score: PromiseScore) -> str:
    """Return in a sentence how promised finishes did."""
    lately = f", and {score.lately:.1%} over the last 1,000" if score.lately == score.lately else ""
    return (
        f"load {score.load:g}: our P90 of the finish held for {score.coverage('finish_p90'):.1%} of {len(score.outcomes)} tasks"
        f"{lately}; the P50 for {score.coverage('finish_p50'):.1%}"
    )


class Scorer:
    """A journal that looks ahead every `look_us` while anything changes."""

    def __init__(self, engine: Engine, score: PromiseScore, look_us: Micros = LOOK_US) -> None:
        self._engine = engine
        self._score = score
        self._look_us = look_us
        self._next: Micros = 0
        self.foresight = Foresight(engine.state, engine.profile)
        self._first: dict[str, Promise] = {}
        self._started: dict[str, Micros] = {}
        self._seen = 0

    def __call__(self, now: Micros, events: Sequence[Event], commands: Sequence[Command]) -> None:
        """Follow one step."""
        foresight = self.foresight
        foresight.step(now, events, commands)
        for event in events:
            if isinstance(event, TaskStarted) and event.rank == 0:
                self._started.setdefault(event.req_no, now)
            elif isinstance(event, TaskFinished) and event.rank == 0:
                self._finished(now, event.req_no)
        for command in commands:
            if isinstance(command, Notify) and command.state in TERMINAL_STATES:
                if command.state is not TaskState.FINISHED:
                    self._first.pop(command.req_no, None)
                self._started.pop(command.req_no, None)
        if foresight.changed and now >= self._next:
            self._look(now)

    def _look(self, now: Micros) -> None:
        fresh = self.foresight.fresh
        began = perf_counter()
        outlook = self.foresight.look()
        self._score.looking_s += perf_counter() - began
        self._score.looks += 1
        self._next = now + self._look_us
        for name in fresh:
            promise = outlook.of(name)
            if promise is not None:
                self._first.setdefault(name, promise)

    def _finished(self, now: Micros, name: str) -> None:
        promise = self._first.pop(name, None)
        started = self._started.get(name)
        if promise is None or started is None:
            return
        self._seen += 1
        if self._seen > LEARNING:
            urgent = self._engine.state.tasks[name].urgent
            self._score.outcomes.append(Outcome(promise, urgent, started, now))


def score(
    config: SimulationConfig, load: float, *, workload: Workload | None = None, look_us: Micros = LOOK_US
) -> PromiseScore:
    """Run one simulation and score its promises; `load` is only noted (`at_load` makes a configuration of a load)."""
    result = PromiseScore(load, config.seed)
    made: list[Scorer] = []

    def beside(engine: Engine) -> Scorer:
        made.append(Scorer(engine, result, look_us))
        return made[0]

    began = perf_counter()
    simulate(config, workload=workload, beside=beside)
    result.wall_s = perf_counter() - began
    result.lately = made[0].foresight.coverage().share
    return result


def at_load(config: SimulationConfig, load: float) -> SimulationConfig:
    """Return the configuration with arrivals so fast that run times alone keep the GPUs busy for this share of the time."""
    if not 0 < load <= 2:
        raise ConfigError(
            f"load: must be above 0 and at most 2, got {load}; 0.8 keeps the GPUs busy for 80% of the time"
        )
    workload = replace(config, rate_scale=1.0).workload()
    hardware = config.hardware()
    work = 0.0
    for arrival in workload.arrivals:
        known = arrival.truth.work_us
        work += hardware.run_us(arrival.task, hardware.reference_gpu) if known is None else known
    gpus = config.nodes * config.gpus_per_node
    span = max(1, workload.span_us)
    if not work:
        raise ConfigError("load: the workload has no run times to measure it by")
    return replace(config, rate_scale=load * gpus * span / work)


def study(
    config: SimulationConfig,
    loads: Sequence[float] = LOADS,
    seeds: int = 3,
    on_progress: Callable[[float, str], None] | None = None,
) -> list[PromiseScore]:
    """Score promises over loads and seeds."""
    profiles.load(config.profile) if not config.profile.endswith(".toml") else None
    scores = []
    for number, load in enumerate(loads):
        for seed in range(seeds):
            if on_progress is not None:
                done = (number * seeds + seed) / (len(loads) * seeds)
                on_progress(done, f"load {load}, seed {seed}")
            scores.append(score(at_load(replace(config, seed=seed), load), load))
    if on_progress is not None:
        on_progress(1.0, "done")
    return scores
