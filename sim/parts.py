"""The mutable pieces of the simulated cluster: nodes, Pods and attempts. Plain records; `sim.world` moves them."""

from __future__ import annotations

from collections import OrderedDict
from enum import Enum, auto

from engine.commands import CreatePod
from engine.resources import NodeSpec
from engine.tasks import FailureCause, Micros, TaskSpec
from sim.caches import ByteCache
from sim.hardware import BatchRow, Hardware
from sim.workload import Truth

AttemptKey = tuple[str, int, int]
"""(req_no, attempt, rank)."""


class Outcome(Enum):
    """How an attempt will end if nobody interferes; decided when it begins."""

    FINISH = auto()
    FAIL = auto()
    CRASH = auto()
    """It takes its Pod down with it."""


class SimNode:
    """A machine: what it offers, what lies in its caches, which Pods it runs, and whether it is up."""

    __slots__ = ("disk", "fetching", "ill", "life", "memory", "model_of", "pods", "spec", "up")

    def __init__(self, spec: NodeSpec, hardware: Hardware) -> None:
        self.spec = spec
        self.disk = ByteCache(round(spec.disk_bytes * hardware.disk_cache_share))
        self.memory = ByteCache(round(spec.memory_bytes * hardware.memory_cache_share))
        self.fetching: dict[str, Micros] = {}
        """Model -> when its files will be on the disk."""
        self.pods: dict[int, SimPod] = {}
        self.up = True
        self.life = 0
        """Counts failures, so that what was under way before one is recognised."""
        self.ill: set[str] = set()
        self.model_of = {gpu.uuid: gpu.model for gpu in spec.gpus}


class SimPod:
    """A container with a model on a share of GPUs."""

    __slots__ = ("fresh", "gpu_model", "hung", "loras", "order", "pipeline", "ready", "running", "share", "stopping")

    def __init__(self, order: CreatePod, gpu_model: str) -> None:
        self.order = order
        self.gpu_model = gpu_model
        self.share = order.grants[0].share if order.grants else 1000
        self.ready = False
        self.fresh = True
        """Nothing has run in it."""
        self.stopping = False
        self.hung = False
        """One of its GPUs is ill: nothing in it ever ends."""
        self.running: dict[AttemptKey, SimAttempt] = {}
        self.loras: OrderedDict[str, None] = OrderedDict()
        self.pipeline = ""
        """Kind of the task that came last; only where loads are measured ones."""


class SimAttempt:
    """One try of one task (of one member of a gang)."""

    __slots__ = (
        "batch_at",
        "began_at",
        "cause",
        "company",
        "company_us",
        "done_before",
        "gone",
        "key",
        "left_us",
        "outcome",
        "peak_bytes",
        "pod",
        "rebased_at",
        "row",
        "row_share",
        "stop_ordered",
        "stretch",
        "task",
        "token",
        "total_us",
        "truth",
    )

    def __init__(self, key: AttemptKey, task: TaskSpec, truth: Truth, pod: SimPod, done_before: float) -> None:
        self.key = key
        self.task = task
        self.truth = truth
        self.pod = pod
        self.done_before = done_before
        """Share of the work that a checkpoint brought along."""
        self.began_at: Micros = -1
        """-1 until it began."""
        self.batch_at: Micros = -1
        """When it entered its Pod's running batch: its adapters are loaded then; -1 until it has."""
        self.row: BatchRow | None = None
        """What it brings into the batch; known once another is there."""
        self.row_share = 1.0
        """Share of its time that others in the batch slow down."""
        self.company = 0
        """Others in the batch now."""
        self.company_us = 0.0
        """Others in the batch, summed up over the time."""
        self.total_us = 0.0
        """Whole run time of this attempt when alone in its Pod."""
        self.left_us = 0.0
        self.rebased_at: Micros = 0
        self.stretch = 1.0
        """How much slower it goes for sharing its Pod."""
        self.outcome = Outcome.FINISH
        self.cause = FailureCause.CRASHED
        self.peak_bytes = 0
        self.token = 0
        """Raised whenever its end is rescheduled or it is gone: an older timeout means nothing."""
        self.stop_ordered = False
        self.gone = False
        """Whether it is over, or vanished with its Pod."""

    def rebase(self, now: Micros) -> None:
        """Account for the time since the last change of speed."""
        spent = now - self.rebased_at
        self.left_us -= spent / self.stretch
        self.company_us += spent * self.company
        self.rebased_at = now

    def done_share(self, now: Micros) -> float:
        """Share of the whole task that is behind it now, what its checkpoint brought included."""
        if self.batch_at < 0 or self.total_us <= 0:
            return self.done_before
        left = self.left_us - (now - self.rebased_at) / self.stretch
        return self.done_before + (1.0 - self.done_before) * max(0.0, min(1.0, 1.0 - left / self.total_us))
