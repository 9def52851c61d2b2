"""`/v1/images/edits` as the openai SDK sends it: a picture, maybe a mask, and what to make of them; one call in, pictures out.

The mask's transparent part is painted anew, as that contract has it; a mask without transparency says it by its white. A picture
that is transparent in places is its own mask; without any mask the whole picture may change.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Request, Response, UploadFile
from pydantic import BaseModel, ConfigDict, Field

from api.gateway import images, sse
from api.gateway.context import AnyCaller, Gateway, GatewayParts
from api.gateway.files import kept
from api.gateway.images import ImagesRequest, ImagesResponse
from api.gateway.jobs import IdempotencyKey
from api.gateway.keys import Caller
from api.gateway.problems import Refused, declared

router = APIRouter(prefix="/v1", tags=["images"])
_OWN = ("image", "images", "mask", "strength", "input_fidelity")
"""Fields that an images request has not."""


class EditsRequest(BaseModel):
    """A picture and what to make of it. Fields after `user` are the platform's own; the openai SDK sends them by `extra_body`."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    prompt: str = Field(min_length=1, max_length=2000)
    image: UploadFile | None = Field(default=None, description="PNG, JPEG or WebP.")
    images: list[UploadFile] | None = Field(
        default=None, alias="image[]", description="The same; one picture is taken."
    )
    mask: UploadFile | None = Field(default=None, description="As large as the picture; transparent where to paint.")
    model: str | None = Field(default=None, max_length=200)
    n: int | None = Field(default=1, ge=1, le=10)
    size: str | None = Field(default=None, description="WIDTHxHEIGHT in multiples of 8; otherwise the picture's shape.")
    quality: str | None = Field(default=None, description="Accepted; use steps instead.")
    input_fidelity: Literal["high", "low"] | None = Field(
        default=None, description="Without a mask: high changes half as much; strength says it exactly."
    )
    output_format: Literal["png"] | None = None
    output_compression: int | None = Field(default=None, ge=0, le=100, description="Accepted; PNG is lossless.")
    background: Literal["auto", "opaque"] | None = None
    response_format: Literal["url", "b64_json"] | None = Field(default=None, description="Default: b64_json.")
    stream: bool | None = Field(default=None, description="Server-sent events instead of one answer.")
    partial_images: int | None = Field(
        default=None, ge=0, le=3, description="Small previews to send on the way, at most; only where `stream` is."
    )
    user: str | None = Field(default=None, max_length=256)
    strength: float | None = Field(default=None, gt=0, le=1)
    negative_prompt: str | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None
    adapter_scale: float | None = None
    priority: int = Field(default=0, ge=-1000, le=1000)
    group: str = Field(default="", max_length=128, pattern=r"^[A-Za-z0-9._:@/-]*$")
    deadline_s: float | None = Field(default=None, gt=0, le=30 * 86_400)
    timeout_s: float | None = Field(default=None, gt=0, le=3600, description="Wait this long at most, then cancel.")


@router.post(
    "/images/edits",
    response_model=ImagesResponse,
    response_model_exclude_none=True,
    responses={**declared(409, 507), 200: {"description": "The pictures.", "content": sse.EVENT_CONTENT}},
    summary="Change a picture and wait",
)
async def edit(
    form: Annotated[EditsRequest, Form(media_type="multipart/form-data")],
    request: Request,
    response: Response,
    known: AnyCaller,
    parts: GatewayParts,
    key: IdempotencyKey = "",
) -> ImagesResponse | Response:
    """Make pictures from a picture. Hanging up cancels it, as does waiting longer than the time-out (504)."""
    given = [*([form.image] if form.image is not None else []), *(form.images or [])]
    if len(given) != 1:
        raise Refused(422, "invalid_parameter", f"image: send one picture, not {len(given)}.", param="image")
    body = ImagesRequest(**form.model_dump(exclude=set(_OWN), exclude_none=True))
    job = images.job_request(body)
    job.parameters.update(await _pictures(form, given[0], known, parts))
    return await images.answered(job, body, request, response, known, parts, key, "image_edit")


async def _pictures(form: EditsRequest, picture: UploadFile, known: Caller, parts: Gateway) -> dict[str, Any]:
    """Store the pictures of a request and return the parameters that name them."""
    file_id, transparent = await _stored(picture, "image", known, parts)
    found: dict[str, Any] = {"image": file_id}
    if form.mask is not None:
        found["mask"], transparent = await _stored(form.mask, "mask", known, parts)
        found |= {"mask_from": "transparent"} if transparent else {}
    elif transparent:
        found |= {"mask": file_id, "mask_from": "transparent"}
    if form.strength is not None:
        found["strength"] = form.strength
    elif form.input_fidelity == "high" and "mask" not in found:
        found["strength"] = 0.4
    return found


async def _stored(picture: UploadFile, field: str, known: Caller, parts: Gateway) -> tuple[str, bool]:
    with tempfile.TemporaryDirectory(prefix="aigc-upload-") as directory:
        path = Path(directory) / "picture"
        with path.open("wb") as out:
            while block := await picture.read(1 << 20):
                await asyncio.to_thread(out.write, block)
        stored, facts = await kept(path, field, known, parts)
    return stored.file_id, bool(facts["transparent"])
