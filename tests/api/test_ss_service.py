"""SS from message to result: queue, journal, engine and a world in memory, in one process."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import random
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from api.mq.messages import decode, encode_request, request_id
from api.mq.port import REQUESTS, RESULTS
from api.mq.sqlite import SqliteQueue
from api.ports import SupportRefused
from api.sm.journal import JournalBroken
from api.sm.process import Scheduler, SchedulerConfig
from api.state_dir import StateDir
from api.support.drill import DrillWorld
from api.support.intake import MethodDefaults
from api.support.jobs import Model
from engine import profiles
from engine.events import NodeReported, TaskFailed, TaskFinished, TaskProgressed
from engine.limits import Limits
from engine.resources import Demand, ResidentModel, Tier
from engine.scheduler import Engine
from engine.tasks import FailureCause
from executors.dfs import open_store

METHODS = {
    "sleep": MethodDefaults(Demand(gpus=1), slots=4),
    "text_to_image": MethodDefaults(Demand(gpus=1)),
    "dreambooth": MethodDefaults(Demand(gpus=1)),
}


class Platform:
    """A scheduler with a drill world, and what an outside program would do with its queues."""

    def __init__(self, root: Path, **drill: Any) -> None:
        self.root = root
        self.drill = {"nodes": 1, "gpus": 2, **drill}
        self.files = open_store("memory://")
        self.start()

    def start(self) -> None:
        config = SchedulerConfig(
            state=StateDir(self.root),
            make_world=lambda begin: DrillWorld(begin.payloads, not_before=begin.not_before, **self.drill),
            profile=profiles.load("fifo"),
            methods=METHODS,
            limits=Limits(backoff_us=1_000),
            models=[Model("tiny", "builtin")],
            files=self.files,
        )
        self.scheduler = Scheduler(config)
        self.queue = self.scheduler.queue
        self.scheduler.start()
        self.support = self.scheduler.support

    def stop(self) -> None:
        self.scheduler.close()
        assert self.scheduler.error is None

    def ask(self, req_no: str | None = None, *, seconds: float = 0.0, raw_id: str = "", **header: Any) -> str:
        req_no = req_no or str(uuid.uuid4())
        fields = {"task_type": "GC", "method": "sleep", "parameters": {"seconds": seconds}, **header}
        fields.setdefault("tenant", "acme")
        body = encode_request(req_no=req_no, **fields)
        self.queue.put(REQUESTS, raw_id or request_id(fields["tenant"], req_no), body, int(fields.get("priority", 0)))
        return req_no

    def pictures(self, number: int = 3) -> list[str]:
        """Store small pictures and return their file ids."""
        ids = []
        for shade in range(number):
            out = io.BytesIO()
            Image.new("RGB", (8, 8), (shade, 0, 0)).save(out, "PNG")
            ids.append(self.files.put_bytes(out.getvalue(), "image/png").file_id)
        return ids

    def results(self, number: int) -> dict[str, dict[str, Any]]:
        """Take this many results and fail if another one follows at once."""
        found: dict[str, dict[str, Any]] = {}
        while len(found) < number:
            taken = self.queue.take(RESULTS, 64, wait_s=30)
            assert taken, f"only {len(found)} of {number} results came"
            for delivery in taken:
                assert delivery.message_id not in found, "a result came twice"
                found[delivery.message_id] = json.loads(delivery.body)
            self.queue.ack(taken)
        return found

    def result(self, req_no: str, tenant: str = "acme") -> dict[str, Any]:
        message = self.results(1)[f"{tenant}/{req_no}"]
        parameters: dict[str, Any] = message["body"]["parameters"]
        return parameters

    def call(self, what: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return await asyncio.wait_for(what(), 60)

        return asyncio.run(run())

    def job_when(self, req_no: str, states: set[str], tenant: str = "acme") -> Any:
        """Return the job as soon as it is in one of the states."""

        async def wait() -> Any:
            while True:
                try:
                    view = await self.support.job(tenant, req_no)
                    if view.state in states:
                        return view
                except SupportRefused:
                    pass
                await asyncio.sleep(0.005)

        return self.call(wait)


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    platform = Platform(tmp_path)
    yield platform
    platform.stop()


def test_a_message_becomes_a_task_and_its_result_a_message(platform: Platform) -> None:
    req_no = platform.ask(priority=3, group="shop", replyTo="me")
    message = platform.results(1)[f"acme/{req_no}"]
    assert message["header"] == {
        "reqNo": req_no, "priority": 3, "taskType": "GC", "group": "shop", "tenant": "acme", "replyTo": "me",
    }  # fmt: skip
    assert message["body"]["method"] == "result"
    assert message["body"]["parameters"]["state"] == "finished"
    assert message["body"]["parameters"]["result"]["metadata"] == {"node": "drill-0"}
    view = platform.call(lambda: platform.support.job("acme", req_no))
    assert (view.state, view.attempt, view.node, view.group) == ("finished", 1, "drill-0", "shop")
    assert view.submitted_at <= view.started_at <= view.finished_at
    assert sum(platform.queue.counts().get(REQUESTS, {}).values()) == 0


def test_the_same_request_twice_is_one_task_and_one_result(platform: Platform) -> None:
    req_no = platform.ask()
    platform.ask(req_no, raw_id="another-message-id")
    platform.result(req_no)
    other = platform.ask()
    assert set(platform.results(1)) == {f"acme/{other}"}
    assert platform.scheduler.core.counters["duplicate"] == 1


def test_two_tenants_may_choose_the_same_req_no(platform: Platform) -> None:
    req_no = platform.ask(tenant="acme")
    platform.ask(req_no, tenant="other")
    assert set(platform.results(2)) == {f"acme/{req_no}", f"other/{req_no}"}


def test_a_bad_message_goes_to_the_dead_letters_and_its_asker_is_told(platform: Platform) -> None:
    req_no = str(uuid.uuid4())
    body = encode_request(req_no=req_no, task_type="GC", method="sleep", parameters={"seconds": -1}, tenant="acme")
    platform.queue.put(REQUESTS, "bad", body)
    platform.queue.put(REQUESTS, "worse", b"no json")
    rejected = platform.result(req_no)
    assert (rejected["state"], rejected["reason"]) == ("rejected", "invalid")
    assert "body.parameters.seconds" in rejected["detail"]
    assert platform.call(lambda: platform.support.job("acme", req_no)).state == "rejected"
    platform.result(platform.ask())
    reasons = {letter.message_id: letter.reason for letter in platform.queue.list_dead(REQUESTS)}
    assert reasons["bad"].startswith("invalid: body.parameters.seconds")
    assert reasons["worse"].startswith("not_json: ")


@pytest.mark.parametrize(
    ("method", "kind", "parameters", "code", "names"),
    [
        ("paint", "GC", {}, "invalid", "body.method"),
        ("dreambooth", "GC", {}, "invalid", "header.taskType"),
        ("text_to_image", "GC", {"prompt": "x", "colour": 1}, "invalid", "colour"),
        ("text_to_image", "GC", {"prompt": "x", "model": "lora-none"}, "model_unknown", "lora-none"),
        ("deploy", "TP", {"model": "nope"}, "model_unknown", "nope"),
        ("deploy", "TP", {"model": "tiny", "pods": 1000}, "invalid", "pods"),
        ("deploy", "TP", {"model": "tiny", "podz": 1}, "invalid", "podz"),
        ("undeploy", "TP", {}, "invalid", "model"),
    ],
)
def test_what_a_method_cannot_do_is_refused_by_name(
    platform: Platform, method: str, kind: str, parameters: dict[str, Any], code: str, names: str
) -> None:
    req_no = platform.ask(method=method, task_type=kind, parameters=parameters)
    rejected = platform.result(req_no)
    assert (rejected["state"], rejected["reason"]) == ("rejected", code)
    assert names in rejected["detail"]


def test_a_failing_task_is_retried_and_ends_as_a_dead_letter(platform: Platform) -> None:
    req_no = platform.ask(parameters={"seconds": 0, "fail": "crash"})
    dead = platform.result(req_no)
    assert (dead["state"], dead["attempt"], dead["result"]) == ("dead", 3, None)
    assert "the drill crashed as asked" in dead["detail"]


def test_a_running_task_is_cancelled_and_no_result_follows(platform: Platform) -> None:
    req_no = platform.ask(seconds=3600)
    platform.job_when(req_no, {"running"})
    view = platform.call(lambda: platform.support.cancel("acme", req_no))
    assert view.state == "cancelled"
    assert platform.call(lambda: platform.support.cancel("acme", req_no)).state == "cancelled"
    assert platform.result(req_no)["state"] == "cancelled"
    other = platform.ask()
    assert set(platform.results(1)) == {f"acme/{other}"}


@pytest.mark.parametrize(("end", "left"), [("cancelled", 0), ("finished", 0), ("dead", 2)])
def test_checkpoints_leave_with_a_job_that_nobody_will_resume(platform: Platform, end: str, left: int) -> None:
    kept = [platform.files.put_bytes(content, "application/x-tar").file_id for content in (b"first", b"second")]
    req_no = platform.ask(seconds=3600)
    platform.job_when(req_no, {"running"})
    post = platform.scheduler.core.post
    for done, file_id in enumerate(kept, start=1):
        post(TaskProgressed(req_no, 1, done, 9, 0, file_id))
    match end:
        case "cancelled":
            platform.call(lambda: platform.support.cancel("acme", req_no))
        case "finished":
            post(TaskFinished(req_no, 1, 0, '{"files":[],"metadata":{}}', 1))
        case _:
            post(TaskFailed(req_no, 1, FailureCause.BAD_INPUT))
    assert platform.result(req_no)["state"] == end
    platform.stop()  # Sends what is owed and removes what is unwanted.
    found = [file_id for file_id in kept if platform.files.stat(file_id) is not None]
    platform.start()
    assert len(found) == left


def test_a_cancel_after_the_result_answers_the_result(platform: Platform) -> None:
    req_no = platform.ask()
    platform.result(req_no)
    assert platform.call(lambda: platform.support.cancel("acme", req_no)).state == "finished"


def test_no_result_follows_an_acknowledged_cancel_whenever_it_comes(tmp_path: Path) -> None:
    platform = Platform(tmp_path, gpus=8)
    chance = random.Random(7)
    asked = [platform.ask(seconds=chance.random() * 0.1) for _ in range(60)]

    async def cancel(req_no: str) -> tuple[str, str]:
        await asyncio.sleep(chance.random() * 0.3)
        return req_no, (await platform.support.cancel("acme", req_no)).state

    async def cancel_all() -> dict[str, str]:
        return dict(await asyncio.gather(*(cancel(req_no) for req_no in asked)))

    acknowledged = platform.call(cancel_all)
    told = {name: message["body"]["parameters"]["state"] for name, message in platform.results(len(asked)).items()}
    assert told == {f"acme/{req_no}": state for req_no, state in acknowledged.items()}
    assert set(told.values()) <= {"finished", "cancelled"}
    assert "cancelled" in told.values()
    platform.stop()


def test_a_request_still_in_the_queue_is_seen_and_cancelled(platform: Platform) -> None:
    platform.scheduler.core.intake.stop()
    req_no = platform.ask()
    view = platform.call(lambda: platform.support.job("acme", req_no))
    assert (view.state, view.method) == ("queued", "sleep")
    assert platform.call(lambda: platform.support.why("acme", req_no))[0]["reason"] == "queued"
    ended = platform.call(lambda: platform.support.cancel("acme", req_no))
    assert ended.state in ("cancelled", "finished")
    assert platform.result(req_no)["state"] == ended.state


def test_another_tenants_job_is_an_absent_one(platform: Platform) -> None:
    req_no = platform.ask()
    platform.result(req_no)
    for call in (
        lambda: platform.support.job("other", req_no),
        lambda: platform.support.cancel("other", req_no),
        lambda: platform.support.why("other", req_no),
        lambda: platform.support.compensate("other", req_no, "redeliver_result"),
    ):
        with pytest.raises(SupportRefused) as caught:
            platform.call(call)
        assert caught.value.status == 404
    assert platform.call(lambda: platform.support.job("*", req_no)).tenant == "acme"


def test_a_waiting_task_says_why(tmp_path: Path) -> None:
    platform = Platform(tmp_path, gpus=1)
    first = platform.ask(seconds=3600, method="sleep")
    platform.job_when(first, {"running"})
    waiting = platform.ask(method="text_to_image", parameters={"prompt": "a red circle"})
    platform.job_when(waiting, {"pending"})
    reasons = platform.call(lambda: platform.support.why("acme", waiting))
    assert reasons
    assert all(item["reason"] and item["message"] for item in reasons)
    platform.stop()


def test_jobs_are_listed_newest_first_in_pages(platform: Platform) -> None:
    mine = [platform.ask(group="a" if n % 2 else "b") for n in range(5)]
    platform.ask(tenant="other")
    platform.results(6)
    page, cursor = platform.call(lambda: platform.support.jobs("acme", limit=3))
    rest, end = platform.call(lambda: platform.support.jobs("acme", limit=3, cursor=cursor))
    assert [view.req_no for view in (*page, *rest)] == mine[::-1]
    assert end == ""
    grouped, _ = platform.call(lambda: platform.support.jobs("acme", group="a", state="finished"))
    assert [view.req_no for view in grouped] == [mine[3], mine[1]]
    everybody, _ = platform.call(lambda: platform.support.jobs("*"))
    assert len(everybody) == 6
    with pytest.raises(SupportRefused, match="cursor"):
        platform.call(lambda: platform.support.jobs("acme", cursor="zzz"))


def test_the_events_of_a_job_tell_its_life_and_end_with_it(platform: Platform) -> None:
    req_no = platform.ask(seconds=0.05)
    platform.job_when(req_no, {"pending", "bound", "starting", "running", "finished"})

    async def listen(after: int) -> list[Any]:
        return [event async for event in platform.support.events("acme", req_no, after)]

    events = platform.call(lambda: listen(0))
    kinds = [event.kind for event in events]
    assert kinds[0] == "submitted"
    assert kinds[-1] == "finished"
    assert [event.event_id for event in events] == sorted({event.event_id for event in events})
    assert events[-1].view.result is not None
    assert all(event.view.result is None for event in events[:-1])
    again = platform.call(lambda: listen(0))
    assert [event.kind for event in again] == [kind for kind in kinds if kind != "progress"]
    assert platform.call(lambda: listen(events[-1].event_id)) == []


def test_a_finished_training_becomes_a_model_that_generation_uses(platform: Platform) -> None:
    parameters = {"pictures": platform.pictures(), "category": "dog", "base_model": "tiny"}
    req_no = platform.ask(method="dreambooth", task_type="TP", parameters=parameters)
    model_id = platform.result(req_no)["result"]["model"]
    model = platform.call(lambda: platform.support.model("acme", model_id))
    assert (model.kind, model.base, model.source_req_no, model.tenant) == ("lora", "tiny", req_no, "acme")
    manifest = platform.scheduler.store.model(model_id).manifest
    kept = b"".join(platform.files.read(hashlib.sha256(manifest).hexdigest()))
    assert json.loads(kept)["model_id"] == model_id, "the file store describes its models itself"
    with pytest.raises(SupportRefused):
        platform.call(lambda: platform.support.model("other", model_id))
    assert [m.model_id for m in platform.call(lambda: platform.support.models("acme"))] == ["tiny", model_id]
    assert [m.model_id for m in platform.call(lambda: platform.support.models("other"))] == ["tiny"]
    picture = platform.ask(method="text_to_image", parameters={"prompt": "a dog", "model": model_id})
    assert platform.result(picture)["state"] == "finished"
    stolen = platform.ask(method="text_to_image", parameters={"prompt": "a dog", "model": model_id}, tenant="other")
    assert platform.result(stolen, "other")["reason"] == "model_unknown"


def test_a_training_on_pictures_that_are_none_is_refused_before_it_is_queued(platform: Platform) -> None:
    text = platform.files.put_bytes(b"no picture", "image/png").file_id
    parameters = {"pictures": [*platform.pictures(2), text], "category": "dog"}
    refused = platform.result(platform.ask(method="dreambooth", task_type="TP", parameters=parameters))
    assert (refused["state"], refused["reason"]) == ("rejected", "invalid")
    assert refused["detail"] == "body.parameters.pictures.2: this is no picture; send PNG, JPEG or WebP"
    parameters["pictures"][2] = "f" * 64
    refused = platform.result(platform.ask(method="dreambooth", task_type="TP", parameters=parameters))
    assert "pictures.2: there is no file ffff" in refused["detail"]


def test_a_file_store_that_does_not_answer_leaves_the_judgement_to_the_pod(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    from api.support import core

    def away(*_: object) -> str:
        raise ConnectionError("the store is away")

    monkeypatch.setattr(core, "problem", away)
    parameters = {"pictures": [f"{n:064x}" for n in range(3)], "category": "dog"}
    asked = platform.ask(method="dreambooth", task_type="TP", parameters=parameters)
    assert platform.result(asked)["state"] == "finished"


def test_a_model_is_deployed_by_call_and_by_message(platform: Platform) -> None:
    view = platform.call(lambda: platform.support.deploy("acme", "tiny", 1))
    assert view.deployed_pods == 1
    req_no = platform.ask(method="undeploy", task_type="TP", parameters={"model": "tiny"})
    assert platform.result(req_no)["result"]["metadata"] == {"pods": 0}
    assert platform.call(lambda: platform.support.model("acme", "tiny")).deployed_pods == 0
    with pytest.raises(SupportRefused):
        platform.call(lambda: platform.support.deploy("acme", "nope", 1))


def test_deleting_a_model_waits_for_no_job_and_takes_it_away(platform: Platform) -> None:
    parameters = {"pictures": platform.pictures(), "category": "dog"}
    training = platform.ask(method="dreambooth", task_type="TP", parameters=parameters)
    model_id = platform.result(training)["result"]["model"]
    with pytest.raises(SupportRefused) as caught:
        platform.call(lambda: platform.support.delete_model("acme", "tiny"))
    assert caught.value.status == 403
    platform.call(lambda: platform.support.deploy("acme", model_id, 1))
    platform.call(lambda: platform.support.delete_model("acme", model_id))
    with pytest.raises(SupportRefused) as caught:
        platform.call(lambda: platform.support.model("acme", model_id))
    assert caught.value.status == 404


def test_a_result_is_delivered_again_with_the_same_bytes(platform: Platform) -> None:
    req_no = platform.ask()
    first = platform.results(1)[f"acme/{req_no}"]
    answer = platform.call(lambda: platform.support.compensate("acme", req_no, "redeliver_result", "k1"))
    assert answer["delivered"]
    assert platform.results(1)[f"acme/{req_no}"] == first
    assert platform.call(lambda: platform.support.compensate("acme", req_no, "redeliver_result", "k1")) == answer
    other = platform.ask()
    assert set(platform.results(1)) == {f"acme/{other}"}, "the same key delivers once"
    with pytest.raises(SupportRefused) as caught:
        platform.call(lambda: platform.support.compensate("acme", other, "redeliver_result", "k1"))
    assert caught.value.code == "key_used"


def test_a_dead_letter_is_run_again_on_request(platform: Platform) -> None:
    req_no = platform.ask(parameters={"seconds": 0, "fail": "error"})
    assert platform.result(req_no)["state"] == "dead"
    answer = platform.call(lambda: platform.support.compensate("acme", req_no, "rerun"))
    assert answer["rerun"] == 1
    assert set(platform.results(1)) == {f"acme/{req_no}/rerun-1"}
    finished = platform.ask()
    platform.result(finished)
    with pytest.raises(SupportRefused) as caught:
        platform.call(lambda: platform.support.compensate("acme", finished, "rerun"))
    assert caught.value.status == 409


def test_a_dead_letter_the_engine_has_forgotten_is_run_again_too(platform: Platform) -> None:
    req_no = platform.ask(parameters={"seconds": 0, "fail": "error"})
    assert platform.result(req_no)["state"] == "dead"

    def forget(engine: Engine) -> None:
        del engine.state.tasks[req_no], engine.state.terminal[req_no]

    platform.call(lambda: platform.scheduler.loop.ask(forget))
    answer = platform.call(lambda: platform.support.compensate("acme", req_no, "rerun"))
    assert answer["rerun"] == 1
    assert set(platform.results(1)) == {f"acme/{req_no}/rerun-1"}


def test_the_quota_of_a_dead_letter_is_given_back_once(platform: Platform) -> None:
    req_no = platform.ask(parameters={"seconds": 0, "fail": "error"})
    platform.result(req_no)
    assert platform.scheduler.store.quota_reserved("acme") == 1
    answer = platform.call(lambda: platform.support.compensate("acme", req_no, "release_quota"))
    assert answer["released"]
    assert platform.scheduler.store.quota_reserved("acme") == 0
    assert platform.call(lambda: platform.support.compensate("acme", req_no, "release_quota")) == answer


def test_nodes_are_shown_drained_and_opened_again(platform: Platform) -> None:
    (node,) = platform.call(platform.support.nodes)
    assert (node["name"], node["state"], len(node["gpus"])) == ("drill-0", "up", 2)
    platform.call(lambda: platform.support.drain("drill-0"))
    assert platform.call(platform.support.nodes)[0]["draining"]
    platform.call(lambda: platform.support.uncordon("drill-0"))
    assert not platform.call(platform.support.nodes)[0]["draining"]
    for call in (lambda: platform.support.drain("nowhere"), lambda: platform.support.drain("drill-0", "no-gpu")):
        with pytest.raises(SupportRefused) as caught:
            platform.call(call)
        assert caught.value.status == 404


def test_a_node_is_shown_with_the_models_it_holds_and_gives_one_up(platform: Platform) -> None:
    platform.scheduler.core.stocks.note(
        [
            NodeReported(
                "drill-0", (), resident=(ResidentModel("m", Tier.MEMORY, 5, True),), cache_counts=(("disk_hits", 3),)
            )
        ]
    )
    (node,) = platform.call(platform.support.nodes)
    assert node["models"] == [{"model": "m", "tier": "memory", "size_bytes": 5, "pinned": True}]
    assert node["caches"] == {"disk": {"hits": 3}}
    platform.call(lambda: platform.support.unload("drill-0", "m"))
    for call in (lambda: platform.support.unload("nowhere", "m"), lambda: platform.support.unload("drill-0", "k")):
        with pytest.raises(SupportRefused) as caught:
            platform.call(call)
        assert caught.value.status == 404


def test_queue_and_health_are_shown(platform: Platform) -> None:
    running = platform.ask(seconds=3600)
    platform.job_when(running, {"running"})
    shown = platform.call(platform.support.queue)
    assert shown["engine"]["tenants"] == {"acme": {"running": 1}}
    assert shown["support"]["accepted"] == 1
    health = platform.call(platform.support.health)
    assert health["ready"], health


def test_a_result_sent_but_not_marked_is_sent_again_and_dropped_by_the_queue(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    read = platform.ask()
    platform.results(1)
    unread = platform.ask()
    platform.job_when(unread, {"finished"})
    platform.scheduler.core.intake.stop()
    platform.scheduler.loop.stop()
    platform.scheduler.core.mail.stop()
    with platform.scheduler.journal.transaction() as db:
        db.execute("UPDATE outbox SET sent = 0")  # as if the process had died before each mark
    platform.scheduler.core.mail.sent.clear()
    platform.stop()
    platform.start()
    last = platform.ask()
    assert set(platform.results(2)) == {f"acme/{unread}", f"acme/{last}"}, f"{read} had been read already"
    platform.stop()


def test_a_request_journaled_but_not_acknowledged_is_recognised(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    queue = platform.queue
    forget = queue.ack
    queue.ack = lambda deliveries: 0  # type: ignore[method-assign]
    req_no = platform.ask()
    platform.job_when(req_no, {"finished"})
    platform.stop()
    queue.ack = forget  # type: ignore[method-assign]
    platform.start()
    last = platform.ask()
    assert set(platform.results(2)) == {f"acme/{req_no}", f"acme/{last}"}
    assert platform.scheduler.core.counters["duplicate"] == 1
    assert platform.scheduler.core.counters["accepted"] == 1
    platform.stop()


def test_a_storage_failure_ends_the_scheduler_and_the_next_one_goes_on(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    platform.result(platform.ask())
    scheduler = platform.scheduler
    with scheduler.journal.transaction() as db:
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages}")
    asked = [platform.ask(group="x" * 128, note="y" * 4000) for _ in range(30)]
    assert scheduler.failed.wait(30)
    health = platform.call(platform.support.health)
    assert not health["ready"]
    assert "full" in health["modules"]["scheduler"]["detail"]
    scheduler.close()
    assert isinstance(scheduler.error, JournalBroken)
    platform.start()
    assert {f"acme/{req_no}" for req_no in asked} == set(platform.results(len(asked)))
    platform.stop()


def test_requests_wait_in_the_queue_while_too_much_is_under_way(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    core = platform.scheduler.core
    running = platform.ask(seconds=3600)
    platform.job_when(running, {"running"})
    core._max_live = 1
    waiting = platform.ask()
    health = platform.call(platform.support.health)
    assert (health["ready"], health["modules"]["intake"]["ok"]) == (False, False)
    assert platform.call(lambda: platform.support.job("acme", waiting)).state == "queued"
    platform.call(lambda: platform.support.cancel("acme", running))
    assert set(platform.results(2)) == {f"acme/{running}", f"acme/{waiting}"}
    platform.stop()


def test_a_nearly_full_disk_accepts_nothing_new(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    core = platform.scheduler.core
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=100, free=4))
    with core._disk_lock:
        core._free_checked_at = 0.0
    assert core.busy()
    waiting = platform.ask()
    assert platform.call(lambda: platform.support.job("acme", waiting)).state == "queued"
    assert not platform.call(platform.support.health)["modules"]["disk"]["ok"]
    monkeypatch.undo()
    with core._disk_lock:
        core._free_checked_at = 0.0
    assert platform.result(waiting)["state"] == "finished"


def test_everything_accepted_comes_back_after_a_restart(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    running = platform.ask(seconds=3600)
    platform.job_when(running, {"running"})
    done = platform.ask()
    first = platform.results(1)[f"acme/{done}"]
    assert first["body"]["parameters"]["state"] == "finished"
    platform.stop()
    waiting = str(uuid.uuid4())
    queue = SqliteQueue(StateDir(tmp_path).queue)
    queue.put(
        REQUESTS, "by-hand", encode_request(req_no=waiting, task_type="GC", method="sleep", parameters={"seconds": 0})
    )
    queue.close()
    platform.start()
    assert set(platform.results(1)) == {f"default/{waiting}"}
    view = platform.job_when(running, {"running"})
    assert view.attempt == 2, "its node died with the process"
    assert platform.call(lambda: platform.support.cancel("acme", running)).state == "cancelled"
    assert platform.call(lambda: platform.support.job("acme", done)).state == "finished"
    decode(json.dumps(platform.results(1)[f"acme/{running}"]).encode())
    platform.stop()
