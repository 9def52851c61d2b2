"""Folds a journal's records into what a planner wants to know. The same fold reads simulated and production journals.

It sees only times, events and commands, keeps one entry per open task, and everything else in sketches and bins of bounded size.
An instance is itself a journal for `engine.ports.drive`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

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
from engine.tasks import TERMINAL_STATES, Micros, TaskSpec, TaskState, TaskType, is_urgent
from sim.coverage import Coverage
from sim.gpu_ledger import GpuLedger
from sim.open_tasks import OpenTask, PodSeen, Sort, member
from sim.shares import Shares
from sim.sketches import Bins, Sketch
from sim.summary import Summary, summarise

_NAMES = 200
"""Tenants that are told apart; the rest are ``(others)``."""
_NO_POD: Final = -(1 << 40)


_VALUES: Final[dict[TaskState, str]] = {state: state.value for state in TaskState}
_DIGESTED_TOGETHER: Final = 512


class Metrics:
    """A running fold; read it with `summary`."""

    def __init__(self) -> None:
        self.ledger = GpuLedger()
        self.shares = Shares()
        self.open: dict[str, OpenTask] = {}
        self.loads_cold, self.loads_again = Sketch(), Sketch()
        self.failures: Counter[str] = Counter()
        self.stops: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.queue, self.running = Bins(), Bins()
        self.load_bins = Bins()
        self.coverage = Coverage()
        self.first_at: Micros | None = None
        self.last_at: Micros = 0
        self.last_end_at: Micros = 0
        self._counts: dict[str, int] = {}
        self._submitted_count = self._attempts = self._restarts = self._resumed = self._warm_starts = 0
        self._tenants: dict[str, None] = {}
        self._sorts: dict[tuple[TaskType, bool, str], Sort] = {}
        self._sorts_by_keys: dict[tuple[str, ...], Sort] = {}
        self._held: dict[tuple[str, str], None] = {}
        """(node, model) pairs that a Pod was created for before: at most nodes x models."""
        self._pods: dict[int, PodSeen] = {}
        self._on_node: dict[str, dict[int, None]] = {}
        self._decisions = blake2b(digest_size=16)
        self._undigested: list[tuple[str | int, ...]] = []

    @property
    def counts(self) -> Counter[str]:
        """How often what happened."""
        found = Counter(self._counts)
        if self._submitted_count:
            found["submitted"] = self._submitted_count
        if self._attempts:
            found["attempts"], found["restarts"] = self._attempts, self._restarts
            found["resumed"], found["warm_starts"] = self._resumed, self._warm_starts
        return found

    @property
    def waiting(self) -> dict[str, Sketch]:
        """Waiting by ``all``, type, priority and tenant."""
        return self._gathered(False)

    @property
    def completion(self) -> dict[str, Sketch]:
        """Completion by ``all``, type, priority and tenant."""
        return self._gathered(True)

    def _gathered(self, completion: bool) -> dict[str, Sketch]:
        found: dict[str, Sketch] = {}
        for sort in self._sorts_by_keys.values():
            sketch = sort.completion if completion else sort.waiting
            if sketch.count:
                for key in sort.keys:
                    if key not in found:
                        found[key] = Sketch()
                    found[key].merge(sketch)
        return found

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
                if self._ended(now, req_no, self.open.get(req_no), member(attempt, rank)) is not None:
                    self.failures[cause.value] += 1
            case TaskStopped(req_no, attempt, rank):
                self._ended(now, req_no, self.open.get(req_no), member(attempt, rank))
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
                self._count("nodes_lost")
                self._node_gone(now, name)
                self.ledger.lost(now, name)
            case TenantConfigured(tenant, weight):
                self.shares.configure(tenant, weight)
            case _:
                pass

    def _submitted(self, now: Micros, event: TaskSubmitted) -> None:
        task = event.task
        req_no = task.req_no
        if req_no in self.open:
            return
        key = (task.task_type, is_urgent(task), task.tenant)
        sort = self._sorts.get(key)
        if sort is None:
            sort = self._sort(task)
            if len(self._sorts) < 4 * _NAMES:
                self._sorts[key] = sort
        self.open[req_no] = OpenTask(task, event.estimate, now, sort)
        self._submitted_count += 1
        self.queue.change(now, 1)
        self.shares.waits(now, sort.share, 1)
        self.ledger.wanted(task.demand)

    def _sort(self, task: TaskSpec) -> Sort:
        tenant, share = task.tenant, self.shares.of(task.tenant)
        if tenant not in self._tenants:
            if len(self._tenants) < _NAMES:
                self._tenants[tenant] = None
            else:
                tenant = "(others)"
        priority = "priority urgent" if is_urgent(task) else "priority ordinary"
        keys = ("all", f"type {task.task_type}", priority, f"tenant {tenant}")
        known = self._sorts_by_keys.get(keys)
        if known is None:
            known = self._sorts_by_keys[keys] = Sort(keys, share)
        if known.share is share:
            return known
        alike = Sort(keys, share)
        alike.waiting, alike.completion = known.waiting, known.completion
        return alike

    def _started(self, now: Micros, event: TaskStarted) -> None:
        task = self.open.get(event.req_no)
        if task is None:
            return
        key = member(event.attempt, event.rank)
        pod = task.pods.get(key, -1)
        if pod < 0:
            return
        share = task.sort.share
        if not task.running:
            self.queue.change(now, -1)
            self.running.change(now, 1)
            self.shares.waits(now, share, -1)
        task.running += 1
        task.pods[key] = ~pod
        self.shares.serves(now, share, task.share)
        known = self._pods.get(pod)
        if known is not None:
            self.ledger.task_began(now, known.devices)
        if task.first_started is None:
            task.first_started = now
            task.sort.waiting.add(now - task.submitted_at)

    def _ended(self, now: Micros, req_no: str, task: OpenTask | None, key: int) -> PodSeen | None:
        """Note that a run is over, however it ended, and return its Pod; None for a report that no run answers to."""
        if task is None:
            return None
        number = task.pods.pop(key, _NO_POD)
        if number == _NO_POD:
            return None
        ran = number < 0
        if ran:
            number = ~number
        pod = self._pods.get(number)
        if pod is None:
            pod = PodSeen()
        else:
            pod.tasks.pop(req_no, None)
        if ran:
            task.running -= 1
            share = task.sort.share
            self.shares.serves(now, share, -task.share)
            self.ledger.task_ended(now, pod.devices)
            if not task.running:
                self.queue.change(now, 1)
                self.running.change(now, -1)
                self.shares.waits(now, share, 1)
        return pod

    def _finished(self, now: Micros, event: TaskFinished) -> None:
        req_no, rank = event.req_no, event.rank
        task = self.open.get(req_no)
        pod = self._ended(now, req_no, task, member(event.attempt, rank))
        if task is None or pod is None:
            return
        estimate, run_us = task.estimate, event.run_us
        if estimate is not None and run_us and not rank:
            devices = pod.devices
            model = "*" if devices is None or devices.gone else devices.gpu_model
            self.coverage.add(estimate.duration(model), run_us)

    def _pod_started(self, now: Micros, number: int) -> None:
        pod = self._pods.get(number)
        if pod is not None and pod.created >= 0:
            (self.loads_again if pod.held_before else self.loads_cold).add(now - pod.created)
            pod.created = -1

    def _pod_gone(self, now: Micros, number: int) -> bool:
        """Take a Pod and what ran in it out; True when something ran in it."""
        hit = False
        pod = self._pods.get(number)
        if pod is not None:
            on_node = self._on_node.get(pod.node)
            if on_node is not None:
                on_node.pop(number, None)
            for req_no in list(pod.tasks):
                task = self.open.get(req_no)
                if task is None:
                    continue
                for key in [key for key, where in task.pods.items() if where in (number, ~number)]:
                    hit = True
                    self._ended(now, req_no, task, key)
            del self._pods[number]
        self.ledger.pod_gone(now, number)
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
            case CreatePod():
                self._created(now, command)
            case StopTask(req_no, attempt, pod):
                self._decide(("stop", now, req_no, attempt, pod))
                self.stops[command.reason or "unnamed"] += 1
            case DeletePod(pod, reason):
                self._decide(("delete", now, pod))
                self._count("pods_deleted")
                self.stops[f"pod: {reason}"] += 1
            case _:
                pass

    def _created(self, now: Micros, order: CreatePod) -> None:
        number, node, model = order.pod, order.node, order.model
        self._decide(("create", now, number, node, model))
        self._count("pods_created")
        pod = self._pods.get(number)
        if pod is None:
            pod = self._pods[number] = PodSeen()
        pod.node, pod.created = node, now
        pod.held_before = (node, model) in self._held
        self._held[node, model] = None
        self._on_node.setdefault(node, {})[number] = None
        if order.method != "sleep" and model:
            self.load_bins.add(now, 1)
        self.ledger.pod_created(now, order)
        pod.devices = self.ledger.pod(number)

    def _start(self, now: Micros, order: StartTask) -> None:
        req_no, attempt, rank, number = order.req_no, order.attempt, order.rank, order.pod
        self._decide(("start", now, req_no, attempt, rank, number))
        task = self.open.get(req_no)
        if task is None:
            return
        pod = self._pods.get(number)
        if pod is None:
            pod = self._pods[number] = PodSeen()
        if not rank:
            self._attempts += 1
            if attempt > 1:
                self._restarts += 1
            if order.checkpoint:
                self._resumed += 1
            if pod.used:
                self._warm_starts += 1
            pod.used = True
        task.pods[member(attempt, rank)] = number
        pod.tasks[req_no] = None

    def _notify(self, now: Micros, notice: Notify) -> None:
        state = notice.state
        if state not in TERMINAL_STATES:
            return
        req_no = notice.req_no
        task = self.open.get(req_no)
        if task is None:
            return
        value = _VALUES[state]
        self._decide(("over", now, req_no, value))
        self.ends[value] += 1
        self.last_end_at = now
        for key in list(task.pods):
            self._ended(now, req_no, task, key)
        del self.open[req_no]
        self.queue.change(now, -1)
        self.shares.waits(now, task.sort.share, -1)
        if state is TaskState.FINISHED:
            task.sort.completion.add(now - task.submitted_at)

    def _count(self, what: str) -> None:
        self._counts[what] = self._counts.get(what, 0) + 1

    def _decide(self, what: tuple[str | int, ...]) -> None:
        self._undigested.append(what)
        if len(self._undigested) >= _DIGESTED_TOGETHER:
            self._digest()

    def _digest(self) -> None:
        self._decisions.update("".join(map(repr, self._undigested)).encode())
        self._undigested.clear()
