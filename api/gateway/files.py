"""Pictures in and out: uploads that are checked in a process of their own, and signed links that the file store answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
import tempfile
from pathlib import Path as FilePath
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Path, Query, Request, Response, UploadFile
from fastapi.responses import RedirectResponse, StreamingResponse
from pydantic import BaseModel

from api.gateway.context import AnyCaller, Gateway, GatewayParts
from api.gateway.keys import Caller
from api.gateway.problems import Refused, declared
from api.gateway.signing import check
from executors.ports import FileRef

log = structlog.get_logger("gateway")
router = APIRouter(tags=["files"])
MEDIA_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
_CHECKER = FilePath(__file__).with_name("picture_check.py")
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
FileId = Annotated[
    str, Path(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the file's content, in lower-case hex.")
]


class Uploaded(BaseModel):
    """A picture that was stored; use `file_id` in a job's parameters."""

    file_id: str
    media_type: str
    size_bytes: int
    width: int
    height: int


@router.post(
    "/v1/uploads", status_code=201, response_model=Uploaded, responses=declared(507), summary="Upload a picture"
)
async def upload(file: UploadFile, known: AnyCaller, parts: GatewayParts) -> Uploaded:
    """Store a PNG, JPEG or WebP picture for the caller. Equal bytes give the same id."""
    with tempfile.TemporaryDirectory(prefix="aigc-upload-") as directory:
        path = FilePath(directory) / "picture"
        with path.open("wb") as out:
            while block := await file.read(1 << 20):
                await asyncio.to_thread(out.write, block)
        stored, found = await kept(path, "file", known, parts)
    return Uploaded(
        file_id=stored.file_id,
        media_type=MEDIA_TYPES[found["format"]],
        size_bytes=stored.size_bytes,
        width=found["width"],
        height=found["height"],
    )


async def kept(path: FilePath, field: str, known: Caller, parts: Gateway) -> tuple[FileRef, dict[str, Any]]:
    """Check a picture and store it for a caller; returns where, and what `check_picture` found. Raises Refused naming the field."""
    found = await check_picture(path, parts.config.max_picture_pixels, parts.config.check_picture_s, field)
    try:
        stored = await asyncio.to_thread(parts.store.put_path, path, MEDIA_TYPES[found["format"]])
    except OSError as error:
        if error.errno == 28:
            raise Refused(507, "storage_full", "The file store is full; nothing was kept.") from None
        raise
    parts.records.own(known.tenant, [stored.file_id], parts.clock_s())
    log.info("picture_stored", tenant=known.tenant, file_id=stored.file_id, size_bytes=stored.size_bytes)
    return stored, found


