"""Container resource prediction in one place: how long a task runs, how much GPU memory it needs, how likely it fails.

>>> predictor = Predictor()
>>> task = {"method": "sleep", "declared_us": 2_000_000}
>>> predictor.observe(task, now_us=5_000_000, run_us=2_000_000)
>>> predictor.predict(task, now_us=6_000_000).p50_us
2000000
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from engine.tasks import SECOND, Micros, Quantiles
from predictors.challenger import Refit, at_once
from predictors.duration import DurationModel, DurationSettings, Outlook
from predictors.failure import FailureModel
from predictors.features import Feature, Request, read_request
from predictors.many import look_many
from predictors.memory import GpuMemoryModel
from predictors.residuals import NORMAL_SPREAD
from predictors.speed import SpeedRatios
from predictors.use import GpuUseModel, HostMemoryModel

LEVELS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 0.8, 0.9, 0.95, 0.975, 0.99, 0.995)
"""The quantiles of every prediction; the central 80, 90 and 99% intervals are among them."""
LONGEST_US: Micros = 90 * 86400 * SECOND
"""No prediction is longer than this."""
_METHODS = 64
_OBSERVED = 4096
_P99 = LEVELS.index(0.99)
_TAIL_POINTS = 24
_TAIL_LEVELS = (*LEVELS, *((i + 0.5) / _TAIL_POINTS for i in range(_TAIL_POINTS)))
_PRIOR_S = {"dreambooth": 600.0, "text_to_image": 10.0}


class Outcome(StrEnum):
    """How an attempt ended, as far as it teaches something."""

    FINISHED = "finished"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"
    OUT_OF_MEMORY = "out_of_memory"
    FAILED = "failed"
    """By the task's own fault: it crashed, its input was bad, its model missing."""
    LOST = "lost"
    """By the platform's fault: node, Pod or GPU lost."""


@dataclass(slots=True, eq=False)  # Frozen, it would take three times as long to make.
class Prediction:
    """What is predicted about one task on one GPU model. Times are run times in microseconds."""

    request: Request
    gpu_model: str
    mean_us: Micros
    quantiles_us: tuple[Micros, ...]
    """At `LEVELS`, never decreasing."""
    failure_chance: float
    gpu_memory_bytes: int
    """What the peak per GPU stays below in all but four tasks of a thousand; 0 when unknown."""
    elapsed_us: Micros
    """The task is known to have run so long; all times count from its start and are at least this."""
    outlook: Outlook
    log_ratio: float
    """Log of run time on this GPU model over that on the reference, as it was known then."""

    @property
    def p50_us(self) -> Micros:
        """Return the median run time."""
        return self.quantiles_us[6]

    @property
    def p80_us(self) -> Micros:
        """Return the run time that 80% stay below."""
        return self.quantiles_us[8]

    @property
    def p90_us(self) -> Micros:
        """Return the run time that 90% stay below: what may be promised."""
        return self.quantiles_us[9]

    @property
    def p99_us(self) -> Micros:
        """Return the run time that 99% stay below."""
        return self.quantiles_us[12]

    def quantiles(self) -> Quantiles:
        """Return the engine's form."""
        return Quantiles(mean=self.mean_us, p50=self.p50_us, p90=self.p90_us, p99=self.p99_us)

    def remaining(self) -> Quantiles:
        """Return the engine's form of the time still to go after `elapsed_us`."""
        gone = self.elapsed_us
        return Quantiles(self.mean_us - gone, self.p50_us - gone, self.p90_us - gone, self.p99_us - gone)


@dataclass(frozen=True, slots=True, eq=False)
class RunTimes:
    """What is predicted about many tasks, in microseconds."""

    means_us: NDArray[np.int64]
    """Shape (tasks,)."""
    quantiles_us: NDArray[np.int64]
    """Shape (tasks, levels): at `LEVELS`, never decreasing."""


