"""The forecaster before the journal: it stamps submitted tasks with estimates and learns from those that have finished.

The engine calls no model, so a recorded run replays without this module. What it learns from is what passes by: the events of
`stamp`, and, where the cluster has several GPU models, the commands that tell which of them an attempt runs on (`watching`).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engine.commands import Command, CreatePod, Notify, StartTask
from engine.events import (
    Event,
    NodeJoined,
    NodeReported,
    PodStopped,
    TaskCancelRequested,
    TaskEstimated,
    TaskFailed,
    TaskFinished,
    TaskProgressed,
    TaskStarted,
    TaskStopped,
    TaskSubmitted,
)
from engine.ports import Journal
from engine.resources import GpuSpec
from engine.tasks import NOT_RETRYABLE, SECOND, TERMINAL_STATES, Estimate, FailureCause, Micros, TaskSpec
from predictors import stored
from predictors.challenger import Refit, at_once
from predictors.company import CompanyCost
from predictors.features import Feature, Request, read_request, task_features
from predictors.given import DeclaredForecaster, NoisyForecaster, OracleForecaster
from predictors.predictor import Outcome, Prediction, Predictor
from predictors.use import GpuWatch

__all__ = ["DeclaredForecaster", "NoisyForecaster", "OnlineForecaster", "OracleForecaster"]

_PPM = 1_000_000
_GPU_MODELS = 32
_OVERDUE_PER_STEP = 32
_OVERDUE_PER_ATTEMPT = 4
_OUTCOMES = {
    FailureCause.CRASHED: Outcome.FAILED,
    FailureCause.OUT_OF_MEMORY: Outcome.OUT_OF_MEMORY,
    FailureCause.BAD_INPUT: Outcome.FAILED,
    FailureCause.MODEL_MISSING: Outcome.FAILED,
    FailureCause.NODE_LOST: Outcome.LOST,
    FailureCause.POD_LOST: Outcome.LOST,
    FailureCause.TIMED_OUT: Outcome.TIMED_OUT,
    FailureCause.GPU_LOST: Outcome.LOST,
    FailureCause.HUNG: Outcome.LOST,
    FailureCause.NOT_FINITE: Outcome.FAILED,
}


@dataclass(slots=True)
class _Tracked:
    """A task between its submission and its end."""

    features: dict[str, Feature]
    members: int
    max_attempts: int
    allotted_bytes: int
    attempt: int = 0
    gpu_model: str = ""
    started_us: Micros = -1
    carried_us: Micros = 0
    """Run time of earlier attempts that a checkpoint saved."""
    saved_us: Micros = 0
    """Run time of this attempt that a checkpoint holds, should it be lost."""
    finished_ranks: int = 0
    reestimated: int = 0
    cancelled: bool = False


class OnlineForecaster:
    """Predicts online: see `Predictor`. Deterministic; its memory is bounded by ``max_tracked`` tasks and the predictor's tables.

    Hand `drive` its ``watching(journal)`` instead of the journal, so that it learns which GPU model an attempt ran on and when the
    engine gave a task up; without it, the GPU model is known only while the cluster has a single one.
    """

    def __init__(self, predictor: Predictor | None = None, max_tracked: int = 100_000) -> None:
        self.predictor = predictor or Predictor()
        self.company = CompanyCost()
        self.gpu_watch = GpuWatch()
        self.max_tracked = max_tracked
        self._tracked: dict[str, _Tracked] = {}
        self._predictions: dict[str, Prediction] = {}
        self._gpus: dict[str, dict[str, str]] = {}
        self._gpu_models: list[str] = []
        self._pod_gpu_model: dict[int, str] = {}
        self._overdue: list[tuple[Micros, str, int]] = []

    @property
    def tracked(self) -> int:
        """Return the number of tasks between their submission and their end."""
        return len(self._tracked)

    def stamp(self, now: Micros, events: Sequence[Event]) -> Sequence[Event]:
        """Return the events with estimates stamped on, and `TaskEstimated` for tasks whose outlook has changed."""
        stamped: list[Event] = []
        for event in events:
            stamped.append(self._submitted(now, event) if isinstance(event, TaskSubmitted) else event)
            later = self._heard(now, event)
            if later is not None:
                stamped.append(later)
        stamped.extend(self._outlived(now))
        self.predictor.watermark_us = max(self.predictor.watermark_us, now)
        return stamped

    def watching(self, journal: Journal) -> Journal:
        """Return a journal that records with ``journal`` and then tells this forecaster of the commands."""

        def record(now: Micros, events: Sequence[Event], commands: Sequence[Command]) -> None:
            journal(now, events, commands)
            self.note(commands)

        return record

    def note(self, commands: Sequence[Command]) -> None:
        """Learn from the engine's orders where attempts run and which tasks are over."""
        for command in commands:
            match command:
                case CreatePod():
                    gpus = self._gpus.get(command.node, {})
                    models = {gpus.get(grant.uuid, "") for grant in command.grants}
                    self._pod_gpu_model[command.pod] = models.pop() if len(models) == 1 else ""
                    self.gpu_watch.placed(command.pod, command.node, [grant.uuid for grant in command.grants])
                    if len(self._pod_gpu_model) > self.max_tracked:
                        del self._pod_gpu_model[next(iter(self._pod_gpu_model))]
                case StartTask():
                    tracked = self._tracked.get(command.req_no)
                    if tracked is not None:
                        tracked.gpu_model = self._pod_gpu_model.get(command.pod, "")
                        if tracked.members == 1:
                            self.gpu_watch.ordered(command.req_no, command.pod)
                case Notify() if command.state in TERMINAL_STATES:
                    self._forget(command.req_no)
                case _:
                    pass

    def recall(self, now: Micros, events: Sequence[Event], commands: Sequence[Command]) -> None:
        """Learn from one recorded step: after a restart, those later than the saved state's watermark."""
        self.stamp(now, events)
        self.note(commands)

    def predict(self, task: TaskSpec, now: Micros, gpu_model: str = "*") -> Prediction:
        """Return the full prediction for a task, as it would be stamped now."""
        return self.predictor.predict(_readable(task_features(task)), now, gpu_model)

    def save(self, path: Path) -> None:
        """Write everything that was learned, and the tasks under way, in place of the file at ``path``."""
        extra = {
            "tracked": [[req_no, asdict(tracked)] for req_no, tracked in self._tracked.items()],
            "gpus": self._gpus,
            "gpu_models": self._gpu_models,
            "pods": list(self._pod_gpu_model.items()),
            "overdue": self._overdue,
            "company": self.company.to_json(),
            "gpu_watch": self.gpu_watch.state(),
            "max_tracked": self.max_tracked,
        }
        stored.save(self.predictor, path, extra)

    @classmethod
    def load(cls, path: Path, refit: Refit = at_once) -> OnlineForecaster:
        """Return the forecaster saved at ``path``; raises FileNotFoundError or `stored.StateUnusable`.

        ``refit`` says where challengers are fitted: at once, or `InBackground`.
        """
        predictor, extra = stored.load(path, refit)
        forecaster = cls(predictor, extra["max_tracked"])
        forecaster._restore(extra)
        return forecaster

    def _restore(self, extra: dict[str, Any]) -> None:
        self._tracked = {req_no: _Tracked(**tracked) for req_no, tracked in extra["tracked"]}
        self._gpus = extra["gpus"]
        self._gpu_models = extra["gpu_models"]
        self._pod_gpu_model = dict(extra["pods"])
        self._overdue = [(due, req_no, attempt) for due, req_no, attempt in extra["overdue"]]
        self.company.restore(extra.get("company", []))
        if "gpu_watch" in extra:
            self.gpu_watch.restore(extra["gpu_watch"])

    def _submitted(self, now: Micros, event: TaskSubmitted) -> TaskSubmitted:
        task = event.task
        known = self._tracked.get(task.req_no)
        if known is not None and event.estimate is not None:
            return event
        features = known.features if known is not None else task_features(task)
        request = _readable(features)
        prediction = self.predictor.predict(request, now)
        estimate = event.estimate or self._estimate(prediction, now)
        if known is None:
            self._tracked[task.req_no] = _Tracked(
                features=features,
                members=task.members,
                max_attempts=task.max_attempts,
                allotted_bytes=max(estimate.gpu_memory_bytes, task.demand.gpu_memory_bytes),
            )
            self._predictions[task.req_no] = prediction
            if len(self._tracked) > self.max_tracked:
                self._forget(next(iter(self._tracked)))
        return replace(event, estimate=estimate)

    def estimate(self, now: Micros, task: TaskSpec) -> Estimate:
        """Return the estimate that a task would get if it were submitted now, and keep nothing of it."""
        return self._estimate(self.predictor.predict(_readable(task_features(task)), now), now)

    def _estimate(self, prediction: Prediction, now: Micros) -> Estimate:
        durations = {"*": prediction.quantiles()}
        if prediction.elapsed_us == 0:  # Of a running task only the time on its own GPU model is known better now.
            for model in self._gpu_models:
                durations[model] = self.predictor.on(prediction, model, now).quantiles()
        return Estimate(
            durations=tuple(sorted(durations.items())),
            gpu_memory_bytes=prediction.gpu_memory_bytes,
            failure_ppm=round(prediction.failure_chance * _PPM),
            host_memory_bytes=self.predictor.host_memory.p99_bytes(prediction.request, now / SECOND),
            gpu_busy_permille=self.predictor.gpu_use.permille(prediction.request, now / SECOND),
            marginal_permille=self.company.marginal_permille(prediction.request.model, prediction.request.pixels),
        )

    def _heard(self, now: Micros, event: Event) -> TaskEstimated | None:
        match event:
            case NodeJoined():
                self._saw_gpus(event.node.name, event.node.gpus)
            case NodeReported():
                self._saw_gpus(event.node, event.gpus)
                self.gpu_watch.reported(now, event.node, event.gpu_busy_permille)
            case TaskStarted():
                self._started(now, event)
            case TaskProgressed(checkpoint=checkpoint) if checkpoint:
                self._saved(now, event)
            case TaskFinished():
                self._finished(now, event)
            case TaskFailed():
                return self._failed(now, event.req_no, event.attempt, event.cause, event.peak_gpu_memory_bytes)
            case TaskStopped():
                self._stopped(now, event)
            case TaskCancelRequested():
                tracked = self._tracked.get(event.req_no)
                if tracked is not None:
                    tracked.cancelled = True
                    if tracked.started_us < 0:
                        self._forget(event.req_no)
            case PodStopped():
                self._pod_gpu_model.pop(event.pod, None)
                self.gpu_watch.gone(event.pod)
            case _:
                pass
        return None

    def _saw_gpus(self, node: str, gpus: Sequence[GpuSpec]) -> None:
        self._gpus[node] = {gpu.uuid: gpu.model for gpu in gpus}
        for gpu in gpus:
            if gpu.model not in self._gpu_models and len(self._gpu_models) < _GPU_MODELS:
                self._gpu_models = sorted([*self._gpu_models, gpu.model])

    def _gpu_model_of(self, tracked: _Tracked) -> str:
        if tracked.gpu_model:
            return tracked.gpu_model
        return self._gpu_models[0] if len(self._gpu_models) == 1 else "*"

    def _started(self, now: Micros, event: TaskStarted) -> None:
        tracked = self._tracked.get(event.req_no)
        if tracked is None or event.attempt < tracked.attempt:
            return
        if event.attempt > tracked.attempt or tracked.started_us < 0:
            tracked.carried_us += tracked.saved_us
            tracked.saved_us = 0
            tracked.attempt = event.attempt
            tracked.started_us = now
            tracked.finished_ranks = 0
            tracked.reestimated = 0
            self.gpu_watch.started(event.req_no)
            self._watch_overdue(now, event.req_no, tracked)

    def _saved(self, now: Micros, event: TaskProgressed) -> None:
        tracked = self._tracked.get(event.req_no)
        if tracked is not None and event.rank == 0 and event.attempt == tracked.attempt and tracked.started_us >= 0:
            tracked.saved_us = now - tracked.started_us

    def _finished(self, now: Micros, event: TaskFinished) -> None:
        tracked = self._tracked.get(event.req_no)
        if tracked is None or event.attempt != tracked.attempt or tracked.started_us < 0:
            return
        tracked.finished_ranks += 1
        if tracked.finished_ranks < tracked.members:
            return
        run_us = event.run_us or now - tracked.started_us
        if event.alone_us:
            # What others in the Pod cost must not be learned as the task's own slowness.
            request = _readable(tracked.features)
            self.company.observe(request.model, request.pixels, run_us, event.alone_us, event.company_permille)
            run_us = min(run_us, event.alone_us)
        peaks = (event.peak_gpu_memory_bytes, event.peak_host_memory_bytes)
        self._observe(now, event.req_no, tracked, run_us, Outcome.FINISHED, *peaks)
        self._forget(event.req_no)

    def _failed(
        self, now: Micros, req_no: str, attempt: int, cause: FailureCause, peak_bytes: int
    ) -> TaskEstimated | None:
        tracked = self._tracked.get(req_no)
        if tracked is None or attempt != tracked.attempt or tracked.started_us < 0:
            return None
        self._observe(now, req_no, tracked, now - tracked.started_us, _OUTCOMES[cause], peak_bytes)
        tracked.started_us = -1
        if tracked.cancelled or cause in NOT_RETRYABLE or attempt >= tracked.max_attempts:
            self._forget(req_no)
            return None
        if cause is not FailureCause.OUT_OF_MEMORY:
            return None
        prediction = self.predictor.predict(_readable(tracked.features), now)
        tracked.allotted_bytes = max(tracked.allotted_bytes, prediction.gpu_memory_bytes)
        return TaskEstimated(req_no, self._estimate(prediction, now))

    def _stopped(self, now: Micros, event: TaskStopped) -> None:
        tracked = self._tracked.get(event.req_no)
        if tracked is None or event.attempt != tracked.attempt or tracked.started_us < 0:
            return
        run_us = now - tracked.started_us
        if tracked.cancelled:
            self._observe(now, event.req_no, tracked, run_us, Outcome.CANCELLED)
            self._forget(event.req_no)
            return
        self.gpu_watch.ended(event.req_no)
        # Preempted: it will run again, so nothing is censored; what a checkpoint saved is not run twice.
        tracked.started_us = -1
        if event.checkpoint:
            tracked.carried_us += run_us
            tracked.saved_us = 0

    def _observe(
        self,
        now: Micros,
        req_no: str,
        tracked: _Tracked,
        run_us: Micros,
        outcome: Outcome,
        peak_bytes: int = 0,
        peak_host_bytes: int = 0,
    ) -> None:
        prediction = self._predictions.get(req_no)
        self.predictor.observe(
            prediction.request if prediction is not None else _readable(tracked.features),
            now,
            tracked.carried_us + run_us,
            outcome,
            self._gpu_model_of(tracked),
            prediction,
            peak_bytes,
            tracked.allotted_bytes,
            f"{req_no}/{tracked.attempt}",
            peak_host_bytes,
            self.gpu_watch.ended(req_no),
        )

    def _prediction(self, now: Micros, req_no: str, tracked: _Tracked) -> Prediction:
        """Return the prediction made when the task was submitted; after a restart, one made now."""
        prediction = self._predictions.get(req_no)
        if prediction is None:
            prediction = self._predictions[req_no] = self.predictor.predict(_readable(tracked.features), now)
        return prediction

    def _watch_overdue(self, now: Micros, req_no: str, tracked: _Tracked) -> None:
        here = self.predictor.on(self._prediction(now, req_no, tracked), self._gpu_model_of(tracked), now)
        due = max(now + 1, tracked.started_us - tracked.carried_us + here.p90_us)
        heapq.heappush(self._overdue, (due, req_no, tracked.attempt))
        if len(self._overdue) > 2 * len(self._tracked) + 1024:
            self._overdue = [entry for entry in self._overdue if self._runs(entry[1], entry[2])]
            heapq.heapify(self._overdue)

    def _runs(self, req_no: str, attempt: int) -> bool:
        tracked = self._tracked.get(req_no)
        return tracked is not None and tracked.attempt == attempt and tracked.started_us >= 0

    def _outlived(self, now: Micros) -> list[TaskEstimated]:
        """Re-condition running tasks that have outlived their P90: F(t | T > elapsed)."""
        later: list[TaskEstimated] = []
        while self._overdue and self._overdue[0][0] <= now and len(later) < _OVERDUE_PER_STEP:
            _, req_no, attempt = heapq.heappop(self._overdue)
            if not self._runs(req_no, attempt):
                continue
            tracked = self._tracked[req_no]
            prediction = self._prediction(now, req_no, tracked)
            tracked.reestimated += 1
            elapsed_us = tracked.carried_us + now - tracked.started_us
            conditioned = self.predictor.remaining(
                self.predictor.on(prediction, self._gpu_model_of(tracked), now), elapsed_us
            )
            later.append(TaskEstimated(req_no, self._estimate(conditioned, now)))
            if tracked.reestimated < _OVERDUE_PER_ATTEMPT:
                due = max(now + 1, now + conditioned.p90_us - elapsed_us)
                heapq.heappush(self._overdue, (due, req_no, attempt))
        return later

    def _forget(self, req_no: str) -> None:
        self._tracked.pop(req_no, None)
        self._predictions.pop(req_no, None)
        self.gpu_watch.ended(req_no)


def _readable(features: dict[str, Feature]) -> Request:
    """Read features; those of a task that carries nonsense count as absent: a forecast must not stop the scheduler."""
    try:
        return read_request(features)
    except ValueError:
        return read_request({name: features[name] for name in ("method", "model", "user") if name in features})
