"""The jobs as SS keeps them, and the rules that fold the engine's decisions into them: pure state, no storage, no clock.

`JobFold` sees every step once, inside the transaction that makes it durable, and returns what the transaction must also write:
changed jobs, their history, outcomes with the result messages that announce them, and models that came into being.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from api.mq.messages import encode_result, result_id
from engine.commands import Command, Notify
from engine.events import Event, ModelDeployed, ModelUndeployed, TaskProgressed, TaskStopped, TaskSubmitted
from engine.tasks import TERMINAL_STATES, Micros, TaskState

TRAINING_METHOD = "dreambooth"
TERMINAL = frozenset(state.value for state in TERMINAL_STATES)
KEPT_CHECKPOINTS = 2
_STARTED = frozenset({TaskState.RUNNING})


@dataclass(slots=True)
class Job:
    """One request, from its message to its outcome. Times are Unix seconds."""

    task_id: str
    """The engine's name of it: the reqNo, told apart only where two tenants chose the same one."""
    tenant: str
    req_no: str
    header: dict[str, Any]
    task_type: str
    method: str
    parameters: dict[str, Any]
    submitted_at: float
    group: str = ""
    model: str = ""
    priority: int = 0
    message_id: str = ""
    state: str = TaskState.PENDING.value
    attempt: int = 0
    node: str = ""
    progress_done: int = 0
    progress_total: int = 0
    started_at: float | None = None
    finished_at: float | None = None
    reason: str = ""
    detail: str = ""
    result: dict[str, Any] | None = None
    rerun: int = 0
    """How often it was run again after its dead letter."""
    n: int = 0
    """Its place in the order of arrival; 0 until stored."""
    last_event: int = 0
    quota: str = "reserved"
    """Its place in the tenant's quota: reserved, used, released."""
    progress_note: str = ""
    """What the method said of its last step; not stored, the next step says it anew."""
    progress_preview: str = ""
    """File id of a small picture of what there is so far; not stored, and gone when the attempt ends."""
    checkpoints: list[str] = field(default_factory=list)
    """File ids of the last ones that its attempts told of in this life of SS; not stored."""

    @property
    def key(self) -> tuple[str, str]:
        """Return what the customer knows it by."""
        return self.tenant, self.req_no

    @property
    def terminal(self) -> bool:
        """Tell whether it ended."""
        return self.state in TERMINAL


@dataclass(frozen=True, slots=True)
class Change:
    """One visible change of a job; `job` is shared, `view` is how it looked then."""

    event_id: int
    kind: str
    at: float
    job: Job
    view: Mapping[str, Any]
    durable: bool = True
    """Progress is shown, not stored."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended, and the message that says so."""

    job: Job
    kind: str
    attempt: int
    message_id: str
    body: bytes
    sha: str


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be generated with."""

    model_id: str
    kind: str
    base: str = ""
    tenant: str = ""
    created_at: float = 0.0
    source_req_no: str = ""
    deployed_pods: int = 0
    files: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    manifest: bytes = b""
    """The JSON description that is kept in the file store beside the model's files."""


