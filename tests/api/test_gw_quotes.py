"""Quotes over a fake support service: tokens, what they keep, and what refusals say."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from api.gateway import quote_tokens
from api.gateway.fake import GatewayFake
from api.gateway.relief import refused_for_now
from api.gateway.retry import retry_after
from api.mq.port import QueueRefused

BODY = {"method": "text_to_image", "parameters": {"prompt": "a red circle", "steps": 20}}


@pytest.fixture
def gw(tmp_path: Path) -> GatewayFake:
    return GatewayFake(tmp_path)


def quote(gw: GatewayFake, headers: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
    answer = gw.client.post("/v1/quotes", json={**BODY, **more}, headers=headers or gw.ana)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def submit(gw: GatewayFake, token: str, headers: dict[str, str] | None = None, **more: Any) -> Any:
    return gw.client.post("/v1/jobs", json={**BODY, "quote": token, **more}, headers=headers or gw.ana)


def age(gw: GatewayFake, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let so many seconds pass for the gateway."""
    submissions = gw.app.state.gateway.submissions
    clock = submissions._clock_s
    monkeypatch.setattr(submissions, "_clock_s", lambda: clock() + seconds)


def test_a_quote_queues_nothing_and_says_when(gw: GatewayFake) -> None:
    gw.submit()
    found = quote(gw)
    assert len(gw.support.messages) == 1
    assert found["queue_position"] == 2
    assert found["start_at"]["p50"] <= found["start_at"]["p90"]
    assert found["finish_at"]["p50"] <= found["finish_at"]["p90"]
    assert found["valid_until"] > 0
    assert [one["kind"] for one in found["alternatives"]] == ["urgent_lane"]


def test_the_token_gives_the_job_the_quoted_name_and_the_time_of_the_quote(gw: GatewayFake) -> None:
    found = quote(gw)
    answer = submit(gw, found["token"])
    assert answer.status_code == 202
    assert answer.json()["req_no"] == found["req_no"]
    header = json.loads(gw.support.messages[-1][1].body)["header"]
    assert header["quotedAt"] == pytest.approx(found["valid_until"] - 30, abs=0.01)


def test_a_token_used_twice_is_one_job(gw: GatewayFake, monkeypatch: pytest.MonkeyPatch) -> None:
    token = quote(gw)["token"]
    first = submit(gw, token)
    age(gw, monkeypatch, 3600)
    second = submit(gw, token)
    assert second.headers["idempotent-replayed"] == "true"
    assert second.json()["req_no"] == first.json()["req_no"]
    assert len(gw.support.messages) == 1


def test_an_expired_token_is_refused_with_what_to_do(gw: GatewayFake, monkeypatch: pytest.MonkeyPatch) -> None:
    token = quote(gw)["token"]
    age(gw, monkeypatch, 31)
    answer = submit(gw, token)
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "quote_expired"
    assert "ask for a new quote" in answer.json()["detail"]
    assert not gw.support.messages


def test_a_token_is_good_until_its_last_second(gw: GatewayFake, monkeypatch: pytest.MonkeyPatch) -> None:
    token = quote(gw)["token"]
    age(gw, monkeypatch, 25)
    assert submit(gw, token).status_code == 202


def test_another_tenants_token_is_refused(gw: GatewayFake) -> None:
    answer = submit(gw, quote(gw)["token"], headers=gw.bob)
    assert answer.status_code == 422
    assert "another tenant" in answer.json()["detail"]


def test_a_token_of_another_request_is_refused(gw: GatewayFake) -> None:
    answer = submit(gw, quote(gw)["token"], priority=100)
    assert answer.status_code == 422
    assert "another request" in answer.json()["detail"]


def test_a_token_under_another_name_is_refused(gw: GatewayFake) -> None:
    answer = submit(gw, quote(gw)["token"], req_no=str(uuid.uuid4()))
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "req_no"


