"""The SimPy cluster behind the engine's World port: arrivals, Pods, loads, runs and failures on a simulated clock.

It answers the engine's commands with the same events as real executors would, later on the simulated clock. SimPy gives the clock
and its timeouts; everything happens in callbacks, because a SimPy process per task would cost more than the scheduling that is
studied. Time is whole microseconds. Every random draw is keyed by what it is for (`sim.draws`): policies can be compared under the
same luck.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, assert_never

import simpy

from engine.commands import (
    Command,
    CreatePod,
    DeletePod,
    Notify,
    PrefetchModel,
    ReleaseModel,
    ScaleNodes,
    StartTask,
    StopTask,
)
from engine.events import (
    Event,
    NodeJoined,
    NodeReported,
    PodStarted,
    PodStopped,
    TaskCancelRequested,
    TaskSubmitted,
)
from engine.resources import ResidentModel
from engine.tasks import TERMINAL_STATES, FailureCause, Micros, TaskSpec, TaskState
from sim.attempts import Attempts
from sim.breakage import Breakage
from sim.caches import Source
from sim.draws import lognormal
from sim.due import Clock
from sim.faults import Fault, FaultKind, FaultPlan
from sim.hardware import Hardware
from sim.maker import Maker
from sim.parts import SimNode, SimPod
from sim.pump import run
from sim.stock import TELL_US, resident
from sim.workload import Arrival, Truth, Workload

__all__ = ["SimWorld", "run"]

_SUBMITTED: Final = Maker(TaskSubmitted)


class SimWorld:
    """A simulated cluster.

    Nodes join at time zero, but for `known_nodes`, which the engine's state holds already (`sim.fork`). `counts` tells what only
    the world can know, such as where each model load found its bytes.
    """

    def __init__(
        self,
        env: simpy.Environment,
        hardware: Hardware,
        workload: Workload,
        seed: int,
        faults: FaultPlan | None = None,
        known_nodes: frozenset[str] = frozenset(),
    ) -> None:
        self.env = env
        self.clock = Clock(env)
        self.hardware = hardware
        self.seed = seed
        self.bell: Callable[[], None] | None = None
        """Called when an event enters the empty inbox; set by `run`."""
        self.on_scale: Callable[[ScaleNodes], None] | None = None
        """Carries out what the engine wants of nodes (`sim.fleet`); None: nobody does."""
        self.counts: dict[str, int] = {}
        self.open_tasks: dict[str, tuple[TaskSpec, Truth]] = {}
        """Tasks that entered and are not known to be over."""
        self.last_arrival_at: Micros = workload.span_us
        self._inbox: list[Event] = []
        self._coming = 0
        self._coming_arrivals: Iterator[Arrival] = iter(workload.arrivals)
        self._next: Arrival | None = None
        self.arrived = 0
        """How many of the workload's tasks have entered."""
        self._dead: dict[str, tuple[TaskSpec, Truth]] = {}
        self._attempts = Attempts(self)
        self.pods: dict[int, SimPod] = {}
        self._loads: dict[str, int] = {}
        self._telling: dict[str, int] = {}
        """Nodes that are about to tell of their caches, with the life in which they are."""
        self._told: dict[str, tuple[int, tuple[ResidentModel, ...]]] = {}
        """What each told last, and in which life."""
        self.nodes = {spec.name: SimNode(spec, hardware) for spec in hardware.nodes}
        for spec in hardware.nodes:
            if spec.name not in known_nodes:
                self.post(NodeJoined(spec))
        self.plan = faults or FaultPlan()
        self._breakage = Breakage(self, self.plan)
        self._breakage.arm()
        self._arm_arrival()

    # --- the World port ---------------------------------------------------------------------------------------------

    def now(self) -> Micros:
        """Return the simulated time."""
        return self.clock.now()

    def take(self) -> Sequence[Event]:
        """Return the events since the last call."""
        taken, self._inbox = self._inbox, []
        return taken

    def perform(self, command: Command) -> None:
        """Begin to carry out a command."""
        match command:
            case StartTask():
                self._attempts.start(command)
            case CreatePod():
                self._create(command)
            case Notify():
                self._heed(command)
            case DeletePod():
                self._delete(command)
            case StopTask():
                self._attempts.stop(command)
            case PrefetchModel():
                self._prefetch(command)
            case ReleaseModel():
                self._release(command)
            case ScaleNodes():
                self.count("scale_advice")
                if self.on_scale is not None:
                    self.on_scale(command)
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
        self._put(event)

    def _put(self, event: Event) -> None:
        inbox = self._inbox
        if not inbox and self.bell is not None:
            self.bell()
        inbox.append(event)

    def after(self, delay_us: Micros, call: Callable[..., None], *arguments: Any) -> None:
        """Call something later on the simulated clock."""
        self.clock.after(delay_us, call, arguments)

    def count(self, what: str, by: int = 1) -> None:
        """Count something that happened."""
        self.counts[what] = self.counts.get(what, 0) + by

    @property
    def settled(self) -> bool:
        """Whether everything has arrived and every task is known to be over."""
        return self._next is None and not self._coming and not self.open_tasks and not self._inbox

    # --- arrivals -----------------------------------------------------------------------------------------------------

    def _emit_posted(self, event: Event) -> None:
        self._coming -= 1
        self.emit(event)

    def _arm_arrival(self) -> None:
        self._next = next(self._coming_arrivals, None)
        if self._next is not None:
            self.after(self._next.at - self.now(), self._arrive)

    def _arrive(self) -> None:
        arrival = self._next
        assert arrival is not None
        at = arrival.at
        while arrival is not None and arrival.at == at:
            self.arrived += 1
            task, truth = arrival.task, arrival.truth
            self.open_tasks.setdefault(task.req_no, (task, truth))
            self._put(_SUBMITTED.make((task, None)))
            if truth.cancel_after_us is not None:
                self.after(truth.cancel_after_us, self._cancel, task.req_no)
            arrival = next(self._coming_arrivals, None)
        self._next = arrival
        if arrival is not None:
            self.after(arrival.at - at, self._arrive)

    def _cancel(self, req_no: str) -> None:
        if req_no in self.open_tasks:
            self.emit(TaskCancelRequested(req_no))

    def _heed(self, notice: Notify) -> None:
        if notice.state not in TERMINAL_STATES:
            if self._dead and notice.req_no in self._dead:
                self.open_tasks[notice.req_no] = self._dead.pop(notice.req_no)
            return
        known = self.open_tasks.pop(notice.req_no, None)
        self._attempts.checkpoints.pop(notice.req_no, None)
        if known is not None and notice.state is TaskState.DEAD:
            self._dead[notice.req_no] = known

    # --- Pods ---------------------------------------------------------------------------------------------------------

    def _create(self, order: CreatePod) -> None:
        node = self.nodes.get(order.node)
        if node is None or not node.up:
            return
        uuid = order.grants[0].uuid if order.grants else ""
        pod = SimPod(order, node.model_of.get(uuid, "cpu"))
        node.pods[order.pod] = self.pods[order.pod] = pod
        self.count("pods_created")
        if any(grant.uuid in node.ill for grant in order.grants):
            self.after(self.hardware.pod_stop_us, self.pod_gone, order.pod, FailureCause.GPU_LOST, "the GPU is ill")
            return
        spent = self.hardware.dispatch_us + self.hardware.pod_start_us
        spent += self._load(node, order.method, order.model, uuid)
        self.after(spent, self._pod_ready, order.pod, node.life)

    def restore_pod(self, order: CreatePod, ready_in_us: Micros | None) -> None:
        """Put a Pod in place that was there before this world was; None: it is ready."""
        node = self.nodes[order.node]
        pod = SimPod(order, node.model_of.get(order.grants[0].uuid if order.grants else "", "cpu"))
        node.pods[order.pod] = self.pods[order.pod] = pod
        if ready_in_us is None:
            pod.ready, pod.fresh = True, False
        else:
            self.after(ready_in_us, self._pod_ready, order.pod, node.life)

    def restore_attempt(self, order: StartTask, ran_us: Micros, checkpoint_share: float = 0.0) -> None:
        """Go on with an attempt that began `ran_us` ago; `checkpoint_share` of its work was behind it then."""
        if order.checkpoint:
            self.restore_checkpoint(order.req_no, order.checkpoint, checkpoint_share)
        self._attempts.resume(order, ran_us)

    def restore_checkpoint(self, req_no: str, checkpoint: str, share: float) -> None:
        """Tell how much of a task's work a checkpoint holds that was made before this world was."""
        self._attempts.checkpoints.setdefault(req_no, {})[checkpoint] = share

    def _load(self, node: SimNode, method: str, model: str, gpu: str) -> Micros:
        """Begin to load a model; return how long it takes from here."""
        if self.hardware.pod_starts is not None:
            nth = self._loads[model] = self._loads.get(model, 0) + 1
            return self.hardware.pod_starts.draw(method, model, self.seed, nth)
        size = self.hardware.model_bytes(method, model)
        if not size:
            return 0
        nth = self._loads[model] = self._loads.get(model, 0) + 1
        if self.hardware.measured is not None:
            self.count("loads_measured")
            return self.hardware.measured.base_us(gpu, self.seed, model, nth)
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
        self.tell_later(node)
        return spent

    def tell_later(self, node: SimNode) -> None:
        """Have a node tell of its caches some time after they changed."""
        if self._telling.get(node.spec.name) != node.life:
            self._telling[node.spec.name] = node.life
            self.after(TELL_US, self._tell, node, node.life)

    def _tell(self, node: SimNode, life: int) -> None:
        if node.life != life or not node.up:
            return
        name = node.spec.name
        del self._telling[name]
        here = resident(node.disk, node.memory)
        if self._told.get(name) != (life, here):
            self._told[name] = (life, here)
            self.emit(NodeReported(name, self._breakage.seen(node).gpus, resident=here))

    def _fetch(self, node: SimNode, model: str, spent: Micros) -> None:
        node.fetching[model] = self.now() + spent
        self.after(spent, self._fetched, node, model, node.life)

    def _fetched(self, node: SimNode, model: str, life: int) -> None:
        if node.life == life:
            node.fetching.pop(model, None)
            node.disk.put(model, self.hardware.model_bytes("", model))
            self.tell_later(node)

    def _prefetch(self, order: PrefetchModel) -> None:
        node = self.nodes.get(order.node)
        if node is None or not node.up:
            return
        if order.pin:
            node.disk.pin(order.model)
            self.tell_later(node)
        if order.model in node.disk or order.model in node.fetching:
            return
        size = self.hardware.model_bytes("", order.model)
        if size:
            self.count("prefetches")
            factor = lognormal(self.hardware.load_sigma, self.seed, "prefetch", order.model, order.node)
            self._fetch(node, order.model, round(factor * self.hardware.fetch_us(size)))

    def _release(self, order: ReleaseModel) -> None:
        node = self.nodes.get(order.node)
        if node is not None and node.up:
            node.disk.unpin(order.model)
            self.tell_later(node)
            if order.drop and not any(pod.order.model == order.model for pod in node.pods.values()):
                node.disk.drop(order.model)
                node.memory.drop(order.model)

    def _pod_ready(self, number: int, life: int) -> None:
        pod = self.pods.get(number)
        if pod is None or pod.stopping or self.nodes[pod.order.node].life != life:
            return
        pod.ready = True
        self.emit(PodStarted(number))

    def _delete(self, order: DeletePod) -> None:
        pod = self.pods.get(order.pod)
        if pod is None or pod.stopping:
            return
        pod.stopping = True
        grace = order.grace_us if pod.running else 0
        self.after(self.hardware.pod_stop_us + grace, self.pod_gone, order.pod, FailureCause.POD_LOST, "as ordered")

    def pod_gone(self, number: int, cause: FailureCause, detail: str) -> None:
        """Let a Pod end and report it, unless it is gone already."""
        pod = self.forget_pod(number)
        if pod is not None:
            self.emit(PodStopped(number, cause, detail))

    def forget_pod(self, number: int) -> SimPod | None:
        """Let a Pod and its attempts vanish without a report; None when it is gone already."""
        pod = self.pods.pop(number, None)
        if pod is None:
            return None
        self.nodes[pod.order.node].pods.pop(number, None)
        for attempt in pod.running.values():
            self._attempts.forget(attempt)
        return pod

    def fail_node(self, node: str, repair_after_us: Micros | None = None) -> None:
        """Let a machine die now; None: it never comes back."""
        self._breakage.strike(Fault(self.now(), FaultKind.NODE_LOST, node, repair_after_us=repair_after_us))

    def crash_pod(self, number: int, detail: str) -> None:
        """Let a Pod die by itself."""
        self.pod_gone(number, FailureCause.CRASHED, detail)
