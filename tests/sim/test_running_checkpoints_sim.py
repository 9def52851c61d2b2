"""Simulated trainings that tell of checkpoints while they run: what a lost one still has behind it."""

from __future__ import annotations

from typing import Any

import pytest
import simpy

from engine.commands import CreatePod, StartTask
from engine.events import TaskFinished, TaskProgressed, TaskStarted
from engine.resources import Demand, GpuGrant
from engine.tasks import SECOND, TaskSpec, TaskType
from sim.hardware import Hardware, cluster
from sim.workload import Arrival, Truth, Workload
from sim.world import SimWorld


class Hands:
    """One Pod and one training of a hundred seconds in ten steps, told what to do by hand."""

    def __init__(self, **hardware: Any) -> None:
        task = TaskSpec("train", "a", "", TaskType.TP, "sleep", features=(("steps", 10),))
        workload = Workload("by hand", (Arrival(0, task, Truth(work_us=100 * SECOND)),))
        self.env = simpy.Environment()
        self.world = SimWorld(self.env, Hardware(cluster(1, 2), load_sigma=0.0, **hardware), workload, 0)
        self.pod(1)
        self.until(20)

    def pod(self, number: int) -> None:
        grant = GpuGrant("node-0-gpu-0", 1000, 0)
        self.world.perform(CreatePod(number, "node-0", "sleep", "", (grant,), Demand(), 1))

    def start(self, attempt: int, pod: int, checkpoint: str = "") -> None:
        self.world.perform(StartTask("train", attempt, pod, "node-0", checkpoint=checkpoint))

    def until(self, seconds: float) -> list[tuple[int, object]]:
        fresh = []
        while self.env.peek() <= seconds * SECOND:
            self.env.step()
            fresh += [(self.world.now(), event) for event in self.world.take()]
        self.env.run(until=round(seconds * SECOND))
        return fresh


def _of(kind: type, seen: list[tuple[int, object]]) -> list[Any]:
    return [(at, event) for at, event in seen if isinstance(event, kind)]


def _attempt_s(seen: list[tuple[int, object]]) -> float:
    ((began, _),) = _of(TaskStarted, seen)
    ((ended, _),) = _of(TaskFinished, seen)
    return (ended - began) / SECOND


def test_a_training_whose_pod_is_lost_has_only_what_its_last_checkpoint_lacks_to_do() -> None:
    hands = Hands(progress_reports=4, running_checkpoints=True)
    hands.start(1, 1)
    told = [event.checkpoint for _, event in _of(TaskProgressed, hands.until(90))]
    assert [name.split("/")[-1] for name in told] == ["2-of-10", "4-of-10", "6-of-10"]
    hands.world.crash_pod(1, "lost")
    hands.pod(2)
    hands.until(120)
    hands.start(2, 2, told[-1])
    assert _attempt_s(hands.until(400)) == pytest.approx(40.0, abs=0.5)


def test_without_running_checkpoints_all_of_it_is_done_again() -> None:
    hands = Hands(progress_reports=4)
    hands.start(1, 1)
    assert {event.checkpoint for _, event in _of(TaskProgressed, hands.until(90))} == {""}
    hands.world.crash_pod(1, "lost")
    hands.pod(2)
    hands.until(120)
    hands.start(2, 2)
    assert _attempt_s(hands.until(400)) == pytest.approx(100.0, abs=0.5)
