"""A small desk to drive the engine by hand: short names for events, and the orders of every step kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any

import pytest

from engine import events as ev
from engine import invariants, profiles
from engine.commands import Command, CreatePod, DeletePod, Notify, StartTask, StopTask
from engine.journal import MemoryJournal
from engine.limits import Limits
from engine.profile import Profile
from engine.resources import GpuSpec, NodeSpec
from engine.scheduler import Engine
from engine.tasks import SECOND, TaskSpec, TaskType


class Desk:
    """An engine, its journal, and a clock in seconds."""

    def __init__(self, profile: str | Profile = "aigc", limits: Limits | None = None) -> None:
        self.engine = Engine(profiles.load(profile) if isinstance(profile, str) else profile, limits)
        self.journal = MemoryJournal()
        self.seconds = 0.0
        self.orders: list[Command] = []

    def step(self, *events: ev.Event, after: float = 1.0) -> Sequence[Command]:
        """Let time pass, hand in events, check the invariants, and return the orders."""
        self.seconds += after
        now = round(self.seconds * SECOND)
        commands = self.engine.step(now, events)
        self.journal(now, events, commands)
        invariants.check(self.engine.state)
        self.orders += commands
        return commands

    def answer(self, commands: Sequence[Command], start: bool = True) -> Sequence[Command]:
        """Let Pods start and stop as ordered, and attempts start, until nothing more follows."""
        all_orders = list(commands)
        while True:
            events: list[ev.Event] = []
            for c in commands:
                match c:
                    case CreatePod():
                        events.append(ev.PodStarted(c.pod))
                    case DeletePod():
                        events.append(ev.PodStopped(c.pod))
                    case StartTask() if start:
                        events.append(ev.TaskStarted(c.req_no, c.attempt, c.rank))
                    case StopTask():
                        events.append(ev.TaskStopped(c.req_no, c.attempt, c.rank, "ckpt" if c.keep_checkpoint else ""))
                    case _:
                        pass
            if not events:
                return all_orders
            commands = self.step(*events, after=0.001)
            all_orders += commands

    def node(
        self, name: str = "n1", gpus: int = 1, memory: int = 80, model: str = "a100", **more: Any
    ) -> Sequence[Command]:
        """Let a node join."""
        return self.step(ev.NodeJoined(make_node(name, gpus, memory, model, **more)))

    def submit(self, *specs: TaskSpec, after: float = 1.0) -> Sequence[Command]:
        """Submit tasks in one step."""
        return self.step(*(ev.TaskSubmitted(spec) for spec in specs), after=after)

    def finish(self, req_no: str, after: float = 1.0) -> Sequence[Command]:
        """Let the current attempt of a task finish."""
        task = self.engine.state.tasks[req_no]
        return self.step(
            *(ev.TaskFinished(req_no, task.attempt, r, "out") for r in range(task.spec.members)), after=after
        )

    def state(self, req_no: str) -> str:
        """Return a task's state."""
        return str(self.engine.state.tasks[req_no].state)

    def where(self, req_no: str) -> str:
        """Return the node of a task's first Pod."""
        state = self.engine.state
        return state.pods[state.tasks[req_no].pods[0]].node.name


def make_node(name: str = "n1", gpus: int = 1, memory: int = 80, model: str = "a100", **more: Any) -> NodeSpec:
    return NodeSpec(name, tuple(GpuSpec(f"{name}-g{i}", model, memory) for i in range(gpus)), **more)


def make_task(req_no: str, **more: Any) -> TaskSpec:
    values: dict[str, Any] = {"tenant": "a", "group": "", "task_type": TaskType.GC, "method": "sleep"}
    return TaskSpec(req_no, **{**values, **more})


@pytest.fixture
def desk() -> Callable[..., Desk]:
    """Return a maker of desks."""
    return Desk


@pytest.fixture
def task() -> Callable[..., TaskSpec]:
    """Return a maker of tasks."""
    return make_task


@pytest.fixture
def node() -> Callable[..., NodeSpec]:
    """Return a maker of nodes."""
    return make_node


def starts(commands: Sequence[Command]) -> list[str]:
    """Return who was ordered to start, in order."""
    return [c.req_no for c in commands if isinstance(c, StartTask)]


@pytest.fixture
def started() -> Callable[[Sequence[Command]], list[str]]:
    """Return a reader of the starts among orders."""
    return starts


