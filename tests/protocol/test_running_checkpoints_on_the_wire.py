"""A checkpoint that a running attempt tells of: it outruns the report that ends the attempt, and survives lost messages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from engine import commands as c
from engine import events as e
from engine.protocol import messages as m
from engine.protocol.agent import AgentMachine
from engine.protocol.controller import Controller
from engine.resources import Demand, GpuSpec, NodeSpec
from executors import ports, wire
from executors.agent_items import NOTE_CHARS, progress_of

SPEC = NodeSpec("n", (GpuSpec("g", "cpu", 1),))
CREATE = c.CreatePod(1, "n", "dreambooth", "", (), Demand(), 1)
START = c.StartTask("r", 1, 1, "n")


class Bodies:
    """Orders without content."""

    def pod(self, command: c.CreatePod) -> dict[str, Any]:
        return {}

    def task(self, command: c.StartTask) -> dict[str, Any]:
        return {}

    def prefetch(self, command: c.PrefetchModel) -> dict[str, Any]:
        return {}


class Ends:
    """Both ends with an attempt under way; every message passes through its bytes."""

    def __init__(self) -> None:
        self.now = 0
        self.agent, self.sm = AgentMachine(SPEC, 1), Controller(1, Bodies())
        self.exchange()
        self.step(CREATE)
        self.agent.report(self.now, m.PodUp(1))
        self.exchange()
        self.step(START)
        self.agent.report(self.now, m.Started("r", 1))
        self.exchange()
        self.step()

    def exchange(self, rounds: int = 4) -> None:
        for _ in range(rounds):
            self.agent.tick(self.now)
            for up in self.agent.take_outgoing(self.now):
                for frame in wire.encode(up):
                    self.sm.receive(self.now, "p", wire.decode(frame))  # type: ignore[arg-type]
            self.agent.take_effects()
            self.sm.tick(self.now)
            for _, down in self.sm.take_outgoing(self.now):
                self.agent.receive(self.now, down)
            self.agent.take_effects()

    def step(self, *commands: c.Command) -> list[e.Event]:
        events = self.sm.take_events()
        self.sm.durable()
        for command in commands:
            self.sm.perform(self.now, command)
        self.exchange()
        return events

    def progress(self, done: int, checkpoint: str = "") -> None:
        self.agent.progress(self.now, m.Progress(0, "r", 1, 0, done, 300, checkpoint))

    def sent(self) -> list[m.Progress]:
        return [message for message in self.agent.take_outgoing(self.now) if isinstance(message, m.Progress)]


def test_a_checkpoint_is_known_before_the_death_that_follows_it_at_once() -> None:
    ends = Ends()
    ends.progress(90)
    ends.progress(100, "a")
    ends.agent.report(ends.now, m.PodDown(1, "crashed"))
    ends.exchange()
    events = ends.step()
    assert events[-2:] == [e.TaskProgressed("r", 1, 100, 300, 0, "a"), e.PodStopped(1, events[-1].cause, "")]  # type: ignore[union-attr]


def test_a_new_checkpoint_does_not_wait_for_the_next_half_second() -> None:
    ends = Ends()
    ends.progress(90)
    ends.progress(95)
    ends.progress(100, "a")
    assert [(item.done, item.checkpoint) for item in ends.sent()] == [(90, ""), (100, "a")]


def test_every_later_progress_repeats_the_checkpoint_so_that_a_lost_message_loses_nothing() -> None:
    ends = Ends()
    ends.progress(100, "a")
    ends.sent()  # Lost on its way.
    ends.now += 600_000
    ends.progress(110)
    ends.exchange()
    assert e.TaskProgressed("r", 1, 110, 300, 0, "a") in ends.step()


def test_two_checkpoints_within_one_step_of_the_engine_end_with_the_later() -> None:
    ends = Ends()
    ends.progress(100, "a")
    ends.progress(200, "b")
    ends.exchange()
    told = [event.checkpoint for event in ends.step() if isinstance(event, e.TaskProgressed)]
    assert told == ["a", "b"]


def test_a_note_on_a_step_comes_along() -> None:
    ends = Ends()
    ends.agent.progress(ends.now, m.Progress(0, "r", 1, 0, 5, 20, "a", "loss 0.5"))
    ends.exchange()
    assert ends.step() == [e.TaskProgressed("r", 1, 5, 20, 0, "a", "loss 0.5")]


def test_a_note_that_is_too_long_is_cut_before_it_travels() -> None:
    report = ports.AttemptProgressed("r", 1, 5, 20, "x" * 1000, 0, "a")
    assert progress_of(report) == m.Progress(0, "r", 1, 0, 5, 20, "a", "x" * NOTE_CHARS)


def test_an_end_that_knows_no_checkpoints_reads_the_others_progress_and_is_read() -> None:
    (frame,) = wire.encode(m.Progress(1, "r", 1, 0, 5, 20, "a", "note"))
    fields = msgspec.msgpack.decode(frame)
    assert fields[-3:] == ["a", "note", ""]
    older = msgspec.msgpack.encode(fields[:-3])
    assert wire.decode(older) == m.Progress(1, "r", 1, 0, 5, 20)


@pytest.mark.parametrize("checkpoint", ["", "a" * 64])
def test_progress_comes_back_from_its_bytes(checkpoint: str) -> None:
    message = replace(m.Progress(1, "r", 1, 0, 5, 20), checkpoint=checkpoint)
    assert [wire.decode(frame) for frame in wire.encode(message)] == [message]
