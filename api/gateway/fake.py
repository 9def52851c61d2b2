"""An SS and a queue in memory: for tests, and for building clients against the gateway without a cluster.

It follows `SupportPort` to the letter, tenants included. Jobs stand still until told (`move`), or run by themselves with
`auto`.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient
from PIL import Image

from api.gateway.app import create_app
from api.gateway.config import GatewayConfig
from api.gateway.keys import KeyStore
from api.monitoring.logs import LogRing, configure_logging
from api.mq.messages import decode
from api.mq.port import Outgoing
from api.ports import JobEvent, JobView, ModelView, SupportRefused
from api.whatif_request import WhatIfRequest
from executors.dfs import open_store
from executors.ports import FileStore

TERMINAL = ("finished", "cancelled", "rejected", "dead")


class SupportFake:
    """`SupportPort` and the gateway's `QueuePort` in one, in memory."""

    def __init__(self, store: FileStore | None = None, *, auto: bool = False) -> None:
        self.store = store
        self.auto = auto
        self.reading = True
        """False: messages stay in the queue."""
        self.messages: list[tuple[str, Outgoing]] = []
        self.held: list[bytes] = []
        self.known: dict[tuple[str, str], JobView] = {}
        self.history: list[JobEvent] = []
        self.compensations: dict[tuple[str, str], Mapping[str, Any]] = {}
        self.models_by_id = {"tiny": ModelView(model_id="tiny", kind="builtin")}
        self.node_rows: dict[str, dict[str, Any]] = {
            "node-1": {
                "name": "node-1",
                "state": "ready",
                "gpus": [
                    {
                        "uuid": "cpu-0",
                        "model": "cpu",
                        "memory_bytes": 1 << 30,
                        "memory_used_bytes": 0,
                        "busy_permille": 250,
                    }
                ],
                "pods": [],
            }
        }
        self.ready = True

    # --- the queue --------------------------------------------------------------------------------------------------

    def put_many(self, queue: str, messages: Sequence[Outgoing]) -> int:
        """Take messages; a known id changes nothing."""
        known = {message.message_id for _, message in self.messages}
        fresh = [message for message in messages if message.message_id not in known]
        for message in fresh:
            self.messages.append((queue, message))
            if self.reading:
                self.read(message.body)
            else:
                self.held.append(message.body)
        return len(fresh)

    def read_held(self) -> None:
        """Read the messages that were held back, and all later ones at once."""
        self.reading = True
        held, self.held = self.held, []
        for body in held:
            self.read(body)

    def read(self, body: bytes) -> None:
        """Make a job of a message."""
        message = decode(body)
        header, parameters = message.header, dict(message.body.parameters)
        view = JobView(
            req_no=message.req_no,
            tenant=header.tenant,
            group=header.group,
            task_type=header.taskType,
            method=message.body.method,
            model=str(parameters.get("model") or parameters.get("base_model") or ""),
            priority=header.priority,
            state="pending",
            submitted_at=time.time(),
            parameters=parameters,
        )
        self.known[(view.tenant, view.req_no)] = view
        self._note("submitted", view)
        if self.auto:
            self.move(view.req_no, "running", node="node-1")
            self.move(view.req_no, "finished", result=self.made(view))

    def made(self, view: JobView) -> dict[str, Any]:
        """Return a result with real little pictures in the store."""
        files = []
        if self.store is not None and view.method == "text_to_image":
            for number in range(int(view.parameters.get("count", 1))):
                buffer = io.BytesIO()
                Image.new("RGB", (8, 8), (number * 20 % 256, 40, 80)).save(buffer, "PNG")
                ref = self.store.put_bytes(buffer.getvalue(), "image/png")
                files.append(
                    {
                        "file_id": ref.file_id,
                        "media_type": "image/png",
                        "size_bytes": ref.size_bytes,
                        "role": "picture",
                        "name": f"{number}.png",
                    }
                )
        return {"files": files, "metadata": {"seed": view.parameters.get("seed", 0)}}

    def move(self, req_no: str, state: str, **changes: Any) -> JobView:
        """Bring a job into a state."""
        key = next(key for key in self.known if key[1] == req_no)
        now = time.time()
        if state == "running":
            changes.setdefault("started_at", now)
        if state in TERMINAL:
            changes.setdefault("finished_at", now)
        view = self.known[key].model_copy(update={"state": state, **changes})
        self.known[key] = view
        self._note(state, view)
        return view

    def _note(self, kind: str, view: JobView) -> None:
        self.history.append(JobEvent(event_id=len(self.history) + 1, kind=kind, at=time.time(), view=view))

    # --- the port ---------------------------------------------------------------------------------------------------

    async def job(self, tenant: str, req_no: str) -> JobView:
        """Return a job."""
        for (owner, known), view in self.known.items():
            if known == req_no and tenant in (owner, "*"):
                return view
        raise SupportRefused(404, "not_found", "there is no such job")

    async def jobs(
        self, tenant: str, *, limit: int = 50, cursor: str = "", state: str = "", group: str = ""
    ) -> tuple[Sequence[JobView], str]:
        """Return jobs, newest first."""
        rows = [
            view
            for (owner, _), view in reversed(self.known.items())
            if tenant in (owner, "*") and state in ("", view.state) and group in ("", view.group)
        ]
        if cursor and not (cursor.isascii() and cursor.isdigit() and len(cursor) < 10):
            raise SupportRefused(400, "bad_cursor", "cursor: take it from next_cursor of the page before")
        start = int(cursor or 0)
        return rows[start : start + limit], str(start + limit) if start + limit < len(rows) else ""

    async def cancel(self, tenant: str, req_no: str) -> JobView:
        """Cancel."""
        view = await self.job(tenant, req_no)
        return view if view.state in TERMINAL else self.move(req_no, "cancelled")

    async def why(self, tenant: str, req_no: str) -> Sequence[Mapping[str, Any]]:
        """Return why it waits."""
        view = await self.job(tenant, req_no)
        if view.state != "pending":
            return []
        return [
            {"reason": "NO_GPU_MEMORY", "message": "no GPU has the memory free", "missing": {"gpu_memory_bytes": 1}}
        ]

    async def quote(self, message: str) -> Mapping[str, Any]:
        """Return a quote: ten seconds of waiting for everybody who waits, and a run of a second."""
        decoded = decode(message.encode())
        ahead = sum(view.state == "pending" for view in self.known.values())
        now = time.time()
        start = {"p50": now + 10 * ahead, "p90": now + 20 * ahead}
        urgent = {
            "kind": "urgent_lane",
            "change": {"priority": 100},
            "start_at": {"p50": now, "p90": now},
            "finish_at": {"p50": now + 1, "p90": now + 2},
        }
        return {
            "queue_position": ahead + 1 if ahead else None,
            "start_at": start,
            "finish_at": {name: at + 1 for name, at in start.items()},
            "run_s": {"mean": 1.0, "p50": 1.0, "p90": 1.0},
            "cost": None,
            "waiting": ahead,
            "reason": "",
            "retry_after_s": 10.0 if ahead else 1.0,
            "alternatives": [urgent] if ahead and decoded.header.priority < 100 else [],
        }

    async def events(self, tenant: str, req_no: str = "", after: int = 0) -> AsyncIterator[JobEvent]:
        """Stream changes."""
        if req_no:
            await self.job(tenant, req_no)
        place = 0
        while True:
            while place < len(self.history):
                event = self.history[place]
                place += 1
                if (
                    event.event_id <= after
                    or (tenant not in (event.view.tenant, "*"))
                    or req_no not in ("", event.view.req_no)
                ):
                    continue
                yield event
            if req_no and (await self.job(tenant, req_no)).state in TERMINAL and place == len(self.history):
                return
            await asyncio.sleep(0.005)

    async def compensate(self, tenant: str, req_no: str, action: str, key: str = "") -> Mapping[str, Any]:
        """Make good."""
        view = await self.job(tenant, req_no)
        if key and (req_no, key) in self.compensations:
            return self.compensations[(req_no, key)]
        if action == "rerun":
            if view.state != "dead":
                raise SupportRefused(409, "not_dead", "only a dead-lettered job can be run again")
            self.move(req_no, "pending", finished_at=None)
        if action == "redeliver_result" and view.state not in TERMINAL:
            raise SupportRefused(409, "not_ended", "the job has no result yet")
        done = {"action": action, "done": True, "number": len(self.compensations) + 1}
        self.compensations[(req_no, key or f"#{len(self.compensations)}")] = done
        return done

    async def models(self, tenant: str) -> Sequence[ModelView]:
        """Return models."""
        return [view for view in self.models_by_id.values() if tenant in ("*", view.tenant) or not view.tenant]

    async def model(self, tenant: str, model_id: str) -> ModelView:
        """Return a model."""
        for view in await self.models(tenant):
            if view.model_id == model_id:
                return view
        raise SupportRefused(404, "not_found", "there is no such model")

    async def deploy(self, tenant: str, model_id: str, pods: int) -> ModelView:
        """Keep Pods warm."""
        view = (await self.model(tenant, model_id)).model_copy(update={"deployed_pods": pods})
        self.models_by_id[model_id] = view
        return view

    async def delete_model(self, tenant: str, model_id: str) -> None:
        """Delete a model."""
        view = await self.model(tenant, model_id)
        if view.kind in ("builtin", "local"):
            raise SupportRefused(409, "not_personalised", "only a model that a training made can be deleted")
        del self.models_by_id[model_id]

    async def nodes(self) -> Sequence[Mapping[str, Any]]:
        """Return nodes."""
        return list(self.node_rows.values())

    async def drain(self, node: str, gpu: str | None = None) -> None:
        """Drain."""
        self._node(node, gpu)["state"] = "draining"

    async def uncordon(self, node: str, gpu: str | None = None) -> None:
        """Take work again."""
        self._node(node, gpu)["state"] = "ready"

    async def unload(self, node: str, model_id: str) -> None:
        """Let a model leave a node."""
        row = self._node(node, None)
        row["models"] = [each for each in row.get("models", ()) if each["model"] != model_id]

    def _node(self, node: str, gpu: str | None) -> dict[str, Any]:
        row = self.node_rows.get(node)
        if row is None or (gpu and all(one["uuid"] != gpu for one in row["gpus"])):
            raise SupportRefused(404, "not_found", "there is no such node or GPU")
        return row

    async def queue(self) -> Mapping[str, Any]:
        """Return lengths."""
        pending = sum(view.state == "pending" for view in self.known.values())
        return {"pending": pending, "mq": {"requests": len(self.held)}}

    async def whatif(self, request: WhatIfRequest) -> Mapping[str, Any]:
        """Answer with what was asked."""
        return {"change": request.model_dump(exclude_defaults=True), "lines": []}

    async def health(self) -> Mapping[str, Any]:
        """Return health."""
        return {"ready": self.ready, "modules": {"scheduler": {"ok": self.ready, "detail": "secret detail"}}}


