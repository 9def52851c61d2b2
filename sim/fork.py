"""Goes on from a moment of a live journal in the simulator: the same queue, Pods and running attempts, and a future of our choice.

The state is the scheduler's own, folded from its journal; no policy is asked until the fork. The world behind it is simulated, with
spans measured from the journal (`sim.calibration`) and run times drawn from what the predictor learned from it. What arrives is
what arrived in a window before the fork, once more. The journal is only read.
"""

from __future__ import annotations

import pickle
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter

import simpy

from engine import snapshot
from engine.commands import CreatePod, DeletePod, StartTask, StopTask
from engine.entities import Pod, Task
from engine.events import NodeDrainRequested
from engine.journal import Record
from engine.ports import Journal
from engine.profile import Profile
from engine.reasons import Reason
from engine.replay import refold
from engine.resources import NodeSpec
from engine.scheduler import Engine
from engine.state import State
from engine.tasks import Micros, PodState, TaskState
from predictors.forecaster import OnlineForecaster
from sim.calibration import (
    Calibration,
    CalibrationError,
    MeasuredFirstRuns,
    RunTimes,
    first_runs,
    learned,
    measure,
    measured_hardware,
    shared_as_measured,
)
from sim.draws import unit
from sim.from_journal import workload_from_records
from sim.hardware import GPU_MODELS, Hardware, cluster
from sim.workload import Arrival, Truth, Workload
from sim.world import SimWorld, run

_UNMEASURED = Calibration(500, {}, 300_000, (), {}, 0)
"""For journals in which nothing was ever started."""
_POOL = re.compile(r"^([0-9]{1,6})x(.+?)(?::([0-9]{1,3}))?$")
_DEFAULT_GPUS = 8
_CONDITIONED_DRAWS = 64
MOST_ARRIVALS = 1_000_000
MOST_GPUS = 100_000


class ForkError(ValueError):
    """A future cannot be simulated as asked; the message names the field and the remedy."""


class ForkIdle(ForkError):
    """No node takes work in a future."""


@dataclass(frozen=True, slots=True)
class Pool:
    """So many nodes with GPUs of one model."""

    nodes: int
    gpu_model: str
    gpus: int | None = None
    """Per node; None: as many as the nodes that are there have."""

    @classmethod
    def parse(cls, text: str, name: str) -> Pool:
        """Read ``2xa100`` or, with GPUs per node, ``2xa100:8``; raises ForkError naming the field."""
        found = _POOL.match(text.strip())
        if found is None or int(found[1]) < 1 or found[3] == "0":
            raise ForkError(f"{name}: {text!r} is no number of nodes; write 2xa100, or 2xa100:8 for 8 GPUs on each")
        return cls(int(found[1]), found[2].strip(), int(found[3]) if found[3] else None)


@dataclass(frozen=True, slots=True)
class Change:
    """How one future differs from another."""

    profile: Profile
    add: tuple[Pool, ...] = ()
    remove: tuple[Pool, ...] = ()
    """Nodes that are drained at the fork: what runs there finishes. Those with the fewest running tasks go first."""
    load: float = 1.0
    """Arrivals come so many times as fast."""

    def __post_init__(self) -> None:
        if not 0 < self.load <= 1_000:
            raise ForkError(
                f"load: must be greater than 0 and at most 1000, got {self.load}; 1.5 is half as much again"
            )


