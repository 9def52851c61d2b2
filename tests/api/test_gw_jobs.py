"""The native jobs API, over a fake support service."""

from __future__ import annotations

import asyncio
import json
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient

from api.gateway import create_app
from api.gateway.fake import GatewayFake
from api.mq.messages import decode
from api.mq.port import Outgoing
from api.mq.sqlite import SqliteQueue


@pytest.fixture
def gw(tmp_path: Path) -> GatewayFake:
    return GatewayFake(tmp_path)


def problem(answer, status: int, code: str) -> dict:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == status
    assert body["error"]["code"] == code
    assert body["error"]["message"] == body["detail"]
    assert body["request_id"] == answer.headers["x-request-id"]
    return body


def events(text: str) -> list[dict]:
    return [json.loads(line[5:]) for line in text.splitlines() if line.startswith("data:")]


def test_a_submitted_job_is_on_the_queue_and_answered_with_its_location(gw: GatewayFake) -> None:
    answer = gw.client.post(
        "/v1/jobs",
        json={
            "method": "text_to_image",
            "parameters": {"prompt": "a red circle"},
            "priority": 120,
            "group": "g1",
            "deadline_s": 60,
        },
        headers=gw.ana,
    )
    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"].endswith(f"/v1/jobs/{job['req_no']}")
    assert answer.headers["retry-after"] == "1"
    [(queue, message)] = gw.support.messages
    assert (queue, message.message_id, message.priority) == ("requests", f"ana/{job['req_no']}", 120)
    tree = json.loads(message.body)
    assert tree["body"] == {"method": "text_to_image", "parameters": {"prompt": "a red circle", "model": "tiny"}}
    assert tree["header"]["tenant"] == "ana"
    assert tree["header"]["taskType"] == "GC"
    assert tree["header"]["group"] == "g1"
    assert tree["header"]["deadline"] == pytest.approx(job["submitted_at"] + 60, abs=1)


def test_a_trace_context_travels_with_the_message_when_it_is_one(gw: GatewayFake) -> None:
    good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    for sent in (good, "nonsense"):
        headers = {**gw.ana, "traceparent": sent}
        gw.client.post("/v1/jobs", json={"method": "sleep", "parameters": {}}, headers=headers)
    first, second = [json.loads(message.body)["header"] for _, message in gw.support.messages]
    assert first["traceparent"] == good
    assert "traceparent" not in second


def test_a_job_is_seen_as_queued_until_its_message_is_read(gw: GatewayFake) -> None:
    gw.support.reading = False
    job = gw.submit()
    path = f"/v1/jobs/{job['req_no']}"
    assert gw.client.get(path, headers=gw.ana).json()["state"] == "queued"
    assert gw.client.get(path, headers=gw.ops).json()["state"] == "queued"
    assert gw.client.get(path + "/why", headers=gw.ana).json()["data"][0]["reason"] == "QUEUED"
    problem(gw.client.get(path, headers=gw.bob), 404, "not_found")
    gw.support.read_held()
    assert gw.client.get(path, headers=gw.ana).json()["state"] == "pending"
    assert gw.client.get(path + "/why", headers=gw.ana).json()["data"][0]["reason"] == "NO_GPU_MEMORY"


def test_a_cancel_of_a_job_that_is_never_read_says_so_instead_of_lying(tmp_path: Path) -> None:
    gw = GatewayFake(tmp_path, queued_wait_s=0.05, poll_s=0.01)
    gw.support.reading = False
    job = gw.submit()
    problem(gw.client.post(f"/v1/jobs/{job['req_no']}/cancel", headers=gw.ana), 503, "still_queued")


def test_cancel_answers_the_final_state_and_is_idempotent(gw: GatewayFake) -> None:
    job = gw.submit()
    path = f"/v1/jobs/{job['req_no']}"
    assert gw.client.post(path + "/cancel", headers=gw.ana).json()["state"] == "cancelled"
    assert gw.client.delete(path, headers=gw.ana).json()["state"] == "cancelled"
    done = gw.submit()
    gw.support.move(done["req_no"], "finished", result={"files": [], "metadata": {}})
    assert gw.client.delete(f"/v1/jobs/{done['req_no']}", headers=gw.ana).json()["state"] == "finished"


def test_the_same_idempotency_key_and_request_replay_the_answer(gw: GatewayFake) -> None:
    body = {"method": "sleep", "parameters": {"seconds": 1}}
    first = gw.client.post("/v1/jobs", json=body, headers={**gw.ana, "Idempotency-Key": "k1"})
    again = gw.client.post("/v1/jobs", json=body, headers={**gw.ana, "Idempotency-Key": "k1"})
    assert again.status_code == 202
    assert again.json() == first.json()
    assert again.headers["idempotent-replayed"] == "true"
    assert len(gw.support.messages) == 1
    other = {"method": "sleep", "parameters": {"seconds": 2}}
    problem(
        gw.client.post("/v1/jobs", json=other, headers={**gw.ana, "Idempotency-Key": "k1"}),
        422,
        "idempotency_key_reused",
    )
    others = gw.client.post("/v1/jobs", json=other, headers={**gw.bob, "Idempotency-Key": "k1"})
    assert others.status_code == 202
    assert others.json()["req_no"] != first.json()["req_no"]