class GatewayFake:
    """A whole gateway over the fake, with the keys of two tenants and of an operator.

    `keep_log` lets structlog write into `logs`, for the whole process.
    """

    def __init__(self, directory: Path, *, auto: bool = False, keep_log: bool = False, **settings: Any) -> None:
        self.store = open_store("memory://")
        self.support = SupportFake(self.store, auto=auto)
        self.keys = KeyStore(directory / "keys.sqlite", b"k" * 32)
        self.logs = LogRing()
        if keep_log:
            configure_logging("gateway", stream=io.StringIO(), ring=self.logs, standard_library=False)
        given = {"signing_secrets": ("s" * 40,), "watch_s": 0.0, "poll_s": 0.01, **settings}
        self.config = GatewayConfig.model_validate({"state_dir": directory, **given})
        self.app = create_app(self.config, self.support, self.support, self.store, self.keys, logs=self.logs)
        self.client = TestClient(self.app)
        self.ana, self.bob = self.key("ana"), self.key("bob")
        self.ops = {"Authorization": f"Bearer {self.keys.create('ops', 'operator')[0]}"}

    def key(self, tenant: str) -> dict[str, str]:
        """Return the headers of a fresh key of a tenant."""
        return {"Authorization": f"Bearer {self.keys.create(tenant)[0]}"}

    def submit(self, **more: Any) -> dict[str, Any]:
        """Submit a job as the tenant ana."""
        answer = self.client.post(
            "/v1/jobs", json={"method": "sleep", "parameters": {"seconds": 1}, **more}, headers=self.ana
        )
        answer.raise_for_status()
        return dict(answer.json())
