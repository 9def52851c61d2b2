"""The SimPy cluster behind the engine's World port: arrivals, Pods, loads, runs and failures on a simulated clock.

It answers the engine's commands with the same events as real executors would, later on the simulated clock. SimPy gives the clock
and its timeouts; everything happens in callbacks, because a SimPy process per task would cost more than the scheduling that is
studied. Time is whole microseconds. Every random draw is keyed by what it is for (`sim.draws`): policies can be compared under the
same luck.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, assert_never

import simpy

from engine.commands import Command, CreatePod, DeletePod, Notify, PrefetchModel, ScaleNodes, StartTask, StopTask
from engine.events import (
    Event,
    NodeJoined,
    PodStarted,
    PodStopped,
    TaskCancelRequested,
    TaskFailed,
    TaskFinished,
    TaskProgressed,
    TaskStarted,
    TaskStopped,
    TaskSubmitted,
)
from engine.tasks import TERMINAL_STATES, FailureCause, Micros, TaskSpec, TaskState, TaskType
from sim.breakage import Breakage
from sim.caches import Source
from sim.draws import lognormal, unit
from sim.faults import Fault, FaultKind, FaultPlan
from sim.hardware import Hardware
from sim.parts import AttemptKey, Outcome, SimAttempt, SimNode, SimPod
from sim.pump import run
from sim.workload import Arrival, Truth, Workload

__all__ = ["SimWorld", "run"]

_LORAS_PER_POD = 8
_EPSILON = 1e-6
"""A step counts as done at its end, however floating point rounds."""
_STOP_SAVE_US = 200_000
"""Time to write a checkpoint or latents down when an attempt is told to stop and keep them."""


class SimWorld:
    """A simulated cluster.

    Nodes join at time zero. `counts` tells what only the world can know, such as where each model load found its bytes.
    """

    def __init__(
        self, env: simpy.Environment, hardware: Hardware, workload: Workload, seed: int, faults: FaultPlan | None = None
    ) -> None:
        self.env = env
        self.hardware = hardware
        self.seed = seed
        self.bell: Callable[[], None] | None = None
        """Called when an event enters the empty inbox; set by `run`."""
        self.counts: dict[str, int] = {}
        self.open_tasks: dict[str, tuple[TaskSpec, Truth]] = {}
        """Tasks that entered and are not known to be over."""
        self.last_arrival_at: Micros = workload.span_us
        self._inbox: list[Event] = []
        self._coming = 0
        self._arrivals: Sequence[Arrival] = workload.arrivals
        self._next_arrival = 0
        self._dead: dict[str, tuple[TaskSpec, Truth]] = {}
        self._attempts: dict[AttemptKey, SimAttempt] = {}
        self._pods: dict[int, SimPod] = {}
        self._checkpoints: dict[str, dict[str, float]] = {}
        self._loads: dict[str, int] = {}
        self.nodes = {spec.name: SimNode(spec, hardware) for spec in hardware.nodes}
        for spec in hardware.nodes:
            self.post(NodeJoined(spec))
        self.plan = faults or FaultPlan()
        self._breakage = Breakage(self, self.plan)
        self._breakage.arm()
        self._arm_arrival()

    # --- the World port ---------------------------------------------------------------------------------------------

    def now(self) -> Micros:
        """Return the simulated time."""
        return int(self.env.now)

    def take(self) -> Sequence[Event]:
        """Return the events since the last call."""
        taken, self._inbox = self._inbox, []
        return taken

    def perform(self, command: Command) -> None:
        """Begin to carry out a command."""
        match command:
            case StartTask():
                self._start(command)
            case CreatePod():
                self._create(command)
            case Notify():
                self._heed(command)
            case DeletePod():
                self._delete(command)
            case StopTask():
                self._stop(command)
            case PrefetchModel():
                self._prefetch(command)
            case ScaleNodes():
                self.count("scale_advice")
            case _:
                assert_never(command)

    # --- for drivers, tests and faults --------------------------------------------------------------------------------

    def post(self, event: Event, at: Micros | None = None) -> None:
        """Let an event from outside happen, now or at a later time: a submission, a cancel, an operator's order."""
        self._coming += 1
        self.after(0 if at is None else at - self.now(), self._emit_posted, event)

    def emit(self, event: Event) -> None:
        """Put an event into the inbox and ring the bell."""
        if isinstance(event, TaskSubmitted):
            self.open_tasks.setdefault(event.task.req_no, (event.task, Truth()))
        if not self._inbox and self.bell is not None:
            self.bell()
        self._inbox.append(event)

    def after(self, delay_us: Micros, call: Callable[..., None], *arguments: Any) -> None:
        """Call something later on the simulated clock."""
        callbacks = self.env.timeout(delay_us).callbacks
        callbacks.append(partial(_callback, call, arguments))

    def count(self, what: str, by: int = 1) -> None:
        """Count something that happened."""
        self.counts[what] = self.counts.get(what, 0) + by

    @property
    def settled(self) -> bool:
        """Whether everything has arrived and every task is known to be over."""
        arrived = self._next_arrival >= len(self._arrivals) and not self._coming
        return arrived and not self.open_tasks and not self._inbox

    @property
    def arrived(self) -> int:
        """How many of the workload's tasks have entered."""
        return self._next_arrival

    # --- arrivals -----------------------------------------------------------------------------------------------------

    def _emit_posted(self, event: Event) -> None:
        self._coming -= 1
        self.emit(event)

    def _arm_arrival(self) -> None:
        if self._next_arrival < len(self._arrivals):
            self.after(self._arrivals[self._next_arrival].at - self.now(), self._arrive)

    def _arrive(self) -> None:
        at = self._arrivals[self._next_arrival].at
        while self._next_arrival < len(self._arrivals) and self._arrivals[self._next_arrival].at == at:
            arrival = self._arrivals[self._next_arrival]
            self._next_arrival += 1
            req_no = arrival.task.req_no
            self.open_tasks.setdefault(req_no, (arrival.task, arrival.truth))
            self.emit(TaskSubmitted(arrival.task))
            if arrival.truth.cancel_after_us is not None:
                self.after(arrival.truth.cancel_after_us, self._cancel, req_no)
        self._arm_arrival()

    def _cancel(self, req_no: str) -> None:
        if req_no in self.open_tasks:
            self.emit(TaskCancelRequested(req_no))

    def _heed(self, notice: Notify) -> None:
        if notice.state not in TERMINAL_STATES:
            if notice.req_no in self._dead:
                self.open_tasks[notice.req_no] = self._dead.pop(notice.req_no)
            return
        known = self.open_tasks.pop(notice.req_no, None)
        self._checkpoints.pop(notice.req_no, None)
        if known is not None and notice.state is TaskState.DEAD:
            self._dead[notice.req_no] = known

    # --- Pods ---------------------------------------------------------------------------------------------------------

    def _create(self, order: CreatePod) -> None:
        node = self.nodes.get(order.node)
        if node is None or not node.up:
            return
        uuid = order.grants[0].uuid if order.grants else ""
        pod = SimPod(order, node.model_of.get(uuid, "cpu"))
        node.pods[order.pod] = self._pods[order.pod] = pod
        self.count("pods_created")
        if any(grant.uuid in node.ill for grant in order.grants):
            self.after(self.hardware.pod_stop_us, self._pod_gone, order.pod, FailureCause.GPU_LOST, "the GPU is ill")
            return
        spent = self.hardware.dispatch_us + self.hardware.pod_start_us + self._load(node, order.method, order.model)
        self.after(spent, self._pod_ready, order.pod, node.life)

    def _load(self, node: SimNode, method: str, model: str) -> Micros:
        """Begin to load a model; return how long it takes from here."""
        size = self.hardware.model_bytes(method, model)
        if not size:
            return 0
        nth = self._loads[model] = self._loads.get(model, 0) + 1
        factor = lognormal(self.hardware.load_sigma, self.seed, "load", model, nth)
        if node.memory.touch(model):
            node.disk.touch(model)
            source, spent = Source.MEMORY, round(factor * self.hardware.load_us(size, Source.MEMORY))
        elif node.disk.touch(model):
            source, spent = Source.DISK, round(factor * self.hardware.load_us(size, Source.DISK))
        elif model in node.fetching:
            wait = max(0, node.fetching[model] - self.now())
            source, spent = Source.REMOTE, wait + round(factor * self.hardware.load_us(size, Source.DISK))
        else:
            source, spent = Source.REMOTE, round(factor * self.hardware.load_us(size, Source.REMOTE))
            self._fetch(node, model, round(factor * self.hardware.fetch_us(size)))
        node.memory.put(model, size)
        self.count(f"loads_{source.value}")
        return spent

    def _fetch(self, node: SimNode, model: str, spent: Micros) -> None:
        node.fetching[model] = self.now() + spent
        self.after(spent, self._fetched, node, model, node.life)

    def _fetched(self, node: SimNode, model: str, life: int) -> None:
        if node.life == life:
            node.fetching.pop(model, None)
            node.disk.put(model, self.hardware.model_bytes("", model))

    def _prefetch(self, order: PrefetchModel) -> None:
        node = self.nodes.get(order.node)
        if node is None or not node.up or order.model in node.disk or order.model in node.fetching:
            return
        size = self.hardware.model_bytes("", order.model)
        if size:
            self.count("prefetches")
            factor = lognormal(self.hardware.load_sigma, self.seed, "prefetch", order.model, order.node)
            self._fetch(node, order.model, round(factor * self.hardware.fetch_us(size)))

    def _pod_ready(self, number: int, life: int) -> None:
        pod = self._pods.get(number)
        if pod is None or pod.stopping or self.nodes[pod.order.node].life != life:
            return
        pod.ready = True
        self.emit(PodStarted(number))

    def _delete(self, order: DeletePod) -> None:
        pod = self._pods.get(order.pod)
        if pod is None or pod.stopping:
            return
        pod.stopping = True
        grace = order.grace_us if pod.running else 0
        self.after(self.hardware.pod_stop_us + grace, self._pod_gone, order.pod, FailureCause.POD_LOST, "as ordered")

    def _pod_gone(self, number: int, cause: FailureCause, detail: str) -> None:
        pod = self.forget_pod(number)
        if pod is not None:
            self.emit(PodStopped(number, cause, detail))

    def forget_pod(self, number: int) -> SimPod | None:
        """Let a Pod and its attempts vanish without a report; None when it is gone already."""
        pod = self._pods.pop(number, None)
        if pod is None:
            return None
        self.nodes[pod.order.node].pods.pop(number, None)
        for key, attempt in pod.running.items():
            attempt.token += 1
            self._attempts.pop(key, None)
        return pod

    def fail_node(self, node: str, repair_after_us: Micros | None = None) -> None:
        """Let a machine die now; None: it never comes back."""
        self._breakage.strike(Fault(self.now(), FaultKind.NODE_LOST, node, repair_after_us=repair_after_us))

    def crash_pod(self, number: int, detail: str) -> None:
        """Let a Pod die by itself."""
        self._pod_gone(number, FailureCause.CRASHED, detail)

    # --- attempts -----------------------------------------------------------------------------------------------------

    def _start(self, order: StartTask) -> None:
        pod = self._pods.get(order.pod)
        known = self.open_tasks.get(order.req_no)
        if pod is None or pod.stopping or known is None:
            return
        key = (order.req_no, order.attempt, order.rank)
        done = self._checkpoints.get(order.req_no, {}).get(order.checkpoint, 0.0) if order.checkpoint else 0.0
        attempt = SimAttempt(key, known[0], known[1], pod, done)
        pod.running[key] = self._attempts[key] = attempt
        # Order and report both travel before the run: it shifts the run by one report, and saves a timeout per task.
        self.after(2 * self.hardware.dispatch_us, self._begin, attempt, attempt.token)

    def _begin(self, attempt: SimAttempt, token: int) -> None:
        if attempt.token != token:
            return
        if attempt.stop_ordered:
            self._stopped(attempt, token, False)
            return
        req_no, number, rank = attempt.key
        now = self.now()
        attempt.began_at = attempt.rebased_at = now
        self._decide(attempt)
        self.emit(TaskStarted(req_no, number, rank))
        self._respeed(attempt.pod)
        if self.hardware.progress_reports and attempt.task.task_type is TaskType.TP:
            self._arm_progress(attempt)

    def _decide(self, attempt: SimAttempt) -> None:
        """Settle how long the attempt runs alone and how it ends."""
        task, truth, pod, hardware = attempt.task, attempt.truth, attempt.pod, self.hardware
        req_no, number, _ = attempt.key
        if truth.work_us is not None:
            work = truth.work_us / hardware.speed(pod.gpu_model)
        else:
            noise = 1.0 if task.method == "sleep" else lognormal(hardware.noise_sigma, self.seed, "run", req_no, number)
            work = hardware.run_us(task, pod.gpu_model, pod.share) * noise
            if task.method != "sleep":
                work += hardware.transfer_us(_pictures(task))
        work = max(1.0, work * (1.0 - attempt.done_before)) + self._lora_us(attempt)
        attempt.peak_bytes = truth.peak_gpu_memory_bytes or round(
            hardware.peak_memory_bytes(task) * lognormal(hardware.memory_sigma, self.seed, "memory", req_no)
        )
        cap = min((grant.memory_bytes for grant in pod.order.grants), default=0)
        wish = _wished_failure(task, number)
        if cap and attempt.peak_bytes > cap:
            attempt.outcome, attempt.cause, attempt.peak_bytes = Outcome.FAIL, FailureCause.OUT_OF_MEMORY, cap
            work *= 0.1 + 0.4 * unit(self.seed, "oom", req_no, number)
        elif truth.fails_with is not None or wish is not None:
            attempt.cause = truth.fails_with or wish or FailureCause.CRASHED
            attempt.outcome = Outcome.CRASH if wish is FailureCause.CRASHED else Outcome.FAIL
        elif unit(self.seed, "crash", req_no, number) * 1_000_000 < self.plan.attempt_crash_ppm:
            attempt.outcome = Outcome.CRASH
            work *= unit(self.seed, "crash-at", req_no, number)
        attempt.total_us = attempt.left_us = max(1.0, work)

    def _lora_us(self, attempt: SimAttempt) -> float:
        spent = 0.0
        loaded = attempt.pod.loras
        for lora in attempt.truth.loras:
            if lora in loaded:
                loaded.move_to_end(lora)
                continue
            self.count("lora_loads")
            spent += self.hardware.lora_load_us * lognormal(
                self.hardware.lora_sigma, self.seed, "lora", lora, attempt.key[0], attempt.key[1]
            )
            loaded[lora] = None
            if len(loaded) > _LORAS_PER_POD:
                loaded.popitem(last=False)
        return spent

    def _respeed(self, pod: SimPod) -> None:
        """Set everybody's speed in a Pod after one came or went, and reschedule their ends."""
        if pod.hung:
            return
        now = self.now()
        running = [attempt for attempt in pod.running.values() if attempt.began_at >= 0]
        marginal = self.hardware.marginal_slot
        stretch = 1.0 - marginal + marginal * len(running)
        for attempt in running:
            attempt.rebase(now)
            attempt.stretch = stretch
            attempt.token += 1
            self.after(max(1, round(attempt.left_us * stretch)), self._end, attempt, attempt.token)

    def _end(self, attempt: SimAttempt, token: int) -> None:
        if attempt.token != token:
            return
        req_no, number, rank = attempt.key
        if attempt.outcome is Outcome.CRASH:
            self.crash_pod(attempt.pod.order.pod, f"attempt {number} of {req_no} crashed")
            return
        self._leave(attempt)
        if attempt.outcome is Outcome.FAIL:
            self.emit(TaskFailed(req_no, number, attempt.cause, rank, "simulated", attempt.peak_bytes))
        else:
            spent = self.now() - attempt.began_at
            self.emit(TaskFinished(req_no, number, rank, f"sim:{req_no}", spent, attempt.peak_bytes))

    def _leave(self, attempt: SimAttempt) -> None:
        attempt.token += 1
        self._attempts.pop(attempt.key, None)
        attempt.pod.running.pop(attempt.key, None)
        if attempt.pod.running:
            self._respeed(attempt.pod)

    def _arm_progress(self, attempt: SimAttempt) -> None:
        gap = max(1, round(attempt.total_us / (self.hardware.progress_reports + 1)))
        self.after(gap, self._report_progress, attempt, gap)

    def _report_progress(self, attempt: SimAttempt, gap: Micros) -> None:
        if self._attempts.get(attempt.key) is not attempt:
            return
        req_no, number, rank = attempt.key
        steps = self._steps(attempt.task)
        done = int(attempt.done_share(self.now()) * steps + _EPSILON)
        self.emit(TaskProgressed(req_no, number, done, steps, rank))
        self.after(gap, self._report_progress, attempt, gap)

    # --- stopping -----------------------------------------------------------------------------------------------------

    def _stop(self, order: StopTask) -> None:
        attempt = self._attempts.get((order.req_no, order.attempt, order.rank))
        if attempt is None or attempt.stop_ordered:
            return
        attempt.stop_ordered = True
        if attempt.began_at < 0:
            return
        now = self.now()
        steps = self._steps(attempt.task)
        step_us = max(1.0, attempt.total_us * attempt.stretch / max(1.0, steps * (1.0 - attempt.done_before)))
        to_boundary = round(step_us - (now - attempt.began_at) % step_us)
        if order.grace_us and to_boundary > order.grace_us:
            self.after(order.grace_us, self._kill_for_grace, attempt)
            return
        save = _STOP_SAVE_US if order.keep_checkpoint else 0
        self.after(to_boundary + save, self._stop_due, attempt, order.keep_checkpoint)

    def _stop_due(self, attempt: SimAttempt, keep: bool) -> None:
        if self._attempts.get(attempt.key) is attempt:
            self._stopped(attempt, attempt.token, keep)

    def _kill_for_grace(self, attempt: SimAttempt) -> None:
        if self._attempts.get(attempt.key) is attempt:
            self._pod_gone(attempt.pod.order.pod, FailureCause.POD_LOST, "killed after the grace")

    def _stopped(self, attempt: SimAttempt, token: int, keep: bool) -> None:
        if attempt.token != token:
            return
        req_no, number, rank = attempt.key
        checkpoint = ""
        if keep:
            steps = self._steps(attempt.task)
            done = int(attempt.done_share(self.now()) * steps + _EPSILON) / steps
            checkpoint = f"sim:{req_no}/{number}/{round(done * steps)}-of-{steps}"
            self._checkpoints.setdefault(req_no, {})[checkpoint] = done
        self._leave(attempt)
        self.emit(TaskStopped(req_no, number, rank, checkpoint))

    def _steps(self, task: TaskSpec) -> int:
        for name, value in task.features:
            if name == "steps" and isinstance(value, int | float) and value >= 1:
                return int(value)
        return self.hardware.default_steps


def _callback(call: Callable[..., None], arguments: tuple[Any, ...], _event: object) -> None:
    call(*arguments)


def _pictures(task: TaskSpec) -> int:
    for name, value in task.features:
        if name == "images" and isinstance(value, int | float):
            return max(1, int(value))
    return 1


def _wished_failure(task: TaskSpec, attempt: int) -> FailureCause | None:
    """Return the failure that a ``sleep`` task asks for: ``fail`` names it, ``fail_attempts`` how often (default: always)."""
    if task.method != "sleep":
        return None
    features = dict(task.features)
    limit = features.get("fail_attempts", 1 << 30)
    if isinstance(limit, int | float) and attempt > limit:
        return None
    named = {"crash": FailureCause.CRASHED, "oom": FailureCause.OUT_OF_MEMORY, "error": FailureCause.BAD_INPUT}
    return named.get(str(features.get("fail", "")))
