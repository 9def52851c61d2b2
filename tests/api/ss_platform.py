"""A whole scheduler over a world in memory, and what an outside program does with its queues: shared by the tests of SS."""

from __future__ import annotations

import asyncio
import io
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from api.mq.messages import encode_request, request_id
from api.mq.port import REQUESTS, RESULTS
from api.ports import SupportRefused
from api.sm.process import Scheduler, SchedulerConfig
from api.state_dir import StateDir
from api.support.drill import DrillWorld
from api.support.intake import MethodDefaults
from api.support.jobs import Model
from engine import profiles
from engine.limits import Limits
from engine.resources import Demand
from executors.dfs import open_store

METHODS = {
    "sleep": MethodDefaults(Demand(gpus=1), slots=4),
    "text_to_image": MethodDefaults(Demand(gpus=1)),
    "dreambooth": MethodDefaults(Demand(gpus=1)),
}


class Platform:
    """A scheduler with a drill world, and what an outside program would do with its queues."""

    def __init__(self, root: Path, **drill: Any) -> None:
        self.root = root
        self.drill = {"nodes": 1, "gpus": 2, **drill}
        self.files = open_store("memory://")
        self.start()

    def start(self) -> None:
        config = SchedulerConfig(
            state=StateDir(self.root),
            make_world=lambda begin: DrillWorld(begin.payloads, not_before=begin.not_before, **self.drill),
            profile=profiles.load("fifo"),
            methods=METHODS,
            limits=Limits(backoff_us=1_000),
            models=[Model("tiny", "builtin")],
            files=self.files,
        )
        self.scheduler = Scheduler(config)
        self.queue = self.scheduler.queue
        self.scheduler.start()
        self.support = self.scheduler.support

    def stop(self) -> None:
        self.scheduler.close()
        assert self.scheduler.error is None

    def ask(self, req_no: str | None = None, *, seconds: float = 0.0, raw_id: str = "", **header: Any) -> str:
        req_no = req_no or str(uuid.uuid4())
        fields = {"task_type": "GC", "method": "sleep", "parameters": {"seconds": seconds}, **header}
        fields.setdefault("tenant", "acme")
        body = encode_request(req_no=req_no, **fields)
        self.queue.put(REQUESTS, raw_id or request_id(fields["tenant"], req_no), body, int(fields.get("priority", 0)))
        return req_no

    def pictures(self, number: int = 3) -> list[str]:
        """Store small pictures and return their file ids."""
        ids = []
        for shade in range(number):
            out = io.BytesIO()
            Image.new("RGB", (8, 8), (shade, 0, 0)).save(out, "PNG")
            ids.append(self.files.put_bytes(out.getvalue(), "image/png").file_id)
        return ids

    def results(self, number: int) -> dict[str, dict[str, Any]]:
        """Take this many results and fail if another one follows at once."""
        found: dict[str, dict[str, Any]] = {}
        while len(found) < number:
            taken = self.queue.take(RESULTS, 64, wait_s=30)
            assert taken, f"only {len(found)} of {number} results came"
            for delivery in taken:
                assert delivery.message_id not in found, "a result came twice"
                found[delivery.message_id] = json.loads(delivery.body)
            self.queue.ack(taken)
        return found

    def result(self, req_no: str, tenant: str = "acme") -> dict[str, Any]:
        message = self.results(1)[f"{tenant}/{req_no}"]
        parameters: dict[str, Any] = message["body"]["parameters"]
        return parameters

    def call(self, what: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return await asyncio.wait_for(what(), 60)

        return asyncio.run(run())

    def job_when(self, req_no: str, states: set[str], tenant: str = "acme") -> Any:
        """Return the job as soon as it is in one of the states."""

        async def wait() -> Any:
            while True:
                try:
                    view = await self.support.job(tenant, req_no)
                    if view.state in states:
                        return view
                except SupportRefused:
                    pass
                await asyncio.sleep(0.005)

        return self.call(wait)
