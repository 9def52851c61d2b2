"""What the planner needs of one run, folded from its journal: exact quantiles by class of tasks, and the load by hour of day.

`sim.metrics` keeps sketches; the planner compares values next to a limit, so it keeps every task's times and sorts them. A task
that never started, or that the cluster lost, has waited for ever: a policy cannot look better by not serving.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.commands import Command, CreatePod, Notify, StartTask
from engine.events import (
    Event,
    NodeJoined,
    NodeLost,
    PodStarted,
    PodStopped,
    TaskFailed,
    TaskFinished,
    TaskStarted,
    TaskStopped,
    TaskSubmitted,
)
from engine.tasks import NOT_RETRYABLE, SECOND, TERMINAL_STATES, FailureCause, Micros, TaskSpec, TaskState, is_urgent
from sim.planner import resampling

_HOUR_US = 3600 * SECOND
_TENANTS = 200
_QUANTILES = (0.50, 0.90, 0.95, 0.99)
Floats = NDArray[np.float64]
Span = tuple[Micros, Micros, float]
"""From, until, GPUs."""


class _Task:
    __slots__ = ("cause", "ended", "run_us", "spec", "started", "state", "submitted")

    def __init__(self, spec: TaskSpec, now: Micros) -> None:
        self.spec = spec
        self.submitted = now
        self.started: Micros | None = None
        self.ended: Micros | None = None
        self.state: TaskState | None = None
        self.cause: FailureCause | None = None
        self.run_us = 0


class _Pod:
    __slots__ = ("created", "gpus", "node", "ready", "running", "since")

    def __init__(self, node: str, gpus: float, now: Micros) -> None:
        self.node = node
        self.gpus = gpus
        self.created = now
        self.ready = False
        self.running = 0
        self.since: Micros = 0


class Recorder:
    """A journal (`engine.ports.Journal`) that remembers every task's times and the GPUs' work by hour.

    `gpus` is the size of the cluster; `clock` maps simulated hours to hours of the day: (hour of day at zero, hours of the day per
    simulated hour), so that a compressed trace still shows its own days.
    """

    def __init__(self, gpus: int, clock: tuple[float, float] = (0.0, 1.0)) -> None:
        self._gpus = gpus
        self._offset, self._pace = clock
        self._tasks: dict[str, _Task] = {}
        self._pods: dict[int, _Pod] = {}
        self._running: dict[tuple[str, int, int], int] = {}
        """(req_no, attempt, rank) -> Pod, from the order until the end."""
        self._begun: set[tuple[str, int, int]] = set()
        self._busy: list[Span] = []
        """When GPUs ran tasks; `_loading`: when they waited for a Pod and its model."""
        self._loading: list[Span] = []
        self._now: Micros = 0
        self._loads = 0

    def __call__(self, now: Micros, events: Sequence[Event], commands: Sequence[Command]) -> None:
        """Fold one step in."""
        self._now = now
        for event in events:
            self._event(now, event)
        for command in commands:
            self._command(now, command)

    def figures(self) -> dict[str, Any]:
        """Return plain values: ``classes``, ``hours``, ``busy``, ``loading``, ``loads``, ``tasks``, ``lost`` and ``span_s``."""
        for number in list(self._pods):
            self._gone(self._now, number)
        tasks = list(self._tasks.values())
        span_us = max(1, *(task.submitted for task in tasks)) if tasks else 1
        table = _Table(tasks)
        shift = self._offset % 1.0
        last = shift + span_us / _HOUR_US * self._pace
        edges = np.append(np.append(shift, np.arange(1.0, last)), last)
        spent = [_by_edges(spans, edges, self._pace, shift) for spans in (self._busy, self._loading)]
        capacity = self._gpus * (last - shift)
        return {
            "tasks": len(tasks),
            "lost": table.lost,
            "span_s": span_us / SECOND,
            "busy": float(spent[0].sum() / capacity),
            "loading": float(spent[1].sum() / capacity),
            "loads": self._loads,
            "classes": {name: table.spread(members) for name, members in sorted(_classes(tasks).items())},
            "hours": self._hours(tasks, table, edges, spent),
        }

    # --- the fold -----------------------------------------------------------------------------------------------------

    def _event(self, now: Micros, event: Event) -> None:
        match event:
            case TaskStarted(req_no, attempt, rank):
                self._started(now, (req_no, attempt, rank))
            case TaskFinished(req_no, attempt, rank):
                if self._ended(now, (req_no, attempt, rank)) and not rank:
                    self._tasks[req_no].run_us = event.run_us
            case TaskSubmitted(task):
                if task.req_no not in self._tasks:
                    self._tasks[task.req_no] = _Task(task, now)
            case TaskFailed(req_no, attempt, cause, rank):
                if self._ended(now, (req_no, attempt, rank)):
                    self._tasks[req_no].cause = cause
            case TaskStopped(req_no, attempt, rank):
                self._ended(now, (req_no, attempt, rank))
            case PodStarted(number):
                pod = self._pods.get(number)
                if pod is not None and not pod.ready:
                    pod.ready = True
                    self._loads += 1
                    self._loading.append((pod.created, now, pod.gpus))
            case PodStopped(number):
                self._gone(now, number)
            case NodeLost(name):
                self._node_gone(now, name, ())
            case NodeJoined(spec, pods):
                self._node_gone(now, spec.name, pods)
            case _:
                pass

    def _command(self, now: Micros, command: Command) -> None:
        match command:
            case StartTask(req_no, attempt):
                self._running[req_no, attempt, command.rank] = command.pod
            case CreatePod():
                gpus = sum(grant.share for grant in command.grants) / 1000
                self._pods[command.pod] = _Pod(command.node, gpus, now)
            case Notify(req_no, state):
                task = self._tasks.get(req_no)
                if task is not None and state in TERMINAL_STATES:
                    task.state, task.ended = state, now
                elif task is not None:
                    task.state = None
            case _:
                pass

    def _started(self, now: Micros, key: tuple[str, int, int]) -> None:
        task, pod = self._tasks.get(key[0]), self._pods.get(self._running.get(key, -1))
        if task is None or pod is None or key in self._begun:
            return
        self._begun.add(key)
        if task.started is None:
            task.started = now
        if not pod.running:
            pod.since = now
        pod.running += 1

    def _ended(self, now: Micros, key: tuple[str, int, int]) -> bool:
        number = self._running.pop(key, None)
        if number is None:
            return False
        if key in self._begun:
            self._begun.discard(key)
            pod = self._pods.get(number)
            if pod is not None:
                pod.running -= 1
                if not pod.running:
                    self._busy.append((pod.since, now, pod.gpus))
        return True

    def _gone(self, now: Micros, number: int) -> None:
        pod = self._pods.pop(number, None)
        if pod is None:
            return
        if not pod.ready:
            self._loading.append((pod.created, now, pod.gpus))
        if pod.running:
            self._busy.append((pod.since, now, pod.gpus))

    def _node_gone(self, now: Micros, name: str, keep: tuple[int, ...]) -> None:
        for number in [number for number, pod in self._pods.items() if pod.node == name and number not in keep]:
            self._gone(now, number)

    def _hours(
        self, tasks: list[_Task], table: _Table, edges: Floats, spent: Sequence[Floats]
    ) -> list[dict[str, float]]:
        """Return a row for every hour of the day that occurs: tasks, the GPUs' shares that run and load, p99 waiting."""
        first = int(self._offset)
        submitted = (
            np.array([task.submitted for task in tasks], dtype=np.float64) / _HOUR_US * self._pace + self._offset % 1.0
        )
        hour_of = (first + submitted.astype(np.int64)) % 24
        bin_of = (first + edges[:-1].astype(np.int64)) % 24
        lengths = np.diff(edges) * self._gpus
        rows = []
        for hour in range(24):
            here = bin_of == hour
            if not here.any():
                continue
            length = float(lengths[here].sum())
            busy, loading = (float(each[here].sum()) / length for each in spent)
            filled = (spent[0][here] + spent[1][here]) / lengths[here]
            waits = table.wait[hour_of == hour]
            waits = np.sort(waits[~np.isnan(waits)])
            rows.append(
                {
                    "hour": float(hour),
                    "tasks": len(waits) * self._gpus / length,
                    "busy": busy,
                    "loading": loading,
                    "fullest": float(filled.max()),
                    "p99_wait": _quantile(waits, 0.99) if len(waits) else 0.0,
                }
            )
        return rows


