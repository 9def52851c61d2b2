"""One error body for everything that can go wrong, and a request id on every answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from api.gateway.fake import GatewayFake


@pytest.fixture
def gw(tmp_path: Path) -> GatewayFake:
    return GatewayFake(tmp_path, max_json_bytes=4096)


CASES = [
    ("no key", "GET", "/v1/jobs", {"headers": {}}, 401, "authentication_error"),
    ("unknown key", "GET", "/v1/jobs", {"headers": {"Authorization": "Bearer x"}}, 401, "authentication_error"),
    ("other scheme", "GET", "/v1/jobs", {"headers": {"Authorization": "Basic eDp5"}}, 401, "authentication_error"),
    ("nothing there", "GET", "/v1/nothing", {}, 404, "not_found_error"),
    ("a slash too many", "GET", "/v1/jobs/", {}, 404, "not_found_error"),
    ("wrong method", "PUT", "/v1/jobs", {}, 405, "invalid_request_error"),
    ("no such job", "GET", f"/v1/jobs/{'0' * 8}-0000-0000-0000-{'0' * 12}", {}, 404, "not_found_error"),
    ("no uuid", "GET", "/v1/jobs/xyz", {}, 422, "invalid_request_error"),
    (
        "not json",
        "POST",
        "/v1/jobs",
        {"content": b"{", "headers": {"Content-Type": "application/json"}},
        400,
        "invalid_request_error",
    ),
    ("wrong fields", "POST", "/v1/jobs", {"json": {}}, 422, "invalid_request_error"),
    (
        "wrong type",
        "POST",
        "/v1/jobs",
        {"content": b"x", "headers": {"Content-Type": "text/plain"}},
        415,
        "invalid_request_error",
    ),
    ("too large", "POST", "/v1/jobs", {"json": {"method": "a" * 5000}}, 413, "invalid_request_error"),
    ("operators only", "GET", "/v1/nodes", {}, 403, "permission_error"),
    ("not an open page", "GET", "/", {"headers": {}}, 401, "authentication_error"),
]


@pytest.mark.parametrize(
    ("method", "path", "more", "status", "kind"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_every_refusal_has_the_one_error_body(
    gw: GatewayFake, method: str, path: str, more: dict, status: int, kind: str
) -> None:
    more = dict(more)
    headers = more.pop("headers", None)
    headers = gw.ana if headers is None else ({**gw.ana, **headers} if "Content-Type" in headers else headers)
    answer = gw.client.request(method, path, headers=headers, **more)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    body = answer.json()
    assert {"type", "title", "status", "detail", "instance", "error_type", "error"} <= set(body)
    assert body["error"]["type"] == body["error_type"] == kind
    assert body["type"] == f"urn:aigc:problem:{body['error']['code']}"
    assert body["instance"] == path
    assert set(body["error"]) == {"message", "type", "param", "code"}


def test_a_method_that_is_not_possible_names_those_that_are(gw: GatewayFake) -> None:
    answer = gw.client.put("/v1/jobs", headers=gw.ana)
    assert set(answer.headers["allow"].replace(" ", "").split(",")) == {"GET", "POST"}


def test_a_crash_leaves_as_the_one_error_body_and_tells_nothing(
    gw: GatewayFake, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashes = []
    monkeypatch.setattr(
        "api.gateway.gate.log.exception", lambda event, **more: crashes.append((event, more["request_id"]))
    )

    async def crash(*_args, **_more):
        raise RuntimeError("secret internals")

    gw.support.models = crash
    answer = gw.client.get("/v1/models", headers={**gw.ana, "x-request-id": "my-id"})
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-request-id"] == "my-id"
    assert answer.json()["request_id"] == "my-id"
    assert "secret" not in answer.text
    assert crashes == [("request_crashed", "my-id")]


def test_a_request_id_is_taken_over_when_it_is_harmless_and_made_otherwise(gw: GatewayFake) -> None:
    assert gw.client.get("/healthz", headers={"x-request-id": "abc-1.2:3"}).headers["x-request-id"] == "abc-1.2:3"
    first = gw.client.get("/healthz", headers={"x-request-id": "a b\tc"}).headers["x-request-id"]
    second = gw.client.get("/healthz", headers={"x-request-id": "x" * 65}).headers["x-request-id"]
    assert first.startswith("req_")
    assert second.startswith("req_")
    assert first != second


def test_validation_names_every_wrong_field(gw: GatewayFake) -> None:
    answer = gw.client.post("/v1/jobs", json={"method": "A", "priority": "x", "extra": 1}, headers=gw.ana)
    assert {one["field"] for one in answer.json()["errors"]} == {"method", "priority", "extra"}


def test_a_query_parameter_that_is_none_is_refused_and_the_known_ones_named(gw: GatewayFake) -> None:
    answer = gw.client.get("/v1/jobs", params={"stat": "running"}, headers=gw.ana)
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "stat"
    assert "cursor, group, limit, state" in answer.json()["detail"]


def test_answers_carry_the_security_headers(gw: GatewayFake) -> None:
    for answer in (gw.client.get("/v1/jobs", headers=gw.ana), gw.client.get("/nowhere"), gw.client.get("/console")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
