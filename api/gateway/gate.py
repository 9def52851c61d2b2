"""What every request passes before a route sees it: request id, caller, rate, places, and the bounds of its body.

Pure ASGI, so that event streams pass unbuffered and a stranger's body is never read.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable, MutableMapping
from typing import Any

import msgspec
import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.gateway.config import GatewayConfig
from api.gateway.keys import Caller, KeyRefused, KeyStore, caller_of_token
from api.gateway.limits import Gcra, InFlight, Verdict, rate_headers
from api.gateway.problems import PROBLEM_TYPE, Refused, problem_body
from api.monitoring.metrics import Metrics

log = structlog.get_logger("gateway")
UPLOADS = frozenset({"/v1/uploads", "/v1/images/edits"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
]


class Envelope:
    """Outermost: gives each request an id, turns a crash into the one error body, counts and logs."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        asked = _header(scope, b"x-request-id")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else f"req_{secrets.token_hex(12)}"
        state["request_id"] = request_id
        state["headers"] = []
        started, status = time.perf_counter(), 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message.setdefault("headers", [])
                message["headers"] = [
                    *headers,
                    (b"x-request-id", request_id.encode()),
                    *state["headers"],
                    *_SECURITY_HEADERS,
                ]
                if status >= 400 and not any(name.lower() == b"cache-control" for name, _ in headers):
                    message["headers"].append((b"cache-control", b"no-store"))
            await send(message)

        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, send_on)
        except Exception:
            log.exception("request_crashed", request_id=request_id, method=scope["method"], route=_route(scope))
            if status:
                raise
            await _refuse(
                scope, send_on, Refused(500, "internal_error", "The gateway failed; the log has the request id.")
            )
        finally:
            self._metrics.in_flight.dec()
            seconds, route = time.perf_counter() - started, _route(scope)
            self._metrics.requests.labels(_method(scope), route, str(status or 499)).inc()
            self._metrics.request_seconds.labels(route).observe(seconds)
            caller = state.get("caller")
            log.info(
                "request",
                request_id=request_id,
                method=scope["method"],
                route=route,
                status=status or 499,
                duration_s=round(seconds, 6),
                tenant=caller.tenant if caller else "",
                reqNo=scope.get("path_params", {}).get("req_no", ""),
            )


class Gate:
    """Who may pass, how often, how many at once, with how large a body."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        config: GatewayConfig,
        keys: KeyStore,
        metrics: Metrics,
        clock_us: Callable[[], int],
    ) -> None:
        self._app = app
        self._config = config
        self._keys = keys
        self._metrics = metrics
        self._clock_us = clock_us
        self._rates = Gcra()
        self._strangers = Gcra()
        self._places = InFlight()
        self._open = {"/healthz", "/readyz", "/openapi.json", "/console"} | (
            {"/metrics"} if config.metrics_open else set()
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        try:
            if path in self._open or path.startswith("/files/signed/"):
                verdict = self._strangers.check(f"open:{_client(scope)}", self._config.open_reads, self._clock_us())
                if not verdict.allowed:
                    raise _too_often("requests of this address", verdict)
                await self._app(scope, await self._bounded(scope, receive), send)
                return
            caller = self._identify(scope)
            scope["state"]["caller"] = caller
            policy = self._config.tenant(caller.tenant)
            self._meter(scope, caller)
            if not self._places.enter(caller.tenant, policy.concurrency):
                raise Refused(
                    429,
                    "too_many_in_flight",
                    f"The tenant has {policy.concurrency} requests in flight, its limit; wait for one to end.",
                    headers={"Retry-After": "1"},
                )
        except Refused as refusal:
            self._metrics.refused.labels(refusal.code).inc()
            await _refuse(scope, send, refusal)
            return
        try:
            await self._app(scope, await self._bounded(scope, receive), send)
        except Refused as refusal:
            self._metrics.refused.labels(refusal.code).inc()
            await _refuse(scope, send, refusal)
        finally:
            self._places.leave(caller.tenant)

    def _identify(self, scope: Scope) -> Caller:
        client = _client(scope)
        now = self._clock_us()
        blocked = self._strangers.would_refuse(client, self._config.failed_auth, now)
        if blocked is not None:
            raise _too_often("failed authentications of this address", blocked)
        scheme, _, credential = _header(scope, b"authorization").partition(" ")
        try:
            if scheme.lower() != "bearer" or not credential.strip():
                raise KeyRefused("send `Authorization: Bearer KEY`; an operator makes keys with `aigc keys create`")
            credential = credential.strip()
            if self._config.jwt is not None and not credential.startswith("aigc_"):
                return caller_of_token(credential, self._config.jwt)
            return self._keys.authenticate(credential)
        except KeyRefused as refused:
            self._strangers.check(client, self._config.failed_auth, now)
            raise Refused(
                401, "invalid_api_key", f"Not authenticated: {refused}.", headers={"WWW-Authenticate": "Bearer"}
            ) from None

    def _meter(self, scope: Scope, caller: Caller) -> None:
        policy = self._config.tenant(caller.tenant)
        submits = scope["method"] == "POST" and not scope["path"].endswith("/cancel")
        name, rate = ("submits", policy.submits) if submits else ("reads", policy.reads)
        verdict = self._rates.check(f"{name}:{caller.tenant}", rate, self._clock_us())
        scope["state"]["headers"].extend(rate_headers(name, verdict))
        if not verdict.allowed:
            raise _too_often(f"{name} of this tenant ({rate.per_minute} a minute, {rate.burst} at once)", verdict)

    async def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """Return a `receive` whose body is checked; JSON is read whole, uploads are counted as they stream."""
        length = _header(scope, b"content-length")
        chunked = bool(_header(scope, b"transfer-encoding"))
        if not chunked and (not length or length == "0"):
            return receive
        upload = scope["path"] in UPLOADS and scope["method"] == "POST"
        limit = self._config.max_upload_bytes if upload else self._config.max_json_bytes
        if length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        if upload:
            if _media_type(scope) != "multipart/form-data":
                raise Refused(415, "unsupported_media_type", "Send the pictures as multipart/form-data, field `file`.")
            return _counted(receive, limit)
        body = await _read(receive, limit)
        if scope["method"] == "POST" and body:
            media_type = _media_type(scope)
            if media_type != "application/json" and not (
                media_type.startswith("application/") and media_type.endswith("+json")
            ):
                raise Refused(415, "unsupported_media_type", "Send the body as application/json.")
            check_json(body, self._config.max_json_depth)
        return _replayed(body, receive)


def check_json(body: bytes, max_depth: int) -> None:
    """Refuse what is not strict JSON (NaN, lone surrogates, broken UTF-8) or is nested deeper than `max_depth`."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise Refused(400, "invalid_json", f"The body is not valid JSON: {reason}.") from None
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > max_depth:
            raise Refused(400, "invalid_json", f"The body is nested deeper than {max_depth} levels.")
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]


