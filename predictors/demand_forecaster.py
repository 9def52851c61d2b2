"""Stands before the journal: counts what arrives, learns what it ran, and puts the demand forecast into the stream of events.

The engine learns of the demand to come by events only, so a journal replays without this module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine.capacity import CapacityChecked, DemandForecast, ModelDemand
from engine.events import Event, TaskFinished, TaskSubmitted
from engine.journal import Record
from engine.ports import Forecaster
from engine.resources import Demand as PodDemand
from engine.tasks import SECOND, Micros, TaskSpec
from predictors.demand import ALL, BIN_US, HORIZONS_US, LEVELS, Demand, DemandModel

_MODELS = 64
"""Models that a forecast names, those that expect most."""
_TRACKED = 200_000
LEVELS_PERMILLE = tuple(round(1000 * level) for level in LEVELS)


@dataclass(slots=True)
class _Arrived:
    bin: int
    keys: tuple[str, str]
    expected_us: Micros | None


def keys_of(task: TaskSpec) -> tuple[str, str]:
    """Return the series that a task counts to besides everything: its type and its model."""
    return f"type:{task.task_type}", f"model:{task.method}/{task.model}"


class DemandForecaster:
    """Forecasts demand behind a forecaster of tasks.

    A forecast comes whenever a bin of five minutes is over; every `check_us` the engine is told to look at its capacity (0: never).
    `offset_us` is added to the time, for worlds whose clock does not begin at midnight.
    """

    def __init__(
        self,
        inner: Forecaster,
        model: DemandModel | None = None,
        check_us: Micros = 10 * SECOND,
        offset_us: Micros = 0,
    ) -> None:
        self.inner = inner
        self.model = DemandModel() if model is None else model
        self.check_us = check_us
        self.offset_us = offset_us
        self.latest: DemandForecast | None = None
        self._arrived: dict[str, _Arrived] = {}
        self._pods: dict[str, tuple[str, str, PodDemand, int]] = {}
        """By the key of a model's series: method, model, and the Pod that serves it."""
        self._next_check: Micros = 0
        self._due = True

    def stamp(self, now: Micros, events: Sequence[Event]) -> Sequence[Event]:
        """Return the events as the inner forecaster leaves them, then a forecast or a check that has fallen due."""
        stamped = self.inner.stamp(now, events)
        closed = self.model.advance(now + self.offset_us)
        for event in stamped:
            match event:
                case TaskSubmitted():
                    self._submitted(now, event)
                case TaskFinished() if event.rank == 0:
                    self._finished(event)
                case _:
                    pass
        more: list[Event] = []
        if closed or self._due:
            forecast = self.forecast()
            if forecast is not None and (forecast != self.latest or closed):
                self._due = False
                self.latest = forecast
                more.append(forecast)
        if self.check_us and now >= self._next_check:
            self._next_check = now + self.check_us
            more.append(CapacityChecked())
        return [*stamped, *more] if more else stamped

    def recall(self, records: Sequence[Record]) -> None:
        """Learn from recorded steps later than what the model has seen."""
        history = self.model.history
        known = 0 if history is None else history.bin * BIN_US
        for record in records:
            if record.now + self.offset_us < known:
                continue
            self.model.advance(record.now + self.offset_us)
            for event in record.events:
                if isinstance(event, TaskSubmitted):
                    self._submitted(record.now, event)
                elif isinstance(event, TaskFinished) and event.rank == 0:
                    self._finished(event)

    def forecast(self) -> DemandForecast | None:
        """Return what is expected to arrive from the last closed bin on; None before anything is known."""
        everything = self.model.forecast(ALL)
        if everything is None:
            return None
        found: list[tuple[float, ModelDemand, Demand]] = []
        for key, (method, model, demand, slots) in self._pods.items():
            expected = self.model.forecast(key)
            if expected is None:
                continue
            run_us = tuple(_whole(each.run_us_quantiles) for each in expected)
            if any(any(row) for row in run_us):
                found.append((expected[-1].run_us, ModelDemand(method, model, demand, slots, run_us), expected[0]))
        found.sort(key=lambda item: (-item[0], item[1].method, item[1].model))
        share = _gpus_per_task(found)
        gpu_us = tuple(_whole([share * each for each in row.run_us_quantiles]) for row in everything)
        return DemandForecast(HORIZONS_US, LEVELS_PERMILLE, gpu_us, tuple(item[1] for item in found[:_MODELS]))

    def _submitted(self, now: Micros, event: TaskSubmitted) -> None:
        task = event.task
        if task.req_no in self._arrived:
            return
        keys = keys_of(task)
        estimate = event.estimate
        expected_us = None if estimate is None or not estimate.durations else estimate.duration("*").mean
        place = self.model.arrived(keys, now + self.offset_us, expected_us)
        self._arrived[task.req_no] = _Arrived(place, keys, expected_us)
        if len(self._arrived) > _TRACKED:
            del self._arrived[next(iter(self._arrived))]
        if keys[1] not in self._pods and len(self._pods) >= self.model.most_series:
            gone = next((key for key in self._pods if key not in self.model.rows), None)
            if gone is not None:
                del self._pods[gone]
        self._pods[keys[1]] = (task.method, task.model, task.demand, max(1, task.slots))

    def _finished(self, event: TaskFinished) -> None:
        arrived = self._arrived.pop(event.req_no, None)
        if arrived is not None and event.run_us > 0:
            self.model.finished(arrived.keys, arrived.bin, event.run_us, arrived.expected_us)


def _whole(values: Sequence[float]) -> tuple[Micros, ...]:
    return tuple(math.ceil(value) if value > 0 else 0 for value in values)


def _gpus_per_task(models: Sequence[tuple[float, ModelDemand, Demand]]) -> float:
    """Return the GPUs that a running task takes on average, weighted by what models expect; slots share their Pod's GPUs alike."""
    total = sum(expected for expected, *_ in models)
    if not total:
        return 1.0
    return (
        sum(expected * each.demand.gpus * each.demand.gpu_share / 1000 / each.slots for expected, each, _ in models)
        / total
    )
