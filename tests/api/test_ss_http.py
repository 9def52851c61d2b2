"""SS over loopback HTTP: the client gives what the service gives, refusals and streams included."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn

from api.ports import JobEvent, JobView, ModelView, SupportRefused
from api.support.client import SupportClient, wait_until_ready
from api.support.http import create_support_app
from api.whatif_request import WhatIfRequest

TOKEN = "t" * 64


def view(state: str = "running", **fields: Any) -> JobView:
    return JobView(
        req_no=str(uuid.UUID(int=1)),
        tenant="acme",
        task_type="GC",
        method="sleep",
        state=state,
        submitted_at=1.5,
        **fields,
    )


class Scripted:
    """A support port that answers from a script and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.left = asyncio.Event()

    async def job(self, tenant: str, req_no: str) -> JobView:
        self.asked.append(("job", tenant, req_no))
        if req_no == "absent":
            raise SupportRefused(404, "job_not_found", "there is no job 'absent'")
        if req_no == "broken":
            raise RuntimeError("a secret detail")
        return view(parameters={"seconds": 1.0}, result={"files": []})

    async def jobs(
        self, tenant: str, *, limit: int = 50, cursor: str = "", state: str = "", group: str = ""
    ) -> tuple[Sequence[JobView], str]:
        self.asked.append(("jobs", tenant, limit, cursor, state, group))
        return [view(), view("finished")], "17"

    async def cancel(self, tenant: str, req_no: str) -> JobView:
        self.asked.append(("cancel", tenant, req_no))
        return view("cancelled")

    async def why(self, tenant: str, req_no: str) -> Sequence[Mapping[str, Any]]:
        return [{"reason": "no_gpu", "message": "no GPU", "missing": {"nodes": 2}}]

    async def events(self, tenant: str, req_no: str = "", after: int = 0) -> AsyncIterator[JobEvent]:
        self.asked.append(("events", tenant, req_no, after))
        if req_no == "absent":
            raise SupportRefused(404, "job_not_found", "there is no job 'absent'")
        try:
            yield JobEvent(event_id=after + 1, kind="running", at=1.0, view=view(detail="zwei\nZeilen"))
            if not req_no:
                await asyncio.Event().wait()
            if req_no == "cut":
                raise SupportRefused(503, "support_down", "SS is going down")
            yield JobEvent(event_id=after + 2, kind="finished", at=2.0, view=view("finished"))
        finally:
            self.left.set()

    async def compensate(self, tenant: str, req_no: str, action: str, key: str = "") -> Mapping[str, Any]:
        return {"action": action, "key": key}

    async def models(self, tenant: str) -> Sequence[ModelView]:
        return [ModelView(model_id="tiny", kind="builtin")]

    async def model(self, tenant: str, model_id: str) -> ModelView:
        return ModelView(model_id=model_id, kind="local", tenant=tenant)

    async def deploy(self, tenant: str, model_id: str, pods: int) -> ModelView:
        return ModelView(model_id=model_id, kind="local", deployed_pods=pods)

    async def delete_model(self, tenant: str, model_id: str) -> None:
        self.asked.append(("delete", tenant, model_id))
        raise SupportRefused(409, "in_use", "a job uses it")

    async def nodes(self) -> Sequence[Mapping[str, Any]]:
        return [{"name": "n1"}]

    async def drain(self, node: str, gpu: str | None = None) -> None:
        self.asked.append(("drain", node, gpu))

    async def uncordon(self, node: str, gpu: str | None = None) -> None:
        self.asked.append(("uncordon", node, gpu))

    async def unload(self, node: str, model_id: str) -> None:
        self.asked.append(("unload", node, model_id))

    async def queue(self) -> Mapping[str, Any]:
        return {"mq": {}}

    async def whatif(self, request: WhatIfRequest) -> Mapping[str, Any]:
        self.asked.append(("whatif", request))
        return {"lines": []}

    async def health(self) -> Mapping[str, Any]:
        return {"ready": True, "modules": {}}


@pytest.fixture
def scripted() -> Scripted:
    return Scripted()


def run(scripted: Scripted, use: Callable[[SupportClient], Any], token: str = TOKEN) -> Any:
    async def inside() -> Any:
        client = SupportClient(
            "http://ss",
            token,
            transport=httpx.ASGITransport(create_support_app(scripted, TOKEN), raise_app_exceptions=False),
        )
        try:
            return await asyncio.wait_for(use(client), 30)
        finally:
            await client.aclose()

    return asyncio.run(inside())