@dataclass(frozen=True)
class Fork:
    """A moment of a journal, ready to go on from as often as one likes."""

    state: bytes
    """The scheduler's snapshot at that moment."""
    now: Micros
    history: tuple[Record, ...] = field(repr=False)
    """What was recorded up to then, as far back as it is wanted for learning and for arrivals."""

    @classmethod
    def of(cls, begin: bytes | None, records: Sequence[Record], at: Micros | None = None) -> Fork:
        """Return the fork after the last record not later than `at` (None: the last one of all).

        `begin` is the snapshot that the records follow. Raises ForkError when there is nothing to go on from.
        """
        kept = tuple(record for record in records if at is None or record.now <= at)
        state = refold(begin, kept)
        if not state.cluster.nodes:
            raise ForkError("the journal knows no node by then; fork later, or let an agent join first")
        # Tasks that are over matter only to those who submit them again, which nobody does here; restoring them costs seconds.
        for req_no in state.terminal:
            del state.tasks[req_no]
        state.terminal.clear()
        return cls(snapshot.take(state), state.now, kept)

    def recorded(self, window_us: Micros) -> tuple[Micros, Workload]:
        """Return when the first step in the window before the fork was made, and what was asked for since."""
        found = self._windows.get(window_us)
        if found is None:
            begins = self.now - window_us
            kept = self.history[bisect_right(self.history, begins, key=attrgetter("now")) :]
            found = (kept[0].now if kept else self.now, workload_from_records(kept))
            self._windows[window_us] = found
        return found

    @cached_property
    def _windows(self) -> dict[Micros, tuple[Micros, Workload]]:
        return {}

    @cached_property
    def calibration(self) -> Calibration:
        """What the journal says about its executors."""
        try:
            return measure(self.history)
        except CalibrationError:
            return _UNMEASURED

    @cached_property
    def predictor(self) -> bytes:
        """The forecaster that learned from the journal; pickled, because every future goes on learning in its own way."""
        return pickle.dumps(learned(self.history))

    def forecaster(self) -> OnlineForecaster:
        """Return a forecaster of one's own."""
        forecaster = pickle.loads(self.predictor)  # noqa: S301 - made a moment ago, in this process
        assert isinstance(forecaster, OnlineForecaster)
        return forecaster

    @property
    def recorded_us(self) -> Micros:
        """How far back the history goes."""
        return self.now - self.history[0].now if self.history else 0


# --- what arrives ---------------------------------------------------------------------------------------------------


def future_arrivals(fork: Fork, window_us: Micros, horizon_us: Micros, load: float, seed: int) -> list[Arrival]:
    """Return what arrives after the fork: the window before it once more, from a moment of it that the seed chooses.

    The window is a ring that is gone round until the horizon, `load` times as fast, so that bursts stay bursts; the same seed
    begins at the same moment for every load. Truths hold what is known besides run times: failures for good, and cancels.
    """
    if window_us <= 0:
        return []
    begun, workload = fork.recorded(window_us)
    offset = round(unit(seed, "where the window begins") * window_us)
    shift = begun - (fork.now - window_us) - offset
    ring = [((arrival.at + shift) % window_us, arrival) for arrival in workload.arrivals]
    ring.sort(key=lambda entry: entry[0])
    arrivals: list[Arrival] = []
    lap = 0
    while ring:
        for at, arrival in ring:
            ahead = round((lap * window_us + at) / load)
            if ahead > horizon_us:
                return arrivals
            if len(arrivals) >= MOST_ARRIVALS:
                raise ForkError(f"load, hours: more than {MOST_ARRIVALS} tasks would arrive; ask for less of either")
            arrivals.append(_again(arrival, lap, fork.now + ahead))
        lap += 1
    return arrivals


def _again(arrival: Arrival, lap: int, at: Micros) -> Arrival:
    """Return an arrival at another time, as a task of its own."""
    task = replace(arrival.task, req_no=f"{arrival.task.req_no}+{lap}")
    if task.start_deadline is not None:
        task = replace(task, start_deadline=task.start_deadline - arrival.at + at)
    return Arrival(at, task, replace(arrival.truth, work_us=None))


# --- the cluster ----------------------------------------------------------------------------------------------------