def test_submitting_a_req_no_twice_is_submitting_it_once(gw: GatewayFake) -> None:
    req_no = str(uuid.uuid4())
    assert gw.submit(req_no=req_no)["req_no"] == req_no
    assert gw.submit(req_no=req_no)["req_no"] == req_no
    assert len(gw.support.messages) == 1
    body = {"method": "sleep", "parameters": {"seconds": 9}, "req_no": req_no}
    refused = gw.client.post("/v1/jobs", json=body, headers=gw.ana)
    problem(refused, 409, "req_no_taken")
    assert refused.headers["x-should-retry"] == "false"


def test_a_job_that_the_queue_refuses_is_forgotten(gw: GatewayFake) -> None:
    req_no = str(uuid.uuid4())
    working = gw.support.put_many

    def broken(queue, messages):
        raise OSError(28, "No space left on device")

    gw.support.put_many = broken
    body = {"method": "sleep", "parameters": {}, "req_no": req_no}
    problem(gw.client.post("/v1/jobs", json=body, headers=gw.ana), 507, "storage_full")
    problem(gw.client.get(f"/v1/jobs/{req_no}", headers=gw.ana), 404, "not_found")
    gw.support.put_many = working
    assert gw.client.post("/v1/jobs", json=body, headers=gw.ana).status_code == 202


def test_lists_go_page_by_page_newest_first(gw: GatewayFake) -> None:
    made = [gw.submit(group="a" if number % 2 else "b")["req_no"] for number in range(5)]
    first = gw.client.get("/v1/jobs", params={"limit": 2}, headers=gw.ana).json()
    assert [job["req_no"] for job in first["data"]] == [made[4], made[3]]
    second = gw.client.get("/v1/jobs", params={"limit": 3, "cursor": first["next_cursor"]}, headers=gw.ana).json()
    assert [job["req_no"] for job in second["data"]] == [made[2], made[1], made[0]]
    assert second["next_cursor"] == ""
    grouped = gw.client.get("/v1/jobs", params={"group": "a"}, headers=gw.ana).json()
    assert [job["req_no"] for job in grouped["data"]] == [made[3], made[1]]
    problem(gw.client.get("/v1/jobs", params={"cursor": "zz"}, headers=gw.ana), 400, "bad_cursor")
    problem(gw.client.get("/v1/jobs", params={"limit": 101}, headers=gw.ana), 422, "validation_failed")


def test_events_are_snapshots_with_ids_and_end_with_the_job(gw: GatewayFake) -> None:
    job = gw.submit()
    gw.support.move(job["req_no"], "running", node="node-1")
    gw.support.move(job["req_no"], "running", progress_done=3, progress_total=10)
    gw.support.move(job["req_no"], "finished", result={"files": [], "metadata": {}})
    answer = gw.client.get(f"/v1/jobs/{job['req_no']}/events", headers=gw.ana)
    assert answer.headers["content-type"].startswith("text/event-stream")
    seen = events(answer.text)
    assert [one["view"]["state"] for one in seen] == ["pending", "running", "running", "finished"]
    assert seen[2]["view"]["progress_done"] == 3
    assert "id: 2\nevent: running\n" in answer.text
    later = gw.client.get(f"/v1/jobs/{job['req_no']}/events", headers={**gw.ana, "Last-Event-ID": "3"})
    assert [one["event_id"] for one in events(later.text)] == [4]
    problem(gw.client.get(f"/v1/jobs/{job['req_no']}/events", headers=gw.bob), 404, "not_found")
    bad = gw.client.get(f"/v1/jobs/{job['req_no']}/events", headers={**gw.ana, "Last-Event-ID": "x"})
    problem(bad, 422, "validation_failed")


def test_parameters_are_checked_before_the_queue_and_named(gw: GatewayFake) -> None:
    cases = [
        ({"method": "text_to_image", "parameters": {"prompt": "x", "steps": 0}}, "parameters.steps"),
        ({"method": "text_to_image", "parameters": {"prompt": "x", "wrong": 1}}, "parameters.wrong"),
        ({"method": "text_to_image", "parameters": {"prompt": "x"}, "model": "nope"}, "model"),
        ({"method": "sleep", "parameters": {}, "model": "tiny"}, "model"),
        ({"method": "paint", "parameters": {}}, "method"),
        ({"method": "sleep", "parameters": {}, "priority": 5000}, "priority"),
        ({"method": "sleep", "parameters": {}, "surprise": 1}, "surprise"),
        (
            {"method": "dreambooth", "parameters": {"pictures": ["a" * 64, "b" * 64, "c" * 64], "category": "dog"}},
            "parameters.pictures",
        ),
    ]
    for body, field in cases:
        answer = gw.client.post("/v1/jobs", json=body, headers=gw.ana)
        assert answer.status_code == 422, body
        assert answer.json()["error"]["param"] == field
    assert gw.support.messages == []


