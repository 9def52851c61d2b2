"""Pods of several slots: which one a task joins, and when its model gets one more in the place of an idle one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine import invariants, snapshot
from engine.commands import CreatePod, DeletePod, Notify, StartTask
from engine.events import Event, NodeJoined, PodStarted, PodStopped, TaskFinished, TaskStarted, TaskSubmitted
from engine.limits import Limits
from engine.profiles import load
from engine.resources import Demand, GpuSpec, NodeSpec
from engine.scheduler import Engine
from engine.tasks import SECOND, Affinity, Estimate, Quantiles, TaskSpec, TaskState, TaskType

GIB = 1 << 30
LOAD_S = 10


class Desk:
    """GPUs of one node, Pods of four slots on whole GPUs, loads of ten seconds."""

    def __init__(self, gpus: int, **profile: Any) -> None:
        asked = {"slot_slowdown_permille": 500, "widen_loads": 4, **profile}
        self.profile = replace(load("aigc"), **asked)
        self.engine = Engine(self.profile, Limits())
        self.now = 0
        self.where: dict[str, int] = {}
        self.step(NodeJoined(NodeSpec("n1", tuple(GpuSpec(f"g{i}", "a100", 80 * GIB) for i in range(gpus)))))

    def step(self, *events: Event, later_s: float = 0) -> list[Any]:
        self.now += round(later_s * SECOND)
        commands = list(self.engine.step(self.now, events))
        for command in commands:
            match command:
                case CreatePod() | StartTask():
                    self.where[command.req_no] = command.pod
                case Notify(state=TaskState.BOUND) if command.pod:
                    self.where[command.req_no] = command.pod
                case _:
                    pass
        invariants.check(self.engine.state)
        return commands

    def ask(self, name: str, model: str, run_s: int = 20, slots: int = 4) -> list[Any]:
        us = run_s * SECOND
        estimate = Estimate((("*", Quantiles(us, us, us, us)),))
        spec = TaskSpec(
            name, "t", "", TaskType.GC, "text_to_image", model, demand=Demand(), affinity=Affinity.NONE, slots=slots
        )
        return self.step(TaskSubmitted(spec, estimate))

    def pod(self, name: str, model: str, run_s: int = 20, slots: int = 4) -> int:
        """Have a task begin in a Pod of its own."""
        (made,) = [each for each in self.ask(name, model, run_s, slots) if isinstance(each, CreatePod)]
        self.step(PodStarted(made.pod), later_s=LOAD_S)
        self.step(TaskStarted(name, 1))
        return made.pod

    def joins(self, name: str, model: str, run_s: int = 20) -> int:
        """Have a task join a Pod; return which."""
        commands = self.ask(name, model, run_s)
        assert not any(isinstance(each, CreatePod | DeletePod) for each in commands)
        self.step(TaskStarted(name, 1))
        return self.where[name]


def test_a_task_joins_the_pod_where_company_costs_least() -> None:
    desk = Desk(2)
    desk.pod("short", "m", 10)
    desk.profile = desk.engine.profile = replace(desk.profile, slot_slowdown_permille=4000)
    second = desk.pod("long", "m", 60)
    desk.engine.profile = replace(desk.profile, slot_slowdown_permille=500)
    desk.step(TaskFinished("long", 1, run_us=5 * SECOND), later_s=5)
    assert desk.joins("next", "m") == second, "it is empty there"


def test_an_idle_pod_goes_where_sharing_costs_more_than_four_loads() -> None:
    desk = Desk(2)
    busy = desk.pod("a", "m", 60)
    idle = desk.pod("other", "n", 5)
    desk.step(TaskFinished("other", 1, run_us=5 * SECOND), later_s=5)
    commands = desk.ask("b", "m", 60)
    # Two runs of which 60 s and 45 s are left, each half as slow again: 52 s, more than four loads of 10 s.
    assert [each.pod for each in commands if isinstance(each, DeletePod)] == [idle]
    (made,) = [each for each in desk.step(PodStopped(idle), later_s=1) if isinstance(each, CreatePod)]
    assert (made.req_no, made.model) == ("b", "m")
    assert made.pod != busy


def test_a_task_joins_where_sharing_costs_less() -> None:
    desk = Desk(2)
    busy = desk.pod("a", "m", 20)
    desk.pod("other", "n", 5)
    desk.step(TaskFinished("other", 1, run_us=5 * SECOND), later_s=5)
    assert desk.joins("b", "m", 20) == busy


def test_without_a_figure_for_the_slowdown_pods_are_shared_as_if_it_were_nothing() -> None:
    desk = Desk(2, slot_slowdown_permille=0)
    busy = desk.pod("a", "m", 60)
    desk.pod("other", "n", 5)
    desk.step(TaskFinished("other", 1, run_us=5 * SECOND), later_s=5)
    assert desk.joins("b", "m", 60) == busy


def test_while_no_pod_is_idle_the_fullest_is_joined_so_that_others_empty_themselves() -> None:
    desk = Desk(2, slot_slowdown_permille=0)
    first = desk.pod("a", "m", 20)
    for name in "bcd":
        desk.joins(name, "m")
    second = desk.pod("e", "m", 20)
    for name in "bc":
        desk.step(TaskFinished(name, 1, run_us=SECOND), later_s=1)
    desk.joins("f", "m")
    assert desk.where["f"] == second, "spread while nothing is known of the slowdown"
    desk.engine.profile = replace(desk.profile, slot_slowdown_permille=500)
    desk.step(TaskFinished("f", 1, run_us=SECOND), later_s=1)
    assert desk.joins("g", "m") == first


def test_the_same_is_decided_from_a_snapshot() -> None:
    desk = Desk(2)
    desk.pod("a", "m", 60)
    desk.pod("other", "n", 5)
    desk.step(TaskFinished("other", 1, run_us=5 * SECOND), later_s=5)
    again = Engine.from_state(desk.engine.profile, snapshot.restore(desk.engine.snapshot()))
    us = 60 * SECOND
    spec = TaskSpec("b", "t", "", TaskType.GC, "text_to_image", "m", demand=Demand(), affinity=Affinity.NONE, slots=4)
    asked = TaskSubmitted(spec, Estimate((("*", Quantiles(us, us, us, us)),)))
    assert list(again.step(desk.now, [asked])) == list(desk.engine.step(desk.now, [asked]))


def test_pods_of_one_slot_are_as_they_were() -> None:
    desk = Desk(2)
    desk.pod("a", "m", 60, slots=1)
    desk.pod("other", "n", 5, slots=1)
    desk.step(TaskFinished("other", 1, run_us=5 * SECOND), later_s=5)
    told = desk.ask("b", "n", 60, slots=1)
    assert desk.where["b"] == desk.where["other"]
    assert not any(isinstance(each, CreatePod) for each in told)
