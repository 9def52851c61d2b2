"""Folds what the other modules do into metrics: the scheduler's steps (`MetricsFold`) and SS's job changes (`JobsFold`).

Both are plain folds: they see each fact once, never ask anybody, and hold no more than the live tasks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import Counter, Gauge, Histogram

from api.monitoring.abnormal import AbnormalityDetector, TaskSeen
from api.monitoring.metrics import Metrics
from api.ports import JobEvent, JobView
from engine.commands import Command, Notify
from engine.events import Event, TaskEstimated, TaskFinished, TaskSubmitted
from engine.tasks import SECOND, TERMINAL_STATES, Estimate, FailureCause, Micros, TaskState

_LONG = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 14_400.0, 86_400.0)
_STEP = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_RATIO = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)


_CAUSE = re.compile(rf"(?:^|: )({'|'.join(cause.value for cause in FailureCause)})(?::|$)")


def cause_in(detail: str) -> FailureCause | None:
    """Return the cause that the scheduler names at the beginning of a detail, None when it names none."""
    found = _CAUSE.search(detail[:120])
    return FailureCause(found[1]) if found else None


@dataclass(slots=True)
class _Live:
    method: str
    estimate: Estimate | None


class MetricsFold:
    """The scheduler's metrics, from each journaled step: what came in, what was ordered, and how good the predictions were."""

    def __init__(
        self, metrics: Metrics, detector: AbnormalityDetector | None = None, max_live: int = 1_000_000
    ) -> None:
        registry = metrics.registry
        self._detector = detector
        self._max_live = max_live
        self._live: dict[str, _Live] = {}
        self._held: dict[str, list[int]] = {}
        self.steps = Counter("aigc_scheduler_steps", "Steps of the engine.", registry=registry)
        self.step_seconds = Histogram(
            "aigc_scheduler_step_duration_seconds",
            "Time to decide and journal one step.",
            buckets=_STEP,
            registry=registry,
        )
        self.events = Counter("aigc_scheduler_events", "Events by kind.", ("kind",), registry=registry)
        self.commands = Counter("aigc_scheduler_commands", "Commands by kind.", ("kind",), registry=registry)
        self.states = Counter(
            "aigc_scheduler_task_transitions", "Tasks that entered a state.", ("state", "reason"), registry=registry
        )
        self.live = Gauge("aigc_scheduler_live_tasks", "Tasks that have not ended.", registry=registry)
        self.residual = Histogram(
            "aigc_predictor_duration_ratio",
            "Run time over its predicted P50.",
            ("method",),
            buckets=_RATIO,
            registry=registry,
        )
        self.covered = Counter(
            "aigc_predictor_runs",
            "Finished runs by whether the predicted P90 held.",
            ("method", "held"),
            registry=registry,
        )

    def step(
        self, now: Micros, events: Sequence[Event], commands: Sequence[Command], duration_s: float | None = None
    ) -> None:
        """Fold one step in; has the shape of a journal, so that it can stand beside one."""
        self.steps.inc()
        if duration_s is not None:
            self.step_seconds.observe(duration_s)
        for event in events:
            self.events.labels(type(event).__name__).inc()
            match event:
                case TaskSubmitted(task=task, estimate=estimate):
                    if len(self._live) < self._max_live:
                        self._live.setdefault(task.req_no, _Live(task.method, estimate))
                case TaskEstimated(req_no=req_no, estimate=estimate):
                    if req_no in self._live and self._live[req_no].estimate is None:
                        self._live[req_no].estimate = estimate
                case TaskFinished():
                    self._finished(event)
                case _:
                    pass
        for command in commands:
            self.commands.labels(type(command).__name__).inc()
            if isinstance(command, Notify):
                self._notified(now, command)
        self.live.set(len(self._live))

    __call__ = step

    def summary(self) -> dict[str, dict[str, int]]:
        """Return by method how many runs kept to their predicted P90 and how many took longer, for `SupportPort.queue`."""
        return {method: {"held": held, "exceeded": exceeded} for method, (held, exceeded) in list(self._held.items())}

    def _finished(self, event: TaskFinished) -> None:
        task = self._live.get(event.req_no)
        if task is None or task.estimate is None or event.run_us <= 0:
            return
        quantiles = task.estimate.duration()
        run_us = event.alone_us or event.run_us  # Predicted is the run alone; what company costs is no fault of it.
        self.residual.labels(task.method).observe(run_us / max(1, quantiles.p50))
        held = run_us <= quantiles.p90
        self.covered.labels(task.method, "yes" if held else "no").inc()
        self._held.setdefault(task.method, [0, 0])[0 if held else 1] += 1
        if self._detector is not None:
            self._detector.predicted(task.method, exceeded=not held)

    def _notified(self, now: Micros, notice: Notify) -> None:
        self.states.labels(notice.state.value, notice.reason[:64]).inc()
        task = self._live.get(notice.req_no)
        if task is not None and self._detector is not None:
            if notice.state in (TaskState.BACKOFF, TaskState.DEAD):
                self._detector.ended(now, task.method, failed=True, cause=cause_in(notice.detail))
            elif notice.state is TaskState.FINISHED:
                self._detector.ended(now, task.method, failed=False)
        if notice.state in TERMINAL_STATES:
            self._live.pop(notice.req_no, None)