def changed_nodes(state: State, change: Change) -> tuple[tuple[NodeSpec, ...], tuple[str, ...]]:
    """Return the nodes that join and the names of those that are drained; raises ForkError naming what is not there."""
    up = [node for node in state.cluster.nodes if node.up]
    joining: list[NodeSpec] = []
    gpus = 0
    for pool in change.add:
        model = _known_model(pool.gpu_model, state, "add_nodes")
        like = next((node.spec for node in up if any(gpu.model == model for gpu in node.spec.gpus)), None)
        gpus += pool.nodes * (pool.gpus or (len(like.gpus) if like is not None else _DEFAULT_GPUS))
        if gpus > MOST_GPUS:
            raise ForkError(f"add_nodes: {gpus} GPUs would join, at most {MOST_GPUS} can; ask for fewer")
        for _ in range(pool.nodes):
            joining.append(_like(like, model, pool.gpus, f"whatif-{len(joining)}"))
    leaving: list[str] = []
    for pool in change.remove:
        model = _known_model(pool.gpu_model, state, "remove_nodes")
        there = [
            node
            for node in up
            if any(gpu.model == model for gpu in node.spec.gpus) and node.name not in leaving and not node.draining
        ]
        if len(there) < pool.nodes:
            raise ForkError(f"remove_nodes: there are {len(there)} working nodes with {model}, not {pool.nodes}")
        there.sort(key=lambda node: (sum(len(pod.tasks) for pod in node.pods.values()), node.name))
        leaving += [node.name for node in there[: pool.nodes]]
    if not joining and all(node.name in leaving or node.draining for node in up):
        raise ForkIdle(
            "no node takes work at this moment of the journal, as when a platform was stopped; fork earlier, or add nodes"
        )
    return tuple(joining), tuple(leaving)


def _known_model(name: str, state: State, field_name: str) -> str:
    there = sorted({gpu.model for node in state.cluster.nodes for gpu in node.spec.gpus})
    if name in there:
        return name
    alike = [model for model in there if name.casefold() in model.casefold()]
    if len(alike) == 1:
        return alike[0]
    if name in GPU_MODELS and field_name == "add_nodes":
        return name
    known = ", ".join(dict.fromkeys([*there, *sorted(GPU_MODELS)] if field_name == "add_nodes" else there))
    raise ForkError(f"{field_name}: unknown GPU model {name!r}; known are {known}")


def _like(like: NodeSpec | None, model: str, gpus: int | None, name: str) -> NodeSpec:
    if like is None:
        return replace(_renamed(cluster(1, gpus or _DEFAULT_GPUS, model)[0], name), name=name)
    count = gpus or len(like.gpus)
    first = next(gpu for gpu in like.gpus if gpu.model == model)
    return replace(
        like,
        name=name,
        gpus=tuple(replace(first, uuid=f"{name}-gpu-{number}", healthy=True) for number in range(count)),
    )


def _renamed(spec: NodeSpec, name: str) -> NodeSpec:
    return replace(spec, gpus=tuple(replace(gpu, uuid=f"{name}-gpu-{number}") for number, gpu in enumerate(spec.gpus)))


# --- the run --------------------------------------------------------------------------------------------------------


def run_forward(
    fork: Fork, change: Change, journal: Journal, *, seed: int, window_us: Micros, horizon_us: Micros
) -> SimWorld:
    """Simulate one future until every task is over; `journal` is told every step.

    Two changes under one seed meet the same arrivals, run times and Pod starts. Raises ForkError.
    """
    state = snapshot.restore(fork.state)
    joining, leaving = changed_nodes(state, change)
    up = [node.spec for node in state.cluster.nodes if node.up]
    hardware = shared_as_measured(measured_hardware(fork.calibration, [*up, *joining]), fork.history)
    forecaster = fork.forecaster()
    longer = first_runs(fork.history, forecaster, hardware.reference_gpu)
    hardware = replace(hardware, first_runs=MeasuredFirstRuns(longer))
    times = RunTimes(forecaster, fork.calibration, hardware.reference_gpu)
    arrivals = []
    for arrival in future_arrivals(fork, window_us, horizon_us, change.load, seed):
        known, drawn = arrival.truth, times.truth(arrival.task, fork.now, seed)
        truth = replace(drawn, fails_with=known.fails_with, cancel_after_us=known.cancel_after_us)
        arrivals.append(replace(arrival, truth=truth))
    world = SimWorld(
        simpy.Environment(initial_time=fork.now),
        hardware,
        Workload("future", tuple(arrivals)),
        seed,
        known_nodes=frozenset(spec.name for spec in up),
    )
    world.last_arrival_at = max(world.last_arrival_at, fork.now)
    _restore(world, state, times, seed)
    for name in leaving:
        world.post(NodeDrainRequested(name))
    run(Engine.from_state(change.profile, state), world, forecaster.watching(journal), forecaster)
    return world


