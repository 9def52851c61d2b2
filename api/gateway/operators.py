"""What operators see and do: nodes, queue, keys, alerts, logs, metrics - and what everybody may ask: is it alive, is it ready."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated, Any, Literal

import structlog
from fastapi import APIRouter, Header, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from api.gateway import sse
from api.gateway.context import Gateway, GatewayParts, OperatorCaller
from api.gateway.fields import Number
from api.gateway.problems import Refused, declared
from api.monitoring.logs import LEVELS, LogLine
from api.monitoring.metrics import CONTENT_TYPE
from api.whatif_request import WhatIfRequest

log = structlog.get_logger("gateway")
router = APIRouter(prefix="/v1", tags=["operators"])
probes = APIRouter(tags=["probes"])
NodeName = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]
KeyId = Annotated[str, Path(pattern=r"^[0-9a-f]{16}$")]


class Listed(BaseModel):
    """Rows as the support service describes them."""

    data: list[dict[str, Any]]


class DeviceChoice(BaseModel):
    """The whole node, or one of its GPUs."""

    model_config = ConfigDict(extra="forbid")

    gpu: str | None = Field(default=None, max_length=128, description="UUID of one GPU; absent: the whole node.")


class NodeOrder(BaseModel):
    """An order that was taken."""

    node: str
    gpu: str | None
    order: Literal["drain", "uncordon"]


class ModelChoice(BaseModel):
    """A model on a node."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1, max_length=200)


class UnloadOrder(BaseModel):
    """An order about a model on a node that was taken."""

    node: str
    model: str
    order: Literal["unload"]


class NewKey(BaseModel):
    """A key to make."""

    model_config = ConfigDict(extra="forbid")

    tenant: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")
    role: Literal["user", "operator"] = "user"
    label: str = Field(default="", max_length=200)
    ttl_s: Number | None = Field(default=None, gt=0, le=10 * 366 * 86_400)


class Key(BaseModel):
    """What is kept about a key. Times are Unix seconds."""

    key_id: str
    tenant: str
    role: Literal["user", "operator"]
    label: str
    created_at: float
    expires_at: float | None
    revoked_at: float | None


class FreshKey(Key):
    """A key just made; `key` is shown this once."""

    key: str


class Keys(BaseModel):
    """All keys, oldest first."""

    data: list[Key]


class Health(BaseModel):
    """Whether the platform takes work."""

    model_config = ConfigDict(extra="allow")

    ready: bool
    modules: dict[str, bool] = Field(default_factory=dict)


@router.get("/nodes", response_model=Listed, responses=declared(), summary="List nodes")
async def nodes(_: OperatorCaller, parts: GatewayParts) -> Listed:
    """Return every node with its GPUs, their use, its Pods and its state."""
    return Listed(data=[dict(node) for node in await parts.support.nodes()])


@router.post("/nodes/{node}/drain", response_model=NodeOrder, responses=declared(409), summary="Drain a node")
async def drain(
    node: NodeName, known: OperatorCaller, parts: GatewayParts, body: DeviceChoice | None = None
) -> NodeOrder:
    """Start nothing new on a node, or on one of its GPUs; what runs there finishes."""
    gpu = body.gpu if body else None
    await parts.support.drain(node, gpu)
    log.info("node_drained", node=node, gpu=gpu, by=known.key_id)
    return NodeOrder(node=node, gpu=gpu, order="drain")


@router.post(
    "/nodes/{node}/uncordon", response_model=NodeOrder, responses=declared(409), summary="Let a node work again"
)
async def uncordon(
    node: NodeName, known: OperatorCaller, parts: GatewayParts, body: DeviceChoice | None = None
) -> NodeOrder:
    """Let a node, or one of its GPUs, take work again."""
    gpu = body.gpu if body else None
    await parts.support.uncordon(node, gpu)
    log.info("node_uncordoned", node=node, gpu=gpu, by=known.key_id)
    return NodeOrder(node=node, gpu=gpu, order="uncordon")


@router.post(
    "/nodes/{node}/unload", response_model=UnloadOrder, responses=declared(), summary="Take a model off a node"
)
async def unload(node: NodeName, known: OperatorCaller, parts: GatewayParts, body: ModelChoice) -> UnloadOrder:
    """Let a model's idle Pods and its files leave a node; what is in use or deployed stays."""
    await parts.support.unload(node, body.model)
    log.info("model_unloaded", node=node, model=body.model, by=known.key_id)
    return UnloadOrder(node=node, model=body.model, order="unload")


@router.get("/queue", response_model=dict[str, Any], responses=declared(), summary="Look at the queue")
async def queue(_: OperatorCaller, parts: GatewayParts) -> dict[str, Any]:
    """Return queue lengths by tenant, priority and reason, and the counters of engine and queue."""
    return dict(await parts.support.queue())


@router.post("/whatif", response_model=dict[str, Any], responses=declared(409), summary="Ask what if")
async def whatif(body: WhatIfRequest, known: OperatorCaller, parts: GatewayParts) -> dict[str, Any]:
    """Fork the live journal, change nodes, policy or load, and return the difference by tenant with 95% intervals.

    The platform goes on undisturbed: a process of its own simulates, one question at a time (409 meanwhile), for at most two
    minutes (504 beyond).
    """
    log.info("whatif_asked", by=known.key_id, **body.model_dump(exclude_defaults=True))
    return dict(await parts.support.whatif(body))