@dataclass(slots=True)
class Folded:
    """What one step means for SS."""

    new: list[Job] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    reopened: list[Job] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    models: list[Model] = field(default_factory=list)
    deployments: list[tuple[str, int]] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Tell whether nothing needs to be written or shown."""
        return not (self.new or self.changes or self.deployments)


class JobFold:
    """Follows the live jobs through the engine's events and commands.

    ``find`` brings back an ended job (a rerun needs it); ``first_event_id`` must be above every id given out before.
    """

    def __init__(self, jobs: Iterable[Job], find: Callable[[str], Job | None], first_event_id: int) -> None:
        self.live = {job.task_id: job for job in jobs}
        self.expected: dict[str, Job] = {}
        """Parsed and posted to the engine, not journaled yet."""
        self.deploying: dict[tuple[str, int], deque[Job]] = {}
        """Requests that a ModelDeployed of (model, Pods) will fulfil; 0 Pods: a ModelUndeployed."""
        self._find = find
        self._next_event = first_event_id

    def fold(self, now: Micros, events: Sequence[Event], commands: Sequence[Command]) -> Folded:
        """Apply one step and return what it means."""
        folded = Folded()
        at = now / 1e6
        for event in events:
            match event:
                case TaskSubmitted(task=task):
                    job = self.expected.pop(task.req_no, None)
                    if job is not None:
                        self.live[task.req_no] = job
                        folded.new.append(job)
                        self._change(folded, "submitted", at, job)
                case TaskProgressed():
                    self._progress(folded, at, event)
                    self._saved(event)
                case TaskStopped():
                    self._saved(event)
                case ModelDeployed(model=model, pods=pods, adapter=adapter):
                    self._deployed(folded, at, adapter or model, pods)
                case ModelUndeployed(model=model, adapter=adapter):
                    self._deployed(folded, at, adapter or model, 0)
                case _:
                    pass
        for command in commands:
            if isinstance(command, Notify):
                self._notify(folded, at, command)
        return folded

    def refuse(self, at: float, job: Job, code: str, detail: str) -> Folded:
        """End a job that never reached the engine."""
        folded = Folded(new=[job])
        job.state, job.reason, job.detail, job.finished_at = TaskState.REJECTED.value, code, detail, at
        self._end(folded, at, job)
        return folded

    def _saved(self, event: TaskProgressed | TaskStopped) -> None:
        """Remember the checkpoints that a job leaves in the file store: the last one, and the one before it."""
        job = self.live.get(event.req_no)
        if job is not None and event.checkpoint and event.checkpoint not in job.checkpoints:
            job.checkpoints = [*job.checkpoints, event.checkpoint][-KEPT_CHECKPOINTS:]

    def _progress(self, folded: Folded, at: float, event: TaskProgressed) -> None:
        job = self.live.get(event.req_no)
        if job is None or job.terminal or event.attempt != job.attempt or event.rank != 0:
            return
        job.progress_done, job.progress_total, job.progress_note = event.done, event.total, event.note
        job.progress_preview = event.preview or job.progress_preview
        self._change(folded, "progress", at, job, durable=False)

    def _deployed(self, folded: Folded, at: float, model: str, pods: int) -> None:
        folded.deployments.append((model, pods))
        waiting = self.deploying.get((model, pods))
        if waiting:
            job = waiting.popleft()
            folded.new.append(job)
            job.state, job.finished_at = TaskState.FINISHED.value, at
            job.result = {"files": [], "metadata": {"pods": pods}, "model": model}
            self._end(folded, at, job)

    def _notify(self, folded: Folded, at: float, notice: Notify) -> None:
        job = self.live.get(notice.req_no)
        if job is None:
            # The store does not know yet how it ended in this very step.
            job = next((each.job for each in folded.outcomes if each.job.task_id == notice.req_no), None)
            job = job or self._find(notice.req_no)
            if job is None or job.state != TaskState.DEAD or notice.state in TERMINAL_STATES:
                return
            self._reopen(folded, job)
        elif job.terminal:
            if job.state != TaskState.DEAD or notice.state in TERMINAL_STATES:
                return
            self._reopen(folded, job)
        job.state = notice.state.value
        job.attempt = notice.attempt or job.attempt
        job.node = notice.node or job.node
        job.reason, job.detail = notice.reason, notice.detail
        if notice.state in _STARTED and job.started_at is None:
            job.started_at = at
        if notice.state is not TaskState.RUNNING:
            job.progress_note = job.progress_preview = ""
        if notice.state is TaskState.BACKOFF:
            job.progress_done = job.progress_total = 0
        if notice.state not in TERMINAL_STATES:
            self._change(folded, job.state, at, job)
            return
        job.finished_at = at
        if notice.state is TaskState.FINISHED:
            job.result = read_result(notice.result)
            if job.progress_total:
                job.progress_done = job.progress_total
            if job.method == TRAINING_METHOD:
                model = trained_model(job, at)
                job.result["model"] = model.model_id
                folded.models.append(model)
        self._end(folded, at, job)

    def _reopen(self, folded: Folded, job: Job) -> None:
        """A dead-lettered job runs again: its dead letter is no longer the outcome, and is not sent if it is of this very step."""
        folded.outcomes = [outcome for outcome in folded.outcomes if outcome.job is not job]
        job.rerun += 1
        job.finished_at = job.started_at = None
        job.progress_done = job.progress_total = 0
        self.live[job.task_id] = job
        folded.reopened.append(job)

    def _end(self, folded: Folded, at: float, job: Job) -> None:
        self._change(folded, job.state, at, job)
        folded.outcomes.append(outcome_of(job))
        self.live.pop(job.task_id, None)

    def _change(self, folded: Folded, kind: str, at: float, job: Job, *, durable: bool = True) -> None:
        job.last_event = self._next_event
        folded.changes.append(Change(self._next_event, kind, at, job, view_of(job), durable))
        self._next_event += 1


def outcome_of(job: Job) -> Outcome:
    """Return the outcome of an ended job; the same job gives the same bytes."""
    body = encode_result(
        job.header, state=job.state, attempt=job.attempt, reason=job.reason, detail=job.detail, result=job.result
    )
    message_id = result_id(job.tenant, job.req_no, job.rerun)
    return Outcome(job, job.state, job.attempt, message_id, body, hashlib.sha256(body).hexdigest())


def read_result(text: str) -> dict[str, Any]:
    """Read an executor's result: a JSON object, or an opaque reference."""
    try:
        tree = msgspec.json.decode(text) if text else {}
    except (ValueError, RecursionError):
        tree = {"reference": text}
    if not isinstance(tree, dict):
        tree = {"reference": text}
    tree.setdefault("files", [])
    tree.setdefault("metadata", {})
    return tree


