"""Previews of a running job as the openai SDK's partial images: small pictures, as many as the caller wants at most."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

from api.gateway import sse
from api.gateway.context import FILE_ID, Gateway
from api.ports import JobView


def preview_every(steps: int | None, wanted: int) -> int:
    """Return after how many steps previews are due so that so many come before the end."""
    from executors.methods.parameters import TextToImageParameters

    usual: int = TextToImageParameters.model_fields["steps"].default
    return max(1, (steps or usual) // (wanted + 1))


class Partials:
    """The partial images of one stream."""

    def __init__(self, parts: Gateway, wanted: int, kind: str) -> None:
        self._parts = parts
        self._wanted = wanted
        self._kind = kind
        self._seen = ""
        self._sent = 0

    async def event(self, view: JobView) -> bytes | None:
        """Return the event for a view with a preview that was not sent yet; None for any other, and when enough were sent."""
        file_id = view.progress_preview
        if self._sent >= self._wanted or file_id == self._seen or not FILE_ID.fullmatch(file_id):
            return None
        self._seen = file_id
        content = await asyncio.to_thread(self._content, file_id)
        if content is None:
            return None
        fields: dict[str, Any] = {
            "type": f"{self._kind}.partial_image",
            "b64_json": base64.b64encode(content).decode(),
            "partial_image_index": self._sent,
            "created_at": int(self._parts.clock_s()),
            "size": "auto",
            "quality": "low",
            "background": "opaque",
            "output_format": "png",
        }
        self._sent += 1
        return sse.event(fields, kind=fields["type"])

    def _content(self, file_id: str) -> bytes | None:
        """Read a preview; it may be gone by now, and the next one will do."""
        try:
            return b"".join(self._parts.store.read(file_id))
        except FileNotFoundError:
            return None
