"""Follows a journal, simulated or from production, and hands on what is over: runs, Pods and tasks with their beginnings and ends.

It remembers only what is open. What becomes of the records is a sink's business: a picture (`timeline_perfetto`), tables
(`timeline_parquet`), a chart for the report (`gantt`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.commands import Command, CreatePod, DeletePod, Notify, StartTask, StopTask
from engine.events import (
    Event,
    NodeJoined,
    NodeLost,
    NodeReported,
    PodStarted,
    PodStopped,
    TaskFailed,
    TaskFinished,
    TaskStarted,
    TaskStopped,
    TaskSubmitted,
)
from engine.resources import GpuGrant, GpuSpec
from engine.state import State
from engine.tasks import TERMINAL_STATES, Micros, PodState, TaskSpec

OPEN = "open"
"""Outcome of whatever was not over when the journal ended."""


class TimelineError(ValueError):
    """A timeline cannot be written; the message names the remedy."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One rank of one attempt, from its order to its end. Times are the journal's, in microseconds."""

    req_no: str
    attempt: int
    rank: int
    pod: int
    node: str
    grants: tuple[GpuGrant, ...]
    spec: TaskSpec | None
    """None for a task whose submission the journal does not hold."""
    submitted_at: Micros
    ordered_at: Micros
    started_at: Micros | None
    """None: it never began."""
    ended_at: Micros
    outcome: str
    """``finished``, ``stopped``, ``open``, a failure's cause, or ``pod_lost``, ``node_lost`` for what took it along."""
    reason: str
    """Why it was stopped, where it was."""


@dataclass(frozen=True, slots=True)
class PodRecord:
    """A Pod from its order until its devices were free again."""

    pod: int
    node: str
    method: str
    model: str
    grants: tuple[GpuGrant, ...]
    slots: int
    created_at: Micros
    ready_at: Micros | None
    ended_at: Micros
    runs: int
    """Attempts that began in it."""
    why: str
    """Why it went: the reason it was deleted for, a failure's cause, ``node_lost``, or ``open``."""


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """A task from its submission to its terminal state."""

    spec: TaskSpec
    submitted_at: Micros
    first_started_at: Micros | None
    ended_at: Micros
    state: str
    """A terminal state, or ``open``."""
    reason: str
    attempts: int


class Sink(Protocol):
    """Takes what a follower hands on."""

    def node(self, now: Micros, name: str, gpus: Sequence[GpuSpec], up: bool) -> None:
        """Take note of a node that came, changed or went."""

    def run(self, record: RunRecord) -> None:
        """Take a run that is over."""

    def pod(self, record: PodRecord) -> None:
        """Take a Pod that is gone."""

    def task(self, record: TaskRecord) -> None:
        """Take a task that is over."""

    def levels(self, now: Micros, waiting: int, running: int, pods: int) -> None:
        """Take the numbers of waiting and running tasks and of Pods, whenever one changed."""


class _Task:
    __slots__ = ("attempts", "first_started_at", "running", "spec", "submitted_at")

    def __init__(self, spec: TaskSpec, now: Micros) -> None:
        self.spec = spec
        self.submitted_at = now
        self.first_started_at: Micros | None = None
        self.running = 0
        self.attempts = 0


class _Run:
    __slots__ = ("order", "ordered_at", "reason", "started_at", "task")

    def __init__(self, order: StartTask, task: _Task | None, now: Micros) -> None:
        self.order = order
        self.task = task
        self.ordered_at = now
        self.started_at: Micros | None = None
        self.reason = ""


class _Pod:
    __slots__ = ("created_at", "order", "ready_at", "running", "runs", "why")

    def __init__(self, order: CreatePod, now: Micros) -> None:
        self.order = order
        self.created_at = now
        self.ready_at: Micros | None = None
        self.running: dict[tuple[str, int, int], None] = {}
        self.runs = 0
        self.why = ""