class Predictor:
    """Learns online, one finished task at a time; one stack per AI method. Time is an argument, in microseconds.

    It learns only what it is told, so label delay is honoured as long as `observe` is called when a task has ended.
    """

    __slots__ = (
        "failures",
        "gpu_use",
        "host_memory",
        "memory",
        "methods",
        "observed",
        "refit",
        "settings",
        "speeds",
        "watermark_us",
    )

    def __init__(self, settings: DurationSettings | None = None, refit: Refit = at_once) -> None:
        self.settings = settings or DurationSettings()
        self.refit = refit
        self.methods: dict[str, DurationModel] = {}
        self.failures = FailureModel()
        self.memory = GpuMemoryModel()
        self.host_memory = HostMemoryModel()
        self.gpu_use = GpuUseModel()
        self.speeds = SpeedRatios()
        self.observed: dict[str, None] = {}
        """Attempts that were learned, the latest last."""
        self.watermark_us: Micros = 0
        """The latest time of which something was learned."""

    def predict(
        self,
        features: Mapping[str, Feature] | Request,
        now_us: Micros,
        gpu_model: str = "*",
        elapsed_us: Micros = 0,
    ) -> Prediction:
        """Predict a task; with ``elapsed_us``, one that has already run so long."""
        request = features if isinstance(features, Request) else read_request(features)
        now_s = now_us / SECOND
        log_ratio = self.speeds.log_ratio(request.method, gpu_model, now_s)
        model = self.methods.get(request.method) or self._new_model(request.method)
        outlook = model.look(request, now_s, self.speeds.frame(request.method))
        mean_us, quantiles_us = _times(model, outlook, log_ratio, elapsed_us)
        return Prediction(
            request=request,
            gpu_model=gpu_model,
            mean_us=mean_us,
            quantiles_us=quantiles_us,
            failure_chance=self.failures.chance(request, now_s),
            gpu_memory_bytes=self.memory.packed_bytes(request, now_s),
            elapsed_us=elapsed_us,
            outlook=outlook,
            log_ratio=log_ratio,
        )

    def predict_many(self, requests: Sequence[Request], now_us: Micros, gpu_model: str = "*") -> RunTimes:
        """Return the run times that `predict` would tell for each request, to the microsecond; faster from some dozens on."""
        means, quantiles = (
            np.empty(len(requests), dtype=np.int64),
            np.empty((len(requests), len(LEVELS)), dtype=np.int64),
        )
        by_method: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            if request.declared_s > 0.0:
                alone = self.predict(request, now_us, gpu_model)
                means[place], quantiles[place] = alone.mean_us, alone.quantiles_us
            else:
                by_method.setdefault(request.method, []).append(place)
        now_s = now_us / SECOND
        for method, places in by_method.items():
            model = self.methods.get(method) or self._new_model(method)
            outlooks = look_many(model, [requests[place] for place in places], now_s, self.speeds.frame(method))
            pool = (model.challenger.errors if outlooks.served else model.champion).pool
            centres = outlooks.centres + self.speeds.log_ratio(method, gpu_model, now_s)
            logs = centres[:, None] + outlooks.scales[:, None] * np.array(pool.quantiles(LEVELS))
            times = (np.exp(np.minimum(logs, 20.0)) * 1e6 + 0.5).astype(np.int64)
            quantiles[places] = np.clip(times, 1, LONGEST_US)
            mean = np.exp(np.minimum(centres, 20.0)) * pool.smears(outlooks.scales) * 1e6
            means[places] = np.clip(mean.astype(np.int64), 1, quantiles[places, _P99])
        return RunTimes(means, quantiles)

    def on(self, prediction: Prediction, gpu_model: str, now_us: Micros) -> Prediction:
        """Return the same prediction for another GPU model; cheaper than predicting again."""
        log_ratio = self.speeds.log_ratio(prediction.request.method, gpu_model, now_us / SECOND)
        if log_ratio == prediction.log_ratio:
            return prediction if gpu_model == prediction.gpu_model else replace(prediction, gpu_model=gpu_model)
        model = self.methods.get(prediction.request.method) or self._new_model(prediction.request.method)
        mean_us, quantiles_us = _times(model, prediction.outlook, log_ratio, prediction.elapsed_us)
        return replace(prediction, gpu_model=gpu_model, log_ratio=log_ratio, mean_us=mean_us, quantiles_us=quantiles_us)

    def remaining(self, prediction: Prediction, elapsed_us: Micros) -> Prediction:
        """Return the prediction re-conditioned on the task having run for ``elapsed_us``: F(t | T > elapsed).

        Its quantiles still count from the task's start; `Prediction.remaining` gives the time to go.
        """
        model = self.methods.get(prediction.request.method) or self._new_model(prediction.request.method)
        mean_us, quantiles_us = _times(model, prediction.outlook, prediction.log_ratio, elapsed_us)
        return replace(prediction, elapsed_us=elapsed_us, mean_us=mean_us, quantiles_us=quantiles_us)

    def at(self, prediction: Prediction, levels: Sequence[float]) -> tuple[Micros, ...]:
        """Return the run time at any quantile levels (each within 0 and 1), from the present pool of residuals."""
        model = self.methods.get(prediction.request.method) or self._new_model(prediction.request.method)
        centre, scale = prediction.outlook.centre + prediction.log_ratio, prediction.outlook.scale
        pool = model.pool(prediction.outlook)
        return tuple(_micros(centre + scale * pool.quantile(level)) for level in levels)

    def observe(
        self,
        features: Mapping[str, Feature] | Request,
        now_us: Micros,
        run_us: Micros,
        outcome: Outcome = Outcome.FINISHED,
        gpu_model: str = "*",
        prediction: Prediction | None = None,
        peak_gpu_memory_bytes: int = 0,
        allotted_gpu_memory_bytes: int = 0,
        identity: str = "",
        peak_host_memory_bytes: int = 0,
        gpu_busy_permille: int = -1,
    ) -> None:
        """Learn from an attempt that ended at ``now_us`` after ``run_us``.

        Pass the ``prediction`` made when the task was submitted: then what is learned about errors is what a prediction really
        errs by. An attempt cancelled, timed out or out of memory would have run longer: its time is a bound, not a data point.
        With an ``identity``, observing the attempt again (a report that came twice) changes nothing; the latest 4,096 are known.
        """
        if identity and not self._first_time(identity):
            return
        request = features if isinstance(features, Request) else read_request(features)
        now_s = now_us / SECOND
        self.watermark_us = max(self.watermark_us, now_us)
        if outcome is Outcome.LOST:
            return
        if outcome is not Outcome.CANCELLED:
            self.failures.learn(request, now_s, failed=outcome is not Outcome.FINISHED)
        if outcome is Outcome.OUT_OF_MEMORY:
            self.memory.learn_out_of_memory(request, now_s, allotted_gpu_memory_bytes, peak_gpu_memory_bytes)
        if outcome is Outcome.FAILED or run_us <= 0:
            return
        model = self._touch(request.method)
        outlook = (
            prediction.outlook
            if prediction is not None
            else model.look(request, now_s, self.speeds.frame(request.method))
        )
        log_ratio = self.speeds.log_ratio(request.method, gpu_model, now_s)
        seconds = run_us / SECOND * math.exp(-log_ratio)
        if outcome is Outcome.FINISHED:
            self.memory.learn(request, now_s, peak_gpu_memory_bytes)
            self.host_memory.learn(request, now_s, peak_host_memory_bytes)
            self.gpu_use.learn(request, now_s, gpu_busy_permille)
            off = math.log(max(run_us, 1) / SECOND) - outlook.centre
            known = 0.0 if outlook.blind else outlook.model_weight / (outlook.model_weight + 4.0)
            sigma = outlook.scale * NORMAL_SPREAD
            self.speeds.learn(request.method, gpu_model, now_s, off, known, request.user, sigma)
            model.learn(request, outlook, now_s, seconds, self.speeds.trust(request.method, gpu_model, now_s))
        else:
            model.learn_censored(request, outlook, now_s, seconds)

    def _first_time(self, identity: str) -> bool:
        if identity in self.observed:
            return False
        self.observed[identity] = None
        if len(self.observed) > _OBSERVED:
            del self.observed[next(iter(self.observed))]
        return True

    def _touch(self, method: str) -> DurationModel:
        model = self.methods.pop(method, None) or self._new_model(method)
        self.methods[method] = model
        if len(self.methods) > _METHODS:
            del self.methods[next(iter(self.methods))]
        return model

    def _new_model(self, method: str) -> DurationModel:
        return DurationModel(replace(self.settings, prior_s=_PRIOR_S.get(method, self.settings.prior_s)), self.refit)