def _by_edges(spans: Sequence[Span], edges: Floats, pace: float, shift: float) -> Floats:
    """Return GPU-hours between neighbouring edges, which are hours on the day's clock."""
    if not spans:
        return np.zeros(len(edges) - 1)
    table = np.array(spans, dtype=np.float64)
    at = np.concatenate((table[:, 0], table[:, 1])) / _HOUR_US * pace + shift
    change = np.concatenate((table[:, 2], -table[:, 2]))
    order = np.argsort(at, kind="stable")
    at, level = at[order], np.cumsum(change[order])
    total = np.concatenate(([0.0], np.cumsum(level[:-1] * np.diff(at))))
    return np.diff(np.interp(edges, at, total))


class _Table:
    """The tasks' times as arrays in seconds: nan where a task does not count, inf where it was never served."""

    def __init__(self, tasks: Sequence[_Task]) -> None:
        self.wait: Floats = np.full(len(tasks), np.nan)
        self.completion: Floats = np.full(len(tasks), np.nan)
        self.slowdown: Floats = np.full(len(tasks), np.nan)
        self.lost = 0
        self._blocks, count = resampling.blocks_of(np.array([task.submitted / SECOND for task in tasks]))
        self._drawn = resampling.draws(count) if count else None
        for row, task in enumerate(tasks):
            if task.started is not None:
                self.wait[row] = (task.started - task.submitted) / SECOND
            elif task.state is not TaskState.CANCELLED:
                self.wait[row] = np.inf
            if task.state is TaskState.FINISHED and task.ended is not None:
                self.completion[row] = (task.ended - task.submitted) / SECOND
                self.slowdown[row] = self.completion[row] / max(task.run_us / SECOND, 1e-6)
            elif task.state is not TaskState.CANCELLED and task.cause not in NOT_RETRYABLE:
                self.completion[row] = self.slowdown[row] = np.inf
            self.lost += bool(np.isinf(self.completion[row]) or np.isinf(self.wait[row]))

    def spread(self, members: Sequence[int]) -> dict[str, Any]:
        """Return count, and mean, quantiles and their standard errors (``mean se``, ...) of each measure over some of the tasks."""
        found: dict[str, Any] = {"count": len(members)}
        rows = np.array(members, dtype=np.int64)
        for name, column in (("wait", self.wait), ("completion", self.completion), ("slowdown", self.slowdown)):
            counted = rows[~np.isnan(column[rows])]
            counted = counted[np.argsort(column[counted], kind="stable")]
            values = column[counted]
            spread = {"mean": float(values.mean()) if len(values) else 0.0}
            for share in _QUANTILES:
                spread[f"p{round(share * 100)}"] = _quantile(values, share) if len(values) else 0.0
            if self._drawn is not None:
                errors = resampling.standard_errors(values, self._blocks[counted], self._drawn, _QUANTILES)
                spread |= {f"{name} se": error for name, error in zip(list(spread), errors or (), strict=False)}
            found[name] = spread
        return found


def _quantile(ordered: Floats, share: float) -> float:
    """Return the smallest value that this share of the values does not exceed."""
    return float(ordered[max(0, -(-round(share * 1000) * len(ordered) // 1000) - 1)])


def _classes(tasks: Sequence[_Task]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {"all": list(range(len(tasks)))}
    tenants: set[str] = set()
    for row, task in enumerate(tasks):
        spec = task.spec
        names = ["urgent" if is_urgent(spec) else "ordinary", f"type {spec.task_type}"]
        if spec.tenant in tenants or len(tenants) < _TENANTS:
            tenants.add(spec.tenant)
            names.append(f"tenant {spec.tenant}")
        for name in names:
            found.setdefault(name, []).append(row)
    return found
