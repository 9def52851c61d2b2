"""`/v1/images/generations` as the openai SDK expects it: one call in, pictures out.

The call is a job like any other - queued, ranked, scheduled -, so that a caller who hangs up or waits too long cancels it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
from collections.abc import Mapping
from typing import Any, Literal

import structlog
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from api.gateway import image_stream, sse
from api.gateway.context import FILE_ID, AnyCaller, Gateway, GatewayParts
from api.gateway.fields import Number, Whole
from api.gateway.jobs import IdempotencyKey
from api.gateway.keys import Caller
from api.gateway.partials import Partials, preview_every
from api.gateway.problems import Refused, declared, no_retry
from api.gateway.submissions import TERMINAL, JobRequest
from api.ports import JobView

log = structlog.get_logger("gateway")
router = APIRouter(prefix="/v1", tags=["images"])
_SIZE = re.compile(r"([1-9][0-9]{1,4})x([1-9][0-9]{1,4})")
_PARAMETERS = ("negative_prompt", "seed", "steps", "guidance", "scheduler", "adapter_scale", "adapters")


class ImagesRequest(BaseModel):
    """Pictures from a text. Fields after `user` are the platform's own; the openai SDK sends them by `extra_body`."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=2000)
    model: str | None = Field(default=None, max_length=200)
    n: Whole | None = Field(default=1, ge=1, le=10)
    size: str | None = Field(default=None, description="WIDTHxHEIGHT in multiples of 8, or auto for the model's own.")
    quality: str | None = Field(default=None, description="Accepted; use steps instead.")
    style: str | None = Field(default=None, description="Accepted; say it in the prompt.")
    output_format: Literal["png"] | None = None
    output_compression: Whole | None = Field(default=None, ge=0, le=100, description="Accepted; PNG is lossless.")
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    response_format: Literal["url", "b64_json"] | None = Field(default=None, description="Default: b64_json.")
    stream: bool | None = Field(default=None, strict=True, description="Server-sent events instead of one answer.")
    partial_images: Whole | None = Field(
        default=None, ge=0, le=3, description="Small previews to send on the way, at most; only where `stream` is."
    )
    user: str | None = Field(default=None, max_length=256)
    negative_prompt: str | None = None
    seed: Whole | None = None
    steps: Whole | None = None
    guidance: Number | None = None
    scheduler: str | None = None
    adapter_scale: Number | None = None
    adapters: list[dict[str, Any]] | None = Field(
        default=None, max_length=8, description="Further LoRAs of the same base: model, weight."
    )
    priority: Whole = Field(default=0, ge=-1000, le=1000)
    group: str = Field(default="", max_length=128, pattern=r"^[A-Za-z0-9._:@/-]*$")
    deadline_s: Number | None = Field(default=None, gt=0, le=30 * 86_400)
    timeout_s: Number | None = Field(default=None, gt=0, le=3600, description="Wait this long at most, then cancel.")


class Picture(BaseModel):
    """One picture: its bytes, or a link that expires."""

    b64_json: str | None = None
    url: str | None = None
    file_id: str
    media_type: str


class ImagesResponse(BaseModel):
    """Pictures in the order of their seeds."""

    model_config = ConfigDict(extra="allow")

    created: int
    data: list[Picture]
    output_format: str = "png"
    size: str | None = None
    req_no: str
    model: str
    metadata: dict[str, Any] = Field(default_factory=dict)


@router.post(
    "/images/generations",
    response_model=ImagesResponse,
    response_model_exclude_none=True,
    responses={
        **declared(409, 507),
        200: {"description": "The pictures.", "content": sse.EVENT_CONTENT},
    },
    summary="Generate pictures and wait",
)
async def generate(
    body: ImagesRequest,
    request: Request,
    response: Response,
    known: AnyCaller,
    parts: GatewayParts,
    key: IdempotencyKey = "",
) -> ImagesResponse | Response:
    """Run a generation and answer with its pictures. Hanging up cancels it, as does waiting longer than the time-out (504)."""
    return await answered(job_request(body), body, request, response, known, parts, key)


async def answered(
    job: JobRequest,
    body: ImagesRequest,
    request: Request,
    response: Response,
    known: Caller,
    parts: Gateway,
    key: str,
    kind: str = "image_generation",
) -> ImagesResponse | Response:
    """Submit a job and answer with its pictures, as the body wants them."""
    outcome = await parts.submissions.submit(
        known, job, key, source="images", traceparent=request.headers.get("traceparent", "")
    )
    req_no = outcome.view.req_no
    limit_s = min(body.timeout_s or parts.config.sync_timeout_s, parts.config.sync_timeout_s)
    location = {"X-Job-Location": f"{parts.base_url(request)}/v1/jobs/{req_no}"}
    if body.stream:

        async def completed(view: JobView) -> list[Mapping[str, Any]]:
            return await _completed(parts, known, request, body, view)

        partials = Partials(parts, body.partial_images or 0, kind)
        source = image_stream.pictures(parts, known.scope, req_no, limit_s, completed, _failure, kind, partials)
        return sse.stream(source, location)
    response.headers.update(location)
    view = await _ended(parts, known, request, req_no, limit_s)
    if view.state != "finished":
        raise _failure(view)
    return await _answer(parts, known, request, body, view)