@pytest.mark.parametrize("place", [0, 10, -1, -10])
def test_a_token_that_was_tampered_with_is_refused(gw: GatewayFake, place: int) -> None:
    token = quote(gw)["token"]
    other = "A" if token[place] != "A" else "B"
    broken = token[:place] + other + (token[place + 1 :] if place != -1 else "")
    # The last letter of base64 may hold bits that say nothing; the one before it always does.
    if place == -1:
        broken = broken[:-2] + ("A" if broken[-2] != "A" else "B") + broken[-1]
    answer = submit(gw, broken)
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "quote_invalid"
    assert not gw.support.messages


@pytest.mark.parametrize("token", [".", "x", "e30.e30", "..", "a.b.c", "-", "W10.W10"])
def test_what_is_no_token_is_refused_in_words(gw: GatewayFake, token: str) -> None:
    answer = submit(gw, token)
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "quote_invalid"


def test_old_secrets_still_verify_tokens() -> None:
    token = quote_tokens.signed("ana", "f", str(uuid.uuid4()), 5.0, b"old" * 20)
    assert quote_tokens.read(token, "ana", "f", [b"new" * 20, b"old" * 20]).quoted_at == 5.0


def test_a_quote_may_not_carry_a_quote(gw: GatewayFake) -> None:
    answer = gw.client.post("/v1/quotes", json={**BODY, "quote": quote(gw)["token"]}, headers=gw.ana)
    assert answer.status_code == 422


def test_what_could_not_be_submitted_cannot_be_quoted(gw: GatewayFake) -> None:
    for wrong in ({"parameters": {"prompt": "x", "nonsense": 1}}, {"model": "nobody's"}, {"method": "dance"}):
        assert gw.client.post("/v1/quotes", json={**BODY, **wrong}, headers=gw.ana).status_code == 422


def test_a_full_queue_answers_with_the_time_at_which_room_is_expected(
    gw: GatewayFake, monkeypatch: pytest.MonkeyPatch
) -> None:
    gw.submit()

    def refuse(queue: str, messages: object) -> int:
        raise QueueRefused("100 messages wait")

    monkeypatch.setattr(gw.support, "put_many", refuse)
    answer = gw.client.post("/v1/jobs", json=BODY, headers=gw.ana)
    assert answer.status_code == 503
    after = int(answer.headers["retry-after"])
    assert 10 <= after <= 13
    assert answer.json()["alternatives"] == [{"kind": "later", "change": {"after_s": after}}]


def test_a_job_that_would_wait_too_long_is_refused_with_what_would_not(tmp_path: Path) -> None:
    gw = GatewayFake(tmp_path, tenants={"ana": {"max_wait_s": 15}})
    for _ in range(3):
        answer = gw.client.post("/v1/jobs", json=BODY, headers=gw.ana)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "too_long_a_wait"
    kinds = {one["kind"]: one for one in answer.json()["alternatives"]}
    assert set(kinds) == {"urgent_lane", "later"}
    assert int(answer.headers["retry-after"]) == kinds["later"]["change"]["after_s"]
    urgent = gw.client.post("/v1/jobs", json={**BODY, **kinds["urgent_lane"]["change"]}, headers=gw.bob)
    assert urgent.status_code == 202


def test_an_alternative_that_the_tenant_may_not_take_is_not_offered(tmp_path: Path) -> None:
    gw = GatewayFake(tmp_path, tenants={"ana": {"max_wait_s": 1, "max_priority": 50}})
    gw.submit()
    answer = gw.client.post("/v1/jobs", json=BODY, headers=gw.ana)
    assert [one["kind"] for one in answer.json()["alternatives"]] == ["later"]


@pytest.mark.parametrize(
    ("seconds", "luck", "after"), [(0, 0, 1), (10, 0, 10), (10, 1, 12), (1e9, 1, 120), (3.2, 0, 4)]
)
def test_a_wait_is_never_shorter_than_expected_and_at_most_two_minutes(seconds: float, luck: float, after: int) -> None:
    assert retry_after(seconds, luck) == after


def test_later_is_offered_once() -> None:
    refused = refused_for_now(503, "x", "Full", 5, [{"kind": "later", "change": {"after_s": 1}}])
    assert [one["kind"] for one in refused.alternatives] == ["later"]
