"""What travels beside parameters and results: the terms of an attempt one way, what company cost it and previews the other."""

from __future__ import annotations

from typing import Any

import msgspec

from engine import commands as c
from engine import events as e
from engine.protocol import messages as m
from engine.protocol.controller import Controller
from engine.protocol.link import ExpectedAttempt, Link
from engine.protocol.outside import PayloadRefused, TermPayloads
from engine.protocol.reports import event_of
from engine.resources import Demand, NodeSpec
from engine.tasks import FailureCause
from executors import wire
from executors.agent_items import item_of, progress_of
from executors.ports import AttemptFinished, AttemptProgressed


class Plain:
    """Payloads that know of no terms."""

    def pod(self, command: c.CreatePod) -> dict[str, object]:
        return {}

    def task(self, command: c.StartTask) -> dict[str, object]:
        return {"prompt": "x"}

    def prefetch(self, command: c.PrefetchModel) -> dict[str, object]:
        return {}


class WithTerms(Plain):
    """Payloads with terms; those of one task cannot be made."""

    def terms(self, command: c.StartTask) -> dict[str, object]:
        if command.req_no == "gone":
            raise PayloadRefused(FailureCause.MODEL_MISSING, "model 'lora' was deleted")
        return {"priority": 100}


def dispatched(payloads: Any, req_no: str = "r") -> tuple[list[m.Dispatch], list[e.Event]]:
    """Start a task on a node with a Pod; returns what is sent and what the engine hears."""
    controller = Controller(1, payloads)
    hello = m.Hello(1, 1, NodeSpec("n"), 7, 1, 1)
    controller.receive(0, "peer", hello)
    controller.perform(0, c.CreatePod(1, "n", "text_to_image", "m", (), Demand()))
    controller.perform(0, c.StartTask(req_no, 1, 1, "n"))
    link: Link = controller._links["n"]
    orders = [attempt.order for attempt in link.attempts.values()]
    return orders, [event for event in controller._events if isinstance(event, e.TaskFailed)]


def test_terms_ride_with_the_dispatch_where_payloads_have_them() -> None:
    assert isinstance(WithTerms(), TermPayloads)
    assert not isinstance(Plain(), TermPayloads)
    assert [order.terms for order in dispatched(WithTerms())[0]] == [{"priority": 100}]
    assert [order.terms for order in dispatched(Plain())[0]] == [{}]


def test_terms_that_cannot_be_made_fail_the_attempt_alone() -> None:
    orders, failed = dispatched(WithTerms(), "gone")
    assert orders == []
    assert failed == [e.TaskFailed("gone", 1, FailureCause.MODEL_MISSING, 0, "model 'lora' was deleted")]


def test_an_end_that_knows_no_terms_reads_the_dispatch_and_is_read() -> None:
    order = m.Dispatch("r", 1, 0, 1, {"prompt": "x"}, "cp", {"priority": 100})
    [frame] = wire.encode(m.Orders(1, 1, 1, 1, (order,), 1))
    tree = msgspec.msgpack.decode(frame)
    [fields] = next(each for each in tree if isinstance(each, list))
    assert fields[-1] == {"priority": 100}
    older = [[fields[:-1]] if isinstance(each, list) else each for each in tree]
    read = wire.decode(msgspec.msgpack.encode(older))
    assert isinstance(read, m.Orders)
    assert read.items == (m.Dispatch("r", 1, 0, 1, {"prompt": "x"}, "cp"),)


def test_what_company_cost_reaches_the_engine() -> None:
    item = item_of(AttemptFinished("r", 1, {}, 30, 5, 0, 10, 2500))
    link = Link("n")
    link.attempts["r", 1, 0] = ExpectedAttempt(m.Dispatch("r", 1, 0, 1))
    event = event_of(link, item)
    assert isinstance(event, e.TaskFinished)
    assert (event.run_us, event.alone_us, event.company_permille) == (30, 10, 2500)


def test_a_preview_travels_as_its_file_id() -> None:
    progress = progress_of(AttemptProgressed("r", 1, 5, 20, "note", 0, "cp", "f" * 64))
    assert (progress.preview, progress.checkpoint) == ("f" * 64, "cp")


def test_the_peak_of_the_host_s_memory_reaches_the_engine() -> None:
    item = item_of(AttemptFinished("r", 1, {}, 30, 5, peak_host_memory_bytes=7 << 30))
    link = Link("n")
    link.attempts["r", 1, 0] = ExpectedAttempt(m.Dispatch("r", 1, 0, 1))
    event = event_of(link, item)
    assert isinstance(event, e.TaskFinished)
    assert (event.peak_gpu_memory_bytes, event.peak_host_memory_bytes) == (5, 7 << 30)
