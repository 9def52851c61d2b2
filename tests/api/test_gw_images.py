"""The images route: with the unmodified openai SDK over a real socket, and its refusals, time-outs and hang-ups."""

from __future__ import annotations

import base64
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn

from api.gateway.fake import GatewayFake


class Served:
    """A gateway on a port of its own, in a thread."""

    def __init__(self, directory: Path, **settings: object) -> None:
        self.gw = GatewayFake(directory, **settings)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(self.gw.app, log_level="error", access_log=False))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        until(lambda: self.server.started)

    def sdk(self, **more: object) -> openai.OpenAI:
        key = self.gw.ana["Authorization"].removeprefix("Bearer ")
        return openai.OpenAI(api_key=key, base_url=f"{self.url}/v1", max_retries=0, **more)

    def close(self) -> None:
        self.server.should_exit = True
        self.server.force_exit = True
        self.thread.join(10)
        self.socket.close()


def until(true, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.005)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    one = Served(tmp_path, auto=True, sync_timeout_s=20)
    yield one
    one.close()


def test_the_openai_sdk_gets_pictures_as_base64(served: Served) -> None:
    client = served.sdk()
    answer = client.images.generate(prompt="a red circle on a blue background", n=2, size="64x64", model="tiny")
    assert [base64.b64decode(one.b64_json)[:4] for one in answer.data] == [b"\x89PNG"] * 2
    assert answer.data[0].b64_json != answer.data[1].b64_json
    assert answer._request_id.startswith("req_")
    assert answer.created == pytest.approx(time.time(), abs=60)
    assert answer.size == "64x64"


def test_the_openai_sdk_gets_links_that_need_no_key(served: Served) -> None:
    answer = served.sdk().images.generate(prompt="a red circle", response_format="url")
    assert httpx.get(answer.data[0].url).content.startswith(b"\x89PNG")
    assert answer.data[0].b64_json is None


def test_our_own_fields_travel_in_extra_body(served: Served) -> None:
    client = served.sdk()
    answer = client.images.generate(
        prompt="a red circle",
        n=1,
        user="u",
        quality="high",
        extra_body={"priority": 120, "group": "g7", "seed": 42, "steps": 7, "guidance": 2.5, "negative_prompt": "blue"},
    )
    view = served.gw.support.known[("ana", answer.req_no)]
    assert (view.priority, view.group) == (120, "g7")
    assert view.parameters == {
        "prompt": "a red circle",
        "count": 1,
        "seed": 42,
        "steps": 7,
        "guidance": 2.5,
        "negative_prompt": "blue",
        "model": "tiny",
    }
    assert answer.metadata["seed"] == 42


def test_the_openai_sdk_lists_models(served: Served) -> None:
    client = served.sdk()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "platform"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


def test_the_openai_sdk_raises_the_right_exceptions(served: Served) -> None:
    client = served.sdk()
    with pytest.raises(openai.UnprocessableEntityError) as wrong:
        client.images.generate(prompt="x", size="63x64")
    assert wrong.value.body["param"] == "parameters.width"
    with pytest.raises(openai.UnprocessableEntityError) as wrong:
        client.images.generate(prompt="x", size="huge")
    assert wrong.value.body["param"] == "size"
    with pytest.raises(openai.UnprocessableEntityError) as wrong:
        client.images.generate(prompt="x", model="nope")
    assert wrong.value.code == "unknown_model"
    with pytest.raises(openai.UnprocessableEntityError):
        client.images.generate(prompt="x", n=11)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(api_key="wrong", base_url=f"{served.url}/v1", max_retries=0).images.generate(prompt="x")


def test_the_openai_sdk_reads_the_stream(served: Served) -> None:
    events = list(served.sdk().images.generate(prompt="x", n=2, stream=True, partial_images=2))
    assert [one.type for one in events] == ["image_generation.completed"] * 2
    assert base64.b64decode(events[0].b64_json).startswith(b"\x89PNG")
    assert events[0].usage.total_tokens == 0


def test_a_stream_that_fails_or_takes_too_long_ends_with_an_error(tmp_path: Path) -> None:
    served = Served(tmp_path)
    try:
        with pytest.raises(openai.APIError, match="not ready within"):
            list(served.sdk().images.generate(prompt="x", stream=True, extra_body={"timeout_s": 0.1}))
        assert [view.state for view in served.gw.support.known.values()] == ["cancelled"]
    finally:
        served.close()


def test_leaving_a_stream_cancels_the_job(tmp_path: Path) -> None:
    served = Served(tmp_path, keepalive_s=0.02, sync_timeout_s=60)
    try:
        body = {"prompt": "x", "stream": True}
        with httpx.stream("POST", f"{served.url}/v1/images/generations", json=body, headers=served.gw.ana) as answer:
            assert next(answer.iter_lines()).startswith(": state=")
        until(lambda: [view.state for view in served.gw.support.known.values()] == ["cancelled"])
    finally:
        served.close()


