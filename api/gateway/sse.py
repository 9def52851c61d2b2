"""Server-sent events: the wire format, with comments that keep a quiet stream alive."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse

from api.gateway.problems import Refused

T = TypeVar("T")
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
EVENT_CONTENT: dict[str, Any] = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "properties": {
                "data": {"type": "string", "description": "A JSON object."},
                "event": {"type": "string"},
                "id": {"type": "string"},
                "retry": {"type": "integer", "minimum": 0},
            },
        }
    }
}
"""One event, as OpenAPI 3.2 describes streams of them."""
DECLARED: dict[int | str, dict[str, Any]] = {200: {"description": "Server-sent events.", "content": EVENT_CONTENT}}


def event(data: Mapping[str, Any] | str, *, kind: str = "", event_id: int | None = None) -> bytes:
    """Return one event. Line breaks cannot occur in its JSON."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=True, default=str)
    lines = []
    if event_id is not None:
        lines.append(f"id: {event_id}")
    if kind:
        lines.append(f"event: {kind}")
    lines.append(f"data: {text}")
    return ("\n".join(lines) + "\n\n").encode()


def comment(text: str) -> bytes:
    """Return a comment, which every client skips."""
    return f": {text}\n\n".encode()


async def with_pauses(source: AsyncIterator[T], seconds: float) -> AsyncIterator[T | None]:
    """Yield the source's items, and None whenever nothing came for so many seconds; the source is closed with this one."""
    pending: asyncio.Task[T | _End] | None = None
    try:
        while True:
            pending = asyncio.create_task(_next(source))
            while not pending.done():
                done, _ = await asyncio.wait([pending], timeout=seconds)
                if not done:
                    yield None
            item = pending.result()
            if isinstance(item, _End):
                return
            yield item
    finally:
        if pending is not None and not pending.done():
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)
        close = getattr(source, "aclose", None)
        if close is not None:
            await close()


class _End:
    """The source has no more items."""


async def _next(source: AsyncIterator[T]) -> T | _End:
    async for item in source:
        return item
    return _End()


def last_event_id(request: Request) -> int:
    """Return the id after which to go on (header Last-Event-ID); 0 from the beginning. Raises Refused 400."""
    text = request.headers.get("last-event-id", "").strip()
    if not text:
        return 0
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise Refused(
            400, "bad_last_event_id", "Last-Event-ID: send the id of an event of this stream.", param="Last-Event-ID"
        )
    return int(text)


def stream(source: AsyncIterator[bytes], headers: Mapping[str, str] | None = None) -> StreamingResponse:
    """Return a response that streams events."""
    return StreamingResponse(source, media_type="text/event-stream", headers={**HEADERS, **(headers or {})})
