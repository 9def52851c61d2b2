"""What the forward run must know besides the state: how often tasks arrive, how long Pods take to load, how long tasks run.

A fold over the journal's steps, in bounded memory. Rates decay, so that a quiet night is not taken for the day before.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log
from typing import Final

from engine.commands import Command, CreatePod, Notify
from engine.events import Event, PodStarted, PodStopped, TaskFinished, TaskSubmitted
from engine.tasks import SECOND, Micros, TaskSpec, TaskState, is_urgent

Base = tuple[str, str]
"""(method, model)."""

MEMORY_US: Final = 900 * SECOND
"""Time constant of the measured rates."""
GRAIN_US: Final = 5 * SECOND
"""Rates decay no more often than this."""
MOST_BASES: Final = 4_096
LOAD_SPREAD: Final = 0.35
"""Standard deviation of the logarithm of a load, until enough are measured."""


class Rate:
    """Events a microsecond, decayed by `MEMORY_US`, and the mean of what they bring."""

    __slots__ = ("_at", "_began", "_count", "_work")

    def __init__(self, now: Micros) -> None:
        self._at = self._began = now
        self._count = self._work = 0.0

    def add(self, now: Micros, work_us: float) -> None:
        """Count one event with its predicted work."""
        self._decay(now)
        self._count += 1.0
        self._work += work_us

    def per_us(self, now: Micros) -> float:
        """Return the rate; it begins from nothing, so a first event does not count for a flood."""
        self._decay(now)
        seen = MEMORY_US * (1.0 - exp(-max(1, now - self._began) / MEMORY_US))
        return self._count / max(seen, 60.0 * SECOND)

    @property
    def work_us(self) -> float:
        """Return the mean predicted work of an event."""
        return self._work / self._count if self._count > 1e-9 else 0.0

    def _decay(self, now: Micros) -> None:
        if now > self._at + GRAIN_US:
            kept = exp(-(now - self._at) / MEMORY_US)
            self._count *= kept
            self._work *= kept
            self._at = now


class _Spread:
    """Moving mean and variance of a logarithm."""

    __slots__ = ("count", "mean", "square")

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.square = LOAD_SPREAD * LOAD_SPREAD

    def add(self, value_us: float) -> None:
        value = log(max(1.0, value_us))
        self.count = min(self.count + 1, 30)
        off = value - self.mean
        self.mean += off / self.count
        if self.count > 1:
            self.square += (off * off - self.square) / (self.count + 5)


class Measured:
    """Rates and spans as the steps show them."""

    def __init__(self, now: Micros = 0) -> None:
        self.urgent = Rate(now)
        self._now = now
        self._ordinary: dict[Base, Rate] = {}
        self._urgent_by: dict[Base, Rate] = {}
        self._creating: dict[int, tuple[Base, Micros]] = {}
        self._loads: dict[Base, _Spread] = {}
        self._any_load: dict[str, _Spread] = {}
        self._runs: dict[Base, _Spread] = {}
        self._specs: dict[str, TaskSpec] = {}

    def step(self, now: Micros, events: Sequence[Event], commands: Sequence[Command]) -> None:
        """Fold one step."""
        self._now = now
        for event in events:
            if isinstance(event, TaskSubmitted):
                self._submitted(now, event)
            elif isinstance(event, PodStarted):
                created = self._creating.pop(event.pod, None)
                if created is not None:
                    self._of(self._loads, created[0]).add(now - created[1])
                    self._any_load.setdefault(created[0][0], _Spread()).add(now - created[1])
            elif isinstance(event, PodStopped):
                self._creating.pop(event.pod, None)
            elif isinstance(event, TaskFinished) and event.rank == 0:
                spec = self._specs.get(event.req_no)
                if spec is not None and event.run_us > 0:
                    self._of(self._runs, (spec.method, spec.model)).add(event.run_us)
        for command in commands:
            if isinstance(command, CreatePod):
                self._creating[command.pod] = ((command.method, command.model), now)
            elif isinstance(command, Notify) and is_terminal(command.state):
                self._specs.pop(command.req_no, None)

    def ordinary(self, base: Base) -> tuple[float, float]:
        """Return (ordinary arrivals a microsecond, mean work) of a method and model."""
        rate = self._ordinary.get(base)
        return (0.0, 0.0) if rate is None else (rate.per_us(self._now), rate.work_us)

    def urgent_of(self, base: Base) -> float:
        """Return the urgent arrivals a microsecond of a method and model."""
        rate = self._urgent_by.get(base)
        return 0.0 if rate is None else rate.per_us(self._now)

    def urgent_bases(self) -> list[Base]:
        """Return every (method, model) that urgent tasks asked for."""
        return list(self._urgent_by)

    def load(self, base: Base, fallback_us: float) -> tuple[float, float]:
        """Return (mean, standard deviation) of the logarithm of what a new Pod takes until it is ready."""
        found = self._loads.get(base) or self._any_load.get(base[0])
        if found is None:
            return log(max(1.0, fallback_us)), LOAD_SPREAD
        return found.mean, min(1.0, found.square**0.5)

    def run_us(self, base: Base) -> float:
        """Return the typical run time of a method and model; 0: none was seen."""
        found = self._runs.get(base)
        return 0.0 if found is None else exp(found.mean)

    def _submitted(self, now: Micros, event: TaskSubmitted) -> None:
        spec = event.task
        if spec.req_no in self._specs:
            return
        if len(self._specs) < 1_000_000:
            self._specs[spec.req_no] = spec
        base = (spec.method, spec.model)
        estimate = event.estimate
        if estimate is not None and estimate.serves_every_model:
            work = float(estimate.duration().mean)
        else:
            work = float(spec.declared_us or self.run_us(base) or SECOND)
        if is_urgent(spec):
            self.urgent.add(now, work)
        table = self._urgent_by if is_urgent(spec) else self._ordinary
        rate = table.get(base)
        if rate is None:
            if len(table) >= MOST_BASES:
                del table[next(iter(table))]
            rate = table[base] = Rate(now)
        rate.add(now, work)

    @staticmethod
    def _of(table: dict[Base, _Spread], base: Base) -> _Spread:
        found = table.get(base)
        if found is None:
            if len(table) >= MOST_BASES:
                del table[next(iter(table))]
            found = table[base] = _Spread()
        return found


def is_terminal(state: TaskState) -> bool:
    """Tell whether a state is terminal, without hashing it."""
    return (
        state is TaskState.FINISHED
        or state is TaskState.CANCELLED
        or state is TaskState.DEAD
        or state is TaskState.REJECTED
    )
