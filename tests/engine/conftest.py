"""A small desk to drive the engine by hand: short names for events, and the orders of every step kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