def test_every_call_arrives_and_its_answer_comes_back(scripted: Scripted) -> None:
    async def use(client: SupportClient) -> None:
        job = await client.job("acme", "r1")
        assert (job.parameters, job.result, job.submitted_at) == ({"seconds": 1.0}, {"files": []}, 1.5)
        page, cursor = await client.jobs("acme", limit=2, cursor="9", state="running", group="a b")
        assert ([job.state for job in page], cursor) == (["running", "finished"], "17")
        assert (await client.cancel("acme", "r1")).state == "cancelled"
        assert (await client.why("acme", "r1"))[0]["missing"] == {"nodes": 2}
        assert await client.compensate("acme", "r1", "rerun", "k") == {"action": "rerun", "key": "k"}
        assert [model.model_id for model in await client.models("acme")] == ["tiny"]
        assert (await client.model("acme", "org/sd 1.5")).model_id == "org/sd 1.5"
        assert (await client.deploy("acme", "org/sd", 2)).deployed_pods == 2
        assert await client.nodes() == [{"name": "n1"}]
        await client.drain("n1", "gpu-0")
        await client.uncordon("n1")
        await client.unload("n1", "org/sd 1.5")
        assert await client.queue() == {"mq": {}}
        assert await client.whatif(WhatIfRequest(add_nodes=["1xa100"], load=1.5)) == {"lines": []}
        assert (await client.health())["ready"]

    run(scripted, use)
    assert ("jobs", "acme", 2, "9", "running", "a b") in scripted.asked
    assert ("drain", "n1", "gpu-0") in scripted.asked
    assert ("uncordon", "n1", None) in scripted.asked
    assert ("unload", "n1", "org/sd 1.5") in scripted.asked
    assert ("whatif", WhatIfRequest(add_nodes=["1xa100"], load=1.5)) in scripted.asked


@pytest.mark.parametrize(
    ("use", "status", "code"),
    [
        (lambda client: client.job("acme", "absent"), 404, "job_not_found"),
        (lambda client: client.delete_model("acme", "m"), 409, "in_use"),
        (lambda client: client.job("acme", "broken"), 500, "internal"),
        (lambda client: client.jobs("acme", limit=0), 422, "invalid"),
        (lambda client: client.compensate("acme", "r1", None), 422, "invalid"),
    ],
)
def test_a_refusal_arrives_as_the_same_refusal(
    scripted: Scripted, use: Callable[[SupportClient], Any], status: int, code: str
) -> None:
    with pytest.raises(SupportRefused) as caught:
        run(scripted, use)
    assert (caught.value.status, caught.value.code) == (status, code)
    assert "secret" not in caught.value.message


def test_without_the_token_nothing_is_answered(scripted: Scripted) -> None:
    for token in ("", "wrong", "t" * 63):
        with pytest.raises(SupportRefused) as caught:
            run(scripted, lambda client: client.job("acme", "r1"), token)
        assert caught.value.status == 401
    assert scripted.asked == []
    with pytest.raises(ValueError, match="token"):
        create_support_app(scripted, "")


def test_events_arrive_in_order_and_end_with_the_job(scripted: Scripted) -> None:
    async def use(client: SupportClient) -> list[JobEvent]:
        return [event async for event in client.events("acme", "r1", 41)]

    events = run(scripted, use)
    assert [(event.event_id, event.kind) for event in events] == [(42, "running"), (43, "finished")]
    assert events[0].view.detail == "zwei\nZeilen"


def test_events_of_an_absent_job_are_refused(scripted: Scripted) -> None:
    async def use(client: SupportClient) -> list[JobEvent]:
        return [event async for event in client.events("acme", "absent")]

    with pytest.raises(SupportRefused, match="absent"):
        run(scripted, use)


def test_a_stream_that_ends_before_its_job_is_an_error(scripted: Scripted) -> None:
    async def use(client: SupportClient) -> None:
        stream = client.events("acme", "cut")
        assert (await anext(stream)).event_id == 1
        await anext(stream)

    with pytest.raises(SupportRefused) as caught:
        run(scripted, use)
    assert (caught.value.status, caught.value.code) == (503, "support_down")


def test_a_scheduler_that_is_down_is_a_503_and_unwell(scripted: Scripted) -> None:
    async def inside() -> None:
        client = SupportClient("http://127.0.0.1:9", TOKEN)
        with pytest.raises(SupportRefused) as caught:
            await client.job("acme", "r1")
        assert (caught.value.status, caught.value.code) == (503, "support_down")
        with pytest.raises(SupportRefused, match="broke"):
            _ = [event async for event in client.events("acme")]
        health = await client.health()
        assert not health["ready"]
        assert not await wait_until_ready(client, 0.01)
        await client.aclose()

    asyncio.run(inside())


@asynccontextmanager
async def served(scripted: Scripted) -> AsyncIterator[str]:
    server = uvicorn.Server(
        uvicorn.Config(
            create_support_app(scripted, TOKEN), port=0, log_config=None, lifespan="off", timeout_graceful_shutdown=1
        )
    )
    task = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


def test_a_listener_that_hangs_up_is_let_go(scripted: Scripted) -> None:
    async def inside() -> None:
        async with served(scripted) as url:
            client = SupportClient(url, TOKEN)
            stream = client.events("acme")
            assert (await anext(stream)).event_id == 1
            await stream.aclose()
            await asyncio.wait_for(scripted.left.wait(), 20)
            await client.aclose()

    asyncio.run(inside())


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() <= before + 1, "asyncio's default executor may keep one"
