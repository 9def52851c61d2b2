"""SS over loopback HTTP, for a gateway in another process. Internal: every call carries the installation's token.

Errors are ``{"error": {"status", "code", "message", "retry_s"}}`` (the last where it is known) and become the same `SupportRefused`
on the other side.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable
from typing import Any

import structlog
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from api.mq.messages import MAX_BYTES
from api.ports import JobEvent, SupportPort, SupportRefused
from api.whatif_request import WhatIfRequest

_log = structlog.get_logger("ss")
KEEPALIVE_S = 10.0


class _Compensation(BaseModel):
    model_config = ConfigDict(extra="forbid")

    action: str
    key: str = Field(default="", max_length=200)


class _Quote(BaseModel):
    model_config = ConfigDict(extra="forbid")

    message: str = Field(max_length=MAX_BYTES)


class _Deployment(BaseModel):
    model_config = ConfigDict(extra="forbid")

    pods: int


class _Unload(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str


class _Device(BaseModel):
    model_config = ConfigDict(extra="forbid")

    gpu: str | None = None


def create_support_app(support: SupportPort, token: str, metrics: Callable[[], bytes] | None = None) -> FastAPI:
    """Return the internal application; `token` is what the gateway must send as its bearer token.

    `metrics` writes the process's figures in Prometheus' text format, served at ``/internal/metrics``.
    """
    if not token:
        raise ValueError("token: SS needs an internal token; take StateDir.secret('internal')")
    expected = f"Bearer {token}".encode()

    def authenticate(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1", "replace")
        if not hmac.compare_digest(given, expected):
            raise SupportRefused(
                401, "bad_token", "the internal token is missing or wrong; both parts read it from the state directory"
            )

    app = FastAPI(
        title="AIGC support service",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        dependencies=[Depends(authenticate)],
    )

    @app.exception_handler(SupportRefused)
    async def _refused(_: Request, error: SupportRefused) -> JSONResponse:
        return _error(error.status, error.code, error.message, error.retry_s)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return _error(422, "invalid", f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, "http", str(error.detail))

    @app.exception_handler(Exception)
    async def _unexpected(_: Request, error: Exception) -> JSONResponse:
        _log.error("internal_error", error=repr(error))
        return _error(500, "internal", "SS failed on this call; its log has the details")

    _job_routes(app, support)
    _model_routes(app, support)
    _operator_routes(app, support)

    @app.get("/internal/metrics")
    async def figures() -> Response:
        return Response(
            metrics() if metrics is not None else b"", media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    return app


def _job_routes(app: FastAPI, support: SupportPort) -> None:
    @app.get("/internal/jobs")
    async def jobs(
        tenant: str, limit: int = Query(50, ge=1, le=500), cursor: str = "", state: str = "", group: str = ""
    ) -> Any:
        page, following = await support.jobs(tenant, limit=limit, cursor=cursor, state=state, group=group)
        return JSONResponse({"jobs": [view.model_dump(mode="json") for view in page], "cursor": following})

    @app.get("/internal/jobs/{req_no}")
    async def job(req_no: str, tenant: str) -> Any:
        return JSONResponse((await support.job(tenant, req_no)).model_dump(mode="json"))

    @app.post("/internal/jobs/{req_no}/cancel")
    async def cancel(req_no: str, tenant: str) -> Any:
        return JSONResponse((await support.cancel(tenant, req_no)).model_dump(mode="json"))

    @app.get("/internal/jobs/{req_no}/why")
    async def why(req_no: str, tenant: str) -> Any:
        return JSONResponse({"reasons": list(await support.why(tenant, req_no))})

    @app.post("/internal/quotes")
    async def quote(order: _Quote) -> Any:
        return JSONResponse(dict(await support.quote(order.message)))

    @app.post("/internal/jobs/{req_no}/compensations")
    async def compensate(req_no: str, tenant: str, order: _Compensation) -> Any:
        return JSONResponse(dict(await support.compensate(tenant, req_no, order.action, order.key)))

    @app.get("/internal/events")
    async def events(tenant: str, req_no: str = "", after: int = 0) -> Any:
        stream = support.events(tenant, req_no, after)
        try:
            first = asyncio.ensure_future(anext(stream))
            # A refusal (404) comes before the first event; it must be an answer, not a broken stream.
            await asyncio.wait({first}, timeout=0.2)
            if first.done() and isinstance(first.exception(), SupportRefused):
                raise first.exception()  # type: ignore[misc]
        except asyncio.CancelledError:
            first.cancel()
            raise
        return StreamingResponse(_sse(stream, first), media_type="text/event-stream")


def _model_routes(app: FastAPI, support: SupportPort) -> None:
    @app.get("/internal/models")
    async def models(tenant: str) -> Any:
        return JSONResponse({"models": [view.model_dump(mode="json") for view in await support.models(tenant)]})

    @app.get("/internal/models/{model_id:path}")
    async def model(model_id: str, tenant: str) -> Any:
        return JSONResponse((await support.model(tenant, model_id)).model_dump(mode="json"))

    @app.put("/internal/models/{model_id:path}")
    async def deploy(model_id: str, tenant: str, order: _Deployment) -> Any:
        return JSONResponse((await support.deploy(tenant, model_id, order.pods)).model_dump(mode="json"))

    @app.delete("/internal/models/{model_id:path}")
    async def delete_model(model_id: str, tenant: str) -> Any:
        await support.delete_model(tenant, model_id)
        return Response(status_code=204)


def _operator_routes(app: FastAPI, support: SupportPort) -> None:
    @app.get("/internal/nodes")
    async def nodes() -> Any:
        return JSONResponse({"nodes": list(await support.nodes())})

    @app.post("/internal/nodes/{node}/drain")
    async def drain(node: str, order: _Device) -> Any:
        await support.drain(node, order.gpu)
        return Response(status_code=204)

    @app.post("/internal/nodes/{node}/uncordon")
    async def uncordon(node: str, order: _Device) -> Any:
        await support.uncordon(node, order.gpu)
        return Response(status_code=204)

    @app.post("/internal/nodes/{node}/unload")
    async def unload(node: str, order: _Unload) -> Any:
        await support.unload(node, order.model)
        return Response(status_code=204)

    @app.get("/internal/queue")
    async def queue() -> Any:
        return JSONResponse(dict(await support.queue()))

    @app.post("/internal/whatif")
    async def whatif(request: WhatIfRequest) -> Any:
        return JSONResponse(dict(await support.whatif(request)))

    @app.get("/internal/health")
    async def health() -> Any:
        return JSONResponse(dict(await support.health()))


async def _sse(stream: AsyncIterator[JobEvent], first: asyncio.Future[JobEvent]) -> AsyncIterator[bytes]:
    """Write events as they come, with a comment now and then, so that both sides notice a dead connection."""
    upcoming = first
    try:
        while True:
            done, _ = await asyncio.wait({upcoming}, timeout=KEEPALIVE_S)
            if not done:
                yield b": alive\n\n"
                continue
            try:
                event = upcoming.result()
            except StopAsyncIteration:
                yield b"event: end\ndata: {}\n\n"
                return
            except SupportRefused as refused:
                yield b"event: refused\ndata: " + _error(refused.status, refused.code, refused.message).body + b"\n\n"
                return
            yield f"id: {event.event_id}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n".encode()
            upcoming = asyncio.ensure_future(anext(stream))
    finally:
        upcoming.cancel()
        await asyncio.gather(upcoming, return_exceptions=True)
        close = getattr(stream, "aclose", None)
        if close is not None:
            await close()


def _error(status: int, code: str, message: str, retry_s: float = 0.0) -> JSONResponse:
    error = {"status": status, "code": code, "message": message, **({"retry_s": retry_s} if retry_s else {})}
    return JSONResponse({"error": error}, status_code=status)
