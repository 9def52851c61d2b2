"""The images routes as a stream: news of the job as comments, which every client skips, previews if wanted, then the pictures.

The openai SDK raises on an event type that it does not know, so nothing is sent but partial images, completed ones and an error.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import structlog

from api.gateway import sse
from api.gateway.context import Gateway
from api.gateway.partials import Partials
from api.gateway.problems import Refused
from api.gateway.submissions import TERMINAL
from api.ports import JobView

log = structlog.get_logger("gateway")
_NO_USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}
_cancelling: set[asyncio.Task[JobView]] = set()


async def pictures(
    parts: Gateway,
    scope: str,
    req_no: str,
    limit_s: float,
    completed: Callable[[JobView], Awaitable[list[Mapping[str, Any]]]],
    failure: Callable[[JobView], Refused],
    kind: str = "image_generation",
    partials: Partials | None = None,
) -> AsyncIterator[bytes]:
    """Stream a job's pictures, previews first where `partials` is given; a reader that leaves before the end cancels the job."""
    ended = False
    try:
        view: JobView | None = None
        async for news in _news(parts, scope, req_no, limit_s, partials):
            if isinstance(news, bytes):
                yield news
            else:
                view = news
        ended = True
        if view is None:
            view = await parts.submissions.cancel(scope, req_no)
            log.info("generation_cancelled", reqNo=req_no, hung_up=False, state=view.state)
        if view.state == "cancelled":
            yield _error(f"Job {req_no} was cancelled, or not ready within {limit_s:g} s.", "timeout")
        elif view.state != "finished":
            refusal = failure(view)
            yield _error(refusal.detail, refusal.code)
        else:
            for fields in await completed(view):
                name = f"{kind}.completed"
                yield sse.event({"type": name, "usage": _NO_USAGE, **fields}, kind=name)
    except Exception as error:
        log.warning("generation_stream_failed", reqNo=req_no, error=repr(error))
        yield _error("The gateway lost sight of the job; look at it in /v1/jobs.", "internal_error")
    finally:
        if not ended:
            cancelling = asyncio.create_task(parts.submissions.cancel(scope, req_no))
            _cancelling.add(cancelling)
            cancelling.add_done_callback(_settled)


async def _news(
    parts: Gateway, scope: str, req_no: str, limit_s: float, partials: Partials | None
) -> AsyncIterator[bytes | JobView]:
    """Yield comments and previews while the job goes on, then its final view; nothing more when the time is up."""
    deadline = time.monotonic() + limit_s
    pause_s = min(parts.config.keepalive_s, max(0.01, limit_s / 10))
    changes = sse.with_pauses(parts.submissions.events(scope, req_no), pause_s)
    async for change in changes:
        if change is not None and change.view.state in TERMINAL:
            yield change.view
            return
        if time.monotonic() >= deadline:
            return
        if change is None:
            yield sse.comment("still here")
        else:
            view = change.view
            yield sse.comment(f"state={view.state} step={view.progress_done} of={view.progress_total}")
            event = await partials.event(view) if partials is not None else None
            if event is not None:
                yield event


def _error(message: str, code: str) -> bytes:
    return sse.event({"error": {"message": message, "type": "server_error", "code": code, "param": None}})


def _settled(task: asyncio.Task[JobView]) -> None:
    _cancelling.discard(task)
    if not task.cancelled() and task.exception() is not None:
        log.warning("cancel_failed", error=repr(task.exception()))
