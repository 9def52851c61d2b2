"""SS as seen from another process: `api.ports.SupportPort` over loopback HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import httpx

from api.ports import JobEvent, JobView, ModelView, SupportRefused
from api.whatif_request import WhatIfRequest

CALL_TIMEOUT_S = 10.0
CERTAIN_TIMEOUT_S = 130.0
"""Longer than SS itself waits for certainty, so that its answer arrives."""
WHATIF_TIMEOUT_S = 150.0
"""Longer than SS lets its worker compute."""
STREAM_SILENCE_S = 30.0
"""SS writes at least a comment every ten seconds."""


class SupportClient:
    """Calls SS at a base URL with the installation's internal token; close it with `aclose`."""

    def __init__(self, base_url: str, token: str, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._http = httpx.AsyncClient(
            base_url=base_url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=CALL_TIMEOUT_S,
            transport=transport,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
            trust_env=False,
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str | int] | None = None,
        body: Any = None,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Any:
        try:
            answer = await self._http.request(method, path, params=params, json=body, timeout=timeout_s)
        except httpx.TimeoutException as error:
            raise SupportRefused(504, "support_timeout", f"SS did not answer within {timeout_s:.0f} s") from error
        except httpx.TransportError as error:
            raise SupportRefused(
                503, "support_down", f"SS cannot be reached: {error}; is `aigc scheduler` running?"
            ) from error
        if answer.is_success:
            return answer.json() if answer.content else None
        raise _refusal(answer)

    # --- jobs ---------------------------------------------------------------------------------------------------------

    async def job(self, tenant: str, req_no: str) -> JobView:
        """Return a job."""
        return JobView.model_validate(
            await self._call("GET", f"/internal/jobs/{_part(req_no)}", params={"tenant": tenant})
        )

    async def jobs(
        self, tenant: str, *, limit: int = 50, cursor: str = "", state: str = "", group: str = ""
    ) -> tuple[Sequence[JobView], str]:
        """Return jobs newest first and the cursor of the next page."""
        params: dict[str, str | int] = {
            "tenant": tenant,
            "limit": limit,
            "cursor": cursor,
            "state": state,
            "group": group,
        }
        page = await self._call("GET", "/internal/jobs", params=params)
        return [JobView.model_validate(view) for view in page["jobs"]], page["cursor"]

    async def cancel(self, tenant: str, req_no: str) -> JobView:
        """Cancel; returns when it is certain."""
        path = f"/internal/jobs/{_part(req_no)}/cancel"
        view = await self._call("POST", path, params={"tenant": tenant}, timeout_s=CERTAIN_TIMEOUT_S)
        return JobView.model_validate(view)

    async def why(self, tenant: str, req_no: str) -> Sequence[Mapping[str, Any]]:
        """Return every reason that keeps the job waiting."""
        answer = await self._call("GET", f"/internal/jobs/{_part(req_no)}/why", params={"tenant": tenant})
        reasons: Sequence[Mapping[str, Any]] = answer["reasons"]
        return reasons

    async def events(self, tenant: str, req_no: str = "", after: int = 0) -> AsyncIterator[JobEvent]:
        """Stream changes; a lost connection raises SupportRefused 503, and the caller goes on after the last id it saw."""
        params: dict[str, str | int] = {"tenant": tenant, "req_no": req_no, "after": after}
        timeout = httpx.Timeout(CALL_TIMEOUT_S, read=STREAM_SILENCE_S)
        try:
            async with self._http.stream("GET", "/internal/events", params=params, timeout=timeout) as answer:
                if not answer.is_success:
                    await answer.aread()
                    raise _refusal(answer)
                kind = ""
                async for line in answer.aiter_lines():
                    if line == "event: end":
                        return
                    if line.startswith("event: "):
                        kind = line[7:]
                    elif line.startswith("data: ") and kind == "refused":
                        raise _refusal_of(json.loads(line[6:]))
                    elif line.startswith("data: "):
                        yield JobEvent.model_validate_json(line[6:])
        except httpx.TransportError as error:
            raise SupportRefused(503, "support_down", f"the stream from SS broke: {error}") from error
        raise SupportRefused(503, "support_down", "SS ended the stream, it is going down")

    async def quote(self, message: str) -> Mapping[str, Any]:
        """Return when a request would start and end."""
        answer: Mapping[str, Any] = await self._call("POST", "/internal/quotes", body={"message": message})
        return answer

    async def compensate(self, tenant: str, req_no: str, action: str, key: str = "") -> Mapping[str, Any]:
        """Carry out a compensation."""
        answer: Mapping[str, Any] = await self._call(
            "POST",
            f"/internal/jobs/{_part(req_no)}/compensations",
            params={"tenant": tenant},
            body={"action": action, "key": key},
            timeout_s=CERTAIN_TIMEOUT_S,
        )
        return answer

    # --- models -------------------------------------------------------------------------------------------------------

    async def models(self, tenant: str) -> Sequence[ModelView]:
        """Return the models the tenant may use."""
        answer = await self._call("GET", "/internal/models", params={"tenant": tenant})
        return [ModelView.model_validate(view) for view in answer["models"]]

    async def model(self, tenant: str, model_id: str) -> ModelView:
        """Return one model."""
        answer = await self._call("GET", f"/internal/models/{_part(model_id)}", params={"tenant": tenant})
        return ModelView.model_validate(answer)

    async def deploy(self, tenant: str, model_id: str, pods: int) -> ModelView:
        """Keep `pods` warm Pods with the model; 0 undeploys."""
        path = f"/internal/models/{_part(model_id)}"
        answer = await self._call(
            "PUT", path, params={"tenant": tenant}, body={"pods": pods}, timeout_s=CERTAIN_TIMEOUT_S
        )
        return ModelView.model_validate(answer)

    async def delete_model(self, tenant: str, model_id: str) -> None:
        """Delete a personalised model."""
        path = f"/internal/models/{_part(model_id)}"
        await self._call("DELETE", path, params={"tenant": tenant}, timeout_s=CERTAIN_TIMEOUT_S)

    # --- operators ----------------------------------------------------------------------------------------------------

    async def nodes(self) -> Sequence[Mapping[str, Any]]:
        """Return every node."""
        nodes: Sequence[Mapping[str, Any]] = (await self._call("GET", "/internal/nodes"))["nodes"]
        return nodes

    async def drain(self, node: str, gpu: str | None = None) -> None:
        """Start nothing new there."""
        await self._call("POST", f"/internal/nodes/{_part(node)}/drain", body={"gpu": gpu})

    async def uncordon(self, node: str, gpu: str | None = None) -> None:
        """Take work again."""
        await self._call("POST", f"/internal/nodes/{_part(node)}/uncordon", body={"gpu": gpu})

    async def unload(self, node: str, model_id: str) -> None:
        """Let a model leave a node."""
        await self._call("POST", f"/internal/nodes/{_part(node)}/unload", body={"model": model_id})

    async def queue(self) -> Mapping[str, Any]:
        """Return queue lengths and counters."""
        answer: Mapping[str, Any] = await self._call("GET", "/internal/queue")
        return answer

    async def whatif(self, request: WhatIfRequest) -> Mapping[str, Any]:
        """Simulate two futures."""
        answer: Mapping[str, Any] = await self._call(
            "POST", "/internal/whatif", body=request.model_dump(mode="json"), timeout_s=WHATIF_TIMEOUT_S
        )
        return answer

    async def health(self) -> Mapping[str, Any]:
        """Return SS's health; an SS that does not answer is a module that is not well."""
        try:
            answer: Mapping[str, Any] = await self._call("GET", "/internal/health", timeout_s=3.0)
        except SupportRefused as refused:
            return {"ready": False, "modules": {"support": {"ok": False, "detail": refused.message}}}
        return answer


def _part(name: str) -> str:
    return quote(name, safe="")


def _refusal(answer: httpx.Response) -> SupportRefused:
    try:
        return _refusal_of(answer.json())
    except (ValueError, KeyError, TypeError):
        return SupportRefused(502, "support_answer", f"SS answered {answer.status_code} in a form that is not its own")


def _refusal_of(tree: Any) -> SupportRefused:
    error = tree["error"]
    return SupportRefused(
        int(error["status"]), str(error["code"]), str(error["message"]), float(error.get("retry_s", 0.0))
    )


async def wait_until_ready(client: SupportClient, timeout_s: float) -> bool:
    """Return whether SS became ready within the time."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not (await client.health())["ready"]:
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.05)
    return True