async def check_picture(path: FilePath, max_pixels: int, timeout_s: float, field: str = "file") -> dict[str, Any]:
    """Decode a picture in a limited process; returns its format, size and whether it is transparent. Raises Refused 422."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        str(_CHECKER),
        str(path),
        str(max_pixels),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    out = b""
    try:
        async with asyncio.timeout(timeout_s):
            out, _ = await process.communicate()
    except TimeoutError:
        raise Refused(422, "picture_refused", f"{field}: the picture takes too long to decode.", param=field) from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    try:
        found = json.loads(out)
    except ValueError:
        found = {"error": "the picture could not be decoded within the limits of memory and time"}
    if "error" in found:
        raise Refused(422, "picture_refused", f"{field}: {found['error']}.", param=field)
    return dict(found)


@router.get(
    "/v1/files/{file_id}/content",
    status_code=302,
    response_class=Response,
    responses=declared(),
    summary="Go to a file's content",
)
async def file_content(
    file_id: FileId,
    request: Request,
    known: AnyCaller,
    parts: GatewayParts,
    job: Annotated[str, Query(pattern=r"^([0-9a-f-]{36})?$", description="A job whose result holds the file.")] = "",
) -> Response:
    """Answer 302 to a signed link that needs no key. The caller must own the file: uploaded it, or a job of theirs made it."""
    if not parts.records.owns(known.scope, file_id) and not await _made_by(parts, known.scope, job, file_id):
        raise Refused(404, "not_found", "There is no such file.")
    return RedirectResponse(parts.link(request, file_id), 302, headers={"Cache-Control": "no-store"})


async def _made_by(parts: Gateway, scope: str, req_no: str, file_id: str) -> bool:
    if not req_no:
        return False
    view = await parts.submissions.job(scope, req_no)
    files = (view.result or {}).get("files") or []
    return any(isinstance(file, dict) and file.get("file_id") == file_id for file in files)


_SIGNED: dict[str, Any] = {
    "response_class": Response,
    "responses": {
        200: {"description": "The file.", "content": {"*/*": {"schema": {"type": "string", "format": "binary"}}}},
        206: {"description": "A part of it.", "content": {"*/*": {"schema": {"type": "string", "format": "binary"}}}},
        304: {"description": "The reader's copy is good."},
        **declared(416),
    },
    "openapi_extra": {"security": []},
}


@router.get(
    "/files/signed/{file_id}", operation_id="read_signed_file", summary="Read a file by a signed link", **_SIGNED
)
@router.head("/files/signed/{file_id}", operation_id="head_signed_file", summary="Look at a signed link", **_SIGNED)
async def signed_file(
    file_id: FileId,
    request: Request,
    parts: GatewayParts,
    expires: Annotated[int, Query(ge=0, le=2**53)],
    signature: Annotated[str, Query(pattern=r"^[0-9a-f]{64}$")],
) -> Response:
    """Serve a file to whoever has a link that is good and fresh. No header names the reader; ETag, Range and HEAD work."""
    keys = [secret.get_secret_value().encode() for secret in parts.config.signing_secrets]
    now = parts.clock_s()
    wrong = check(file_id, expires, signature, now, keys)
    if wrong is not None:
        raise Refused(403, "link_refused", f"Not served: {wrong}.")
    ref = await asyncio.to_thread(parts.store.stat, file_id)
    if ref is None:
        raise Refused(404, "not_found", "The file has been deleted.")
    return await _served(parts, request, ref, max_age_s=max(0, int(expires - now)))


async def _served(parts: Gateway, request: Request, ref: FileRef, max_age_s: int) -> Response:
    tag = f'"{ref.file_id}"'
    headers = {
        "ETag": tag,
        "Accept-Ranges": "bytes",
        "Cache-Control": f"private, max-age={max_age_s}, immutable",
        "Content-Disposition": "inline" if ref.media_type in MEDIA_TYPES.values() else "attachment",
        "Content-Security-Policy": "default-src 'none'; sandbox",
    }
    asked = request.headers.get("if-none-match", "")
    if asked.strip() == "*" or tag in [one.strip().removeprefix("W/") for one in asked.split(",")]:
        return Response(status_code=304, headers=headers)
    condition = request.headers.get("if-range", "").strip()
    span = None if condition and condition != tag else parse_range(request.headers.get("range", ""), ref.size_bytes)
    start, end = (0, ref.size_bytes) if span is None else span
    headers["Content-Length"] = str(end - start)
    if span is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{ref.size_bytes}"
    status = 200 if span is None else 206
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=ref.media_type)
    try:
        chunks = await asyncio.to_thread(parts.store.read, ref.file_id, start, None if span is None else end)
    except FileNotFoundError:
        raise Refused(404, "not_found", "The file has been deleted.") from None
    parts.metrics.served_bytes.inc(end - start)
    return StreamingResponse(chunks, status, headers=headers, media_type=ref.media_type)


def parse_range(header: str, size: int) -> tuple[int, int] | None:
    """Return [start, end) of a single byte range; None to serve the whole. Raises Refused 416.

    Several ranges, other units and malformed headers are ignored, as RFC 9110 allows.
    """
    match = _RANGE.fullmatch(header.strip())
    if match is None or match.group(1) == match.group(2) == "":
        return None
    first, last = match.groups()
    if first == "":
        length = int(last)
        start, end = max(0, size - length), size
        satisfiable = length > 0 and size > 0
    else:
        start, end = int(first), size if last == "" else min(size, int(last) + 1)
        if last != "" and int(last) < start:
            return None
        satisfiable = start < size
    if not satisfiable:
        raise Refused(
            416, "range_not_satisfiable", f"The file has {size} bytes.", headers={"Content-Range": f"bytes */{size}"}
        )
    return start, end