async def _read(receive: Receive, limit: int) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(30):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise Refused(400, "bad_request", "The connection closed before the body was complete.")
                body += message.get("body", b"")
                if len(body) > limit:
                    raise _too_large(limit)
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise Refused(400, "bad_request", "The body did not arrive within 30 s.") from None


def _replayed(body: bytes, receive: Receive) -> Receive:
    done = False

    async def replay() -> Message:
        nonlocal done
        if done:
            return await receive()
        done = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _counted(receive: Receive, limit: int) -> Receive:
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise _too_large(limit)
        return message

    return counted


def _too_large(limit: int) -> Refused:
    return Refused(
        413,
        "body_too_large",
        f"The body is larger than the {limit} bytes allowed here.",
        headers={"Connection": "close"},
    )


def _too_often(what: str, verdict: Verdict) -> Refused:
    wait_s = max(1, -(-verdict.retry_us // 1_000_000))
    headers = {"Retry-After": str(wait_s), "retry-after-ms": str(max(1, verdict.retry_us // 1000))}
    return Refused(429, "rate_limited", f"Too many {what}; try again in {wait_s} s.", headers=headers)


async def _refuse(scope: Scope, send: Send, refusal: Refused) -> None:
    body = problem_body(
        refusal.status_code,
        refusal.detail,
        path=scope["path"],
        request_id=scope["state"]["request_id"],
        code=refusal.code,
        param=refusal.param,
        errors=refusal.errors,
    )
    headers = [(b"content-type", PROBLEM_TYPE.encode()), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode("latin-1")) for name, value in (refusal.headers or {}).items()]
    await send({"type": "http.response.start", "status": refusal.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


def _header(scope: MutableMapping[str, Any], name: bytes) -> str:
    for key, value in scope["headers"]:
        if key == name:
            return str(value.decode("latin-1"))
    return ""


def _client(scope: Scope) -> str:
    return str((scope.get("client") or ("unknown",))[0])


def _media_type(scope: Scope) -> str:
    return _header(scope, b"content-type").partition(";")[0].strip().lower()


def _route(scope: Scope) -> str:
    return str(getattr(scope.get("route"), "path", "")) or "none"


def _method(scope: Scope) -> str:
    method = str(scope["method"])
    return method if method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS") else "OTHER"
