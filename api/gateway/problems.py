"""One error body for every refusal: RFC 9457 problem details merged with the shape that the openai SDK reads.

Every error of the gateway, the framework's own included, leaves as ``application/problem+json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from api.gateway.retry import retry_after
from api.ports import SupportRefused

PROBLEM_TYPE = "application/problem+json"
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    416: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}
_CODES = {
    400: "bad_request",
    401: "invalid_api_key",
    403: "not_allowed",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    413: "body_too_large",
    415: "unsupported_media_type",
    416: "range_not_satisfiable",
    422: "validation_failed",
    429: "rate_limited",
    500: "internal_error",
    503: "unavailable",
    504: "timeout",
    507: "storage_full",
}


class ErrorBody(BaseModel):
    """The error as the openai SDK reads it."""

    message: str
    type: str
    param: str | None = None
    code: str


class FieldProblem(BaseModel):
    """One field that was refused, and why."""

    field: str
    message: str


class Problem(BaseModel):
    """Why a request was refused."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="A stable URN of the problem.")
    title: str
    status: int
    detail: str
    instance: str = Field(description="The path of the request.")
    error_type: str
    error: ErrorBody
    errors: list[FieldProblem] = Field(default_factory=list)
    alternatives: list[dict[str, Any]] = Field(
        default_factory=list, description="What is possible instead: `kind`, and the `change` to the request."
    )
    request_id: str = ""


class Refused(HTTPException):
    """A refusal with everything its body and headers need; raised anywhere below the routes."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        errors: Iterable[FieldProblem] = (),
        alternatives: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(status_code=status, detail=message, headers=dict(headers or {}))
        self.code = code
        self.param = param
        self.errors = tuple(errors)
        self.alternatives = tuple(alternatives)


def no_retry(headers: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return headers that keep the openai SDK from trying again what cannot succeed."""
    return {**(headers or {}), "x-should-retry": "false"}


def problem_body(
    status: int,
    message: str,
    *,
    path: str,
    request_id: str,
    code: str = "",
    param: str | None = None,
    errors: Iterable[FieldProblem] = (),
    alternatives: Iterable[Mapping[str, Any]] = (),
) -> bytes:
    """Return the merged error body as JSON bytes."""
    code = code or _CODES.get(status, "error")
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    body = Problem(
        type=f"urn:aigc:problem:{code}",
        title=_title(status),
        status=status,
        detail=message,
        instance=path,
        error_type=kind,
        error=ErrorBody(message=message, type=kind, param=param, code=code),
        errors=list(errors),
        alternatives=[dict(one) for one in alternatives],
        request_id=request_id,
    )
    return json.dumps(body.model_dump(), ensure_ascii=True).encode()


def problem_response(request: Request, status: int, message: str, **more: Any) -> Response:
    """Return a response with the merged error body."""
    headers = more.pop("headers", None)
    request_id = str(request.scope.get("state", {}).get("request_id", ""))
    body = problem_body(status, message, path=request.url.path, request_id=request_id, **more)
    return Response(body, status, headers=headers, media_type=PROBLEM_TYPE)


def install(app: FastAPI) -> None:
    """Let every exception that a route may raise leave in the one error body."""

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        if error.status_code == 405 and not isinstance(error, Refused):
            headers["Allow"] = _allowed(request) or headers.get("Allow", "GET")
        if isinstance(error, Refused):
            return problem_response(
                request,
                error.status_code,
                error.detail,
                code=error.code,
                param=error.param,
                errors=error.errors,
                alternatives=error.alternatives,
                headers=headers,
            )
        detail = error.detail if error.detail != _title(error.status_code) else _plain(error.status_code, request)
        return problem_response(request, error.status_code, detail, headers=headers)

    async def validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        fields = [FieldProblem(field=_field(one["loc"]), message=one["msg"]) for one in error.errors()[:20]]
        first = fields[0] if fields else FieldProblem(field="body", message="invalid")
        message = f"{first.field}: {first.message}" + (f" (and {len(fields) - 1} more)" if len(fields) > 1 else "")
        return problem_response(request, 422, message, param=first.field, errors=fields)

    async def support_refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, SupportRefused)
        headers = {}
        if error.status == 409:
            headers = no_retry()
        elif error.status in (429, 503, 504):
            headers = {"Retry-After": str(retry_after(error.retry_s)) if error.retry_s else "1"}
        return problem_response(request, error.status, error.message, code=error.code, headers=headers)

    async def support_away(request: Request, error: Exception) -> Response:
        message = "The support service does not answer now; try again in a moment."
        return problem_response(request, 503, message, code="support_unavailable", headers={"Retry-After": "1"})

    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(SupportRefused, support_refused)
    app.add_exception_handler(ConnectionError, support_away)
    app.add_exception_handler(TimeoutError, support_away)


def declared(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI entries of the refusals that a route may answer with, besides those common to all."""
    content = {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    common = (400, 401, 403, 404, 405, 413, 415, 422, 429, 500, 503, 504)
    return {status: {"description": _title(status), "content": content} for status in (*common, *statuses)}


def _allowed(request: Request) -> str:
    """Return the methods of all routes at this path; the framework names only those of the first."""
    template = str(getattr(request.scope.get("route"), "path", "")).replace(":path}", "}")
    return ", ".join(sorted(method.upper() for method in request.app.openapi()["paths"].get(template, {})))


def _title(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"


def _plain(status: int, request: Request) -> str:
    if status == 404:
        return f"There is nothing at {request.url.path[:200]}."
    if status == 405:
        return f"{request.method} is not possible here; the Allow header names what is."
    return f"{_title(status)}."


def _field(location: Iterable[Any]) -> str:
    parts = [str(part) for part in location]
    return (
        ".".join(parts[1:] if len(parts) > 1 and parts[0] in ("body", "query", "path", "header") else parts) or "body"
    )
