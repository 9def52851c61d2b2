"""The JSON message of the queues: the one place where an outside program's bytes become a request, checked and bounded.

A request: ``{"header": {"reqNo", "priority", "taskType", "group", ...}, "body": {"method", "parameters"}}``. A result travels in
the same envelope with the method ``result``. Unknown header fields are tolerated: a newer producer can talk to an older platform.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 16
RESULT_METHOD = "result"
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._:@/-]*$"


class MessageRefused(ValueError):
    """The message cannot be used. `code` is stable; `req_no` and `tenant` are filled in where they could be read."""

    def __init__(
        self, code: str, message: str, req_no: str = "", tenant: str = "", header: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.req_no = req_no
        self.tenant = tenant
        self.header = dict(header or {})


def _unix_seconds(value: object) -> object:
    """Read a deadline given as Unix seconds or as an RFC 3339 time with its zone."""
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise ValueError("give Unix seconds or a time like 2027-01-31T12:00:00Z") from None
        if moment.tzinfo is None:
            raise ValueError("the time needs its zone, for example a Z at the end")
        return moment.timestamp()
    return value


def _whole(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("give a whole number")
    return value


class Header(BaseModel):
    """Who asks for what, and how urgently."""

    model_config = ConfigDict(extra="allow")

    reqNo: UUID
    """The request's identity, chosen by the caller: sending it twice is asking once."""
    priority: Annotated[int, BeforeValidator(_whole)] = Field(ge=-1000, le=1000)
    """Higher first; 100 and above is urgent."""
    taskType: Literal["TP", "GC"]
    group: str = Field(default="", max_length=128)
    tenant: str = Field(default="default", min_length=1, max_length=64, pattern=_NAME)
    deadline: Annotated[float, BeforeValidator(_unix_seconds)] | None = Field(default=None, ge=0, le=253402300799)
    """A task that has not started by then goes to the dead letter."""
    affinity: Literal["none", "preferred", "strict", "exclusive"] = "preferred"
    """How the group is bound to a node."""
    traceparent: str | None = Field(default=None, max_length=256)
    quotedAt: float | None = Field(default=None, ge=0, le=253402300799)
    """Unix seconds of the quote whose place the request keeps; it counts for 30 s at most."""


class Body(BaseModel):
    """What is to be done."""

    model_config = ConfigDict(extra="forbid")

    method: str = Field(min_length=1, max_length=64, pattern=r"^[a-z][a-z0-9_]*$")
    parameters: dict[str, Any] = Field(default_factory=dict)


class Message(BaseModel):
    """One message of either queue."""

    model_config = ConfigDict(extra="forbid")

    header: Header
    body: Body

    @property
    def req_no(self) -> str:
        """Return the request's identity in its canonical spelling."""
        return str(self.header.reqNo)


class ResultParameters(BaseModel):
    """The parameters of a result message."""

    model_config = ConfigDict(extra="allow")

    state: Literal["finished", "cancelled", "rejected", "dead"]
    reason: str = ""
    detail: str = ""
    attempt: int = 0
    result: dict[str, Any] | None = None
    """As in `JobView.result`; only when finished."""


def decode(raw: bytes) -> Message:
    """Read a message; raises MessageRefused, with the request's identity where it was readable."""
    if len(raw) > MAX_BYTES:
        raise MessageRefused(
            "too_large",
            f"the message has {len(raw)} bytes, the limit is {MAX_BYTES}; put files into the file store and send ids",
        )
    try:
        # Strict: no NaN, no number out of range, no half surrogate pair; whatever it reads can be written again.
        tree = msgspec.json.decode(raw)
    except (ValueError, RecursionError) as error:
        raise MessageRefused("not_json", f"the message is not valid JSON in UTF-8: {error}") from None
    if raw.count(b"{") + raw.count(b"[") > MAX_DEPTH and _depth_exceeds(tree, MAX_DEPTH):
        raise MessageRefused("too_deep", f"the message nests deeper than {MAX_DEPTH} levels", *_identity(tree))
    try:
        return Message.model_validate(tree)
    except ValidationError as error:
        raise MessageRefused("invalid", _explain(error), *_identity(tree)) from None


def encode(header: Mapping[str, Any], method: str, parameters: Mapping[str, Any]) -> bytes:
    """Write a message; equal input gives equal bytes."""
    tree = {"header": dict(header), "body": {"method": method, "parameters": dict(parameters)}}
    return msgspec.json.encode(tree)


def encode_request(
    *,
    req_no: str,
    task_type: str,
    method: str,
    parameters: Mapping[str, Any],
    tenant: str = "default",
    group: str = "",
    priority: int = 0,
    **header: Any,
) -> bytes:
    """Write a request message, checked by the rules that its reader applies; raises MessageRefused."""
    fields = {"reqNo": req_no, "priority": priority, "taskType": task_type, "group": group, "tenant": tenant}
    fields.update({name: value for name, value in header.items() if value is not None})
    raw = encode(fields, method, parameters)
    decode(raw)
    return raw


def encode_result(
    header: Mapping[str, Any], *, state: str, attempt: int, reason: str, detail: str, result: Mapping[str, Any] | None
) -> bytes:
    """Write the result message of a request that ended; `header` is the request's."""
    parameters: dict[str, Any] = {"state": state, "attempt": attempt, "reason": reason, "detail": detail}
    parameters["result"] = dict(result) if result is not None else None
    return encode(header, RESULT_METHOD, parameters)


def result_id(tenant: str, req_no: str, rerun: int = 0) -> str:
    """Return the message id of a result: one per request, and one more for each ordered rerun of a dead-lettered one."""
    return f"{tenant}/{req_no}" if rerun == 0 else f"{tenant}/{req_no}/rerun-{rerun}"


def request_id(tenant: str, req_no: str) -> str:
    """Return the message id the gateway puts a request under; outside programs should use it too."""
    return f"{tenant}/{req_no}"


def _depth_exceeds(tree: object, limit: int) -> bool:
    stack = [(tree, 1)]
    while stack:
        node, depth = stack.pop()
        if not isinstance(node, dict | list):
            continue
        if depth > limit:
            return True
        stack.extend((child, depth + 1) for child in (node.values() if isinstance(node, dict) else node))
    return False


def _identity(tree: object) -> tuple[str, str, dict[str, Any]]:
    """Read reqNo and tenant from a message that is otherwise wrong; empty where they are no good."""
    header = tree.get("header") if isinstance(tree, dict) else None
    if not isinstance(header, dict):
        return "", "", {}
    try:
        req_no = str(UUID(str(header.get("reqNo"))))
    except ValueError:
        return "", "", {}
    try:
        tenant = Header(reqNo=UUID(req_no), priority=0, taskType="GC", tenant=header.get("tenant", "default")).tenant
    except ValidationError:
        return "", "", {}
    priority = header.get("priority")
    kind = header.get("taskType")
    group = header.get("group")
    echo = {
        "reqNo": req_no,
        "priority": priority if isinstance(priority, int) and abs(priority) <= 1000 else 0,
        "taskType": kind if kind in ("TP", "GC") else "GC",
        "group": group if isinstance(group, str) and len(group) <= 128 else "",
        "tenant": tenant,
    }
    return req_no, tenant, echo


def _explain(error: ValidationError) -> str:
    lines = [
        f"{'.'.join(str(part) for part in item['loc']) or 'message'}: {item['msg']}" for item in error.errors()[:10]
    ]
    return "; ".join(lines)
