"""What the gateway asks of the support service (SS), in one process or over loopback HTTP.

Writes do not pass here: they travel as messages through the queue. Cancels and state queries do, at once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from api.whatif_request import WhatIfRequest


class Expected(BaseModel):
    """When something is expected, as Unix seconds: it comes by `p50` in half of such cases, by `p90` in nine of ten."""

    p50: float
    p90: float


class JobView(BaseModel):
    """A job as its owner sees it."""

    model_config = ConfigDict(extra="ignore")

    req_no: str
    tenant: str
    group: str = ""
    task_type: Literal["TP", "GC"]
    method: str
    model: str = ""
    priority: int = 0
    state: str
    """A `TaskState` value, or ``queued`` while the message is still in the queue."""
    attempt: int = 0
    node: str = ""
    progress_done: int = 0
    progress_total: int = 0
    progress_note: str = ""
    """The method's word about its last step, such as a training's loss."""
    progress_preview: str = ""
    """File id of a small picture of what there is so far, where the job asked for previews; gone when the attempt ends."""
    submitted_at: float
    """Unix seconds, like every time here."""
    started_at: float | None = None
    finished_at: float | None = None
    reason: str = ""
    detail: str = ""
    queue_position: int | None = None
    """Place in the order of service, from 1, while it waits for a place; None: it has one, is over, or it is not known yet."""
    start_at: Expected | None = None
    finish_at: Expected | None = None
    """None: it is over, or nobody can say."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    result: dict[str, Any] | None = None
    """``{"files": [{"file_id", "media_type", "size_bytes", "role"}], "metadata": {...}, "model"?: id}`` once finished."""


class JobEvent(BaseModel):
    """One change of a job; `view` is the full state after it, so that a reader may miss any number of events."""

    event_id: int
    kind: str
    at: float
    view: JobView


class ModelView(BaseModel):
    """A model that can be generated with."""

    model_id: str
    tenant: str = ""
    """Empty: everybody's."""
    kind: Literal["builtin", "local", "lora", "full"]
    base: str = ""
    created_at: float = 0
    source_req_no: str = ""
    deployed_pods: int = 0
    files: dict[str, str] = Field(default_factory=dict)
    """Name -> file id, for models that lie in the file store."""
    metadata: dict[str, Any] = Field(default_factory=dict)


class SupportRefused(Exception):
    """SS refuses a call: `status` is the HTTP status that fits, `code` is stable, the message is for people.

    `retry_s` is when the same call may be answered; 0: nothing is known of that.
    """

    def __init__(self, status: int, code: str, message: str, retry_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_s = retry_s
        self.status = status
        self.code = code
        self.message = message


class SupportPort(Protocol):
    """SS as the gateway and the command line see it. Another tenant's object answers as an absent one (404)."""

    async def job(self, tenant: str, req_no: str) -> JobView:
        """Return a job; raises SupportRefused 404. Tenant ``*`` (operators) sees all, here and below."""
        ...

    async def jobs(
        self, tenant: str, *, limit: int = 50, cursor: str = "", state: str = "", group: str = ""
    ) -> tuple[Sequence[JobView], str]:
        """Return jobs newest first and the cursor of the next page, empty at the end."""
        ...

    async def cancel(self, tenant: str, req_no: str) -> JobView:
        """Cancel; returns when it is certain: the final state, whichever of result and cancel came first. Idempotent."""
        ...

    async def why(self, tenant: str, req_no: str) -> Sequence[Mapping[str, Any]]:
        """Return every reason that keeps the job waiting: ``{"reason", "message", "missing": {...}}``."""
        ...

    async def quote(self, message: str) -> Mapping[str, Any]:
        """Return when a request message (`api.mq.messages`) would start and end if it were submitted now, what it would cost, and
        what else could be done: see `api.support.quotes`. Nothing is queued."""
        ...

    def events(self, tenant: str, req_no: str = "", after: int = 0) -> AsyncIterator[JobEvent]:
        """Stream changes of one job (or of all the tenant's) after an event id; ends when the one job is terminal."""
        ...

    async def compensate(self, tenant: str, req_no: str, action: str, key: str = "") -> Mapping[str, Any]:
        """Redeliver the result message, re-run a dead-lettered task, or give back quota: ``redeliver_result``, ``rerun``,
        ``release_quota``. Idempotent by key, recorded."""
        ...

    async def models(self, tenant: str) -> Sequence[ModelView]:
        """Return the models the tenant may use."""
        ...

    async def model(self, tenant: str, model_id: str) -> ModelView:
        """Return one model; raises SupportRefused 404."""
        ...

    async def deploy(self, tenant: str, model_id: str, pods: int) -> ModelView:
        """Keep `pods` warm Pods with the model; 0 undeploys."""
        ...

    async def delete_model(self, tenant: str, model_id: str) -> None:
        """Delete a personalised model; 409 while a job uses it."""
        ...

    async def nodes(self) -> Sequence[Mapping[str, Any]]:
        """Return every node with its GPUs, use, Pods and state (operators)."""
        ...

    async def drain(self, node: str, gpu: str | None = None) -> None:
        """Start nothing new there (operators)."""
        ...

    async def uncordon(self, node: str, gpu: str | None = None) -> None:
        """Take work again (operators)."""
        ...

    async def unload(self, node: str, model_id: str) -> None:
        """Let a model's idle Pods and files leave a node; what is in use or deployed stays (operators)."""
        ...

    async def queue(self) -> Mapping[str, Any]:
        """Return queue lengths by tenant, priority and reason; engine and MQ counters (operators)."""
        ...

    async def whatif(self, request: WhatIfRequest) -> Mapping[str, Any]:
        """Simulate two futures of the journal and return their difference by tenant (operators); see `sim.whatif.WhatIf`."""
        ...

    async def health(self) -> Mapping[str, Any]:
        """Return ``{"ready": bool, "modules": {name: {"ok": bool, "detail": str}}}``."""
        ...
