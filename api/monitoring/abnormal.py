"""Finds abnormal states: stuck tasks, silent nodes, a jump of the failure rate, predictions that no longer hold.

Pure: what is seen and the time are arguments, the alerts that hold are the answer. Each rule says what it saw, what it expected,
and what to look at next, because an alert that only names a number helps nobody.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from engine.tasks import SECOND, FailureCause, Micros

Kind = Literal[
    "stuck_task",
    "silent_node",
    "failure_rate",
    "prediction_residuals",
    "promises",
    "module_down",
    "gpu_cordoned",
    "gpu_ill",
    "device_failures",
]
Severity = Literal["critical", "warning"]
_Z = 1.96


@dataclass(frozen=True, slots=True)
class Thresholds:
    """When a state counts as abnormal. Spans are microseconds."""

    waiting_us: Micros = 1800 * SECOND
    """A task that waits so long for a place is stuck."""
    starting_us: Micros = 300 * SECOND
    """Bound, starting or stopping for so long is stuck."""
    no_progress_us: Micros = 600 * SECOND
    """Running without a step for so long is stuck, and longer than four times its predicted P99 where that is known."""
    silent_us: Micros = 15 * SECOND
    recent_us: Micros = 300 * SECOND
    """The span whose failure rate is compared with what came before."""
    history_us: Micros = 6 * 3600 * SECOND
    least_runs: int = 8
    """Fewer runs in the recent span prove nothing."""
    failure_jump: float = 0.15
    """The recent rate must exceed the earlier one by this, with 97.5% confidence."""
    residual_runs: int = 200
    """Latest runs that the predictions are judged by."""
    residual_share: float = 0.2
    """P90 should be exceeded by a tenth of the runs; by more than this share, with 97.5% confidence, it no longer holds."""
    device_failures: int = 3
    """So many failed attempts of one cause in the recent span speak of devices, models or limits, not of chance."""
    promise_drift: float = 0.03
    """The P90 of the finish should hold for nine of ten jobs; when it holds for fewer or more by this, with 97.5% confidence, it no
    longer means what it says."""
    promises_least: int = 200
    """Fewer judged promises prove nothing."""
    max_tracked: int = 10_000
    """Runs kept per method."""
    max_stuck: int = 100
    """Stuck tasks listed at once, the longest first."""


@dataclass(frozen=True, slots=True)
class TaskSeen:
    """A live task as last seen. Times are microseconds."""

    req_no: str
    state: str
    since: Micros
    """When it entered the state, or made its last step."""
    method: str = ""
    predicted_p99_us: Micros = 0
    """0: unknown."""


@dataclass(frozen=True, slots=True)
class NodeSeen:
    """A node as last seen."""

    name: str
    heard_at: Micros
    expected: bool = True
    """False for nodes that are known to be lost or were taken away."""


@dataclass(frozen=True, slots=True)
class GpuSeen:
    """A GPU as last seen."""

    node: str
    uuid: str
    healthy: bool = True
    """The DevicePlugin finds it there and well."""
    cordoned: bool = False
    """The scheduler gives it no more work because it failed one piece of work after another."""


@dataclass(frozen=True, slots=True)
class Alert:
    """An abnormal state that holds. `since` is microseconds; `value` and `threshold` are in the unit the message names."""

    kind: Kind
    subject: str
    severity: Severity
    since: Micros
    message: str
    value: float
    threshold: float


@dataclass(slots=True)
class _Runs:
    ends: deque[tuple[Micros, bool]]
    exceeded: deque[bool]


@dataclass(slots=True)
class AbnormalityDetector:
    """Keeps what it needs of the past, bounded; `look` returns the alerts that hold at `now`."""

    thresholds: Thresholds = field(default_factory=Thresholds)
    _runs: dict[str, _Runs] = field(default_factory=dict)
    _since: dict[tuple[str, str], Micros] = field(default_factory=dict)
    _promises: tuple[float, int, int] = (0.9, 0, 0)
    _causes: dict[FailureCause, deque[tuple[Micros, str]]] = field(default_factory=dict)

    def ended(self, now: Micros, method: str, *, failed: bool, cause: FailureCause | None = None) -> None:
        """Note the end of an attempt of a method, with the cause of a failure where it is known."""
        self._of(method).ends.append((now, failed))
        if failed and cause in _REMEDIES:
            self._causes.setdefault(cause, deque(maxlen=self.thresholds.max_tracked)).append((now, method))

    def predicted(self, method: str, *, exceeded: bool) -> None:
        """Note whether a finished run took longer than its predicted P90."""
        self._of(method).exceeded.append(exceeded)

    def promised(self, level: float, held: int, count: int) -> None:
        """Note how many of the latest promised finishes held, of those that should have with this share."""
        self._promises = (level, held, count)

    def look(
        self,
        now: Micros,
        tasks: Iterable[TaskSeen] = (),
        nodes: Iterable[NodeSeen] = (),
        modules: Mapping[str, bool] | None = None,
        gpus: Iterable[GpuSeen] = (),
    ) -> tuple[Alert, ...]:
        """Return the alerts that hold now, worst first; each keeps the time it was first seen."""
        found = [
            *self._stuck(now, tasks),
            *self._silent(now, nodes),
            *self._failures(now),
            *self._residuals(now),
            *self._drifted(now),
            *_down(now, modules or {}),
            *_devices(now, gpus),
            *self._device_failures(now),
        ]
        since: dict[tuple[str, str], Micros] = {
            (alert.kind, alert.subject): min(alert.since, self._since.get((alert.kind, alert.subject), now))
            for alert in found
        }
        self._since = since
        held = [replace(alert, since=since[(alert.kind, alert.subject)]) for alert in found]
        return tuple(sorted(held, key=lambda alert: (alert.severity, alert.kind, alert.since, alert.subject)))

    def _of(self, method: str) -> _Runs:
        if method not in self._runs:
            limits = self.thresholds
            self._runs[method] = _Runs(deque(maxlen=limits.max_tracked), deque(maxlen=limits.residual_runs))
        return self._runs[method]

    def _stuck(self, now: Micros, tasks: Iterable[TaskSeen]) -> list[Alert]:
        alerts = []
        for task in tasks:
            limit = self._patience(task)
            stood = now - task.since
            if limit and stood > limit:
                message = (
                    f"task {task.req_no} ({task.method}) has been {task.state} without change for {stood / SECOND:.0f} s, "
                    f"expected at most {limit / SECOND:.0f} s; ask `why` for it, and look at its Node"
                )
                alerts.append(
                    Alert(
                        "stuck_task",
                        task.req_no,
                        "warning",
                        task.since + limit,
                        message,
                        stood / SECOND,
                        limit / SECOND,
                    )
                )
        alerts.sort(key=lambda alert: (-alert.value, alert.subject))
        return alerts[: self.thresholds.max_stuck]

    def _patience(self, task: TaskSeen) -> Micros:
        limits = self.thresholds
        if task.state == "running":
            return max(limits.no_progress_us, 4 * task.predicted_p99_us)
        if task.state in ("bound", "starting", "stopping"):
            return limits.starting_us
        return limits.waiting_us if task.state in ("queued", "pending", "backoff") else 0

    def _silent(self, now: Micros, nodes: Iterable[NodeSeen]) -> list[Alert]:
        limit = self.thresholds.silent_us
        alerts = []
        for node in nodes:
            quiet = now - node.heard_at
            if node.expected and quiet > limit:
                message = (
                    f"node {node.name} has not been heard for {quiet / SECOND:.0f} s; look at its agent and the network"
                )
                alerts.append(
                    Alert(
                        "silent_node",
                        node.name,
                        "critical",
                        node.heard_at + limit,
                        message,
                        quiet / SECOND,
                        limit / SECOND,
                    )
                )
        return alerts

    def _failures(self, now: Micros) -> list[Alert]:
        limits = self.thresholds
        alerts = []
        for method, runs in sorted(self._runs.items()):
            while runs.ends and runs.ends[0][0] < now - limits.history_us:
                runs.ends.popleft()
            recent = [failed for at, failed in runs.ends if at >= now - limits.recent_us]
            before = [failed for at, failed in runs.ends if at < now - limits.recent_us]
            if len(recent) < limits.least_runs:
                continue
            usual = sum(before) / len(before) if len(before) >= limits.least_runs else 0.0
            threshold = usual + limits.failure_jump
            rate = sum(recent) / len(recent)
            if lower_bound(sum(recent), len(recent)) > threshold:
                message = (
                    f"{sum(recent)} of the last {len(recent)} runs of {method} failed ({rate:.0%}), before it were {usual:.0%}; "
                    "look at the reasons in /v1/jobs?state=dead and in the log"
                )
                alerts.append(Alert("failure_rate", method, "critical", now, message, rate, threshold))
        return alerts

    def _device_failures(self, now: Micros) -> list[Alert]:
        limits = self.thresholds
        alerts = []
        for cause, seen in sorted(self._causes.items()):
            while seen and seen[0][0] < now - limits.recent_us:
                seen.popleft()
            if len(seen) >= limits.device_failures:
                methods = ", ".join(sorted({method for _, method in seen}))
                message = (
                    f"{len(seen)} attempts of {methods} ended {cause} in the last {limits.recent_us // SECOND // 60} min; "
                    f"{_REMEDIES[cause]}"
                )
                since, threshold = seen[limits.device_failures - 1][0], float(limits.device_failures)
                alerts.append(
                    Alert("device_failures", cause.value, "warning", since, message, float(len(seen)), threshold)
                )
        return alerts

    def _drifted(self, now: Micros) -> list[Alert]:
        """Return the alert that promised times no longer hold as often as they say."""
        (level, held, count), drift = self._promises, self.thresholds.promise_drift
        if count < self.thresholds.promises_least:
            return []
        share = held / count
        if lower_bound(count - held, count) > 1 - level + drift:
            what, limit = "jobs end later than promised too often", level - drift
        elif lower_bound(held, count) > level + drift:
            what, limit = "promises are wider than they need to be", level + drift
        else:
            return []
        message = (
            f"our P90 of the finish held for {share:.1%} of the last {count} jobs, it should for {level:.0%}: {what}; the load or "
            "the machines have changed, it is being learned (docs/when.md)"
        )
        return [Alert("promises", "finish_p90", "warning", now, message, share, limit)]

    def _residuals(self, now: Micros) -> list[Alert]:
        limits = self.thresholds
        alerts = []
        for method, runs in sorted(self._runs.items()):
            count, over = len(runs.exceeded), sum(runs.exceeded)
            if count >= limits.least_runs and lower_bound(over, count) > limits.residual_share:
                message = (
                    f"{over} of the last {count} runs of {method} took longer than their predicted P90, a tenth should; "
                    "the workload or the machines have changed, see `aigc predict report`"
                )
                alerts.append(
                    Alert("prediction_residuals", method, "warning", now, message, over / count, limits.residual_share)
                )
        return alerts


_REMEDIES = {
    FailureCause.HUNG: "the jobs' details have the stack of the thread that stood still",
    FailureCause.NOT_FINITE: "one model: it does not work in half precision; many models on one GPU: drain that GPU",
    FailureCause.GPU_LOST: "see the GPUs' state in `aigc nodes list` and the kernel's log for Xid lines",
    FailureCause.OUT_OF_MEMORY: "`aigc doctor` on the node shows what each model takes; give its Pods more or ask for less",
}
"""Causes that speak of devices -> what to look at."""


def _devices(now: Micros, gpus: Iterable[GpuSeen]) -> list[Alert]:
    alerts = []
    for gpu in gpus:
        name = f"{gpu.node}/{gpu.uuid}"
        if gpu.cordoned:
            message = (
                f"GPU {gpu.uuid} of {gpu.node} failed one piece of work after another and gets no more; look at it, then "
                f"`aigc nodes uncordon {gpu.node} --gpu {gpu.uuid}`"
            )
            alerts.append(Alert("gpu_cordoned", name, "critical", now, message, 1.0, 1.0))
        if not gpu.healthy:
            message = f"GPU {gpu.uuid} of {gpu.node} is gone or ill; look at its driver and the kernel's log"
            alerts.append(Alert("gpu_ill", name, "critical", now, message, 1.0, 1.0))
    return alerts


def _down(now: Micros, modules: Mapping[str, bool]) -> list[Alert]:
    return [
        Alert("module_down", name, "critical", now, f"module {name} does not work; see /readyz and its log", 0.0, 1.0)
        for name, works in sorted(modules.items())
        if not works
    ]


def lower_bound(hits: int, count: int) -> float:
    """Return the lower end of Wilson's 95% interval of a share (Wilson 1927)."""
    if count == 0:
        return 0.0
    share, z2 = hits / count, _Z * _Z
    centre = share + z2 / (2 * count)
    spread = _Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return max(0.0, (centre - spread) / (1 + z2 / count))
