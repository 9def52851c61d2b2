"""Urgent, aged and ordinary work under overload: urgent work waits little, and nobody waits for ever."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import events as ev
from engine import profiles, snapshot
from engine.commands import Command, CreatePod, DeletePod, StartTask, StopTask
from engine.journal import Record, decisions_digest
from engine.replay import recover, replay
from engine.resources import GpuSpec, NodeSpec
from engine.scheduler import Engine
from engine.tasks import SECOND, URGENT_PRIORITY, TaskSpec, TaskType

AGE_S = 60


def profile(aged_every: int) -> Any:
    return profiles.load(
        f'[ordering]\npolicy = "fair"\nage_s = {AGE_S}\naged_every = {aged_every}\n[preemption]\nenabled = false\n'
    )


class Flood:
    """A cluster with at least three urgent tasks of every model waiting at all times; every task runs for ten seconds or so."""

    def __init__(self, aged_every: int, gpus: int, models: int, seed: int) -> None:
        self.engine = Engine(profile(aged_every))
        self.rng = random.Random(seed)
        self.models = models
        self.records: list[Record] = []
        self.now = 0
        self.count = 0
        self.starts: list[str] = []
        self.running: list[tuple[int, str, int]] = []
        self.inbox: list[ev.Event] = [
            ev.NodeJoined(NodeSpec("n1", tuple(GpuSpec(f"g{i}", "a100", 80) for i in range(gpus))))
        ]

    def submit(self, name: str, model: int, priority: int = 0, tenant: str = "a") -> None:
        spec = TaskSpec(name, tenant, "", TaskType.GC, "sleep", f"m{model}", priority=priority)
        self.inbox.append(ev.TaskSubmitted(spec))

    def step(self) -> None:
        self.now += SECOND
        for each in [each for each in self.running if each[0] <= self.now]:
            self.running.remove(each)
            self.inbox.append(ev.TaskFinished(each[1], each[2], run_us=10 * SECOND))
        waiting = [t.spec.model for t in self.engine.state.tasks.values() if t.urgent and t.state == "pending"]
        for model in range(self.models):
            for _ in range(3 - waiting.count(f"m{model}")):
                self.count += 1
                self.submit(f"urgent-{self.count}", model, URGENT_PRIORITY)
        events, self.inbox = tuple(self.inbox), []
        commands = tuple(self.engine.step(self.now, events))
        self.records.append(Record(len(self.records) + 1, self.now, events, commands))
        for command in commands:
            self.answer(command)

    def answer(self, command: Command) -> None:
        match command:
            case CreatePod():
                self.inbox.append(ev.PodStarted(command.pod))
            case DeletePod():
                self.inbox.append(ev.PodStopped(command.pod))
            case StartTask():
                self.starts.append(command.req_no)
                self.inbox.append(ev.TaskStarted(command.req_no, command.attempt))
                self.running.append((self.now + self.rng.randrange(8, 13) * SECOND, command.req_no, command.attempt))
            case _:
                assert not isinstance(command, StopTask)


@settings(max_examples=25, deadline=None)
@given(
    aged_every=st.integers(1, 12),
    gpus=st.integers(1, 4),
    models=st.integers(1, 3),
    seed=st.integers(0, 99),
    old=st.integers(1, 6),
)
def test_ordinary_work_never_starves_under_a_permanent_flood_of_urgent_work(
    aged_every: int, gpus: int, models: int, seed: int, old: int
) -> None:
    flood = Flood(aged_every, gpus, models, seed)
    for index in range(old):
        flood.submit(f"old-{index}", index % (models + 1), tenant=f"t{index % 2}")  # of one model nothing else is asked
    bound = 40 * aged_every * old  # placements; the share alone would need aged_every each
    while not all(f"old-{index}" in flood.starts for index in range(old)):
        assert len(flood.starts) < bound + gpus * AGE_S, "an aged task waits for ever"
        flood.step()


@settings(max_examples=15, deadline=None)
@given(aged_every=st.integers(2, 12), gpus=st.integers(1, 4), seed=st.integers(0, 99))
def test_aged_work_takes_no_more_than_its_share_from_urgent_work(aged_every: int, gpus: int, seed: int) -> None:
    flood = Flood(aged_every, gpus, 1, seed)
    for index in range(400):
        flood.submit(f"old-{index}", 0)
    while flood.now < (AGE_S + 15) * SECOND:
        flood.step()
    before = len(flood.starts)
    while len(flood.starts) < before + 20 * aged_every:
        flood.step()
    aged = sum(name.startswith("old") for name in flood.starts[before:])
    assert abs(aged - 20) <= 4, f"{aged} of {len(flood.starts) - before} placements, one in {aged_every} is meant"


def test_aged_work_never_goes_before_urgent_work_where_the_profile_says_so() -> None:
    flood = Flood(0, 2, 1, 1)
    flood.submit("old", 0)
    for _ in range(5 * AGE_S):
        flood.step()
    assert len(flood.starts) > 40
    assert "old" not in flood.starts


def test_the_aged_go_in_the_order_in_which_they_came_whoever_they_belong_to() -> None:
    flood = Flood(4, 1, 1, 1)
    names = [f"old-{index}" for index in range(6)]
    for index, name in enumerate(names):
        flood.submit(name, 0, tenant="heavy" if index < 4 else "light")
        flood.step()
    while not set(names) <= set(flood.starts):
        flood.step()
    assert [name for name in flood.starts if name in names] == names


@pytest.mark.parametrize("at", [70, 133, 200])
def test_a_recovery_between_two_turns_of_the_aged_decides_as_the_live_engine(at: int) -> None:
    flood = Flood(4, 2, 2, 3)
    for index in range(30):
        flood.submit(f"old-{index}", index % 3)
    taken = b""
    for step in range(260):
        if step == at - 20:
            taken = flood.engine.snapshot()
        flood.step()
    recovered = recover(taken, flood.records[at - 20 : at], profile(4))
    again = [Record(r.seq, r.now, r.events, tuple(recovered.step(r.now, r.events))) for r in flood.records[at:]]
    assert decisions_digest(again) == decisions_digest(flood.records[at:])
    assert recovered.state.digest() == flood.engine.state.digest()
    assert any(name.startswith("old") for name in flood.starts)
    assert replay(flood.records, profile(4)).difference is None


def test_a_snapshot_from_before_placements_were_counted_can_be_read() -> None:
    flood = Flood(4, 1, 1, 1)
    for _ in range(30):
        flood.step()
    data = snapshot.to_data(flood.engine.state)
    assert data["counters"].pop("placed") > 0
    assert snapshot.from_data(data).placed == 0