def test_an_idempotency_key_attaches_to_the_job_of_before(served: Served) -> None:
    client = served.sdk()
    first = client.images.generate(prompt="x", extra_headers={"Idempotency-Key": "k"})
    again = client.images.generate(prompt="x", extra_headers={"Idempotency-Key": "k"})
    assert again.req_no == first.req_no
    assert len(served.gw.support.messages) == 1


def test_waiting_too_long_cancels_the_job_and_says_so(tmp_path: Path) -> None:
    gw = GatewayFake(tmp_path, sync_timeout_s=5)
    answer = gw.client.post("/v1/images/generations", json={"prompt": "x", "timeout_s": 0.05}, headers=gw.ana)
    assert answer.status_code == 504
    assert answer.headers["x-should-retry"] == "false"
    assert answer.json()["error"]["code"] == "timeout"
    [view] = gw.support.known.values()
    assert view.state == "cancelled"


def test_a_result_that_wins_against_the_time_out_is_given(tmp_path: Path) -> None:
    gw = GatewayFake(tmp_path)

    async def too_late(tenant: str, req_no: str):
        view = await gw.support.job(tenant, req_no)
        return gw.support.move(req_no, "finished", result=gw.support.made(view))

    gw.support.cancel = too_late
    answer = gw.client.post("/v1/images/generations", json={"prompt": "x", "timeout_s": 0.05}, headers=gw.ana)
    assert answer.status_code == 200
    assert len(answer.json()["data"]) == 1


@pytest.mark.parametrize(
    ("state", "status", "code"),
    [("cancelled", 409, "job_cancelled"), ("rejected", 422, "job_rejected"), ("dead", 500, "generation_failed")],
)
def test_a_job_that_ends_without_pictures_is_an_error_that_is_not_tried_again(
    tmp_path: Path, state: str, status: int, code: str
) -> None:
    gw = GatewayFake(tmp_path)
    reading = gw.support.read

    def read_and_end(body: bytes) -> None:
        reading(body)
        [(_, req_no)] = gw.support.known
        gw.support.move(req_no, state, reason="out_of_memory", detail="the card is too small")

    gw.support.read = read_and_end
    answer = gw.client.post("/v1/images/generations", json={"prompt": "x"}, headers=gw.ana)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert "the card is too small" in answer.json()["detail"]
    assert answer.headers["x-should-retry"] == "false"


def test_hanging_up_cancels_the_job(tmp_path: Path) -> None:
    served = Served(tmp_path, sync_timeout_s=60)
    try:
        with pytest.raises(openai.APITimeoutError):
            served.sdk(timeout=0.5).images.generate(prompt="x")
        until(lambda: [view.state for view in served.gw.support.known.values()] == ["cancelled"])
    finally:
        served.close()


def test_a_caller_that_hangs_up_while_the_message_is_queued_cancels_it_once_it_is_read(tmp_path: Path) -> None:
    served = Served(tmp_path, sync_timeout_s=60, queued_wait_s=30)
    served.gw.support.reading = False
    try:
        with pytest.raises(openai.APITimeoutError):
            served.sdk(timeout=0.5).images.generate(prompt="x")
        served.gw.support.read_held()
        until(lambda: [view.state for view in served.gw.support.known.values()] == ["cancelled"])
    finally:
        served.close()


def test_event_streams_arrive_while_the_job_runs_and_end_when_the_caller_leaves(tmp_path: Path) -> None:
    served = Served(tmp_path, keepalive_s=0.02)
    try:
        job = served.gw.submit()
        url = f"{served.url}/v1/jobs/{job['req_no']}/events"
        with httpx.stream("GET", url, headers=served.gw.ana, timeout=10) as answer:
            lines = answer.iter_lines()
            assert next(line for line in lines if line.startswith("event:")) == "event: submitted"
            assert next(line for line in lines if line == ": still here")
            served.gw.support.move(job["req_no"], "running")
            assert next(line for line in lines if line.startswith("event:")) == "event: running"
        metrics = served.gw.app.state.gateway.metrics
        until(lambda: metrics.in_flight._value.get() == 0)
    finally:
        served.close()


def test_a_tenant_has_only_so_many_requests_in_flight(tmp_path: Path) -> None:
    served = Served(tmp_path, tenants={"ana": {"concurrency": 1}})
    try:
        job = served.gw.submit()
        url = f"{served.url}/v1/jobs/{job['req_no']}"
        with httpx.stream("GET", f"{url}/events", headers=served.gw.ana) as answer:
            lines = answer.iter_lines()
            next(lines)
            refused = httpx.get(url, headers=served.gw.ana)
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "too_many_in_flight"
            assert refused.headers["retry-after"] == "1"
            assert httpx.get(url, headers=served.gw.ops).status_code == 200
        until(lambda: httpx.get(url, headers=served.gw.ana).status_code == 200)
    finally:
        served.close()
