"""Forecasters that learn nothing: declared run times, the truth, and the truth blurred. Yardsticks for the simulator."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist

from engine.events import Event, TaskSubmitted
from engine.ports import Forecaster
from engine.tasks import SECOND, Estimate, Micros, Quantiles

_P90 = NormalDist().inv_cdf(0.9)
_P99 = NormalDist().inv_cdf(0.99)

_ESTIMATES_KEPT = 10_000
"""People declare round figures: the same estimate serves many tasks."""


class DeclaredForecaster:
    """Takes what the caller declares for the truth, and ``default_us`` where nothing is declared."""

    def __init__(self, default_us: Micros = 60 * SECOND) -> None:
        self.default_us = default_us
        self._known: dict[Micros, Estimate] = {}

    def stamp(self, now: Micros, events: Sequence[Event]) -> Sequence[Event]:
        """Return the events with the declared run time stamped on submitted tasks."""
        return [self._stamped(event) if isinstance(event, TaskSubmitted) else event for event in events]

    def _stamped(self, event: TaskSubmitted) -> TaskSubmitted:
        if event.estimate is not None:
            return event
        declared_us = event.task.declared_us
        run_us = self.default_us if declared_us is None else declared_us
        estimate = self._known.get(run_us)
        if estimate is None:
            if len(self._known) >= _ESTIMATES_KEPT:
                self._known.clear()
            estimate = self._known[run_us] = _exactly(run_us)
        return TaskSubmitted(event.task, estimate)


class OracleForecaster:
    """Knows every task's true run time.

    ``durations_us`` maps req_no to run time on the reference GPU model, ``factors`` a GPU model to its run time relative to that.
    """

    def __init__(self, durations_us: Mapping[str, Micros], factors: Mapping[str, float] | None = None) -> None:
        self.durations_us = durations_us
        self.factors = dict(sorted((factors or {}).items()))

    def stamp(self, now: Micros, events: Sequence[Event]) -> Sequence[Event]:
        """Return the events with the true run time stamped on submitted tasks; raises KeyError for an unknown task."""
        return [self._stamped(event) if isinstance(event, TaskSubmitted) else event for event in events]

    def _stamped(self, event: TaskSubmitted) -> TaskSubmitted:
        try:
            true_us = self.durations_us[event.task.req_no]
        except KeyError:
            raise KeyError(f"OracleForecaster.durations_us: no true run time of task {event.task.req_no!r}") from None
        estimate = _exactly(true_us, self.factors)
        return replace(event, estimate=estimate)


class NoisyForecaster:
    """Blurs another forecaster's run times by a lognormal error: what a predictor with log error ``sigma`` would know.

    A task's error depends on the seed and its req_no alone, not on the order of the tasks. Its quantiles are those of the truth
    given the blurred value, so they are calibrated.
    """

    def __init__(self, oracle: Forecaster, sigma: float, seed: int) -> None:
        if not sigma >= 0.0:
            raise ValueError(f"NoisyForecaster.sigma: must be at least 0, got {sigma}")
        self.oracle = oracle
        self.sigma = sigma
        self.seed = seed

    def stamp(self, now: Micros, events: Sequence[Event]) -> Sequence[Event]:
        """Return the oracle's events with blurred run times."""
        return [
            self._blurred(event) if isinstance(event, TaskSubmitted) else event
            for event in self.oracle.stamp(now, events)
        ]

    def _blurred(self, event: TaskSubmitted) -> TaskSubmitted:
        if event.estimate is None:
            return event
        error = self.sigma * _normal(self.seed, event.task.req_no)
        durations = tuple((model, self._spread(quantiles.p50, error)) for model, quantiles in event.estimate.durations)
        return replace(event, estimate=replace(event.estimate, durations=durations))

    def _spread(self, true_us: Micros, error: float) -> Quantiles:
        centre = true_us * math.exp(error)
        return Quantiles(
            mean=round(centre * math.exp(self.sigma**2 / 2)),
            p50=round(centre),
            p90=round(centre * math.exp(_P90 * self.sigma)),
            p99=round(centre * math.exp(_P99 * self.sigma)),
        )


def _exactly(run_us: Micros, factors: Mapping[str, float] | None = None) -> Estimate:
    by_model = {"*": run_us, **{model: round(run_us * factor) for model, factor in (factors or {}).items()}}
    return Estimate(durations=tuple((model, Quantiles(us, us, us, us)) for model, us in sorted(by_model.items())))


def _normal(seed: int, req_no: str) -> float:
    digest = hashlib.sha256(f"{seed}:{req_no}".encode()).digest()
    uniform = (int.from_bytes(digest[:7], "big") + 0.5) / 2**56
    return NormalDist().inv_cdf(uniform)
