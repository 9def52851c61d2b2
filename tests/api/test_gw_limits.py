"""Rates, places in flight and body bounds: the units, and how they answer over HTTP."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.gateway.config import RatePolicy
from api.gateway.fake import GatewayFake
from api.gateway.limits import Gcra, InFlight

SECOND = 1_000_000


def test_a_burst_passes_at_once_and_then_one_per_period() -> None:
    gcra, policy = Gcra(), RatePolicy(per_minute=60, burst=3)
    verdicts = [gcra.check("a", policy, 0) for _ in range(4)]
    assert [one.allowed for one in verdicts] == [True, True, True, False]
    assert [one.remaining for one in verdicts] == [2, 1, 0, 0]
    assert verdicts[3].retry_us == SECOND
    assert not gcra.check("a", policy, SECOND - 1).allowed
    assert gcra.check("a", policy, SECOND).allowed
    assert not gcra.check("a", policy, SECOND).allowed
    assert gcra.check("b", policy, SECOND).allowed


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3 * SECOND), max_size=80), st.integers(1, 240), st.integers(1, 10))
def test_no_span_ever_lets_more_pass_than_burst_plus_rate(gaps, per_minute, burst) -> None:
    gcra, policy = Gcra(), RatePolicy(per_minute=per_minute, burst=burst)
    now, passed = 0, []
    for gap in gaps:
        now += gap
        if gcra.check("a", policy, now).allowed:
            passed.append(now)
    period = 60 * SECOND // per_minute
    for first in range(len(passed)):
        for last in range(first, len(passed)):
            assert last - first + 1 <= burst + (passed[last] - passed[first]) // period


def test_a_refused_request_waits_exactly_as_long_as_it_was_told() -> None:
    gcra, policy = Gcra(), RatePolicy(per_minute=7, burst=2)
    now = 0
    for _ in range(20):
        verdict = gcra.check("a", policy, now)
        if not verdict.allowed:
            assert gcra.would_refuse("a", policy, now + verdict.retry_us - 1) is not None
            now += verdict.retry_us
            assert gcra.check("a", policy, now).allowed


def test_memory_of_rates_is_bounded() -> None:
    gcra, policy = Gcra(max_keys=10), RatePolicy()
    for number in range(1000):
        gcra.check(str(number), policy, number)
    assert len(gcra) <= 10


def test_places_in_flight_are_counted_per_key() -> None:
    places = InFlight()
    assert places.enter("a", 1)
    assert not places.enter("a", 1)
    assert places.enter("b", 1)
    places.leave("a")
    assert places.enter("a", 1)
    assert places.count("c") == 0


def test_too_many_submissions_answer_429_with_every_header_a_client_reads(tmp_path: Path) -> None:
    gw = GatewayFake(tmp_path, tenants={"ana": {"submits": {"per_minute": 6, "burst": 2}}})
    body = {"method": "sleep", "parameters": {}}
    first = gw.client.post("/v1/jobs", json=body, headers=gw.ana)
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["ratelimit-policy"] == '"submits";q=2;w=20'
    assert first.headers["ratelimit"].startswith('"submits";r=1;t=')
    gw.client.post("/v1/jobs", json=body, headers=gw.ana)
    refused = gw.client.post("/v1/jobs", json=body, headers=gw.ana)
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 10
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert gw.client.post("/v1/jobs", json=body, headers=gw.bob).status_code == 202
    assert gw.client.get("/v1/jobs", headers=gw.ana).status_code == 200


def test_a_stranger_who_keeps_guessing_keys_is_slowed_down(tmp_path: Path) -> None:
    gw = GatewayFake(tmp_path, failed_auth={"per_minute": 1, "burst": 3})
    wrong = {"Authorization": "Bearer nothing"}
    statuses = [gw.client.get("/v1/jobs", headers=wrong).status_code for _ in range(5)]
    assert statuses == [401, 401, 401, 429, 429]


def test_open_pages_are_limited_per_address(tmp_path: Path) -> None:
    gw = GatewayFake(tmp_path, open_reads={"per_minute": 1, "burst": 2})
    assert [gw.client.get("/healthz").status_code for _ in range(3)] == [200, 200, 429]
    assert gw.client.get("/v1/jobs", headers=gw.ana).status_code == 200


def test_bodies_are_bounded_by_their_length_header_and_by_their_bytes(tmp_path: Path) -> None:
    gw = GatewayFake(tmp_path, max_json_bytes=2048, max_upload_bytes=4096)
    headers = {**gw.ana, "Content-Type": "application/json"}
    large = b'{"method": "sleep", "parameters": {"x": "' + b"a" * 5000 + b'"}}'
    assert gw.client.post("/v1/jobs", content=large, headers=headers).status_code == 413
    chunks = (large[start : start + 100] for start in range(0, len(large), 100))
    refused = gw.client.post("/v1/jobs", content=chunks, headers=headers)
    assert refused.status_code == 413
    assert refused.json()["error"]["code"] == "body_too_large"
    sent = gw.client.post("/v1/uploads", files={"file": ("a.png", b"x" * 5000)}, headers=gw.ana)
    assert sent.status_code == 413
    form = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"x" * 9000 + b"\r\n--b--\r\n"
    streamed = gw.client.post(
        "/v1/uploads",
        content=(form[start : start + 500] for start in range(0, len(form), 500)),
        headers={**gw.ana, "Content-Type": "multipart/form-data; boundary=b"},
    )
    assert streamed.status_code == 413
    assert streamed.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b'{"a": NaN}',
        b'{"a": "\\ud800"}',
        b'{"a": "\xff"}',
        b"[" * 100_000 + b"]" * 100_000,
        b'{"method": "sleep", "parameters": ' + b'{"a": ' * 40 + b"1" + b"}" * 40 + b"}",
    ],
    ids=["cut off", "not a number", "lone surrogate", "broken utf-8", "very deep", "too deep"],
)
def test_json_that_is_not_strict_or_too_deep_is_refused(tmp_path: Path, body: bytes) -> None:
    gw = GatewayFake(tmp_path)
    refused = gw.client.post("/v1/jobs", content=body, headers={**gw.ana, "Content-Type": "application/json"})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "invalid_json"


def test_a_full_admission_window_answers_429(tmp_path: Path) -> None:
    gw = GatewayFake(tmp_path, window_size=1, tenants={"ana": {"max_waiting": 1}})
    window = gw.app.state.gateway.submissions._intake._window
    window.push(None, tenant="bob", weight=1, priority=0, now=0, max_waiting=5)
    refused = gw.client.post("/v1/jobs", json={"method": "sleep", "parameters": {}}, headers=gw.ana)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "window_full"
    assert refused.headers["retry-after"] == "1"
