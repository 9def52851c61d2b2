"""The scheduler's foresight while it runs: looks ahead when it can afford to, keeps what it learned, and answers quotes.

A look costs from a millisecond (a few tasks) to some hundred (ten thousand); the next one comes after fifty times that, so that
looking takes at most 2% of the scheduler's time, however much waits. Quotes have as much again, of which a second may be saved up.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from api.ports import SupportRefused
from engine.ahead.calibration import LEVELS, Calibration, Coverage
from engine.ahead.foresight import Foresight, Outlook, Promise
from engine.commands import Command
from engine.events import Event, TaskSubmitted
from engine.ports import Forecaster
from engine.scheduler import Engine
from engine.tasks import Estimate, Micros, TaskSpec
from predictors.forecaster import OnlineForecaster

_log = structlog.get_logger("sm")

SHARE: Final = 0.02
"""Most of the scheduler's time that looking ahead may take; following its steps takes about as much again."""
QUOTES_SAVED_S: Final = 1.0
"""Time for quotes that may be saved up while nobody asks for one."""
LEAST_S: Final = 0.2
"""Looks come no more often than this."""
STALE_S: Final = 5.0
"""A look this old is renewed even if nothing happened: time itself changes what is left of running tasks."""


@dataclass(frozen=True, slots=True)
class Quoted:
    """What a task would be promised if it were submitted now."""

    promise: Promise | None
    """None: nobody can say when it would start."""
    estimate: Estimate | None
    gpu_models: tuple[str, ...]
    """GPU models that take work now, by name."""
    waiting: int
    """Tasks that wait for a place now."""


class ForesightMetrics:
    """What Prometheus sees of it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._spent = Counter("aigc_foresight_look_seconds", "Time spent looking ahead.", registry=registry)
        self._looks = Counter("aigc_foresight_looks", "Forward runs.", registry=registry)
        self._waiting = Gauge("aigc_foresight_waiting_tasks", "Tasks that wait for a place.", registry=registry)
        self._held = Gauge(
            "aigc_foresight_promises_held_ratio",
            "Share of the last 1,000 promises that held, by quantile.",
            ("quantile",),
            registry=registry,
        )
        self._scored = Gauge("aigc_foresight_promises_scored", "Promised finishes judged so far.", registry=registry)

    def looked(self, spent_s: float, waiting: int, coverage: Mapping[str, Coverage], scored: int) -> None:
        """Note one look."""
        self._spent.inc(spent_s)
        self._looks.inc()
        self._waiting.set(waiting)
        for name, each in coverage.items():
            if each.count:
                self._held.labels(name).set(each.share)
        self._scored.set(scored)


class LiveForesight:
    """Beside one scheduler's loop; everything but `outlook` and `coverage` belongs to the loop's thread."""

    def __init__(
        self,
        engine: Engine,
        forecaster: Forecaster,
        registry: CollectorRegistry,
        file: Path | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._engine, self._forecaster = engine, forecaster
        self._file, self._clock = file, clock
        self._foresight = Foresight(engine.state, engine.profile, _restored(file))
        self._next = 0.0
        self._looked = float("-inf")
        self._for_quotes_s, self._counted_at = QUOTES_SAVED_S, clock()
        self._figures = ForesightMetrics(registry)

    @property
    def outlook(self) -> Outlook:
        """Return what the last look saw; any thread may read it."""
        return self._foresight.outlook

    def coverage(self) -> dict[str, Coverage]:
        """Return how often the promises of each quantile held lately."""
        return {name: self._foresight.coverage(name) for name in LEVELS}

    def step(self, now: Micros, events: Sequence[Event], commands: Sequence[Command]) -> None:
        """Take in a durable step."""
        self._foresight.step(now, events, commands)

    def look_if_due(self) -> None:
        """Look ahead, if anything changed and the last look is paid for."""
        began = self._clock()
        if began < self._next or not (self._foresight.changed or began - self._looked >= STALE_S):
            return
        if not self._foresight.live and not self._foresight.changed:
            return
        outlook = self._foresight.look()
        ended = self._clock()
        self._looked = ended
        self._next = ended + max(LEAST_S, (ended - began) * (1 / SHARE - 1))
        self._figures.looked(ended - began, outlook.waiting, self.coverage(), self._foresight.calibration.scored)

    def quote(self, spec: TaskSpec) -> Quoted:
        """Return what a task would be promised now; neither the engine nor the forecaster remembers that it was asked.

        Raises SupportRefused 503 when quotes have taken their share of the scheduler's time.
        """
        began = self._clock()
        self._for_quotes_s = min(QUOTES_SAVED_S, self._for_quotes_s + SHARE * (began - self._counted_at))
        self._counted_at = began
        if self._for_quotes_s <= 0:
            raise SupportRefused(
                503,
                "quotes_used_up",
                "quotes have taken their share of the scheduler's time; jobs are accepted as ever",
                LEAST_S - self._for_quotes_s / SHARE,
            )
        try:
            return self._quote(spec)
        finally:
            self._for_quotes_s -= self._clock() - began

    def _quote(self, spec: TaskSpec) -> Quoted:
        now = self._engine.state.now
        estimate = estimate_of(self._forecaster, now, spec)
        models = {
            gpu.model
            for node in self._engine.state.cluster.nodes
            if node.up and not node.draining
            for gpu in node.gpus
            if gpu.open
        }
        return Quoted(
            self._foresight.quote(spec, estimate), estimate, tuple(sorted(models)), self._foresight.outlook.waiting
        )

    def save(self) -> None:
        """Keep what was learned about the promises for the next life."""
        if self._file is None:
            return
        fresh = self._file.with_suffix(".new")
        fresh.write_text(json.dumps(self._foresight.calibration.saved()))
        os.replace(fresh, self._file)

    def figures(self) -> dict[str, Any]:
        """Return what operators see of it."""
        return {
            "waiting": self.outlook.waiting,
            "scored": self._foresight.calibration.scored,
            "held": {
                name: {"level": each.level, "promises": each.count, "share": round(each.share, 4)}
                for name, each in self.coverage().items()
                if each.count
            },
        }


def estimate_of(forecaster: Forecaster, now: Micros, spec: TaskSpec) -> Estimate | None:
    """Return the estimate that a task would get."""
    if isinstance(forecaster, OnlineForecaster):
        return forecaster.estimate(now, spec)
    stamped = forecaster.stamp(now, [TaskSubmitted(spec)])[0]
    return stamped.estimate if isinstance(stamped, TaskSubmitted) else None


def _restored(file: Path | None) -> Calibration | None:
    if file is None or not file.is_file():
        return None
    try:
        return Calibration.restored(json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        _log.warning("calibration_begins_anew", file=str(file), error=str(error))
        return None