def test_a_tenant_may_not_ask_for_more_urgency_than_its_policy_allows(tmp_path: Path) -> None:
    gw = GatewayFake(tmp_path, tenants={"ana": {"max_priority": 50}})
    body = {"method": "sleep", "parameters": {}, "priority": 51}
    problem(gw.client.post("/v1/jobs", json=body, headers=gw.ana), 403, "priority_not_allowed")
    assert gw.client.post("/v1/jobs", json=body, headers=gw.bob).status_code == 202


def test_compensations_are_idempotent_by_key(gw: GatewayFake) -> None:
    job = gw.submit()
    path = f"/v1/jobs/{job['req_no']}/compensations"
    problem(gw.client.post(path, json={"action": "rerun"}, headers=gw.ana), 409, "not_dead")
    gw.support.move(job["req_no"], "dead", reason="crashed")
    keyed = {**gw.ana, "Idempotency-Key": "again"}
    first = gw.client.post(path, json={"action": "redeliver_result"}, headers=keyed).json()
    assert gw.client.post(path, json={"action": "redeliver_result"}, headers=keyed).json() == first
    assert len(gw.support.compensations) == 1
    assert gw.client.post(path, json={"action": "rerun"}, headers=gw.ana).status_code == 200
    assert gw.client.get(f"/v1/jobs/{job['req_no']}", headers=gw.ana).json()["state"] == "pending"
    problem(gw.client.post(path, json={"action": "explode"}, headers=gw.ana), 422, "validation_failed")


def test_a_support_service_that_is_away_gives_503_and_writes_still_pass(gw: GatewayFake) -> None:
    job = gw.submit()

    async def away(*_args, **_more):
        raise ConnectionError("refused")

    gw.support.job = away
    refused = gw.client.get(f"/v1/jobs/{job['req_no']}", headers=gw.ana)
    problem(refused, 503, "support_unavailable")
    assert refused.headers["retry-after"] == "1"
    assert gw.client.post("/v1/jobs", json={"method": "sleep", "parameters": {}}, headers=gw.ana).status_code == 202


def test_messages_reach_the_embedded_queue_urgent_first_and_once(tmp_path: Path) -> None:
    queue = SqliteQueue(tmp_path / "queue.sqlite")
    fake = GatewayFake(tmp_path)
    app = create_app(fake.config, fake.support, queue, fake.store, fake.keys)
    client = TestClient(app)
    made = []
    for priority in (0, 150, 0):
        body = {"method": "sleep", "parameters": {"seconds": 1}, "priority": priority}
        made.append(client.post("/v1/jobs", json=body, headers={**fake.ana, "Idempotency-Key": f"k{len(made)}"}).json())
    body = {"method": "sleep", "parameters": {"seconds": 1}, "priority": 150}
    client.post("/v1/jobs", json=body, headers={**fake.ana, "Idempotency-Key": "k1"})
    taken = [decode(one.body) for one in queue.take("requests", 10)]
    queue.close()
    assert [message.req_no for message in taken] == [made[1]["req_no"], made[0]["req_no"], made[2]["req_no"]]
    assert {message.header.tenant for message in taken} == {"ana"}


def test_what_arrives_while_the_queue_is_busy_enters_it_by_rank(gw: GatewayFake) -> None:
    entered, released, working = threading.Event(), threading.Event(), gw.support.put_many

    def slow(queue: str, messages: Sequence[Outgoing]) -> int:
        entered.set()
        assert released.wait(20)
        return working(queue, messages)

    gw.support.put_many = slow
    window = gw.app.state.gateway.submissions._intake._window

    async def scene() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=gw.app), base_url="http://gw") as client:

            def submit(group: str, headers: dict[str, str], priority: int = 0) -> asyncio.Task[httpx.Response]:
                body = {"method": "sleep", "parameters": {}, "group": group, "priority": priority}
                return asyncio.create_task(client.post("/v1/jobs", json=body, headers=headers))

            calls = [submit("first", gw.ana)]
            assert await asyncio.to_thread(entered.wait, 20)
            for number, (group, headers, priority) in enumerate(
                [("a1", gw.ana, 0), ("a2", gw.ana, 0), ("a3", gw.ana, 0), ("b1", gw.bob, 0), ("urgent", gw.ana, 100)], 1
            ):
                calls.append(submit(group, headers, priority))
                while len(window) < number:
                    assert not calls[-1].done()
                    await asyncio.sleep(0)
            released.set()
            assert {answer.status_code for answer in await asyncio.gather(*calls)} == {202}

    asyncio.run(asyncio.wait_for(scene(), 60))
    order = [json.loads(message.body)["header"]["group"] for _, message in gw.support.messages]
    assert order == ["first", "urgent", "a1", "b1", "a2", "a3"]