def _times(
    model: DurationModel, outlook: Outlook, log_ratio: float, elapsed_us: Micros
) -> tuple[Micros, tuple[Micros, ...]]:
    centre, scale, pool = outlook.centre + log_ratio, outlook.scale, model.pool(outlook)
    if elapsed_us <= 0:
        exp = math.exp
        residuals = pool.quantiles(LEVELS)
        if centre + scale * residuals[-1] < 20.0:
            times = [int(exp(centre + scale * z) * 1e6 + 0.5) for z in residuals]
        else:
            times = [int(exp(min(centre + scale * z, 20.0)) * 1e6 + 0.5) for z in residuals]
        if times[0] < 1 or times[-1] > LONGEST_US:
            times = [max(1, min(LONGEST_US, us)) for us in times]
        # A mean beyond P99 would be one freak's: in a young pool a single residual can weigh that much.
        mean = int(math.exp(min(centre, 20.0)) * pool.smear(scale) * SECOND)
        return max(1, min(times[12], mean)), tuple(times)
    gone = (math.log(elapsed_us / SECOND) - centre) / scale
    found = [max(elapsed_us, _micros(centre + scale * z)) for z in pool.all_beyond(gone, _TAIL_LEVELS)]
    return sum(found[len(LEVELS) :]) // _TAIL_POINTS, tuple(found[: len(LEVELS)])


def _micros(log_s: float) -> Micros:
    return max(1, min(LONGEST_US, round(math.exp(min(log_s, 20.0)) * SECOND)))
