"""Join a busy Pod or start another: by what company costs against what a load costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engine import invariants, snapshot
from engine.commands import CreatePod, Notify, StartTask
from engine.events import Event, NodeJoined, PodStarted, TaskStarted, TaskSubmitted
from engine.journal import Record
from engine.limits import Limits
from engine.profiles import load
from engine.resources import Demand, GpuSpec, NodeSpec
from engine.scheduler import Engine
from engine.tasks import SECOND, URGENT_PRIORITY, Affinity, Estimate, Quantiles, TaskSpec, TaskState, TaskType

GIB = 1 << 30
LOAD_S = 10


def estimate(run_s: int, marginal_permille: int) -> Estimate:
    us = run_s * SECOND
    return Estimate((("*", Quantiles(us, us, us, us)),), marginal_permille=marginal_permille)


class Drill:
    """GPUs of one node; a first Pod of four slots was loaded in ten seconds and runs a task of twenty."""

    def __init__(self, gpus: int = 2, **profile: Any) -> None:
        self.profile = replace(load("aigc"), **profile)
        self.engine = Engine(self.profile, Limits())
        self.now = 0
        self.records: list[Record] = []
        self.step(NodeJoined(NodeSpec("n1", tuple(GpuSpec(f"g{i}", "a100", 80 * GIB) for i in range(gpus)))))
        self.ask("first")
        self.step(PodStarted(1), later_us=LOAD_S * SECOND)
        self.step(TaskStarted("first", 1), later_us=0)

    def step(self, *events: Event, later_us: int = 0) -> list[Any]:
        self.now += later_us
        commands = list(self.engine.step(self.now, events))
        self.records.append(Record(len(self.records), self.now, tuple(events), tuple(commands)))
        invariants.check(self.engine.state)
        return commands

    def ask(self, name: str, run_s: int = 20, marginal_permille: int = 690, **fields: Any) -> str:
        """Submit a task and say where it went: ``joins``, ``new`` or ``waits``."""
        group = fields.pop("group", "")
        usual = {"model": "base", "demand": Demand(), "slots": 4}
        spec = TaskSpec(name, "t", group, TaskType.GC, "text_to_image", **{**usual, **fields})
        commands = self.step(TaskSubmitted(spec, estimate(run_s, marginal_permille)))
        if any(isinstance(each, CreatePod) and each.req_no == name for each in commands):
            return "new"
        joined = [each for each in commands if isinstance(each, StartTask) and each.req_no == name]
        bound = [each for each in commands if isinstance(each, Notify) and each.state is TaskState.BOUND and each.pod]
        return "joins" if joined or bound else "waits"


def test_a_task_starts_another_pod_where_company_costs_more_than_a_load() -> None:
    """Two runs of 20 s, each 69% longer for the other, are 27.6 s against a load of 10 s."""
    assert Drill().ask("x") == "new"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"marginal_permille": 20}, "company costs 0.8 s"),
        ({"run_s": 5}, "it is over before the load would be"),
        ({"marginal_permille": 0}, "nothing was measured"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_it_joins_where_company_costs_less(fields: dict[str, Any], why: str) -> None:
    assert Drill().ask("x", **fields) == "joins", why


def test_it_joins_where_there_is_no_room() -> None:
    assert Drill(gpus=1).ask("x") == "joins"


def test_it_joins_where_the_profile_does_not_ask() -> None:
    assert Drill(slot_slowdown_permille=0).ask("x") == "joins"


def test_a_run_that_is_nearly_over_is_little_company() -> None:
    drill = Drill()
    drill.step(later_us=18 * SECOND)
    assert drill.ask("x") == "joins"


def test_a_strict_group_stays_on_its_node() -> None:
    drill = Drill(gpus=1)
    drill.ask("member", marginal_permille=0, group="g", affinity=Affinity.STRICT)
    drill.step(NodeJoined(NodeSpec("n2", (GpuSpec("g9", "a100", 80 * GIB),))))
    assert drill.ask("x", group="g", affinity=Affinity.STRICT) == "joins"
    assert drill.ask("y") == "new"


def test_an_idle_pod_is_taken_before_anything_is_loaded() -> None:
    drill = Drill()
    assert drill.ask("x") == "new"
    drill.step(PodStarted(2), later_us=LOAD_S * SECOND)
    drill.step(TaskStarted("x", 1))
    assert drill.ask("y") == "joins"  # No third GPU.
    assert sorted(len(pod.tasks) for pod in drill.engine.state.pods.values()) == [1, 2]


def test_the_same_is_decided_from_a_snapshot() -> None:
    drill = Drill(gpus=4)
    taken, before = drill.engine.snapshot(), len(drill.records)
    for name in ("a", "b", "c", "d", "e"):
        drill.ask(name)
    again = Engine.from_state(drill.profile, snapshot.restore(taken))
    for record in drill.records[before:]:
        assert tuple(again.step(record.now, record.events)) == record.commands


def test_room_is_left_to_who_ranks_before() -> None:
    """A new Pod for comfort may not take the last GPU from an urgent task of another model that comes in the same step."""
    drill = Drill()
    usual = {"demand": Demand(), "slots": 4}
    urgent = TaskSpec("u", "t", "", TaskType.GC, "text_to_image", "other", URGENT_PRIORITY, **usual)
    ordinary = TaskSpec("o", "t", "", TaskType.GC, "text_to_image", "base", **usual)
    commands = drill.step(
        TaskSubmitted(ordinary, estimate(20, 690)),
        TaskSubmitted(urgent, estimate(20, 690)),
    )
    assert [each.req_no for each in commands if isinstance(each, CreatePod)] == ["u"]
    assert [each.req_no for each in commands if isinstance(each, StartTask)] == ["o"]
