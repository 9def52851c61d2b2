"""The support service (SS) as the gateway sees it: `api.ports.SupportPort` inside the scheduler's process.

Every answer shows durable facts only. What changes the engine is posted as an event, and the call returns when the journal has it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from api.mq.messages import MessageRefused, decode, request_id
from api.mq.port import REQUESTS
from api.ports import JobEvent, JobView, ModelView, SupportRefused
from api.support import views
from api.support.compensate import compensate
from api.support.core import SupportCore
from api.support.intake import MAX_DEPLOYED_PODS
from api.support.jobs import TERMINAL, Job, Model, view_of
from api.support.quotes import Asked, Foreseeing, Told, answer, told_apart
from api.whatif_request import WhatIfRequest
from engine.ahead.foresight import Promise
from engine.ahead.instead import would_start_if
from engine.events import Event, ModelUnloadRequested, NodeDrainRequested, NodeUncordoned, TaskCancelRequested
from engine.scheduler import Engine

T = TypeVar("T")
CERTAIN_TIMEOUT_S = 120.0
"""Longest wait for a cancel: a silent node's lease and margin, with room to spare."""
KEEPALIVE_S = 15.0
OUTLOOK_S = 1.0
"""How often the reader of one job's events is told of a promise that changed."""
MAX_PAGE = 500


class Loop(Protocol):
    """The scheduler's loop as SS needs it."""

    def post(self, event: Event) -> None:
        """Give the engine an event; from any thread."""
        ...

    async def ask(self, question: Callable[[Engine], T]) -> T:
        """Answer a question about the engine between two of its steps."""
        ...

    def health(self) -> Mapping[str, tuple[bool, str]]:
        """Return (well, detail) of each part of the loop."""
        ...


