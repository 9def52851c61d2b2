"""What a customer asks for (`TaskSpec`), what is predicted about it (`Estimate`), and the constants both worlds share."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from engine.resources import Demand

Micros = int
"""A point in time or a span, in whole microseconds. The engine never asks what time it is."""

SECOND: Micros = 1_000_000
NEVER: Micros = 2**62
URGENT_PRIORITY = 100
"""Tasks at or above this priority are urgent; all others are ordinary."""


class TaskType(StrEnum):
    """TP trains a personalised model, GC generates pictures."""

    TP = "TP"
    GC = "GC"


class Affinity(StrEnum):
    """How a group is bound to a Node."""

    NONE = "none"
    PREFERRED = "preferred"
    STRICT = "strict"
    EXCLUSIVE = "exclusive"


class TaskState(StrEnum):
    """The life of a task. FINISHED, CANCELLED, REJECTED and DEAD are terminal."""

    PENDING = "pending"
    BOUND = "bound"
    """Bound to a Pod that is still being created."""
    STARTING = "starting"
    """StartTask was ordered; the executor has not confirmed."""
    RUNNING = "running"
    STOPPING = "stopping"
    """StopTask was ordered (cancel or preemption); its slot is taken until the executor confirms."""
    BACKOFF = "backoff"
    """A failed attempt waits for its retry time."""
    FINISHED = "finished"
    CANCELLED = "cancelled"
    REJECTED = "rejected"
    DEAD = "dead"
    """Out of attempts, or its start deadline passed: the dead letter."""


TERMINAL_STATES = frozenset({TaskState.FINISHED, TaskState.CANCELLED, TaskState.REJECTED, TaskState.DEAD})


class PodState(StrEnum):
    """The life of a Pod. Its devices stay taken until it is GONE."""

    CREATING = "creating"
    READY = "ready"
    """Started, has never run a task."""
    BUSY = "busy"
    IDLE = "idle"
    """Warm: no task, model loaded; may be reused or reclaimed."""
    STOPPING = "stopping"
    GONE = "gone"


class FailureCause(StrEnum):
    """Why an attempt failed. `NOT_RETRYABLE` causes go to the dead letter at once."""

    CRASHED = "crashed"
    OUT_OF_MEMORY = "out_of_memory"
    BAD_INPUT = "bad_input"
    MODEL_MISSING = "model_missing"
    NODE_LOST = "node_lost"
    POD_LOST = "pod_lost"
    TIMED_OUT = "timed_out"
    GPU_LOST = "gpu_lost"
    HUNG = "hung"
    """No step came within the time that steps take; its Pod was killed."""
    NOT_FINITE = "not_finite"
    """The numbers overflowed or were none: the model in this precision, or the device."""


NOT_RETRYABLE = frozenset({FailureCause.BAD_INPUT, FailureCause.MODEL_MISSING})
LAST_ATTEMPT: dict[FailureCause, int] = {FailureCause.NOT_FINITE: 2}
"""Cause -> the attempt that is the last when it fails so, whatever the task allows: once more may help, more often does not."""


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A predicted distribution of one quantity, in the quantity's own unit (durations: microseconds)."""

    mean: int
    p50: int
    p90: int
    p99: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the forecaster stamped on a task before the journal.

    ``durations`` maps a GPU model to predicted run time in microseconds, sorted by model; the entry ``"*"`` serves every model
    that is not listed and is always present.
    """

    durations: tuple[tuple[str, Quantiles], ...]
    gpu_memory_bytes: int = 0
    """P99 of peak memory per GPU; 0 when unknown (then the demand's own figure holds)."""
    failure_ppm: int = 0
    """Chance of failure in parts per million."""
    marginal_permille: int = 0
    """How much longer a run takes for each other task in its Pod, in thousandths of the run alone; 0: unknown."""
    host_memory_bytes: int = 0
    """P99 of the most memory that its Pod's process holds on the host; 0 when unknown."""
    gpu_busy_permille: int = 0
    """What share of its time it is expected to keep its GPUs busy when it has them alone, in thousandths; 0 when unknown."""

    @property
    def serves_every_model(self) -> bool:
        """Tell whether the entry ``"*"`` is there."""
        for model, _ in self.durations:  # noqa: SIM110 - asked for every task
            if model == "*":
                return True
        return False

    def duration(self, gpu_model: str = "*") -> Quantiles:
        """Return the quantiles for a GPU model, or those of ``"*"``."""
        fallback = None
        for model, quantiles in self.durations:
            if model == gpu_model:
                return quantiles
            if model == "*":
                fallback = quantiles
        if fallback is None:
            raise ValueError('Estimate.durations: the entry "*" is missing; every estimate carries one')
        return fallback


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """A task as submitted. `req_no` is its identity: submitting twice is submitting once."""

    req_no: str
    tenant: str
    group: str
    """Empty: the task belongs to no group."""
    task_type: TaskType
    method: str
    """AI method: ``text_to_image``, ``dreambooth``, ``sleep``."""
    model: str = ""
    """Model the Pod must hold; Pods are reused only for the same (method, model)."""
    priority: int = 0
    demand: Demand = field(default_factory=Demand)
    slots: int = 1
    """Tasks a Pod of this (method, model) may run at once."""
    members: int = 1
    """Gang size: this many Pods start together or not at all."""
    affinity: Affinity = Affinity.PREFERRED
    start_deadline: Micros | None = None
    """Absolute; a task that has not started by then goes to the dead letter."""
    run_limit_us: Micros | None = None
    max_attempts: int = 3
    declared_us: Micros | None = None
    """Run time the caller declares; serves as the estimate where no forecaster stamped one."""
    features: tuple[tuple[str, str | int | float], ...] = ()
    """Sorted (name, value) pairs the forecaster keys on: images, steps, width, height, loras, user ..."""
    preemptible: bool = True
    adapters: tuple[str, ...] = ()
    """Personalised models (LoRA) that the task adds to the Pod's model; tasks of any adapters share the Pods of their model."""
    urgent_slots: int = 0
    """Where the task is urgent and a Pod of its kind is full, so many tasks more than it has slots may be in the Pod: its batch
    sets an ordinary picture aside where it must."""
    credit_us: Micros = 0
    """Where the time of submission ranks, the task ranks as if submitted so much earlier: its place was quoted then."""


def is_urgent(spec: TaskSpec) -> bool:
    """Tell whether the task ranks with the urgent ones."""
    return spec.priority >= URGENT_PRIORITY
