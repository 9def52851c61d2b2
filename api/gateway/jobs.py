"""The native jobs API: submit, look, list, cancel, why, follow, compensate."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import structlog
from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from api.gateway import sse
from api.gateway.context import AnyCaller, GatewayParts, Job, JobPage, ReqNo, job_of
from api.gateway.problems import declared
from api.gateway.submissions import TERMINAL, JobRequest
from api.ports import JobEvent

log = structlog.get_logger("gateway")
router = APIRouter(prefix="/v1", tags=["jobs"])
STATES = "queued|pending|bound|starting|running|stopping|backoff|finished|cancelled|rejected|dead"
IdempotencyKey = Annotated[
    str,
    Header(
        alias="Idempotency-Key",
        max_length=255,
        pattern=r"^[!-~]*$",
        description="The same key and request give the stored answer again; with another request 422.",
    ),
]


class Blocker(BaseModel):
    """One reason that keeps a job waiting."""

    model_config = ConfigDict(extra="allow")

    reason: str
    message: str = ""
    missing: dict[str, Any] = Field(default_factory=dict)


class Blockers(BaseModel):
    """Every reason that keeps a job waiting; empty when nothing does."""

    data: list[Blocker]


class Compensation(BaseModel):
    """What to make good."""

    model_config = ConfigDict(extra="forbid")

    action: Literal["redeliver_result", "rerun", "release_quota"]


class Compensated(BaseModel):
    """What was done; the same key gives the same answer."""

    model_config = ConfigDict(extra="allow")

    action: str
    req_no: str


@router.post("/jobs", status_code=202, response_model=Job, responses=declared(409, 507), summary="Submit a job")
async def submit_job(
    body: JobRequest,
    request: Request,
    response: Response,
    known: AnyCaller,
    parts: GatewayParts,
    key: IdempotencyKey = "",
) -> Job:
    """Put a job on the queue. Answered when it is durable there; follow `Location` for its state."""
    outcome = await parts.submissions.submit(known, body, key, traceparent=request.headers.get("traceparent", ""))
    job = job_of(parts, request, outcome.view)
    response.headers["Location"] = job.links.self
    response.headers["Retry-After"] = "1"
    if outcome.replayed:
        response.headers["Idempotent-Replayed"] = "true"
    log.info(
        "job_accepted",
        reqNo=job.req_no,
        tenant=job.tenant,
        method=job.method,
        priority=job.priority,
        replayed=outcome.replayed,
    )
    return job


@router.get("/jobs", response_model=JobPage, responses=declared(), summary="List jobs, newest first")
async def list_jobs(
    request: Request,
    known: AnyCaller,
    parts: GatewayParts,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
    cursor: Annotated[str, Query(max_length=200, pattern=r"^[A-Za-z0-9._:=-]*$")] = "",
    state: Annotated[str, Query(pattern=rf"^({STATES})?$", description=f"One of {STATES.replace('|', ', ')}.")] = "",
    group: Annotated[str, Query(max_length=128, pattern=r"^[A-Za-z0-9._:@/-]*$")] = "",
) -> JobPage:
    """List the caller's jobs (an operator: everybody's)."""
    views, following = await parts.support.jobs(known.scope, limit=limit, cursor=cursor, state=state, group=group)
    return JobPage(data=[job_of(parts, request, view) for view in views], next_cursor=following)


@router.get("/jobs/{req_no}", response_model=Job, responses=declared(), summary="Look at a job")
async def get_job(req_no: ReqNo, request: Request, response: Response, known: AnyCaller, parts: GatewayParts) -> Job:
    """Return a job, with links to its files once it has finished."""
    view = await parts.submissions.job(known.scope, req_no)
    if view.state not in TERMINAL:
        response.headers["Retry-After"] = "1"
    return job_of(parts, request, view)


@router.delete("/jobs/{req_no}", response_model=Job, responses=declared(), summary="Cancel a job")
@router.post("/jobs/{req_no}/cancel", response_model=Job, responses=declared(), summary="Cancel a job")
async def cancel_job(req_no: ReqNo, request: Request, known: AnyCaller, parts: GatewayParts) -> Job:
    """Cancel, and answer when it is certain: the final state, whichever of result and cancel came first. Idempotent."""
    view = await parts.submissions.cancel(known.scope, req_no)
    log.info("job_cancelled", reqNo=req_no, tenant=view.tenant, state=view.state)
    return job_of(parts, request, view)


@router.get("/jobs/{req_no}/why", response_model=Blockers, responses=declared(), summary="Why does a job wait?")
async def why_job(req_no: ReqNo, known: AnyCaller, parts: GatewayParts) -> Blockers:
    """Name every reason that keeps a job waiting, with what is missing."""
    view = await parts.submissions.job(known.scope, req_no)
    if view.state == "queued":
        return Blockers(
            data=[Blocker(reason="QUEUED", message="The job's message has not been read from the queue yet.")]
        )
    return Blockers(data=[Blocker.model_validate(dict(one)) for one in await parts.support.why(view.tenant, req_no)])


@router.get(
    "/jobs/{req_no}/events", responses={**declared(), **sse.DECLARED}, response_class=Response, summary="Follow a job"
)
async def job_events(
    req_no: ReqNo,
    request: Request,
    known: AnyCaller,
    parts: GatewayParts,
    _after: Annotated[str, Header(alias="Last-Event-ID", max_length=18, pattern=r"^[0-9]*$")] = "",
) -> Response:
    """Stream the changes of a job as server-sent events, each with the full state after it; ends with the job.

    Reconnect with `Last-Event-ID` to go on behind the last event seen.
    """
    changes = parts.submissions.events(known.scope, req_no, sse.last_event_id(request))
    await parts.submissions.job(known.scope, req_no)
    return sse.stream(_written(changes, request, parts))


@router.get("/events", responses={**declared(), **sse.DECLARED}, response_class=Response, summary="Follow all jobs")
async def all_events(
    request: Request,
    known: AnyCaller,
    parts: GatewayParts,
    _after: Annotated[str, Header(alias="Last-Event-ID", max_length=18, pattern=r"^[0-9]*$")] = "",
) -> Response:
    """Stream the changes of all the caller's jobs, for ever."""
    changes = parts.support.events(known.scope, "", sse.last_event_id(request))
    return sse.stream(_written(changes, request, parts))


@router.post(
    "/jobs/{req_no}/compensations", response_model=Compensated, responses=declared(409), summary="Make a job good again"
)
async def compensate_job(
    req_no: ReqNo, body: Compensation, known: AnyCaller, parts: GatewayParts, key: IdempotencyKey = ""
) -> Compensated:
    """Deliver the result message again, re-run a dead-lettered task, or give back reserved quota. Idempotent by key, recorded."""
    view = await parts.submissions.job(known.scope, req_no)
    done = await parts.support.compensate(view.tenant, req_no, body.action, key)
    log.info("job_compensated", reqNo=req_no, action=body.action, by=known.key_id)
    return Compensated.model_validate({**done, "action": body.action, "req_no": req_no})


async def _written(changes: AsyncIterator[JobEvent], request: Request, parts: GatewayParts) -> AsyncIterator[bytes]:
    yield sse.comment("open")
    async for change in sse.with_pauses(changes, parts.config.keepalive_s):
        if change is None:
            yield sse.comment("still here")
            continue
        data = {**change.model_dump(exclude={"view"}), "view": job_of(parts, request, change.view).model_dump()}
        yield sse.event(data, kind=change.kind, event_id=change.event_id or None)