@router.get("/alerts", response_model=Listed, responses=declared(), summary="List alerts")
async def alerts(_: OperatorCaller, parts: GatewayParts) -> Listed:
    """Return the abnormal states that hold now, worst first."""
    return Listed(data=[asdict(alert) for alert in parts.watch.alerts()])


@router.get("/keys", response_model=Keys, responses=declared(), summary="List API keys")
async def list_keys(_: OperatorCaller, parts: GatewayParts) -> Keys:
    """Return every key's record; the keys themselves are not kept."""
    return Keys(data=[Key(**asdict(record)) for record in parts.keys.list()])


@router.post("/keys", status_code=201, response_model=FreshKey, responses=declared(), summary="Make an API key")
async def make_key(body: NewKey, known: OperatorCaller, parts: GatewayParts) -> FreshKey:
    """Make a key. It is shown once, in this answer."""
    key, record = parts.keys.create(body.tenant, body.role, label=body.label, ttl_s=body.ttl_s)
    log.info("key_made", key_id=record.key_id, tenant=record.tenant, role=record.role, by=known.key_id)
    return FreshKey(key=key, **asdict(record))


@router.delete("/keys/{key_id}", response_model=Key, responses=declared(), summary="Revoke an API key")
async def revoke_key(key_id: KeyId, known: OperatorCaller, parts: GatewayParts) -> Key:
    """Revoke a key from now on. Revoking twice changes nothing."""
    record = parts.keys.revoke(key_id)
    if record is None:
        raise Refused(404, "not_found", "There is no such key.")
    log.info("key_revoked", key_id=key_id, by=known.key_id)
    return Key(**asdict(record))


@router.get("/logs", responses={**declared(), **sse.DECLARED}, response_class=Response, summary="Follow the log")
async def logs(
    request: Request,
    _: OperatorCaller,
    parts: GatewayParts,
    module: Annotated[str, Query(max_length=64)] = "",
    req_no: Annotated[str, Query(max_length=64)] = "",
    level: Annotated[Literal["debug", "info", "warning", "error", "critical"], Query()] = "debug",
    follow: Annotated[bool, Query(description="False: the lines kept now, then end.")] = True,
    _after: Annotated[str, Header(alias="Last-Event-ID", max_length=18, pattern=r"^[0-9]*$")] = "",
) -> Response:
    """Stream the log's lines as server-sent events, from the oldest that is kept; filter by module, job and level."""
    least = LEVELS.index(level)

    def wanted(line: LogLine) -> bool:
        fields = line.fields
        rank = LEVELS.index(fields["level"]) if fields.get("level") in LEVELS else 1
        return (
            rank >= least
            and (not module or fields.get("module") == module)
            and (not req_no or req_no in (fields.get("reqNo"), fields.get("req_no")))
        )

    return sse.stream(_log_events(parts, sse.last_event_id(request), follow, wanted))


async def _log_events(parts: Gateway, after: int, follow: bool, wanted: Any) -> AsyncIterator[bytes]:
    yield sse.comment("open")
    if not follow:
        for line in parts.logs.after(after):
            if wanted(line):
                yield sse.event(line.fields, kind="log", event_id=line.number)
        return
    async for found in sse.with_pauses(parts.logs.follow(after), parts.config.keepalive_s):
        if found is None:
            yield sse.comment("still here")
        elif wanted(found):
            yield sse.event(found.fields, kind="log", event_id=found.number)


@probes.get("/healthz", summary="Is it alive?", openapi_extra={"security": []})
async def healthz() -> dict[str, str]:
    """Answer as long as the process serves requests."""
    return {"status": "ok"}


@probes.get(
    "/readyz",
    response_model=Health,
    responses={503: {"model": Health, "description": "Not ready."}},
    summary="Does it take work?",
    openapi_extra={"security": []},
)
async def readyz(response: Response, parts: GatewayParts) -> Health:
    """Answer 200 when every module works, else 503 with the ones that do not. Details are in /v1/queue and the log."""
    try:
        health = await parts.support.health()
    except Exception as error:
        log.warning("support_unreachable", error=repr(error))
        health = {"ready": False, "modules": {"support": {"ok": False}}}
    found = {str(name): bool(module.get("ok")) for name, module in dict(health.get("modules", {})).items()}
    answer = Health(ready=bool(health.get("ready")), modules={"gateway": True, **found})
    response.status_code = 200 if answer.ready else 503
    return answer


@probes.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **declared()},
    summary="Prometheus metrics",
)
async def metrics(request: Request, parts: GatewayParts) -> Response:
    """Return the metrics of the gateway and of what it sees of every module, in Prometheus' text format."""
    known = request.scope["state"].get("caller")
    if not parts.config.metrics_open and (known is None or known.role != "operator"):
        raise Refused(403, "operators_only", "Only operators may read the metrics.")
    await parts.watch.refresh()
    return Response(parts.metrics.exposition(), media_type=CONTENT_TYPE)
