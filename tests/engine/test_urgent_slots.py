"""Urgent tasks run at once beside those that fill a Pod, where their method can do that; nobody is stopped for them."""

from __future__ import annotations

from typing import Any

import pytest

from engine import invariants, snapshot
from engine.commands import CreatePod, StartTask, StopTask
from engine.events import Event, NodeDrainRequested, NodeJoined, PodStarted, TaskFinished, TaskStarted, TaskSubmitted
from engine.journal import Record
from engine.limits import Limits
from engine.profiles import load
from engine.resources import Demand, GpuSpec, NodeSpec
from engine.scheduler import Engine
from engine.tasks import SECOND, TaskSpec, TaskType

GIB = 1 << 30


class Drill:
    """One GPU, whose Pod of two slots two long ordinary tasks fill."""

    def __init__(self, profile: str = "aigc") -> None:
        self.profile = load(profile)
        self.engine = Engine(self.profile, Limits())
        self.now = 0
        self.made: list[CreatePod] = []
        self.records: list[Record] = []
        self.step(NodeJoined(NodeSpec("n1", (GpuSpec("g0", "a100", 80 * GIB),))))
        self.ask("a")
        [pod] = self.made
        self.pod = pod.pod
        self.step(PodStarted(self.pod))
        self.ask("b")
        assert len(self.engine.state.pods[self.pod].tasks) == 2
        self.step(TaskStarted("a", 1), TaskStarted("b", 1))

    def step(self, *events: Event, later_us: int = SECOND) -> list[Any]:
        self.now += later_us
        commands = list(self.engine.step(self.now, events))
        self.records.append(Record(len(self.records), self.now, tuple(events), tuple(commands)))
        self.made = [each for each in commands if isinstance(each, CreatePod)] or self.made
        invariants.check(self.engine.state)
        return commands

    def ask(self, name: str, **fields: Any) -> list[Any]:
        spec = TaskSpec(
            name,
            "t",
            fields.pop("group", ""),
            TaskType.GC,
            "text_to_image",
            **{
                "model": "base",
                "demand": Demand(),
                "slots": 2,
                "urgent_slots": 1,
                "declared_us": 600 * SECOND,
                **fields,
            },
        )
        return self.step(TaskSubmitted(spec))


def started(commands: list[Any]) -> list[str]:
    return [each.req_no for each in commands if isinstance(each, StartTask)]


def test_an_urgent_task_starts_at_once_beside_those_that_fill_the_pod() -> None:
    drill = Drill()
    commands = drill.ask("urgent", priority=100)
    assert started(commands) == ["urgent"]
    assert not [each for each in commands if isinstance(each, StopTask | CreatePod)]
    assert len(drill.engine.state.pods[drill.pod].tasks) == 3


def test_no_more_are_let_in_than_the_tasks_say() -> None:
    drill = Drill()
    assert started(drill.ask("first", priority=100)) == ["first"]
    assert started(drill.ask("second", priority=100)) == []
    drill.step(TaskStarted("first", 1))
    assert started(drill.step(TaskFinished("first", 1))) == ["second"]


def test_a_pod_takes_ordinary_tasks_again_when_it_is_below_its_slots() -> None:
    drill = Drill()
    drill.ask("urgent", priority=100)
    drill.ask("waits")
    assert started(drill.step(TaskFinished("a", 1))) == []
    assert started(drill.step(TaskFinished("b", 1))) == ["waits"]


@pytest.mark.parametrize(
    "fields",
    [
        {"priority": 99},
        {"priority": 100, "urgent_slots": 0},
        {"priority": 100, "model": "other"},
        {"priority": 100, "slots": 3},
    ],
    ids=["ordinary", "of a method that cannot", "of another model", "of another kind of Pod"],
)
def test_others_wait(fields: dict[str, Any]) -> None:
    drill = Drill()
    assert started(drill.ask("x", **fields)) == []


def test_a_draining_node_takes_none() -> None:
    drill = Drill()
    drill.step(NodeDrainRequested("n1"))
    assert started(drill.ask("urgent", priority=100)) == []


def test_what_was_decided_is_decided_again_from_the_journal_and_from_a_snapshot() -> None:
    drill = Drill()
    state = drill.engine.snapshot()
    before = len(drill.records)
    drill.ask("first", priority=100)
    drill.ask("second", priority=100, group="g")
    drill.step(TaskFinished("first", 1))
    again = Engine.from_state(drill.profile, snapshot.restore(state))
    for record in drill.records[before:]:
        assert tuple(again.step(record.now, record.events)) == record.commands
    fresh = Engine(drill.profile, Limits())
    for record in drill.records:
        assert tuple(fresh.step(record.now, record.events)) == record.commands


def test_a_task_that_asks_for_nonsense_is_refused_by_field() -> None:
    drill = Drill()
    drill.ask("x", urgent_slots=-1)
    [refused] = [each for each in drill.records[-1].commands if getattr(each, "detail", "")]
    assert "urgent_slots: -1 is out of range" in refused.detail
