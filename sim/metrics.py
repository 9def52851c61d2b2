"""Folds a journal's records into what a planner wants to know. The same fold reads simulated and production journals.

It sees only times, events and commands, keeps one entry per open task, and everything else in sketches and bins of bounded size.
An instance is itself a journal for `engine.ports.drive`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b

from engine.commands import Command, CreatePod, DeletePod, Notify, StartTask, StopTask
from engine.events import (
    Event,
    NodeJoined,
    NodeLost,
    NodeReported,
    PodStarted,
    PodStopped,
    TaskFailed,
    TaskFinished,
    TaskStarted,
    TaskStopped,
    TaskSubmitted,
    TenantConfigured,
)
from engine.tasks import TERMINAL_STATES, Estimate, Micros, TaskSpec, TaskState, TaskType, is_urgent
from sim.gpu_ledger import GpuLedger
from sim.shares import Shares
from sim.sketches import Bins, Sketch, add_to_all
from sim.summary import Coverage, Summary, summarise

_NAMES = 200
"""Tenants that are told apart; the rest are ``(others)``."""
_PODS_REMEMBERED = 100_000


class _Sketches:
    """Where the waiting and the completion of one sort of tasks are counted: under all, their type, priority and tenant."""

    __slots__ = ("completion", "keys", "waiting")

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.keys = keys
        self.waiting: tuple[Sketch, ...] = ()
        self.completion: tuple[Sketch, ...] = ()


class OpenTask:
    """What is remembered of a task that is not over."""

    __slots__ = ("estimate", "first_started", "pods", "running", "share", "sketches", "spec", "submitted_at")

    def __init__(self, spec: TaskSpec, estimate: Estimate | None, now: Micros, sketches: _Sketches) -> None:
        self.spec = spec
        self.estimate = estimate
        self.submitted_at = now
        self.first_started: Micros | None = None
        self.sketches = sketches
        demand = spec.demand
        self.share = demand.gpus * demand.gpu_share / spec.slots
        """Thousandths of GPUs that serve it while it runs."""
        self.running: set[tuple[int, int]] = set()
        """(attempt, rank) that run now."""
        self.pods: dict[tuple[int, int], int] = {}


class Metrics:
    """A running fold; read it with `summary`."""

    def __init__(self) -> None:
        self.ledger = GpuLedger()
        self.shares = Shares()
        self.open: dict[str, OpenTask] = {}
        self.waiting: dict[str, Sketch] = {}
        self.completion: dict[str, Sketch] = {}
        self.loads_cold, self.loads_again = Sketch(), Sketch()
        self.counts: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.stops: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.queue, self.running = Bins(), Bins()
        self.load_bins = Bins()
        self.coverage = Coverage()
        self.first_at: Micros | None = None
        self.last_at: Micros = 0
        self.last_end_at: Micros = 0
        self._tenants: set[str] = set()
        self._sorts: dict[tuple[TaskType, bool, str], _Sketches] = {}
        self._creating: dict[int, tuple[Micros, bool]] = {}
        self._held: set[tuple[str, str]] = set()
        """(node, model) pairs that a Pod was created for before: at most nodes x models."""
        self._node_of: dict[int, str] = {}
        self._on_node: dict[str, dict[int, None]] = {}
        self._in_pod: dict[int, dict[str, None]] = {}
        """Pod -> tasks that were started in it and are not known to have ended."""
        self._used: dict[int, None] = {}
        self._decisions = blake2b(digest_size=16)
        self._undigested: list[tuple[str | int, ...]] = []

    def __call__(self, now: Micros, events: Sequence[Event], commands: Sequence[Command]) -> None:
        """Fold one step in."""
        if self.first_at is None:
            self.first_at = now
        self.last_at = now
        for event in events:
            self._event(now, event)
        for command in commands:
            self._command(now, command)

    def summary(self) -> Summary:
        """Return what was learned so far."""
        self.ledger.close(self.last_at)
        for series in (self.queue, self.running, self.load_bins):
            series.advance(self.last_at)
        return summarise(self)

    def decisions_digest(self) -> str:
        """Return a fingerprint of every placement, start, stop and deletion, with its time."""
        self._digest()
        return self._decisions.hexdigest()

    # --- events -------------------------------------------------------------------------------------------------------

    def _event(self, now: Micros, event: Event) -> None:
        match event:
            case TaskStarted():
                self._started(now, event)
            case TaskFinished():
                self._finished(now, event)
            case TaskSubmitted():
                self._submitted(now, event)
            case TaskFailed(req_no, attempt, cause, rank):
                if self._ended(now, req_no, attempt, rank):
                    self.failures[cause.value] += 1
            case TaskStopped(req_no, attempt, rank):
                self._ended(now, req_no, attempt, rank)
            case PodStarted(pod):
                self._pod_started(now, pod)
            case PodStopped(pod, cause):
                if self._pod_gone(now, pod):
                    self.failures[cause.value] += 1
            case NodeJoined(spec, pods):
                self._node_gone(now, spec.name, keep=pods)
                self.ledger.joined(now, spec, pods)
            case NodeReported(name, gpus):
                self.ledger.reported(now, name, gpus)
            case NodeLost(name):
                self.counts["nodes_lost"] += 1
                self._node_gone(now, name)
                self.ledger.lost(now, name)
            case TenantConfigured(tenant, weight):
                self.shares.configure(tenant, weight)
            case _:
                pass

    def _submitted(self, now: Micros, event: TaskSubmitted) -> None:
        task = event.task
        if task.req_no in self.open:
            return
        sort = (task.task_type, is_urgent(task), task.tenant)
        sketches = self._sorts.get(sort)
        if sketches is None:
            sketches = self._sort(task)
            if len(self._sorts) < 4 * _NAMES:
                self._sorts[sort] = sketches
        self.open[task.req_no] = OpenTask(task, event.estimate, now, sketches)
        self.counts["submitted"] += 1
        self.queue.change(now, 1)
        self.shares.waits(now, task.tenant, 1)
        self.ledger.wanted(task.demand)

    def _sort(self, task: TaskSpec) -> _Sketches:
        tenant = task.tenant
        if tenant not in self._tenants:
            if len(self._tenants) < _NAMES:
                self._tenants.add(tenant)
            else:
                tenant = "(others)"
        priority = "priority urgent" if is_urgent(task) else "priority ordinary"
        return _Sketches(("all", f"type {task.task_type}", priority, f"tenant {tenant}"))

    def _started(self, now: Micros, event: TaskStarted) -> None:
        task = self.open.get(event.req_no)
        key = (event.attempt, event.rank)
        if task is None or key in task.running or key not in task.pods:
            return
        if not task.running:
            self.queue.change(now, -1)
            self.running.change(now, 1)
            self.shares.waits(now, task.spec.tenant, -1)
        task.running.add(key)
        self.shares.serves(now, task.spec.tenant, task.share)
        self.ledger.task_began(now, task.pods[key])
        if task.first_started is None:
            task.first_started = now
            sketches = task.sketches
            if not sketches.waiting:
                sketches.waiting = tuple(_sketch(self.waiting, name) for name in sketches.keys)
            add_to_all(sketches.waiting, now - task.submitted_at)

    def _ended(self, now: Micros, req_no: str, attempt: int, rank: int) -> OpenTask | None:
        """Note that a run is over, however it ended; None for a report that no run answers to."""
        task = self.open.get(req_no)
        key = (attempt, rank)
        if task is None or key not in task.pods:
            return None
        pod = task.pods.pop(key)
        self._in_pod.get(pod, {}).pop(req_no, None)
        if key in task.running:
            task.running.discard(key)
            self.shares.serves(now, task.spec.tenant, -task.share)
            self.ledger.task_ended(now, pod)
            if not task.running:
                self.queue.change(now, 1)
                self.running.change(now, -1)
                self.shares.waits(now, task.spec.tenant, 1)
        return task

    def _finished(self, now: Micros, event: TaskFinished) -> None:
        known = self.open.get(event.req_no)
        pod = known.pods.get((event.attempt, event.rank)) if known else None
        task = self._ended(now, event.req_no, event.attempt, event.rank)
        if task is None or pod is None:
            return
        if task.estimate is not None and event.run_us and not event.rank:
            self.coverage.add(task.estimate.duration(self.ledger.gpu_model(pod)), event.run_us)

    def _pod_started(self, now: Micros, pod: int) -> None:
        created = self._creating.pop(pod, None)
        if created is not None:
            began, again = created
            (self.loads_again if again else self.loads_cold).add(now - began)

    def _pod_gone(self, now: Micros, pod: int) -> bool:
        """Take a Pod and what ran in it out; True when something ran in it."""
        self._creating.pop(pod, None)
        self._on_node.get(self._node_of.pop(pod, ""), {}).pop(pod, None)
        hit = False
        for req_no in list(self._in_pod.pop(pod, ())):
            task = self.open.get(req_no)
            for attempt, rank in [key for key, where in task.pods.items() if where == pod] if task else ():
                hit = True
                self._ended(now, req_no, attempt, rank)
        self.ledger.pod_gone(now, pod)
        return hit

    def _node_gone(self, now: Micros, name: str, keep: tuple[int, ...] = ()) -> None:
        for pod in [pod for pod in self._on_node.get(name, ()) if pod not in keep]:
            if self._pod_gone(now, pod):
                self.failures["node_lost"] += 1

    # --- commands -----------------------------------------------------------------------------------------------------

    def _command(self, now: Micros, command: Command) -> None:
        match command:
            case StartTask():
                self._start(now, command)
            case Notify():
                self._notify(now, command)
            case CreatePod(pod, node, method, model):
                self._decide("create", now, pod, node, model)
                self.counts["pods_created"] += 1
                again = (node, model) in self._held
                self._held.add((node, model))
                self._creating[pod] = (now, again)
                self._node_of[pod] = node
                self._on_node.setdefault(node, {})[pod] = None
                if method != "sleep" and model:
                    self.load_bins.add(now, 1)
                self.ledger.pod_created(now, command)
            case StopTask(req_no, attempt, pod):
                self._decide("stop", now, req_no, attempt, pod)
                self.stops[command.reason or "unnamed"] += 1
            case DeletePod(pod, reason):
                self._decide("delete", now, pod)
                self.counts["pods_deleted"] += 1
                self.stops[f"pod: {reason}"] += 1
            case _:
                pass

    def _start(self, now: Micros, order: StartTask) -> None:
        self._decide("start", now, order.req_no, order.attempt, order.rank, order.pod)
        task = self.open.get(order.req_no)
        if task is None:
            return
        if not order.rank:
            self.counts["attempts"] += 1
            self.counts["restarts"] += order.attempt > 1
            self.counts["resumed"] += bool(order.checkpoint)
            first_use = order.pod not in self._used
            self._used[order.pod] = None
            if len(self._used) > _PODS_REMEMBERED:
                del self._used[next(iter(self._used))]
            self.counts["warm_starts"] += not first_use
        task.pods[order.attempt, order.rank] = order.pod
        self._in_pod.setdefault(order.pod, {})[order.req_no] = None

    def _notify(self, now: Micros, notice: Notify) -> None:
        if notice.state not in TERMINAL_STATES:
            return
        task = self.open.pop(notice.req_no, None)
        if task is None:
            return
        self._decide("over", now, notice.req_no, notice.state.value)
        self.ends[notice.state.value] += 1
        self.last_end_at = now
        if task.pods:
            self.open[notice.req_no] = task
            for attempt, rank in list(task.pods):
                self._ended(now, notice.req_no, attempt, rank)
            del self.open[notice.req_no]
        self.queue.change(now, -1)
        self.shares.waits(now, task.spec.tenant, -1)
        if notice.state is TaskState.FINISHED:
            sketches = task.sketches
            if not sketches.completion:
                sketches.completion = tuple(_sketch(self.completion, name) for name in sketches.keys)
            add_to_all(sketches.completion, now - task.submitted_at)

    def _decide(self, *what: str | int) -> None:
        self._undigested.append(what)
        if len(self._undigested) >= 512:
            self._digest()

    def _digest(self) -> None:
        self._decisions.update("".join(map(repr, self._undigested)).encode())
        self._undigested.clear()


def _sketch(table: dict[str, Sketch], name: str) -> Sketch:
    found = table.get(name)
    if found is None:
        found = table[name] = Sketch()
    return found