class Follower:
    """A running fold over steps; an instance is itself a journal for `engine.ports.drive`."""

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self._sinks = tuple(sinks)
        self._tasks: dict[str, _Task] = {}
        self._pods: dict[int, _Pod] = {}
        self._runs: dict[tuple[str, int, int], _Run] = {}
        self._on_node: dict[str, dict[int, None]] = {}
        self._running = 0
        self._last = (-1, -1, -1)
        self.now: Micros = 0

    def __call__(self, now: Micros, events: Sequence[Event], commands: Sequence[Command]) -> None:
        """Fold one step in."""
        self.now = now
        for event in events:
            self._event(now, event)
        for command in commands:
            self._command(now, command)
        levels = (len(self._tasks) - self._running, self._running, len(self._pods))
        if levels != self._last:
            self._last = levels
            for sink in self._sinks:
                sink.levels(now, *levels)

    def begin_from(self, state: State) -> None:
        """Take over what a snapshot holds, for a journal whose first steps are no longer kept."""
        self.now = state.now
        for node in state.cluster.nodes:
            if node.up:
                self._node(state.now, node.name, node.spec.gpus, True)
        for pod in state.pods.values():
            order = CreatePod(pod.number, pod.node.name, pod.method, pod.model, pod.grants, pod.demand, pod.slots)
            self._create(pod.created_at, order)
            if pod.state is not PodState.CREATING:
                self._pods[pod.number].ready_at = pod.created_at
        for task in state.live_tasks():
            self._tasks[task.req_no] = _Task(task.spec, task.submitted_at)
            for rank, number in enumerate(task.pods):
                if number and task.live >> rank & 1 and number in self._pods:
                    node_name = self._pods[number].order.node
                    self._start(task.ordered_at, StartTask(task.req_no, task.attempt, number, node_name, rank))
                    if task.rank_started >> rank & 1:
                        self._started(task.started_at, (task.req_no, task.attempt, rank))

    def close(self) -> None:
        """Hand on whatever is still open, with its outcome `OPEN`, as of the last step."""
        for key in list(self._runs):
            self._end(self.now, key, OPEN)
        for number in list(self._pods):
            self._pod_gone(self.now, number, OPEN, OPEN)
        for req_no in list(self._tasks):
            self._over(self.now, req_no, OPEN, "")

    # --- events -------------------------------------------------------------------------------------------------------

    def _event(self, now: Micros, event: Event) -> None:
        match event:
            case TaskSubmitted(task):
                if task.req_no not in self._tasks:
                    self._tasks[task.req_no] = _Task(task, now)
            case TaskStarted(req_no, attempt, rank):
                self._started(now, (req_no, attempt, rank))
            case TaskFinished(req_no, attempt, rank):
                self._end(now, (req_no, attempt, rank), "finished")
            case TaskFailed(req_no, attempt, cause, rank):
                self._end(now, (req_no, attempt, rank), cause.value)
            case TaskStopped(req_no, attempt, rank):
                self._end(now, (req_no, attempt, rank), "stopped")
            case PodStarted(number):
                if number in self._pods:
                    self._pods[number].ready_at = now
            case PodStopped(number, cause):
                self._pod_gone(now, number, "", cause.value)
            case NodeJoined(spec, pods):
                self._node_gone(now, spec.name, keep=pods)
                self._node(now, spec.name, spec.gpus, True)
            case NodeReported(name, gpus):
                self._node(now, name, gpus, True)
            case NodeLost(name):
                self._node_gone(now, name)
                self._node(now, name, (), False)
            case _:
                pass

    def _node(self, now: Micros, name: str, gpus: Sequence[GpuSpec], up: bool) -> None:
        for sink in self._sinks:
            sink.node(now, name, gpus, up)

    def _started(self, now: Micros, key: tuple[str, int, int]) -> None:
        run = self._runs.get(key)
        if run is None or run.started_at is not None:
            return
        run.started_at = now
        pod = self._pods.get(run.order.pod)
        if pod is not None:
            pod.runs += 1
        task = run.task
        if task is not None:
            if task.first_started_at is None:
                task.first_started_at = now
            task.running += 1
            self._running += task.running == 1

    def _end(self, now: Micros, key: tuple[str, int, int], outcome: str) -> None:
        run = self._runs.pop(key, None)
        if run is None:
            return
        order = run.order
        pod = self._pods.get(order.pod)
        if pod is not None:
            pod.running.pop(key, None)
        task = run.task
        if task is not None and run.started_at is not None:
            task.running -= 1
            self._running -= task.running == 0
        record = RunRecord(
            req_no=order.req_no,
            attempt=order.attempt,
            rank=order.rank,
            pod=order.pod,
            node=order.node,
            grants=pod.order.grants if pod is not None else (),
            spec=task.spec if task is not None else None,
            submitted_at=task.submitted_at if task is not None else run.ordered_at,
            ordered_at=run.ordered_at,
            started_at=run.started_at,
            ended_at=now,
            outcome=outcome,
            reason=run.reason,
        )
        for sink in self._sinks:
            sink.run(record)

    def _pod_gone(self, now: Micros, number: int, why: str, outcome: str) -> None:
        pod = self._pods.get(number)
        if pod is None:
            return
        for key in list(pod.running):
            self._end(now, key, outcome)
        del self._pods[number]
        order = pod.order
        self._on_node.get(order.node, {}).pop(number, None)
        record = PodRecord(
            pod=number,
            node=order.node,
            method=order.method,
            model=order.model,
            grants=order.grants,
            slots=order.slots,
            created_at=pod.created_at,
            ready_at=pod.ready_at,
            ended_at=now,
            runs=pod.runs,
            why=why or pod.why or outcome,
        )
        for sink in self._sinks:
            sink.pod(record)

    def _node_gone(self, now: Micros, name: str, keep: tuple[int, ...] = ()) -> None:
        for number in [number for number in self._on_node.get(name, ()) if number not in keep]:
            self._pod_gone(now, number, "node_lost", "node_lost")

    # --- commands -----------------------------------------------------------------------------------------------------

    def _command(self, now: Micros, command: Command) -> None:
        match command:
            case CreatePod():
                self._create(now, command)
            case StartTask():
                self._start(now, command)
            case StopTask(req_no, attempt, _, _, rank):
                run = self._runs.get((req_no, attempt, rank))
                if run is not None:
                    run.reason = command.reason
            case DeletePod(number, reason):
                if number in self._pods:
                    self._pods[number].why = reason
            case Notify(req_no, state) if state in TERMINAL_STATES:
                self._over(now, req_no, state.value, command.reason)
            case _:
                pass

    def _create(self, now: Micros, order: CreatePod) -> None:
        if order.pod not in self._pods:
            self._pods[order.pod] = _Pod(order, now)
            self._on_node.setdefault(order.node, {})[order.pod] = None

    def _start(self, now: Micros, order: StartTask) -> None:
        key = (order.req_no, order.attempt, order.rank)
        task = self._tasks.get(order.req_no)
        self._runs[key] = _Run(order, task, now)
        pod = self._pods.get(order.pod)
        if pod is not None:
            pod.running[key] = None
        if task is not None and not order.rank:
            task.attempts += 1

    def _over(self, now: Micros, req_no: str, state: str, reason: str) -> None:
        task = self._tasks.get(req_no)
        if task is None:
            return
        for key in [key for key in self._runs if key[0] == req_no] if task.running else ():
            self._end(now, key, "stopped")
        del self._tasks[req_no]
        record = TaskRecord(
            spec=task.spec,
            submitted_at=task.submitted_at,
            first_started_at=task.first_started_at,
            ended_at=now,
            state=state,
            reason=reason,
            attempts=task.attempts,
        )
        for sink in self._sinks:
            sink.task(record)
