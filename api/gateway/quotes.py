"""Quotes: what a job would get if it were submitted now, with a token that keeps its place for half a minute.

Submitted with the token (`quote_tokens`), the job ranks as if it had been submitted when it was quoted.
"""

from __future__ import annotations

import uuid
from typing import Any

import structlog
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from api.gateway.context import AnyCaller, GatewayParts
from api.gateway.problems import Refused, declared
from api.gateway.quote_tokens import VALID_S, signed
from api.gateway.submissions import JobRequest
from api.ports import Expected

log = structlog.get_logger("gateway")
router = APIRouter(prefix="/v1", tags=["jobs"])


class Cost(BaseModel):
    """What the run would cost by the price list: on average, and at the 90th percentile of its run time."""

    currency: str
    expected: float
    p90: float


class RunTime(BaseModel):
    """Predicted seconds of the run itself."""

    mean: float
    p50: float
    p90: float


class Alternative(BaseModel):
    """Another way that was found to be possible. `change` is what differs from the request; `after_s`: submit so much later."""

    model_config = ConfigDict(extra="allow")

    kind: str = Field(description="fewer_steps, urgent_lane, ordinary_lane or later.")
    change: dict[str, Any]
    queue_position: int | None = None
    start_at: Expected | None = None
    finish_at: Expected | None = None
    cost: Cost | None = None


class Quote(BaseModel):
    """When a job would start and end if it were submitted now. Times are Unix seconds."""

    token: str = Field(description="Give it as `quote` with the same request, by `valid_until`, to keep the place.")
    valid_until: float
    req_no: str = Field(description="The identity that the job will have.")
    queue_position: int | None = Field(
        description="Place in the order of service; null when it would have a place at once."
    )
    start_at: Expected | None
    finish_at: Expected | None = Field(description="Null when nobody can say; `reason` says why.")
    run_s: RunTime | None
    cost: Cost | None = Field(description="Null where the price list or the prediction knows nothing.")
    waiting: int = Field(description="Jobs that wait for a place now, everybody's.")
    reason: str = ""
    alternatives: list[Alternative] = Field(default_factory=list)


@router.post("/quotes", response_model=Quote, responses=declared(), summary="When would it be done, and for how much?")
async def make_quote(body: JobRequest, known: AnyCaller, parts: GatewayParts) -> Quote:
    """Look ahead with the job put in; nothing is queued. The same request with the token keeps its place for 30 s."""
    if body.quote:
        raise Refused(422, "invalid_parameter", "quote: leave it out here; it belongs to POST /v1/jobs.", param="quote")
    if body.req_no is None:
        body = body.model_copy(update={"req_no": uuid.uuid4()})
    message, fingerprint = await parts.submissions.prepared(known, body)
    found = dict(await parts.support.quote(message.decode()))
    found.pop("retry_after_s", None)
    now = parts.clock_s()
    secret = parts.config.signing_secrets[0].get_secret_value().encode()
    req_no = str(body.req_no)
    token = signed(known.tenant, fingerprint, req_no, now, secret)
    log.info("quoted", reqNo=req_no, tenant=known.tenant, position=found.get("queue_position"))
    return Quote.model_validate({**found, "token": token, "valid_until": now + VALID_S, "req_no": req_no})