class JobsFold:
    """Metrics of jobs as SS reports their changes, and the live tasks that the detector looks at."""

    def __init__(
        self, metrics: Metrics, detector: AbnormalityDetector, started_at_s: float, max_live: int = 100_000
    ) -> None:
        registry = metrics.registry
        self._detector = detector
        self._started_at_s = started_at_s
        self._max_live = max_live
        self.live: dict[tuple[str, str], TaskSeen] = {}
        self.ended = Counter("aigc_jobs_ended", "Jobs that ended.", ("task_type", "method", "state"), registry=registry)
        self.retried = Counter(
            "aigc_jobs_retried", "Attempts that failed and are tried again.", ("method",), registry=registry
        )
        self.failed = Counter(
            "aigc_jobs_failed_attempts", "Attempts that failed, by cause.", ("method", "cause"), registry=registry
        )
        self.wait_seconds = Histogram(
            "aigc_jobs_wait_seconds",
            "From submission to running.",
            ("task_type", "urgency"),
            buckets=_LONG,
            registry=registry,
        )
        self.run_seconds = Histogram(
            "aigc_jobs_run_seconds", "From running to the end.", ("method",), buckets=_LONG, registry=registry
        )
        self.states = Gauge("aigc_jobs_live", "Jobs that have not ended, by state.", ("state",), registry=registry)

    def fold(self, event: JobEvent) -> None:
        """Fold one change in. Changes from before this process are history: they count for the state, not for the counters."""
        view, at = event.view, int(event.at * SECOND)
        key = (view.tenant, view.req_no)
        before = self.live.get(key)
        fresh = event.at >= self._started_at_s
        if fresh and view.state == "running" and (before is None or before.state != "running"):
            urgency = "urgent" if view.priority >= 100 else "ordinary"
            self.wait_seconds.labels(view.task_type, urgency).observe(max(0.0, event.at - view.submitted_at))
        if fresh and view.state == "backoff":
            self.retried.labels(view.method).inc()
            self._failed(at, view)
        if view.state in TERMINAL_STATES:
            self.live.pop(key, None)
            if fresh:
                self.ended.labels(view.task_type, view.method, view.state).inc()
                if view.state == "dead":
                    self._failed(at, view)
                elif view.state == "finished":
                    self._detector.ended(at, view.method, failed=False)
                if view.state == "finished" and view.started_at is not None and view.finished_at is not None:
                    self.run_seconds.labels(view.method).observe(max(0.0, view.finished_at - view.started_at))
        elif key in self.live or len(self.live) < self._max_live:
            self.live[key] = TaskSeen(view.req_no, view.state, at, view.method)

    def _failed(self, at: Micros, view: JobView) -> None:
        cause = cause_in(view.detail)
        self.failed.labels(view.method, cause.value if cause is not None else "unknown").inc()
        self._detector.ended(at, view.method, failed=True, cause=cause)

    def seed(self, view: JobView, now_s: float) -> None:
        """Take in a live job that was there before; its patience starts anew where its last step is not known."""
        since = view.submitted_at if view.state in ("queued", "pending", "backoff") else now_s
        if len(self.live) < self._max_live:
            self.live.setdefault(
                (view.tenant, view.req_no), TaskSeen(view.req_no, view.state, int(since * SECOND), view.method)
            )

    def gauges(self) -> None:
        """Bring the gauges of live jobs up to date."""
        counts = dict.fromkeys(("pending", "bound", "starting", "running", "stopping", "backoff"), 0)
        for task in self.live.values():
            counts[task.state] = counts.get(task.state, 0) + 1
        for state, count in counts.items():
            self.states.labels(state).set(count)
