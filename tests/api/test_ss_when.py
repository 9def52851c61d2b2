"""When will it be done, from a living scheduler: promises in jobs and events, quotes, and what would let a job start."""

from __future__ import annotations

import asyncio
import itertools
import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from api.mq.messages import encode_request
from api.mq.port import REQUESTS
from api.ports import SupportRefused
from api.sm.foresight import LEAST_S, SHARE, LiveForesight, Quoted
from api.sm.process import Scheduler, SchedulerConfig
from api.state_dir import StateDir
from api.support.drill import DrillWorld
from api.support.intake import MAX_CREDIT_US, MethodDefaults
from api.support.jobs import Model
from api.support.quotes import Asked, Told, answer, told_apart
from engine import profiles
from engine.ahead.foresight import Promise
from engine.events import Event, NodeJoined, TaskSubmitted
from engine.ports import NoForecast
from engine.resources import Demand, GpuSpec, NodeSpec
from engine.scheduler import Engine
from engine.tasks import SECOND, URGENT_PRIORITY, TaskSpec, TaskType
from predictors.forecaster import DeclaredForecaster


class Living:
    """A scheduler with a drill world of one GPU."""

    def __init__(self, root: Path) -> None:
        self.scheduler = Scheduler(
            SchedulerConfig(
                state=StateDir(root),
                make_world=lambda begin: DrillWorld(begin.payloads, not_before=begin.not_before, nodes=1, gpus=1),
                profile=profiles.load("fifo"),
                methods={"sleep": MethodDefaults(Demand(gpus=1)), "text_to_image": MethodDefaults(Demand(gpus=1))},
                models=[Model("tiny", "builtin")],
                forecaster=lambda _: DeclaredForecaster(),
            )
        )
        self.scheduler.start()
        self.support = self.scheduler.support

    def message(self, seconds: float = 1.0, method: str = "sleep", **header: Any) -> tuple[str, str]:
        req_no = str(uuid.uuid4())
        parameters = header.pop("parameters", {"seconds": seconds})
        fields = {"task_type": "GC", "method": method, "parameters": parameters, "tenant": "acme", **header}
        return req_no, encode_request(req_no=req_no, **fields).decode()

    def ask(self, seconds: float = 1.0, **header: Any) -> str:
        req_no, body = self.message(seconds, **header)
        self.scheduler.queue.put(REQUESTS, f"acme/{req_no}", body.encode(), 0)
        return req_no

    def call(self, what: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return await asyncio.wait_for(what(), 60)

        return asyncio.run(run())

    def job_when(self, req_no: str, good: Callable[[Any], bool]) -> Any:
        async def wait() -> Any:
            while True:
                try:
                    view = await self.support.job("acme", req_no)
                    if good(view):
                        return view
                except SupportRefused:
                    pass
                await asyncio.sleep(0.01)

        return self.call(wait)


@pytest.fixture
def living(tmp_path: Path) -> Iterator[Living]:
    made = Living(tmp_path)
    yield made
    made.scheduler.close()


def test_a_waiting_job_says_its_place_and_when_it_will_start_and_end(living: Living) -> None:
    first = living.ask(3_000)
    living.job_when(first, lambda view: view.state == "running" and view.finish_at is not None)
    second, third = living.ask(600), None
    living.job_when(second, lambda view: view.queue_position == 1)
    third = living.ask(600)
    view = living.job_when(third, lambda view: view.queue_position == 2)
    assert view.start_at.p50 <= view.start_at.p90 <= view.finish_at.p90
    assert view.start_at.p50 - view.submitted_at > 2_400
    page, _ = living.call(lambda: living.support.jobs("acme"))
    assert [each.queue_position for each in page] == [2, 1, None]
    figures = living.call(living.support.queue)["promises"]
    assert figures["waiting"] == 2
    assert b"aigc_foresight_waiting_tasks 2.0" in living.scheduler.metrics.exposition()


def test_followers_of_a_job_are_told_when_its_outlook_changes(living: Living) -> None:
    living.ask(3_000)
    before, followed = living.ask(500), living.ask(500)
    living.job_when(followed, lambda view: view.queue_position == 2)

    async def follow() -> list[Any]:
        seen: list[Any] = []
        cancelled = False
        async for event in living.support.events("acme", followed):
            if event.kind == "outlook":
                seen.append(event)
                if event.view.queue_position == 1:
                    return seen
            if event.kind == "outlook" and not cancelled:
                cancelled = True
                await living.support.cancel("acme", before)
        return seen

    seen = living.call(follow)
    assert seen[-1].view.queue_position == 1
    assert {event.event_id for event in seen} == {0}


def test_a_quote_says_what_the_job_would_get_and_leaves_no_trace(living: Living) -> None:
    running = living.ask(1_000)
    living.job_when(running, lambda view: view.finish_at is not None)
    found = living.call(lambda: living.support.quote(living.message(50)[1]))
    assert found["queue_position"] == 1
    assert found["finish_at"]["p50"] - found["start_at"]["p50"] == pytest.approx(50, abs=5)
    assert found["run_s"]["p50"] == 50
    assert [one["kind"] for one in found["alternatives"]] == ["later"]
    assert 1 <= found["retry_after_s"] <= 120
    assert json.loads(json.dumps(found)) == found
    page, _ = living.call(lambda: living.support.jobs("acme"))
    assert [each.req_no for each in page] == [running]


def test_what_is_no_request_cannot_be_quoted(living: Living) -> None:
    for message in ("{}", "nonsense", living.message(method="text_to_image", parameters={"prompt": ""})[1]):
        with pytest.raises(SupportRefused) as refused:
            living.call(lambda message=message: living.support.quote(message))
        assert refused.value.status == 422


def test_a_job_with_a_quote_comes_before_those_that_came_in_between(living: Living) -> None:
    running = living.ask(3_000)
    now = living.job_when(running, lambda view: view.finish_at is not None).submitted_at
    between = living.ask(60)
    living.job_when(between, lambda view: view.queue_position == 1)
    quoted = living.ask(60, quotedAt=now)
    living.job_when(quoted, lambda view: view.queue_position == 1)
    task = living.scheduler.engine.state.tasks[quoted]
    assert 0 < task.spec.credit_us <= MAX_CREDIT_US


def test_why_says_what_would_let_the_job_start_now(living: Living) -> None:
    living.job_when(living.ask(3_000), lambda view: view.state == "running")
    waiting = living.ask(60)
    living.job_when(waiting, lambda view: view.state == "pending")
    reasons = living.call(lambda: living.support.why("acme", waiting))
    would = [each["message"] for each in reasons if each["reason"] == "would_start_if"]
    assert would == ["it would start now if 1 more GPU were free"]


def test_what_was_learned_is_kept_and_a_broken_file_is_begun_anew(tmp_path: Path) -> None:
    living = Living(tmp_path)
    living.job_when(living.ask(0.01), lambda view: view.state == "finished")
    living.scheduler.close()
    file = tmp_path / "foresight.json"
    assert "scores" in json.loads(file.read_text())
    file.write_text("{")
    again = Living(tmp_path)
    again.job_when(again.ask(0.01), lambda view: view.state == "finished")
    again.scheduler.close()
    assert "scores" in json.loads(file.read_text())


def test_looks_take_a_fiftieth_of_the_time_whatever_they_cost() -> None:
    engine = Engine(profiles.load("fifo"))
    clock = [0.0]
    ahead = LiveForesight(engine, NoForecast(), CollectorRegistry(), clock=lambda: clock[0])
    looks: list[float] = []
    look = ahead._foresight.look

    def slow() -> Any:
        looks.append(clock[0])
        clock[0] += 1.0
        return look()

    ahead._foresight.look = slow  # type: ignore[method-assign]
    for number in range(8_000):
        now = number * 50_000
        events: list[Event] = [NodeJoined(NodeSpec("n", (GpuSpec("g", "a100", 1),)))] if number == 0 else []
        events += [TaskSubmitted(TaskSpec(f"t{number}", "a", "", TaskType.GC, "sleep"))]
        ahead.step(now, events, engine.step(now, events))
        ahead.look_if_due()
        clock[0] += 0.05
    assert len(looks) / clock[0] == pytest.approx(SHARE, rel=0.15)
    assert min(later - earlier for earlier, later in itertools.pairwise(looks)) >= LEAST_S


def test_quotes_take_a_fiftieth_of_the_time_and_say_when_there_will_be_more() -> None:
    engine = Engine(profiles.load("fifo"))
    clock = [0.0]
    ahead = LiveForesight(engine, NoForecast(), CollectorRegistry(), clock=lambda: clock[0])
    events: list[Event] = [NodeJoined(NodeSpec("n", (GpuSpec("g", "a100", 1),)))]
    ahead.step(0, events, engine.step(0, events))
    quote = ahead._foresight.quote
    given: list[float] = []
    waits: list[float] = []

    def slow(*asked: Any) -> Any:
        clock[0] += 0.3
        given.append(clock[0])
        return quote(*asked)

    ahead._foresight.quote = slow  # type: ignore[method-assign,assignment]
    spec = TaskSpec("asked", "a", "", TaskType.GC, "sleep")
    while clock[0] < 1_000:
        try:
            ahead.quote(spec)
        except SupportRefused as refused:
            assert (refused.status, refused.code) == (503, "quotes_used_up")
            waits.append(refused.retry_s)
            clock[0] += refused.retry_s
    assert len(given) * 0.3 / clock[0] == pytest.approx(SHARE, rel=0.15)
    assert given[3] == pytest.approx(1.2), "a second of quotes was saved up"
    assert all(0 < wait < 20 for wait in waits)


class OneQuote:
    """Foresight that has time for so many quotes."""

    def __init__(self, living: Living, quotes: int) -> None:
        self.outlook = living.scheduler.foresight.outlook
        self.left = quotes

    def quote(self, spec: TaskSpec) -> Quoted:
        if not self.left:
            raise SupportRefused(503, "quotes_used_up", "no time", 3.0)
        self.left -= 1
        return Quoted(Promise(0, 2, SECOND, SECOND, 2 * SECOND, 3 * SECOND), None, (), 1)


def test_a_quote_is_given_without_its_alternatives_when_the_time_for_quotes_runs_out(living: Living) -> None:
    asked = Asked.read(living.message(1.0, priority=URGENT_PRIORITY)[1], living.scheduler.core)

    def kinds(quotes: int) -> list[str]:
        return [each["kind"] for each in answer(asked, OneQuote(living, quotes))["alternatives"]]

    assert kinds(3) == ["ordinary_lane", "later"]
    assert kinds(1) == ["later"]
    with pytest.raises(SupportRefused, match="no time"):
        kinds(0)


def test_a_reader_is_told_only_what_is_news() -> None:
    told = Told()
    promise = Promise(0, 3, 10 * SECOND, 20 * SECOND, 30 * SECOND, 100 * SECOND)
    assert told.is_news(promise)
    told.tell(promise)
    assert not told.is_news(Promise(0, 3, 10 * SECOND, 20 * SECOND, 31 * SECOND, 105 * SECOND))
    assert told.is_news(Promise(0, 2, 10 * SECOND, 20 * SECOND, 30 * SECOND, 100 * SECOND))
    assert told.is_news(Promise(0, 3, 10 * SECOND, 20 * SECOND, 30 * SECOND, 120 * SECOND))
    told.tell(None)
    assert not told.is_news(promise)


def test_the_engines_name_of_a_request_is_the_one_that_ss_gives(living: Living) -> None:
    req_no = living.ask(0.01)
    living.job_when(req_no, lambda view: view.state == "finished")
    assert living.scheduler.core._task_id("other", req_no) == told_apart("other", req_no)
