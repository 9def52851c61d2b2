"""The half of SS that lives in the scheduler's loop: takes requests in, folds every step into the store, announces what is durable.

One rule orders everything: a step, the jobs it changed, the outcomes it decided and the results it owes are one transaction; only
after its commit are requests acknowledged, results published, readers told.
"""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import structlog

from api.mq.messages import Message, MessageRefused, decode
from api.mq.port import REQUESTS, Delivery, Queue
from api.ports import SupportRefused
from api.sm.journal import SqliteJournal
from api.support.board import Board
from api.support.intake import GENERATION_METHOD, MethodDefaults, Request, understand
from api.support.jobs import TRAINING_METHOD, Folded, Job, JobFold
from api.support.memory import MemoryDoor
from api.support.payloads import StorePayloads
from api.support.pictures import problem, problem_of
from api.support.sharing import pod_model
from api.support.stocks import Stocks
from api.support.store import Store
from api.support.threads import IntakeThread, MailThread
from engine.commands import Command
from engine.events import Event, ModelDeployed, ModelUndeployed, NodeReported, TaskSubmitted
from engine.tasks import Micros, TaskSpec
from executors.methods.parameters import picture_fields
from executors.ports import FileStore

_log = structlog.get_logger("ss")
GENERATES = "text_to_image"
_NEVER_RESUMED = frozenset({"finished", "cancelled"})
"""How jobs end whose checkpoints nobody needs; a dead-lettered one may be run again."""
MIN_FREE_SHARE = 0.05
"""Below this share of free disk nothing new is accepted."""