class SupportService:
    """SS in one process with the scheduler's loop."""

    def __init__(
        self,
        core: SupportCore,
        loop: Loop,
        *,
        heard: Callable[[], Mapping[str, float]] = dict,
        figures: Callable[[], Mapping[str, Any]] = dict,
        foresee: Callable[[WhatIfRequest], Awaitable[Mapping[str, Any]]] | None = None,
        foresight: Foreseeing | None = None,
    ) -> None:
        """`heard` says when each node was heard last; `figures` are added to `queue`; `foresee` answers what-ifs, `foresight` says
        when jobs will be done."""
        self._core = core
        self._loop = loop
        self._heard, self._figures = heard, figures
        self._foresee, self._foreseeing = foresee, False
        self._foresight = foresight

    # --- jobs ---------------------------------------------------------------------------------------------------------

    async def job(self, tenant: str, req_no: str) -> JobView:
        """Return a job, from the board, the store, or the queue where it still waits."""
        shown = self._core.board.view((tenant, req_no))
        if shown is not None:
            return self._shown(shown[1])
        job = self._core.store.job(tenant, req_no)
        if job is not None:
            return self._shown(self._freshest(job))
        waiting = self._core.queue.peek(REQUESTS, request_id(tenant, req_no))
        if waiting is not None:
            try:
                message = decode(waiting.body)
                if message.header.tenant == tenant and message.req_no == req_no:
                    return views.queued_view(message, self._core.clock())
            except MessageRefused:
                pass
        raise _absent("job", req_no)

    async def jobs(
        self, tenant: str, *, limit: int = 50, cursor: str = "", state: str = "", group: str = ""
    ) -> tuple[Sequence[JobView], str]:
        """Return jobs newest first and the cursor of the next page."""
        if cursor and not cursor.isdigit():
            raise SupportRefused(422, "bad_cursor", "cursor: use the one that came with the page before")
        limit = max(1, min(limit, MAX_PAGE))
        found = self._core.store.jobs(tenant, limit + 1, int(cursor or 0), state, group)
        page = [self._shown(self._freshest(job)) for job in found[:limit]]
        return page, str(found[limit - 1].n) if len(found) > limit else ""

    def _shown(self, view: Mapping[str, Any]) -> JobView:
        return views.job_view(view, self._promise(view["tenant"], view["req_no"]))

    def _promise(self, tenant: str, req_no: str) -> Promise | None:
        """Return when a job will be done, by the last look ahead."""
        if self._foresight is None:
            return None
        outlook = self._foresight.outlook
        return outlook.of(req_no, tenant) or outlook.of(told_apart(tenant, req_no), tenant)

    def _freshest(self, job: Job) -> Mapping[str, Any]:
        shown = self._core.board.view(job.key)
        return shown[1] if shown is not None and shown[0] >= job.last_event else view_of(job)

    async def cancel(self, tenant: str, req_no: str) -> JobView:
        """Cancel; returns the final state, whichever of result and cancel came first."""
        job = await self._taken_in(tenant, req_no)
        if job.terminal:
            return views.job_view(view_of(job))
        self._core.post(TaskCancelRequested(job.task_id))
        ended = await self._core.board.until(lambda: self._ended(job.key), CERTAIN_TIMEOUT_S)
        if ended is None:
            raise SupportRefused(504, "not_certain", f"job {req_no}: it is not certain yet that it stopped; ask again")
        return views.job_view(ended)

    def _ended(self, key: tuple[str, str]) -> Mapping[str, Any] | None:
        shown = self._core.board.view(key)
        if shown is None:
            job = self._core.store.job(*key)
            return view_of(job) if job is not None and job.terminal else None
        return shown[1] if shown[1]["state"] in TERMINAL else None

    async def _taken_in(self, tenant: str, req_no: str) -> Job:
        """Return a job from the store, taking its message out of the queue first where it still waits there."""
        store, queue = self._core.store, self._core.queue
        job = store.job(tenant, req_no)
        if job is not None:
            return job
        message_id = request_id(tenant, req_no)
        delivery = await asyncio.to_thread(queue.claim, REQUESTS, message_id)
        if delivery is not None:
            await asyncio.to_thread(self._core.take_in, delivery)
        elif queue.peek(REQUESTS, message_id) is None and store.job(tenant, req_no) is None:
            raise _absent("job", req_no)
        job = await self._core.board.until(lambda: store.job(tenant, req_no), 10.0)
        if job is None:
            raise _absent("job", req_no)
        return job

    async def why(self, tenant: str, req_no: str) -> Sequence[Mapping[str, Any]]:
        """Return every reason that keeps the job waiting."""
        job = self._core.store.job(tenant, req_no)
        if job is None:
            await self.job(tenant, req_no)
            return [{"reason": "queued", "message": "the request waits in the message queue", "missing": {}}]
        if job.terminal:
            return []
        task_id = job.task_id

        def question(engine: Engine) -> list[dict[str, Any]]:
            # A task that ended a long time ago is forgotten by the engine.
            if task_id not in engine.state.tasks:
                return []
            instead = would_start_if(engine.state, engine.profile, task_id)
            return views.blockers_view(engine.why(task_id)) + views.instead_view(instead)

        return await self._loop.ask(question)

    async def events(self, tenant: str, req_no: str = "", after: int = 0) -> AsyncIterator[JobEvent]:
        """Stream changes after an event id; ends when the one job is terminal."""
        board = self._core.board
        if req_no:
            await self.job(tenant, req_no)
        listener = board.listen(lambda change: tenant in ("*", change.job.tenant) and req_no in ("", change.job.req_no))
        try:
            for event in self._history(tenant, req_no, after):
                yield event
                after = event.event_id
            job = self._core.store.job(tenant, req_no) if req_no else None
            if job is not None and job.terminal:
                if job.last_event > after:
                    yield JobEvent(
                        event_id=job.last_event,
                        kind=job.state,
                        at=job.finished_at or 0.0,
                        view=views.job_view(view_of(job)),
                    )
                return
            told = Told()
            while not board.closed:
                for change in await listener.take(OUTLOOK_S if req_no and self._foresight else KEEPALIVE_S):
                    if change.event_id <= after:
                        continue
                    after = change.event_id
                    promise = self._promise(change.job.tenant, change.job.req_no)
                    if req_no:
                        told.tell(promise)
                    yield views.job_event(change, promise)
                    if req_no and change.view["state"] in TERMINAL:
                        return
                if req_no and (outlook := await self._outlook(tenant, req_no, told)) is not None:
                    yield outlook
            raise SupportRefused(503, "support_down", "SS is going down; go on after the last event id")
        finally:
            board.leave(listener)

    async def _outlook(self, tenant: str, req_no: str, told: Told) -> JobEvent | None:
        """Return an event where a job's promise has changed since its reader was told; it has no id, for it is not stored."""
        if self._foresight is None:
            return None
        view = await self.job(tenant, req_no)
        promise = self._promise(view.tenant, req_no)
        if promise is None or view.state in TERMINAL or not told.is_news(promise):
            return None
        told.tell(promise)
        return JobEvent.model_construct(event_id=0, kind="outlook", at=promise.made_at / 1e6, view=view)

    def _history(self, tenant: str, req_no: str, after: int) -> list[JobEvent]:
        """Return the stored changes after an event id; without an id, one job's whole life and of all jobs nothing."""
        if not req_no and after <= 0:
            return []
        jobs: dict[int, Job | None] = {}
        events = []
        for row in self._core.store.events(tenant, req_no, after, 10_000):
            if row[3] not in jobs:
                jobs[row[3]] = self._core.store.job_by_number(row[3])
            job = jobs[row[3]]
            if job is not None:
                events.append(views.stored_event(row, job))
        return events

    async def quote(self, message: str) -> Mapping[str, Any]:
        """Return when a request would start and end if it were submitted now, its cost, and alternatives."""
        foresight = self._foresight
        if foresight is None:
            raise SupportRefused(501, "no_foresight", "this SS does not look ahead")
        asked = Asked.read(message, self._core)
        return await self._loop.ask(lambda _: answer(asked, foresight))

    async def compensate(self, tenant: str, req_no: str, action: str, key: str = "") -> Mapping[str, Any]:
        """Redeliver the result, run a dead-lettered task again, or give back its quota; idempotent by key."""
        job = self._core.store.job(tenant, req_no)
        if job is None:
            raise _absent("job", req_no)
        return await compensate(self._core, self._remembered, job, action, key)

    async def _remembered(self, task_id: str) -> bool:
        return await self._loop.ask(lambda engine: task_id in engine.state.tasks)

    # --- models -------------------------------------------------------------------------------------------------------

    async def models(self, tenant: str) -> Sequence[ModelView]:
        """Return the models the tenant may use."""
        return [views.model_view(model) for model in self._core.store.models(tenant)]

    async def model(self, tenant: str, model_id: str) -> ModelView:
        """Return one model."""
        return views.model_view(self._model(tenant, model_id))

    def _model(self, tenant: str, model_id: str) -> Model:
        model = self._core.store.model(model_id)
        if model is None or (tenant != "*" and model.tenant not in ("", tenant)):
            raise _absent("model", model_id)
        return model

    async def deploy(self, tenant: str, model_id: str, pods: int) -> ModelView:
        """Keep `pods` warm Pods with the model; 0 undeploys."""
        if not 0 <= pods <= MAX_DEPLOYED_PODS:
            raise SupportRefused(422, "invalid", f"pods: give a whole number from 0 to {MAX_DEPLOYED_PODS}")
        self._model(tenant, model_id)
        self._core.post(self._core.deployment(model_id, pods))

        def deployed() -> Model | None:
            model = self._core.store.model(model_id)
            return model if model is not None and model.deployed_pods == pods else None

        model = await self._core.board.until(deployed, CERTAIN_TIMEOUT_S)
        if model is None:
            raise SupportRefused(504, "not_certain", f"model {model_id}: the deployment is not certain yet; ask again")
        return views.model_view(model)

    async def delete_model(self, tenant: str, model_id: str) -> None:
        """Delete a personalised model; 409 while a job or another model needs it."""
        model = self._model(tenant, model_id)
        if model.kind in ("builtin", "local"):
            raise SupportRefused(
                403, "not_yours", f"model {model_id} is {model.kind}; only trained models can be deleted"
            )
        if self._core.store.model_in_use(model_id):
            raise SupportRefused(
                409, "in_use", f"model {model_id} is used by a job that has not ended; cancel it or wait"
            )
        if model.deployed_pods:
            await self.deploy(tenant, model_id, 0)

        def delete() -> None:
            with self._core.journal.transaction() as db:
                self._core.store.write_model_deleted(db, model_id)

        await asyncio.to_thread(delete)

    # --- operators ----------------------------------------------------------------------------------------------------

    async def nodes(self) -> Sequence[Mapping[str, Any]]:
        """Return every node with its GPUs, use, Pods and state."""
        heard, use, stocks = self._heard(), self._core.use, self._core.stocks.view()
        return await self._loop.ask(lambda engine: views.nodes_view(engine.state, heard, use, stocks))

    async def drain(self, node: str, gpu: str | None = None) -> None:
        """Start nothing new there."""
        await self._check_node(node, gpu)
        self._core.post(NodeDrainRequested(node, gpu))
        await self._loop.ask(lambda _: None)

    async def uncordon(self, node: str, gpu: str | None = None) -> None:
        """Take work again."""
        await self._check_node(node, gpu)
        self._core.post(NodeUncordoned(node, gpu))
        await self._loop.ask(lambda _: None)

    async def unload(self, node: str, model_id: str) -> None:
        """Let a model's idle Pods and files leave a node."""
        nodes = {item["name"]: item for item in await self.nodes()}
        if node not in nodes:
            raise _absent("node", node)
        held = {each["model"] for each in (*nodes[node].get("models", ()), *nodes[node]["pods"])}
        if model_id not in held:
            raise SupportRefused(404, "not_found", f"node {node} holds no model {model_id[:200]!r}; see its models")
        self._core.post(ModelUnloadRequested(node, model_id))
        await self._loop.ask(lambda _: None)

    async def _check_node(self, node: str, gpu: str | None) -> None:
        nodes = {item["name"]: item for item in await self.nodes()}
        if node not in nodes:
            raise _absent("node", node)
        if gpu is not None and gpu not in {item["uuid"] for item in nodes[node]["gpus"]}:
            raise _absent("gpu", gpu)

    async def queue(self) -> Mapping[str, Any]:
        """Return queue lengths, engine and MQ counters."""
        engine = await self._loop.ask(lambda engine: views.engine_view(engine.state))
        counts = await asyncio.to_thread(self._core.queue.counts)
        return {"engine": engine, "mq": counts, "support": dict(self._core.counters), **self._figures()}

    async def whatif(self, request: WhatIfRequest) -> Mapping[str, Any]:
        """Simulate two futures in a process of its own, one question at a time."""
        if self._foresee is None:
            raise SupportRefused(501, "no_whatif", "this SS has no journal to fork")
        if self._foreseeing:
            raise SupportRefused(409, "whatif_running", "another what-if is being computed; ask again when it is done")
        self._foreseeing = True
        try:
            return await self._foresee(request)
        finally:
            self._foreseeing = False

    async def health(self) -> Mapping[str, Any]:
        """Return whether SS and the scheduler are ready, part by part."""
        modules = {name: {"ok": ok, "detail": detail} for name, (ok, detail) in self._loop.health().items()}
        low = self._core.disk_low()
        modules["disk"] = {"ok": not low, "detail": "less than 5% free: nothing new is accepted" if low else ""}
        behind = self._core.busy() and not low
        modules["intake"] = {
            "ok": not behind,
            "detail": "too much is under way: requests wait in the queue" if behind else "",
        }
        return {"ready": all(module["ok"] for module in modules.values()), "modules": modules}


def _absent(what: str, name: str) -> SupportRefused:
    return SupportRefused(404, f"{what}_not_found", f"there is no {what} {name!r}")
