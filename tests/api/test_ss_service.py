"""SS from message to result: queue, journal, engine and a world in memory, in one process."""

from __future__ import annotations

import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ss_platform import Platform

from api.mq.messages import encode_request
from api.mq.port import REQUESTS


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