@pytest.fixture
def bound() -> Callable[[Sequence[Command]], list[str]]:
    """Return a reader of whom Pods were created for, in order."""
    return lambda commands: [c.req_no for c in commands if isinstance(c, CreatePod)]


@pytest.fixture
def told() -> Callable[[Sequence[Command]], list[tuple[str, str, str]]]:
    """Return a reader of the news among orders: (reqNo, state, reason)."""
    return lambda commands: [(c.req_no, str(c.state), str(c.reason)) for c in commands if isinstance(c, Notify)]


class Clockwork:
    """A world without any delay: Pods start and stop at once, and every task runs exactly as long as it takes.

    Times are whole seconds. A task that is stopped goes on later where it was.
    """

    def __init__(self, profile: str | Profile, limits: Limits | None = None) -> None:
        self.engine = Engine(profiles.load(profile) if isinstance(profile, str) else profile, limits)
        self.journal = MemoryJournal()
        self.now = 0
        self.begun: dict[str, list[float]] = {}
        """Task -> when its attempts started."""
        self.ended: dict[str, float] = {}
        self.stops: list[tuple[float, str]] = []
        self._left: dict[str, int] = {}
        self._since: dict[tuple[str, int, int], int] = {}
        self._due: list[tuple[int, int, ev.Event]] = []
        self._order = 0

    def at(self, seconds: float, *events: ev.Event) -> None:
        """Let events happen at a time."""
        for event in events:
            self._order += 1
            heappush(self._due, (round(seconds * SECOND), self._order, event))

    def job(self, req_no: str, at: float, runs: float, believed: float | None = None, **more: Any) -> None:
        """Let a task come at a time that runs so long; the scheduler believes that, or what it is told."""
        self._left[req_no] = round(runs * SECOND)
        declared = round((runs if believed is None else believed) * SECOND)
        more.setdefault("task_type", TaskType.TP)
        self.at(at, ev.TaskSubmitted(make_task(req_no, declared_us=declared, **more)))

    def node(self, name: str = "n1", gpus: int = 1, **more: Any) -> None:
        """Let a node be there from the beginning."""
        self.at(0, ev.NodeJoined(make_node(name, gpus, **more)))

    def run(self, until: float = 1e9) -> Clockwork:
        """Go on until nothing happens any more, or until a time; check the invariants after every step."""
        end = round(until * SECOND)
        while True:
            wakeup = self.engine.wakeup_at
            due = [at for at in (self._due[0][0] if self._due else None, wakeup) if at is not None]
            if not due or min(due) > end or (not self._due and not self.engine.state.live_tasks()):
                return self
            self.now = max(self.now, min(due))
            events = []
            while self._due and self._due[0][0] <= self.now:
                events.append(heappop(self._due)[2])
            commands = self.engine.step(self.now, [e for e in events if self._is_true(e)])
            self.journal(self.now, events, commands)
            invariants.check(self.engine.state)
            for command in commands:
                self._perform(command)

    def _is_true(self, event: ev.Event) -> bool:
        if not isinstance(event, ev.TaskFinished):
            return True
        key = (event.req_no, event.attempt, event.rank)
        if self._since.pop(key, None) is None:
            return False
        self.ended[event.req_no] = self.now / SECOND
        return True

    def _perform(self, command: Command) -> None:
        now = self.now / SECOND
        match command:
            case CreatePod():
                self.at(now, ev.PodStarted(command.pod))
            case DeletePod():
                self.at(now, ev.PodStopped(command.pod))
            case StartTask():
                req_no, attempt, rank = command.req_no, command.attempt, command.rank
                if rank == 0:
                    self.begun.setdefault(req_no, []).append(now)
                self._since[req_no, attempt, rank] = self.now
                self.at(now, ev.TaskStarted(req_no, attempt, rank))
                self.at(now + self._left[req_no] / SECOND, ev.TaskFinished(req_no, attempt, rank, "out"))
            case StopTask():
                since = self._since.pop((command.req_no, command.attempt, command.rank))
                if command.rank == 0:
                    self.stops.append((now, command.req_no))
                    self._left[command.req_no] -= self.now - since
                self.at(now, ev.TaskStopped(command.req_no, command.attempt, command.rank, "ckpt"))
            case _:
                pass


@pytest.fixture
def clockwork() -> Callable[..., Clockwork]:
    """Return a maker of worlds without delay."""
    return Clockwork
