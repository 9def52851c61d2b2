"""A copy of what matters of the live state: places where Pods are or could be, what runs in them, and who waits for what.

A place is a Pod, or free room on a GPU. Its slots become free at drawn times. What only the binding can judge (which exact node,
CPU and disk, adapters in a Pod's memory) is left out: the calibration answers for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import exp
from typing import Final

import numpy as np

from engine.ahead.draws import DRAWS, NORMALS, Floats, remaining, row_of, shape_of
from engine.ahead.measured import Base, Measured
from engine.entities import Node, Pod, Task
from engine.profile import Profile
from engine.resources import WHOLE_GPU, Demand
from engine.state import State
from engine.tasks import SECOND, Affinity, Estimate, Micros, PodState, TaskSpec, TaskState

STOP_US: Final = 1 * SECOND
"""What a Pod that was told to go is taken to need."""
MOST_CPU_PLACES: Final = 64
ANY_NODE: Final = -1

Kind = tuple[str, str, int, int, int, tuple[str, ...], int]
"""(method, model, slots, GPUs, share, GPU models, CPU): Pods of one kind serve the same tasks."""
LineKey = tuple[Kind, int]
"""A kind, and the row of the only node that will do, or `ANY_NODE`."""


def kind_of(method: str, model: str, slots: int, demand: Demand) -> Kind:
    """Return the kind of Pods that serve such tasks."""
    cpu = 0 if demand.gpus else demand.cpu_milli
    return (method, model, slots, demand.gpus, demand.gpu_share, demand.gpu_models, cpu)


def price_of(kind: Kind) -> int:
    """Return the thousandths of GPUs that a Pod of a kind takes; 0: it needs no GPU."""
    return kind[3] * kind[4]


@dataclass(slots=True)
class Waiter:
    """A waiting task with what the forward run needs of it, worked out once."""

    task: Task
    line: LineKey
    estimate: Estimate | None
    mean: float
    sigma: float
    row: int


@dataclass(slots=True)
class Place:
    """A Pod, or room for one."""

    node: int
    kind: Kind | None
    """None: nothing is loaded."""
    price: int
    gpu_model: str
    memory_bytes: int
    """Of one GPU; 0: no GPU."""
    free_at: list[Floats] = field(default_factory=list)
    """Draws of when each slot is free."""
    ready_us: Micros = 0
    """When its Pod was ready, as far as is known."""


@dataclass(slots=True)
class Under:
    """A task that has a place already: draws of its start and its end."""

    task: Task
    start: Floats
    finish: Floats


@dataclass(slots=True)
class Picture:
    """Places and tasks at one moment."""

    now: Micros
    places: list[Place]
    under: list[Under]
    """Tasks that are bound, starting, running, or for which room is being made."""
    waiting: list[Task]
    """Tasks that wait for a place."""

    @property
    def at_once(self) -> int:
        """Return how many tasks are served at a time."""
        return sum(len(place.free_at) for place in self.places)


class Painter:
    """Takes pictures of a state; keeps what it knows of each task between two of them."""

    def __init__(self, profile: Profile, measured: Measured) -> None:
        self._profile = profile
        self._measured = measured
        self._known: dict[str, Waiter] = {}

    def forget(self, req_no: str) -> None:
        """Let go of a task that is over."""
        self._known.pop(req_no, None)

    def waiter(self, task: Task) -> Waiter:
        """Return what the run needs of a waiting task."""
        spec = task.spec
        known = self._known.get(task.req_no)
        node = ANY_NODE
        if spec.affinity in (Affinity.STRICT, Affinity.EXCLUSIVE):
            group = task.group
            node = group.node.index if group is not None and group.node is not None else ANY_NODE
        if known is not None and known.estimate is task.estimate and known.line[1] == node:
            return known
        kind = known.line[0] if known is not None else kind_of(spec.method, spec.model, spec.slots, spec.demand)
        mean, sigma = self.duration(task, "*")
        known = self._known[task.req_no] = Waiter(task, (kind, node), task.estimate, mean, sigma, row_of(task.seq))
        return known

    def duration(self, task: Task, gpu_model: str) -> tuple[float, float]:
        """Return (mean, standard deviation) of the logarithm of a task's run time."""
        return self.duration_of(task.spec, task.estimate, gpu_model)

    def duration_of(self, spec: TaskSpec, estimate: Estimate | None, gpu_model: str) -> tuple[float, float]:
        """Return the same of a task that need not exist."""
        fallback = spec.declared_us or self._measured.run_us((spec.method, spec.model)) or SECOND
        return shape_of(estimate, gpu_model, float(fallback))

    def load(self, base: Base) -> tuple[float, float]:
        """Return (mean, standard deviation) of the logarithm of what a Pod takes to be ready."""
        return self._measured.load(base, float(self._profile.reload_us))

    def paint(self, state: State, live: Iterable[Task]) -> Picture:
        """Return a picture of now; `live` are the tasks that have not ended."""
        picture = Picture(state.now, [], [], [])
        taken: dict[int, list[Floats]] = {}
        for task in live:
            match task.state:
                case TaskState.PENDING if task.req_no in state.claims:
                    self._claimed(picture, state, task)
                case TaskState.PENDING if task.admitted:
                    picture.waiting.append(task)
                case TaskState.BACKOFF:
                    picture.waiting.append(task)
                case TaskState.BOUND | TaskState.STARTING | TaskState.RUNNING | TaskState.STOPPING:
                    under = self._under(state, task)
                    if task.state is not TaskState.STOPPING:
                        picture.under.append(under)
                    for number in task.pods:
                        taken.setdefault(number, []).append(under.finish)
                case _:
                    pass
        for pod in state.pods.values():
            self._pod(picture, pod, taken.get(pod.number, []))
        for node in state.cluster.nodes:
            if node.up and not node.draining:
                self._free(picture, node)
        return picture

    def _under(self, state: State, task: Task) -> Under:
        now = state.now
        pods = [state.pods[number] for number in task.pods if number in state.pods]
        mean, sigma = self.duration(task, _gpu_model(pods[0]) if pods else "*")
        row = row_of(task.seq)
        if task.state is TaskState.STOPPING:
            gone = np.full(DRAWS, float(now + STOP_US))
            return Under(task, gone, gone)
        if task.state is TaskState.RUNNING:
            elapsed = now - task.started_at
            start = np.full(DRAWS, float(task.started_at))
            return Under(task, start, now + remaining(mean, sigma, elapsed + task.kept_us, row))
        start = np.full(DRAWS, float(now))
        for pod in pods:
            if pod.state is PodState.CREATING:
                start = np.maximum(start, self._ready(pod, now))
        return Under(task, start, start + np.exp(mean + sigma * NORMALS[row]))

    def _ready(self, pod: Pod, now: Micros) -> Floats:
        """Return draws of when a Pod that is being created takes tasks."""
        mean, sigma = self.load((pod.method, pod.model))
        return now + remaining(mean, sigma, now - pod.created_at, row_of(pod.number))

    def _claimed(self, picture: Picture, state: State, task: Task) -> None:
        """Add a task for which room is being made, and the place that it will have."""
        claim = state.claims[task.req_no]
        begin = np.full(DRAWS, float(state.now + (STOP_US if claim.waits_for else 0)))
        waiter = self.waiter(task)
        mean, sigma = self.load((task.spec.method, task.spec.model))
        start = begin + np.exp(mean + sigma * NORMALS[(waiter.row + 1) % len(NORMALS)])
        finish = start + np.exp(waiter.mean + waiter.sigma * NORMALS[waiter.row])
        picture.under.append(Under(task, start, finish))
        gpu = claim.node.by_uuid[claim.grants[0].uuid] if claim.grants else None
        place = Place(claim.node.index, waiter.line[0], price_of(waiter.line[0]), "" if gpu is None else gpu.model, 0)
        place.memory_bytes = 0 if gpu is None else gpu.memory_bytes
        place.free_at = [finish] + [start] * (task.spec.slots - 1)
        picture.places.append(place)

    def _pod(self, picture: Picture, pod: Pod, taken: list[Floats]) -> None:
        if pod.state is PodState.GONE or pod.claimed_by or not pod.node.up or pod.node.draining or not pod.devices_open:
            return
        gpu = pod.node.by_uuid[pod.grants[0].uuid] if pod.grants else None
        kind: Kind | None = kind_of(pod.method, pod.model, pod.slots, pod.demand)
        assert kind is not None
        place = Place(pod.node.index, kind, price_of(kind), "" if gpu is None else gpu.model, 0)
        place.memory_bytes = 0 if gpu is None else gpu.memory_bytes
        if pod.state is PodState.STOPPING or pod.doomed is not None:
            place.kind = None
            place.free_at = [np.full(DRAWS, float(picture.now + STOP_US))]
        else:
            idle = np.full(DRAWS, float(picture.now))
            if pod.state is PodState.CREATING:
                idle = self._ready(pod, picture.now)
            place.free_at = [*taken[: pod.slots], *[idle] * (pod.slots - len(taken))]
            place.ready_us = pod.created_at
        picture.places.append(place)

    def _free(self, picture: Picture, node: Node) -> None:
        """Add the room on a node that no Pod and no claim holds."""
        now = np.full(DRAWS, float(picture.now))
        for gpu in node.gpus:
            if gpu.open and gpu.share_free > 0:
                picture.places.append(
                    Place(node.index, None, min(WHOLE_GPU, gpu.share_free), gpu.model, gpu.memory_free, [now])
                )
        needs = [task.spec.demand.cpu_milli for task in picture.waiting if not task.spec.demand.gpus]
        if needs:
            room = MOST_CPU_PLACES if not max(needs) else node.spec.cpu_milli // max(needs)
            room -= sum(1 for pod in node.pods.values() if not pod.demand.gpus and pod.state is not PodState.GONE)
            for _ in range(min(MOST_CPU_PLACES, room)):
                picture.places.append(Place(node.index, None, 0, "", 0, [now]))


def _gpu_model(pod: Pod) -> str:
    return pod.node.by_uuid[pod.grants[0].uuid].model if pod.grants else "*"


def typical_us(mean: float) -> float:
    """Return the median of a run time whose logarithm has this mean."""
    return exp(mean)
