"""From a validated request to a durable message: the one way by which the gateway makes work.

The jobs route and the OpenAI route both come through here, so that both check owners, rank, and keep idempotency alike.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.gateway import quote_tokens
from api.gateway.config import GatewayConfig
from api.gateway.fields import Number, Whole
from api.gateway.intake import Intake
from api.gateway.keys import Caller
from api.gateway.problems import FieldProblem, Refused, no_retry
from api.gateway.records import Records
from api.gateway.relief import refused_for_now
from api.mq.messages import MessageRefused, encode_request, request_id
from api.ports import JobEvent, JobView, SupportPort, SupportRefused

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
QUOTE_TIMEOUT_S = 3.0
TERMINAL = frozenset({"finished", "cancelled", "rejected", "dead"})
TRAINING_METHODS = frozenset({"dreambooth"})
FILE_PARAMETERS = ("pictures", "image", "mask")
MODEL_PARAMETERS = {"text_to_image": "model", "dreambooth": "base_model"}
"""The parameter that names a method's model; other methods need none."""


class JobRequest(BaseModel):
    """A job to run."""

    model_config = ConfigDict(extra="forbid")

    method: str = Field(pattern=r"^[a-z][a-z0-9_]{0,63}$", description="AI method: text_to_image, dreambooth, sleep.")
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="The method's own parameters; unknown ones are refused."
    )
    model: str = Field(
        default="", max_length=200, pattern=r"^[A-Za-z0-9._/:-]*$", description="Model id; empty: the default."
    )
    group: str = Field(
        default="", max_length=128, pattern=r"^[A-Za-z0-9._:@/-]*$", description="Jobs of one group go to one node."
    )
    priority: Whole = Field(default=0, ge=-1000, le=1000, description="Higher first; 100 and above is urgent.")
    affinity: Literal["none", "preferred", "strict", "exclusive"] | None = Field(
        default=None, description="How the group is bound."
    )
    deadline_s: Number | None = Field(
        default=None, gt=0, le=30 * 86_400, description="Start within this many seconds, or not at all."
    )
    task_type: Literal["TP", "GC"] | None = Field(
        default=None, description="Training or generation; follows from the method."
    )
    req_no: uuid.UUID | None = Field(
        default=None, description="Identity of the job; submitting it twice is submitting it once."
    )
    quote: str = Field(
        default="",
        max_length=1000,
        pattern=r"^[A-Za-z0-9._-]*$",
        description="Token of a quote of this request, not older than 30 s: the job keeps the place that was quoted.",
    )


Validate = Callable[[str, Mapping[str, Any]], dict[str, Any]]
"""Checks a method's parameters; returns them with defaults, raises Refused 422 naming the field."""