def trained_model(job: Job, at: float) -> Model:
    """Return the model a finished training made; its id depends on the request alone, so that folding twice names it once."""
    assert job.result is not None
    minted = hashlib.sha256(f"{job.tenant}/{job.req_no}".encode()).hexdigest()[:12]
    described = job.result["metadata"] if isinstance(job.result["metadata"], dict) else {}
    kind = "full" if str(described.get("kind", job.parameters.get("method", "lora"))) == "full" else "lora"
    files = {
        str(item.get("name") or item.get("role") or item["file_id"]): str(item["file_id"])
        for item in job.result["files"]
        if isinstance(item, dict) and item.get("file_id") and item.get("role") == "adapter"
    }
    model_id = f"{kind}-{minted}"
    base = str(described.get("base_model") or job.model)
    manifest = {
        "model_id": model_id,
        "kind": kind,
        "base": base,
        "files": files,
        "metadata": described,
        "source": job.req_no,
    }
    return Model(
        model_id=model_id,
        kind=kind,
        base=base,
        tenant=job.tenant,
        created_at=at,
        source_req_no=job.req_no,
        files=files,
        metadata=dict(described),
        manifest=json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(),
    )


def view_of(job: Job) -> dict[str, Any]:
    """Return the job as `api.ports.JobView` spells it."""
    return {
        "req_no": job.req_no,
        "tenant": job.tenant,
        "group": job.group,
        "task_type": job.task_type,
        "method": job.method,
        "model": job.model,
        "priority": job.priority,
        "state": job.state,
        "attempt": job.attempt,
        "node": job.node,
        "progress_done": job.progress_done,
        "progress_total": job.progress_total,
        "progress_note": job.progress_note,
        "progress_preview": job.progress_preview,
        "submitted_at": job.submitted_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "reason": job.reason,
        "detail": job.detail,
        "parameters": job.parameters,
        "result": job.result,
    }