class SupportCore:
    """SS without its face. Give `within` and `published` to the journal, `payloads` to the world, then `start`."""

    def __init__(
        self,
        journal: SqliteJournal,
        store: Store,
        queue: Queue,
        *,
        methods: Mapping[str, MethodDefaults],
        default_model: str = "tiny",
        files: FileStore | None = None,
        quotas: Mapping[str, int] | None = None,
        max_live: int = 200_000,
        max_expected: int = 4_000,
        failed: Callable[[BaseException], None] = lambda _: None,
        clock: Callable[[], float] = time.time,
        largest_card: Callable[[], int] = lambda: 0,
    ) -> None:
        """`largest_card` returns the memory of the cluster's largest GPU in bytes, 0 while none is known."""
        self.journal, self.store, self.queue = journal, store, queue
        self.methods, self.default_model = dict(methods), default_model
        self.clock = clock
        self._quotas = dict(quotas or {})
        self._files = files
        self._memory = MemoryDoor(store.model, largest_card)
        self._max_live, self._max_expected = max_live, max_expected
        self.board = Board()
        self.fold = JobFold(store.live_jobs(), store.job_by_task, (journal.epoch << 32) + 1)
        self.payloads = StorePayloads(self.fold.live, store.job_by_task, store.model)
        self._post: Callable[[Event], None] | None = None
        self._intake_lock = threading.Lock()
        self._posted: dict[tuple[str, str], tuple[str, dict[str, Delivery]]] = {}
        """Requests given to the engine and not durable yet: task id and newest delivery of each message, by (tenant, reqNo)."""
        self._names: dict[str, tuple[str, str]] = {}
        """The same requests by task id."""
        self.stocks = Stocks()
        self.use: dict[str, dict[str, tuple[int, int]]] = {}
        """Memory used and busy thousandths of each GPU, by node, as reported last."""
        self._folded = Folded()
        self._free_checked_at = 0.0
        self._disk_low = False
        self._disk_lock = threading.Lock()
        self.counters = {
            "accepted": 0,
            "duplicate": 0,
            "quarantined": 0,
            "refused": 0,
            "finished": 0,
            "cancelled": 0,
            "dead": 0,
            "rejected": 0,
        }
        self.mail = MailThread(queue, store, files, store.manifests, failed)
        self.intake = IntakeThread(queue, self.take_in, self.busy, failed)

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self, post: Callable[[Event], None]) -> None:
        """Begin to take requests in; `post` gives events to the engine."""
        self._post = post
        # What an earlier life took and did not bring into the journal is taken anew at once, not when its lease runs out.
        self.queue.release(REQUESTS)
        self.mail.start()
        self.intake.start()

    def post(self, event: Event) -> None:
        """Give the engine an event."""
        if self._post is None:
            raise RuntimeError("SupportCore.start was not called: there is no engine to give events to")
        self._post(event)

    def stop_intake(self) -> None:
        """Take nothing in any more; what was taken in may still become durable."""
        self.intake.stop()

    def stop(self) -> None:
        """Send the results that are owed and end; call when the loop has ended."""
        self.intake.stop()
        self.mail.stop()
        if self.mail.sent:
            with self.journal.transaction() as db:
                self._mark_sent(db)
        self.board.close()

    def busy(self) -> bool:
        """Tell whether intake should wait: too much under way, or the disk is nearly full."""
        return len(self._posted) >= self._max_expected or len(self.fold.live) >= self._max_live or self.disk_low()

    def disk_low(self) -> bool:
        """Tell whether less than `MIN_FREE_SHARE` of the disk is free; looked at once a second."""
        with self._disk_lock:
            now = time.monotonic()
            if now - self._free_checked_at >= 1.0:
                self._free_checked_at = now
                usage = shutil.disk_usage(self.journal.path.parent)
                self._disk_low = usage.free < usage.total * MIN_FREE_SHARE
            return self._disk_low

    # --- in the loop, around each commit --------------------------------------------------------------------------------

    def within(self, db: sqlite3.Connection, now: Micros, events: Sequence[Event], commands: Sequence[Command]) -> None:
        """Write what a step means, inside its transaction."""
        for event in events:
            if isinstance(event, NodeReported) and (event.gpu_memory_used or event.gpu_busy_permille):
                busy = dict(event.gpu_busy_permille)
                self.use[event.node] = {uuid: (used, busy.get(uuid, 0)) for uuid, used in event.gpu_memory_used}
        self.stocks.note(events)
        self._folded = self.fold.fold(now, events, commands)
        if not self._folded.empty:
            self.store.write_folded(db, self._folded)
        self._mark_sent(db)

    def published(self) -> None:
        """Tell everybody what the last step meant; it is durable now."""
        folded, self._folded = self._folded, Folded()
        if not folded.empty:
            self._announce(folded)

    def _announce(self, folded: Folded) -> None:
        self.board.publish(folded.changes)
        deliveries: list[Delivery] = []
        for job in folded.new:
            self._names.pop(job.task_id, None)
            posted = self._posted.pop(job.key, None)
            if posted is not None:
                deliveries.extend(posted[1].values())
        unwanted: list[str] = []
        for outcome in folded.outcomes:
            self.counters[outcome.kind] += 1
            if outcome.kind in _NEVER_RESUMED:
                unwanted.extend(outcome.job.checkpoints)
        if deliveries or folded.outcomes:
            self.mail.journaled(deliveries, results=bool(folded.outcomes), unwanted=unwanted)

    def _mark_sent(self, db: sqlite3.Connection) -> None:
        sent = self.mail.sent
        if sent:
            self.store.write_sent(db, [sent.popleft() for _ in range(len(sent))])

    # --- taking requests in ---------------------------------------------------------------------------------------------

    def take_in(self, delivery: Delivery) -> None:
        """Turn one message into an event for the engine, an answer, or a dead letter."""
        with self._intake_lock:
            try:
                self._take_in(delivery)
            except MessageRefused as refused:
                self._refuse(delivery, refused)

    def _take_in(self, delivery: Delivery) -> None:
        message = decode(delivery.body)
        tenant, req_no = key = (message.header.tenant, message.req_no)
        posted = self._posted.get(key)
        if posted is not None:
            # The same request in a second message, or its lease ran out before the step was durable: acknowledge it as well.
            self.counters["duplicate"] += delivery.message_id not in posted[1]
            posted[1][delivery.message_id] = delivery
            return
        if self.store.known(tenant, req_no, delivery.message_id):
            self.counters["duplicate"] += 1
            self.mail.journaled([delivery], results=False)
            return
        request = understand(
            message,
            message_id=delivery.message_id,
            task_id=self._task_id(tenant, req_no),
            now=int(self.clock() * 1e6),
            methods=self.methods,
            default_model=self.default_model,
            find_model=self.store.model,
        )
        self._look_at_pictures(request.job)
        request = self._look_at_memory(request)
        quota = self._quotas.get(tenant, 0)
        if quota and self.store.quota_reserved(tenant) + len(self._posted) >= quota:
            raise MessageRefused(
                "quota",
                f"tenant {tenant} has {quota} requests under way, as many as its quota",
                *key,
                request.job.header,
            )
        self.counters["accepted"] += 1
        self._names[request.job.task_id] = key
        self._posted[key] = (request.job.task_id, {delivery.message_id: delivery})
        self._give(request)

    def _look_at_pictures(self, job: Job) -> None:
        """Refuse a request whose pictures cannot be used; a file store that does not answer leaves the judgement to the Pod."""
        if self._files is None or job.method not in (TRAINING_METHOD, GENERATION_METHOD):
            return
        try:
            if job.method == TRAINING_METHOD:
                wrong = problem(self._files, job.parameters["pictures"])
            else:
                wrong = problem_of(self._files, picture_fields(job.parameters))
        except Exception as error:  # Every store has errors of its own.
            _log.warning("pictures_unseen", req_no=job.req_no, error=f"{type(error).__name__}: {error}"[:300])
            return
        if wrong:
            raise MessageRefused("invalid", f"body.parameters.{wrong}", job.req_no, job.tenant, job.header)

    def _look_at_memory(self, request: Request) -> Request:
        """Refuse what no GPU here can ever hold; what can be run goes on with what predictions know its model by."""
        job, spec = request.job, request.spec
        if spec is None or job.method not in (TRAINING_METHOD, GENERATES):
            return request
        trains = job.method == TRAINING_METHOD
        look = self._memory.training_problem if trains else self._memory.problem
        wrong = look(job.model, job.parameters)
        if wrong:
            raise MessageRefused("invalid", f"body.parameters.{wrong}", job.req_no, job.tenant, job.header)
        features = tuple(sorted({**dict(spec.features), **dict(self._memory.features(job.model))}.items()))
        return replace(request, spec=replace(spec, features=features))

    def _give(self, request: Request) -> None:
        job = request.job
        if request.spec is not None:
            self.fold.expected[job.task_id] = job
            self.post(TaskSubmitted(request.spec))
        else:
            self.fold.deploying.setdefault((job.model, request.pods), deque()).append(job)
            self.post(self.deployment(job.model, request.pods))

    def deployment(self, model_id: str, pods: int) -> ModelDeployed | ModelUndeployed:
        """Return the event that keeps `pods` warm Pods with a model; LoRAs of one base share those of the base."""
        model = self.store.model(model_id)
        held, adapters = pod_model(model, self.store.model) if model is not None else (model_id, ())
        adapter = adapters[0] if adapters else ""
        if pods == 0:
            return ModelUndeployed(held, GENERATES, adapter)
        defaults = self.methods.get(GENERATES, MethodDefaults())
        return ModelDeployed(held, GENERATES, defaults.demand, defaults.slots, pods, adapter)

    def again(self, job: Job) -> TaskSpec:
        """Return the task of a stored job once more; raises SupportRefused where its model or method is gone."""
        body = {"method": job.method, "parameters": job.parameters}
        message = Message.model_validate({"header": {**job.header, "deadline": None}, "body": body})
        try:
            request = understand(
                message,
                message_id=job.message_id,
                task_id=job.task_id,
                now=int(self.clock() * 1e6),
                methods=self.methods,
                default_model=self.default_model,
                find_model=self.store.model,
            )
        except MessageRefused as refused:
            raise SupportRefused(409, refused.code, str(refused)) from None
        assert request.spec is not None, "a deployment is never a dead letter"
        return request.spec

    def _task_id(self, tenant: str, req_no: str) -> str:
        """Return the engine's name of a request; two tenants that chose the same reqNo are told apart."""
        if req_no not in self._names and self.store.job_by_task(req_no) is None:
            return req_no
        return f"{req_no}-{hashlib.sha256(tenant.encode()).hexdigest()[:12]}"

    def _refuse(self, delivery: Delivery, refused: MessageRefused) -> None:
        """Answer where the asker is readable, and keep what nobody can use as a dead letter."""
        if refused.req_no and not self.store.known(refused.tenant, refused.req_no, delivery.message_id):
            job = self._refused_job(delivery, refused)
            with self.journal.transaction() as db:
                folded = self.fold.refuse(self.clock(), job, refused.code, str(refused))
                self.store.write_folded(db, folded)
            self._announce(folded)
        if refused.code == "quota":
            self.counters["refused"] += 1
            self.mail.journaled([delivery], results=False)
            return
        self.counters["quarantined"] += 1
        self.queue.bury([delivery], f"{refused.code}: {refused}")
        _log.warning(
            "message_quarantined",
            message_id=delivery.message_id,
            reqNo=refused.req_no,
            code=refused.code,
            reason=str(refused),
        )

    def _refused_job(self, delivery: Delivery, refused: MessageRefused) -> Job:
        header: dict[str, Any] = refused.header
        return Job(
            task_id=self._task_id(refused.tenant, refused.req_no),
            tenant=refused.tenant,
            req_no=refused.req_no,
            header=header,
            task_type=str(header.get("taskType", "GC")),
            method="",
            parameters={},
            submitted_at=self.clock(),
            group=str(header.get("group", "")),
            priority=int(header.get("priority", 0)),
            message_id=delivery.message_id,
        )