def validate_parameters(method: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Check a method's parameters before they are queued; raises Refused 422 naming the field."""
    from executors.methods import parameters as known

    if method not in known.PARAMETERS:
        names = ", ".join(sorted(known.PARAMETERS))
        raise Refused(422, "unknown_method", f"method: there is no {method!r}; known are {names}.", param="method")
    try:
        known.validate(method, dict(parameters))
    except known.ParameterError as error:
        fields = [FieldProblem(field=f"parameters.{one.field}", message=one.message) for one in error.problems]
        raise Refused(
            422, "invalid_parameter", f"{fields[0].field}: {fields[0].message}", param=fields[0].field, errors=fields
        ) from None
    except RecursionError:
        raise Refused(422, "invalid_parameter", "parameters: nested too deeply", param="parameters") from None
    return dict(parameters)


def _files_of(parameters: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """Return the files that checked parameters name, by field."""
    found: dict[str, Sequence[Any]] = {}
    for name in FILE_PARAMETERS:
        value = parameters.get(name)
        found[name] = value if isinstance(value, (list, tuple)) else [value] if value else []
    for index, use in enumerate(parameters.get("control") or ()):
        found[f"control.{index}.image"] = [use["image"]]
    return found


@dataclass(frozen=True, slots=True)
class Submitted:
    """The outcome of a submission."""

    view: JobView
    replayed: bool = False


class Submissions:
    """Checks requests, gives them an identity, and brings them to the queue; reads jobs that SS may not know yet."""

    def __init__(
        self,
        config: GatewayConfig,
        support: SupportPort,
        intake: Intake,
        records: Records,
        clock_s: Callable[[], float],
        validate: Validate = validate_parameters,
    ) -> None:
        self._config = config
        self._support = support
        self._intake = intake
        self._records = records
        self._clock_s = clock_s
        self._validate = validate
        self._pruned_at = clock_s()

    async def submit(
        self, caller: Caller, request: JobRequest, key: str = "", source: str = "jobs", traceparent: str = ""
    ) -> Submitted:
        """Put a job on the queue; returns when it is durable there. Raises Refused."""
        parameters = await self._checked(caller, request)
        quoted_at: float | None = None
        if request.quote:
            request, quoted_at = self._redeemed(caller, request)
        fingerprint = _fingerprint(source, request)
        req_no = str(request.req_no or uuid.uuid4())
        if key:
            kept = await asyncio.to_thread(
                self._records.begin, caller.tenant, key, fingerprint, req_no, self._clock_s()
            )
            if kept.fingerprint != fingerprint:
                raise Refused(
                    422,
                    "idempotency_key_reused",
                    "Idempotency-Key: it was used with another request; take a fresh key.",
                )
            if kept.status:
                return Submitted(JobView.model_validate_json(kept.body), replayed=True)
            req_no = kept.req_no
        elif request.req_no is not None:
            known = await self._known(caller, req_no, fingerprint)
            if known is not None:
                return Submitted(known, replayed=True)
        view = self._view(caller, request, req_no, parameters)
        await self._enqueue(caller, request, view, fingerprint, traceparent, quoted_at)
        if key:
            await asyncio.to_thread(self._records.settle, caller.tenant, key, 202, view.model_dump_json())
        return Submitted(view)

    async def prepared(self, caller: Caller, request: JobRequest) -> tuple[bytes, str]:
        """Return the message that a request would become, and its fingerprint for a quote; raises Refused as `submit` would."""
        parameters = await self._checked(caller, request)
        view = self._view(caller, request, str(request.req_no), parameters)
        return message_of(view, request, self._clock_s()), _fingerprint("quote", request)

    async def _checked(self, caller: Caller, request: JobRequest) -> dict[str, Any]:
        """Return the request's parameters; raises Refused where the tenant may not ask for it or something in it is wrong."""
        policy = self._config.tenant(caller.tenant)
        if request.priority > policy.max_priority:
            raise Refused(
                403,
                "priority_not_allowed",
                f"priority: this tenant may ask for {policy.max_priority} at most.",
                param="priority",
            )
        parameters = self._validate(request.method, self._with_model(request))
        await self._check_references(caller, request, parameters)
        return parameters

    def _redeemed(self, caller: Caller, request: JobRequest) -> tuple[JobRequest, float]:
        """Return the request under the reqNo of its quote, and when that was made; raises Refused 409 or 422."""
        secrets = [secret.get_secret_value().encode() for secret in self._config.signing_secrets]
        quote = quote_tokens.read(request.quote, caller.tenant, _fingerprint("quote", request), secrets)
        if request.req_no is not None and str(request.req_no) != quote.req_no:
            raise Refused(422, "quote_invalid", "req_no: leave it out, or give the one of the quote.", param="req_no")
        late_s = self._clock_s() - quote.quoted_at
        if not -1 <= late_s <= quote_tokens.VALID_S and self._records.accepted(caller.tenant, quote.req_no) is None:
            raise Refused(
                409,
                "quote_expired",
                f"quote: it is {late_s:.0f} s old, a place is kept for {quote_tokens.VALID_S:.0f} s; ask for a new quote, or "
                "submit without one.",
                param="quote",
                headers=no_retry(),
            )
        return request.model_copy(update={"req_no": uuid.UUID(quote.req_no)}), quote.quoted_at

    async def job(self, scope: str, req_no: str) -> JobView:
        """Return a job, also one that still waits in the queue; raises SupportRefused 404."""
        try:
            return await self._support.job(scope, req_no)
        except SupportRefused as refused:
            if refused.status != 404:
                raise
            kept = self._records.accepted(scope, req_no)
            if kept is None:
                raise
            return JobView.model_validate_json(kept[1])

    async def cancel(self, scope: str, req_no: str) -> JobView:
        """Cancel a job; returns when it is certain. A job whose message SS has not read yet is waited for, up to a limit."""
        deadline = self._clock_s() + self._config.queued_wait_s
        while True:
            tenant = (await self.job(scope, req_no)).tenant
            try:
                return await self._support.cancel(tenant, req_no)
            except SupportRefused as refused:
                if refused.status != 404:
                    raise
            if self._clock_s() >= deadline:
                raise SupportRefused(
                    503, "still_queued", "The job's message has not been read from the queue yet; try again."
                )
            await asyncio.sleep(self._config.poll_s)

    async def events(self, scope: str, req_no: str, after: int = 0) -> AsyncGenerator[JobEvent, None]:
        """Stream the changes of a job, from the queue on."""
        view = await self.job(scope, req_no)
        if view.state == "queued":
            yield JobEvent(event_id=0, kind="queued", at=view.submitted_at, view=view)
            while (await self.job(scope, req_no)).state == "queued":
                await asyncio.sleep(self._config.poll_s)
        async for event in self._support.events(view.tenant, req_no, after):
            yield event

    async def _known(self, caller: Caller, req_no: str, fingerprint: str) -> JobView | None:
        """Return the job of a reqNo that was submitted before; raises Refused 409 when it was another request."""
        kept = self._records.accepted(caller.tenant, req_no)
        if kept is not None and kept[0] != fingerprint:
            raise Refused(
                409,
                "req_no_taken",
                "req_no: it belongs to another request; take a fresh UUID.",
                param="req_no",
                headers=no_retry(),
            )
        try:
            return await self.job(caller.tenant, req_no)
        except SupportRefused as refused:
            if refused.status == 404:
                return None
            raise

    async def _check_references(self, caller: Caller, request: JobRequest, parameters: Mapping[str, Any]) -> None:
        for name, file_ids in _files_of(parameters).items():
            for file_id in file_ids:
                if not isinstance(file_id, str) or not self._records.owns(caller.scope, file_id):
                    field = f"parameters.{name}"
                    raise Refused(
                        422,
                        "unknown_file",
                        f"{field}: upload the file first; there is no {str(file_id)[:80]}.",
                        param=field,
                    )
        name = MODEL_PARAMETERS.get(request.method, "")
        await self._check_model(
            caller, str(parameters.get(name, "")), "model" if request.model else f"parameters.{name}"
        )
        for number, use in enumerate(parameters.get("adapters") or ()):
            await self._check_model(caller, str(use["model"]), f"parameters.adapters.{number}.model")

    async def _check_model(self, caller: Caller, model: str, field: str) -> None:
        """Refuse a model that the caller may not use, or that is not there."""
        if not model or model in self._config.public_models:
            return
        try:
            await self._support.model(caller.scope, model)
        except SupportRefused as refused:
            if refused.status != 404:
                raise
            raise Refused(422, "unknown_model", f"{field}: there is no model {model[:80]!r}.", param=field) from None

    def _with_model(self, request: JobRequest) -> dict[str, Any]:
        """Return the parameters with the model where the method looks for it."""
        name, parameters = MODEL_PARAMETERS.get(request.method, ""), dict(request.parameters)
        if not name:
            if request.model:
                raise Refused(422, "invalid_parameter", f"model: {request.method} uses no model.", param="model")
            return parameters
        if request.model and parameters.setdefault(name, request.model) != request.model:
            raise Refused(422, "invalid_parameter", f"model: parameters.{name} names another one.", param="model")
        parameters.setdefault(name, self._config.default_model)
        return parameters

    def _view(self, caller: Caller, request: JobRequest, req_no: str, parameters: dict[str, Any]) -> JobView:
        training = request.method in TRAINING_METHODS
        kind = request.task_type or ("TP" if training else "GC")
        if training and kind != "TP":
            raise Refused(422, "invalid_parameter", f"task_type: {request.method} is a TP task.", param="task_type")
        model = str(parameters.get(MODEL_PARAMETERS.get(request.method, ""), ""))
        return JobView(
            req_no=req_no,
            tenant=caller.tenant,
            group=request.group,
            task_type=kind,
            method=request.method,
            model=model,
            priority=request.priority,
            state="queued",
            submitted_at=self._clock_s(),
            parameters=parameters,
        )

    async def _enqueue(
        self,
        caller: Caller,
        request: JobRequest,
        view: JobView,
        fingerprint: str,
        traceparent: str,
        quoted_at: float | None,
    ) -> None:
        now = self._clock_s()
        if now - self._pruned_at > 60:
            self._pruned_at = now
            await asyncio.to_thread(self._records.prune, now - self._config.idempotency_ttl_s)
        policy = self._config.tenant(caller.tenant)
        message = message_of(view, request, now, traceparent, quoted_at)
        await self._promised_in_time(caller, view, message)
        fresh = self._records.accept(caller.tenant, view.req_no, fingerprint, view.model_dump_json(), now)
        try:
            await self._intake.submit(
                request_id(caller.tenant, view.req_no),
                message,
                tenant=caller.tenant,
                weight=policy.weight,
                priority=view.priority,
                max_waiting=policy.max_waiting,
            )
        except Refused as refused:
            if fresh:
                self._records.forget(caller.tenant, view.req_no)
            if refused.code == "queue_full":
                raise await self._relieved(refused, message) from None
            raise

    async def _promised_in_time(self, caller: Caller, view: JobView, message: bytes) -> None:
        """Refuse what would wait for longer than the tenant's jobs may; raises Refused 503."""
        limit_s = self._config.tenant(caller.tenant).max_wait_s
        found = await self._looked_ahead(message) if limit_s else None
        if found is None or not found.get("start_at"):
            return
        wait_s = found["start_at"]["p50"] - self._clock_s()
        if wait_s <= limit_s:
            return
        soon = self._clock_s() + limit_s
        helpful = [
            one
            for one in found.get("alternatives", ())
            if one.get("start_at")
            and one["start_at"]["p50"] <= soon
            and one.get("change", {}).get("priority", view.priority) <= self._config.tenant(caller.tenant).max_priority
        ]
        raise refused_for_now(
            503,
            "too_long_a_wait",
            f"The job would wait for about {wait_s:.0f} s, this tenant's jobs for {limit_s:.0f} s at most",
            wait_s - limit_s,
            helpful,
        )

    async def _relieved(self, refused: Refused, message: bytes) -> Refused:
        """Return a refusal with the time at which the scheduler's queue is likely to move."""
        found = await self._looked_ahead(message)
        if found is None:
            return refused
        what = refused.detail.partition("; try again")[0]
        return refused_for_now(refused.status_code, refused.code, what, float(found.get("retry_after_s", 1.0)))

    async def _looked_ahead(self, message: bytes) -> Mapping[str, Any] | None:
        """Return a quote of a message; None where SS gives none in time: a submission does not fail for want of one."""
        try:
            async with asyncio.timeout(QUOTE_TIMEOUT_S):
                return await self._support.quote(message.decode())
        except (SupportRefused, ConnectionError, TimeoutError):
            return None


def message_of(
    view: JobView, request: JobRequest, now_s: float, traceparent: str = "", quoted_at: float | None = None
) -> bytes:
    """Return the queue message of a job; raises Refused 413 or 422 when it cannot be one."""
    try:
        return encode_request(
            req_no=view.req_no,
            task_type=view.task_type,
            method=view.method,
            parameters=view.parameters,
            tenant=view.tenant,
            group=view.group,
            priority=view.priority,
            deadline=None if request.deadline_s is None else now_s + request.deadline_s,
            affinity=request.affinity,
            traceparent=traceparent if _TRACEPARENT.fullmatch(traceparent) else None,
            quotedAt=quoted_at,
        )
    except MessageRefused as refused:
        status = 413 if refused.code == "too_large" else 422
        raise Refused(status, f"message_{refused.code}", f"parameters: {refused}", param="parameters") from None


def _fingerprint(source: str, request: JobRequest) -> str:
    text = json.dumps(
        [source, request.model_dump(mode="json", exclude={"req_no", "quote"})], sort_keys=True, separators=(",", ":")
    )
    return hashlib.sha256(text.encode()).hexdigest()
