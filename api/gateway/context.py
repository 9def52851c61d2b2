"""What the routes share: one value per application, reached through the request."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Path, Request, Security
from fastapi.security import HTTPBearer
from pydantic import BaseModel, Field

from api.gateway.config import GatewayConfig
from api.gateway.keys import Caller, KeyStore
from api.gateway.problems import Refused
from api.gateway.records import Records
from api.gateway.signing import signed_path
from api.gateway.submissions import Submissions
from api.monitoring.logs import LogRing
from api.monitoring.metrics import Metrics
from api.monitoring.watch import Watch
from api.ports import JobView, SupportPort
from executors.ports import FileStore

FILE_ID = re.compile(r"[0-9a-f]{64}")
_bearer = HTTPBearer(
    auto_error=False, description="An API key (`aigc_...`), or a signed token where the operator allows them."
)


@dataclass(frozen=True, slots=True)
class Gateway:
    """The parts that routes work with."""

    config: GatewayConfig
    support: SupportPort
    store: FileStore
    keys: KeyStore
    records: Records
    submissions: Submissions
    metrics: Metrics
    logs: LogRing
    watch: Watch
    clock_s: Callable[[], float] = time.time

    def link(self, request: Request, file_id: str) -> str:
        """Return an absolute link to a file that needs no key and expires."""
        secret = self.config.signing_secrets[0].get_secret_value().encode()
        return self.base_url(request) + signed_path(file_id, self.clock_s(), self.config.link_ttl_s, secret)

    def base_url(self, request: Request) -> str:
        """Return the address that callers reach, without a slash at the end."""
        return (self.config.public_url or str(request.base_url)).rstrip("/")


async def gateway(request: Request) -> Gateway:
    """Return the application's parts."""
    parts = request.app.state.gateway
    assert isinstance(parts, Gateway)
    return parts


async def caller(request: Request, _: Annotated[Any, Security(_bearer)] = None) -> Caller:
    """Return who calls; the gate has authenticated already."""
    known = request.scope["state"].get("caller")
    assert isinstance(known, Caller)
    return known


async def operator(known: Annotated[Caller, Depends(caller)]) -> Caller:
    """Return the caller, who must be an operator; raises Refused 403."""
    if known.role != "operator":
        raise Refused(403, "operators_only", "Only operators may do this; use a key with the role operator.")
    return known


async def known_query(request: Request) -> None:
    """Refuse query parameters that the route does not have, so that a typing error does not pass for a wide search."""
    template = str(getattr(request.scope.get("route"), "path", "")).replace(":path}", "}")
    operation = request.app.openapi()["paths"].get(template, {}).get(request.method.lower())
    if operation is None or template.startswith("/files/signed/"):
        return
    known = {one["name"] for one in operation.get("parameters", ()) if one["in"] == "query"}
    for name in request.query_params:
        if name not in known:
            has = ", ".join(sorted(known)) or "none"
            raise Refused(
                422,
                "unknown_parameter",
                f"{name[:80]}: no query parameter of this route; it has: {has}.",
                param=name[:80],
            )


GatewayParts = Annotated[Gateway, Depends(gateway)]
AnyCaller = Annotated[Caller, Depends(caller)]
OperatorCaller = Annotated[Caller, Depends(operator)]
ReqNo = Annotated[
    str,
    Path(
        pattern=r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
        description="The job's identity, a UUID in lower case.",
    ),
]


class Links(BaseModel):
    """Where to go on from a job."""

    self: str
    events: str
    cancel: str
    why: str


class Job(JobView):
    """A job with links. Each file of its result carries `url` (needs no key, expires) and `content_url` (stable, needs the key)."""

    links: Links
    preview_url: str = Field(
        default="", description="Where the picture of `progress_preview` is, without a key, for a while."
    )


class JobChange(BaseModel):
    """One change of a job; `view` is its full state after it."""

    event_id: int
    kind: str
    at: float
    view: Job


class JobPage(BaseModel):
    """Jobs, newest first."""

    data: list[Job]
    next_cursor: str = Field(default="", description="Give it as `cursor` for the next page; empty at the end.")


def job_of(parts: Gateway, request: Request, view: JobView) -> Job:
    """Return a job as its owner sees it, and note that the owner may read its files."""
    base = parts.base_url(request)
    path = f"{base}/v1/jobs/{view.req_no}"
    fields = view.model_dump()
    if view.result:
        files = [dict(file) for file in view.result.get("files") or [] if isinstance(file, dict)]
        ids = [str(file.get("file_id", "")) for file in files if FILE_ID.fullmatch(str(file.get("file_id", "")))]
        parts.records.own(view.tenant, ids, parts.clock_s())
        for file in files:
            if file.get("file_id") in ids:
                file["url"] = parts.link(request, file["file_id"])
                file["content_url"] = f"{base}/v1/files/{file['file_id']}/content"
        fields["result"] = {**view.result, "files": files}
    if FILE_ID.fullmatch(view.progress_preview):
        parts.records.own(view.tenant, [view.progress_preview], parts.clock_s())
        fields["preview_url"] = parts.link(request, view.progress_preview)
    return Job(**fields, links=Links(self=path, events=f"{path}/events", cancel=f"{path}/cancel", why=f"{path}/why"))