def _restore(world: SimWorld, state: State, times: RunTimes, seed: int) -> None:
    """Put everything that was under way at the fork into the world."""
    doomed: list[DeletePod] = []
    for pod in state.pods.values():
        if pod.state is PodState.GONE or not pod.node.up:
            continue
        order = CreatePod(pod.number, pod.node.name, pod.method, pod.model, pod.grants, pod.demand, pod.slots)
        world.restore_pod(order, _start_left(pod, world, state.now) if pod.state is PodState.CREATING else None)
        if pod.state is PodState.STOPPING:
            doomed.append(DeletePod(pod.number, pod.reason, state.limits.grace_us))
    for task in state.live_tasks():
        truth = _truth(task, state, times, world.hardware, seed)
        world.open_tasks[task.req_no] = (task.spec, truth)
        share = task.progress_done / task.progress_total if task.progress_total else 0.0
        if task.checkpoint:
            world.restore_checkpoint(task.req_no, task.checkpoint, share)
        for rank, number in enumerate(task.pods):
            if not task.live >> rank & 1 or number not in world.pods:
                continue
            node = world.pods[number].order.node
            # A checkpoint that this very attempt saved is not where it began.
            began_from = "" if task.kept_until else task.checkpoint
            order_to_start = StartTask(task.req_no, task.attempt, number, node, rank, began_from)
            if task.rank_started >> rank & 1:
                world.restore_attempt(order_to_start, state.now - task.started_at)
            else:
                world.perform(order_to_start)
            if task.state is TaskState.STOPPING:
                keep = task.stop_reason == Reason.PREEMPTED
                grace = state.limits.grace_us
                world.perform(StopTask(task.req_no, task.attempt, number, node, rank, grace, task.stop_reason, keep))
    for delete in doomed:
        world.perform(delete)


def _start_left(pod: Pod, world: SimWorld, now: Micros) -> Micros:
    hardware = world.hardware
    assert hardware.pod_starts is not None
    whole = hardware.dispatch_us + hardware.pod_starts.draw(pod.method, pod.model, world.seed, pod.number)
    return max(1, whole - (now - pod.created_at))


def _truth(task: Task, state: State, times: RunTimes, hardware: Hardware, seed: int) -> Truth:
    """Draw the run time of a task that is there at the fork; of one that runs, given that it has run so long already."""
    truth = times.truth(task.spec, state.now, seed)
    if not task.rank_started or task.state not in (TaskState.RUNNING, TaskState.STOPPING):
        return truth
    pod = state.pods[task.pods[0]] if task.pods and task.pods[0] in state.pods else None
    uuid = pod.grants[0].uuid if pod is not None and pod.grants else ""
    model = next((gpu.model for gpu in pod.node.spec.gpus if gpu.uuid == uuid), "") if pod is not None else ""
    ran_us = round((state.now - task.started_at) * hardware.speed(model))
    for turn in range(1, _CONDITIONED_DRAWS):
        if truth.work_us is not None and truth.work_us > ran_us:
            return truth
        truth = times.truth(task.spec, state.now, seed + turn * 7_919)
    prediction = times.forecaster.predict(task.spec, state.now, times.gpu_model)
    return replace(truth, work_us=times.forecaster.predictor.remaining(prediction, ran_us).p50_us + 1)