def job_request(body: ImagesRequest) -> JobRequest:
    """Return the job that an images request asks for; raises Refused 422 for a size that is none."""
    parameters: dict[str, Any] = {"prompt": body.prompt, "count": body.n or 1}
    parameters |= {name: value for name in _PARAMETERS if (value := getattr(body, name)) is not None}
    if body.size not in (None, "auto"):
        match = _SIZE.fullmatch(body.size or "")
        if match is None:
            raise Refused(422, "invalid_parameter", "size: write WIDTHxHEIGHT, such as 512x512, or auto.", param="size")
        parameters |= {"width": int(match.group(1)), "height": int(match.group(2))}
    if body.model:
        parameters["model"] = body.model
    if body.stream and body.partial_images:
        parameters["preview_every"] = preview_every(body.steps, body.partial_images)
    return JobRequest(
        method="text_to_image",
        parameters=parameters,
        group=body.group,
        priority=body.priority,
        deadline_s=body.deadline_s,
    )


async def _ended(parts: Gateway, known: Caller, request: Request, req_no: str, limit_s: float) -> JobView:
    """Wait for the job's end; a time-out and a caller that hangs up cancel it."""
    waiting = asyncio.create_task(_follow(parts, known.scope, req_no))
    gone = asyncio.create_task(_hung_up(request))
    try:
        await asyncio.wait([waiting, gone], timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        hung_up = gone.done()
        view = await parts.submissions.cancel(known.scope, req_no)
        log.info("generation_cancelled", reqNo=req_no, hung_up=hung_up, state=view.state)
        if view.state == "finished":
            return view
        if hung_up:
            raise Refused(400, "client_closed", "The caller hung up; the job was cancelled.")
        message = (
            f"The pictures were not ready within {limit_s:g} s; job {req_no} was cancelled. Use /v1/jobs for long work."
        )
        raise Refused(504, "timeout", message, headers=no_retry())
    finally:
        for task in (waiting, gone):
            task.cancel()
        await asyncio.gather(waiting, gone, return_exceptions=True)


async def _follow(parts: Gateway, scope: str, req_no: str) -> JobView:
    async with contextlib.aclosing(parts.submissions.events(scope, req_no)) as changes:
        async for change in changes:
            if change.view.state in TERMINAL:
                return change.view
    return await parts.submissions.job(scope, req_no)


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _failure(view: JobView) -> Refused:
    why = ": ".join(part for part in (view.reason, view.detail[-1000:]) if part) or "no reason was given"
    if view.state == "cancelled":
        return Refused(409, "job_cancelled", f"Job {view.req_no} was cancelled: {why}.", headers=no_retry())
    if view.state == "rejected":
        return Refused(422, "job_rejected", f"The scheduler refused job {view.req_no}: {why}.", headers=no_retry())
    return Refused(500, "generation_failed", f"Job {view.req_no} failed: {why}.", headers=no_retry())


async def _answer(
    parts: Gateway, known: Caller, request: Request, body: ImagesRequest, view: JobView
) -> ImagesResponse:
    result = view.result or {}
    files = [file for file in result.get("files") or [] if str(file.get("media_type", "")).startswith("image/")]
    ids = [str(file["file_id"]) for file in files if FILE_ID.fullmatch(str(file.get("file_id", "")))]
    parts.records.own(known.tenant, ids, parts.clock_s())
    pictures = []
    for file_id, file in zip(ids, files, strict=True):
        picture = Picture(file_id=file_id, media_type=str(file["media_type"]))
        if body.response_format == "url":
            picture.url = parts.link(request, file_id)
        else:
            content = await asyncio.to_thread(_content, parts, file_id)
            picture.b64_json = base64.b64encode(content).decode()
        pictures.append(picture)
    metadata = result.get("metadata") if isinstance(result.get("metadata"), dict) else {}
    return ImagesResponse(
        created=int(view.finished_at or parts.clock_s()),
        data=pictures,
        size=body.size if body.size != "auto" else None,
        req_no=view.req_no,
        model=view.model,
        metadata=metadata or {},
    )


async def _completed(
    parts: Gateway, known: Caller, request: Request, body: ImagesRequest, view: JobView
) -> list[Mapping[str, Any]]:
    """Return the fields of each picture's event."""
    answer = await _answer(parts, known, request, body.model_copy(update={"response_format": "b64_json"}), view)
    common = {
        "created_at": answer.created,
        "background": "opaque",
        "output_format": "png",
        "quality": body.quality or "auto",
        "size": body.size or "auto",
        "req_no": view.req_no,
    }
    return [{**common, "b64_json": one.b64_json, "file_id": one.file_id} for one in answer.data]


def _content(parts: Gateway, file_id: str) -> bytes:
    try:
        return b"".join(parts.store.read(file_id))
    except FileNotFoundError:
        raise Refused(500, "result_lost", f"File {file_id} of the result is gone.", headers=no_retry()) from None
