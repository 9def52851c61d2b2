"""The mutable things a State is made of. Only the fold (engine/fold_*.py) changes them; policies read them.

Fields below a ``derived`` remark are indices that are rebuilt from the rest; they are no part of a snapshot.
"""

from __future__ import annotations

from typing import Any

from engine.resources import WHOLE_GPU, Demand, GpuGrant, GpuSpec, NodeSpec
from engine.states import POD_GONE, POD_STOPPING
from engine.tasks import NEVER, Estimate, FailureCause, Micros, PodState, TaskSpec, TaskState, is_urgent


class Account:
    """What fair sharing keeps of a tenant or a group."""

    __slots__ = ("credit", "vtime")

    def __init__(self) -> None:
        self.vtime = 0
        """Predicted cost of all it was given, over its weight; never goes back."""
        self.credit = 0
        """Cost that was charged but not used; spent before `vtime` grows again."""

    def spend(self, amount: int) -> None:
        """Charge an amount; a negative one becomes credit."""
        left = self.credit - amount
        if left < 0:
            self.vtime -= left
            left = 0
        self.credit = left


class Tenant(Account):
    """Whoever pays; tenants share the cluster by weight."""

    __slots__ = ("floor", "max_pending", "max_running", "name", "pending", "running", "seq", "weight")

    def __init__(self, name: str, seq: int) -> None:
        super().__init__()
        self.name = name
        self.seq = seq
        self.weight = 1
        self.max_pending = 0
        self.max_running = 0
        self.pending = 0
        """Admitted tasks in PENDING or BACKOFF."""
        self.running = 0
        """Tasks in BOUND, STARTING, RUNNING or STOPPING."""
        self.floor = 0
        """Virtual time of the group of this tenant that was served last."""


class Group(Account):
    """Tasks of one tenant that belong together and go to one Node."""

    __slots__ = ("live", "name", "node", "pending", "placed", "seq", "tenant", "waiting")

    def __init__(self, tenant: Tenant, name: str, seq: int) -> None:
        super().__init__()
        self.tenant = tenant
        self.name = name
        self.seq = seq
        self.node: Node | None = None
        self.live = 0
        """Tasks that are not terminal."""
        self.pending = 0
        self.placed = 0
        """Tasks in BOUND, STARTING, RUNNING or STOPPING."""
        # derived
        self.waiting: dict[str, Task] = {}
        """Bound-to-be-together tasks (strict, exclusive) that are in a waiting line."""


class Gpu:
    """One device of a node and what is free of it."""

    __slots__ = (
        "drained",
        "healthy",
        "load_us",
        "memory_bytes",
        "memory_free",
        "model",
        "present",
        "share_free",
        "uuid",
    )

    def __init__(self, spec: GpuSpec) -> None:
        self.uuid = spec.uuid
        self.model = spec.model
        self.memory_bytes = spec.memory_bytes
        self.healthy = spec.healthy
        self.present = True
        self.drained = False
        self.share_free = 1000
        """Thousandths that no Pod and no claim holds; below zero while a claim waits for room."""
        self.memory_free = spec.memory_bytes
        self.load_us: Micros = 0
        """What it took lately to start a Pod with a model on it, a moving average; 0: never done."""

    @property
    def open(self) -> bool:
        """Tell whether new work may use it."""
        return self.present and self.healthy and not self.drained


class Node:
    """A machine of the physical resource list. It keeps its row for ever, also while it is lost."""

    __slots__ = (
        "by_uuid",
        "cordoned",
        "draining",
        "exclusive",
        "expected",
        "free",
        "gpus",
        "groups",
        "index",
        "models",
        "name",
        "pins",
        "pods",
        "spec",
        "tiers",
        "up",
    )

    def __init__(self, spec: NodeSpec, index: int) -> None:
        self.name = spec.name
        self.index = index
        self.spec = spec
        self.up = True
        self.cordoned = False
        """An operator drained it; it stays so, even through a restart, until an operator says otherwise."""
        self.draining = False
        """Takes nothing new: it is cordoned, or its agent is about to leave."""
        self.exclusive: Group | None = None
        """The group that has the node for itself."""
        self.gpus: list[Gpu] = []
        self.by_uuid: dict[str, Gpu] = {}
        self.free: list[int] = []
        """Free amount per column of the cluster's resources."""
        self.pods: dict[int, Pod] = {}
        self.models: dict[str, None] = {}
        """Models its cache probably holds, the last used one last."""
        self.tiers: dict[str, int] | None = None
        """Models it reported, with the rank of where they lie (`engine.stock`); None: it never did."""
        self.expected: dict[str, Micros] = {}
        """Models that were ordered there and that it did not report yet, with the time of the order; kept where it reports."""
        self.pins: dict[str, None] = {}
        """Models that stay in its cache."""
        # derived
        self.groups: dict[int, Group] = {}
        """Groups bound here, by their sequence number."""


class Pod:
    """A container with one AI method and one model on one node; its devices are taken until it is known to be gone."""

    __slots__ = (
        "check_at",
        "claimed_by",
        "created_at",
        "demand",
        "devices_open",
        "doomed",
        "grants",
        "idle_since",
        "loads_from",
        "method",
        "model",
        "node",
        "number",
        "offered",
        "reason",
        "slots",
        "state",
        "stopping_since",
        "tasks",
        "warm",
    )

    def __init__(
        self, number: int, node: Node, method: str, model: str, slots: int, demand: Demand, grants: tuple[GpuGrant, ...]
    ):
        self.number = number
        self.node = node
        self.method = method
        self.model = model
        self.slots = slots
        self.demand = demand
        self.grants = grants
        self.state = PodState.CREATING
        self.tasks: dict[str, int] = {}
        """Task (reqNo) -> rank, one per slot in use or promised."""
        self.created_at: Micros = 0
        self.idle_since: Micros = 0
        self.stopping_since: Micros = 0
        self.doomed: FailureCause | None = None
        """A device under it is gone or ill: it must go, and its attempts fail with this."""
        self.reason = ""
        self.claimed_by = ""
        """The task whose room it stands in."""
        self.loads_from = -1
        """Rank of where its model's files lay when it was ordered (`engine.stock`); -1: unknown."""
        # derived
        self.devices_open = True
        """Whether every device under it is present, well and not drained."""
        self.check_at: Micros = NEVER
        self.offered = -1
        """How many tasks are in it while it is offered to others; -1: it is not."""
        self.warm: Any = None

    @property
    def usable(self) -> bool:
        """Tell whether new tasks may go into it once a slot is free."""
        if self.doomed is not None or self.claimed_by or not self.node.up or self.node.draining:
            return False
        if self.state is POD_STOPPING or self.state is POD_GONE:
            return False
        return self.devices_open

    def look_at_devices(self) -> None:
        """Take in the condition of the devices under the Pod."""
        by_uuid = self.node.by_uuid
        self.devices_open = all(by_uuid[grant.uuid].open for grant in self.grants)


class Claim:
    """Room that a task waits for: taken from the free amounts now, empty when every Pod and task in its way has gone."""

    __slots__ = ("demand", "grants", "node", "req_no", "waits_for")

    def __init__(self, req_no: str, node: Node, grants: tuple[GpuGrant, ...], demand: Demand) -> None:
        self.req_no = req_no
        self.node = node
        self.grants = grants
        self.demand = demand
        self.waits_for: dict[int, None] = {}
        """Pods that must be gone first."""


class Deployment:
    """A model for which warm Pods are kept, for itself or for personalised models that share them."""

    __slots__ = ("demand", "method", "model", "pods", "slots", "wanted")

    def __init__(self, model: str, method: str, demand: Demand, slots: int, wanted: dict[str, int]) -> None:
        self.model = model
        self.method = method
        self.demand = demand
        self.slots = slots
        self.wanted = wanted
        """Pods wanted, by personalised model; by "" for the model itself."""
        self.pods = max(wanted.values(), default=0)
        """As many as the one wants that wants most: they share them."""


class Task:
    """A request and everything that has happened to it."""

    __slots__ = (
        "admitted",
        "alone",
        "attempt",
        "began_at",
        "cancel_requested",
        "cause",
        "charged",
        "checkpoint",
        "deadline",
        "detail",
        "done",
        "estimate",
        "failures",
        "finished_at",
        "group",
        "kept_until",
        "kept_us",
        "line_ticket",
        "lines",
        "live",
        "memory_floor",
        "misjudged",
        "ordered_at",
        "pending_since",
        "pods",
        "predicted_us",
        "preemptions",
        "price",
        "progress_done",
        "progress_total",
        "ran_us",
        "rank_started",
        "req_no",
        "result",
        "retry_at",
        "seq",
        "shape",
        "spec",
        "started_at",
        "state",
        "stop_reason",
        "stopping_since",
        "submitted_at",
        "tenant",
        "urgent",
    )

    def __init__(
        self, spec: TaskSpec, seq: int, tenant: Tenant, group: Group | None, now: Micros, estimate: Estimate | None
    ) -> None:
        self.spec = spec
        self.req_no = spec.req_no
        self.seq = seq
        self.tenant = tenant
        self.group = group
        self.urgent = is_urgent(spec)
        self.state = TaskState.PENDING
        self.admitted = False
        self.submitted_at = now
        self.pending_since = now
        self.deadline = spec.start_deadline
        self.attempt = 0
        self.failures = 0
        self.preemptions = 0
        self.cancel_requested = False
        self.retry_at: Micros | None = None
        self.pods: list[int] = []
        """Pod of each rank of the current attempt; 0: none yet."""
        self.live = 0
        """Bit mask of ranks that were ordered to start and have not ended."""
        self.rank_started = 0
        self.done = 0
        self.ordered_at: Micros = 0
        self.started_at: Micros = 0
        self.stopping_since: Micros = 0
        self.finished_at: Micros = 0
        self.progress_done = 0
        self.progress_total = 0
        self.checkpoint = ""
        self.result = ""
        self.cause: FailureCause | None = None
        """Why the current or last attempt failed."""
        self.detail = ""
        self.stop_reason = ""
        self.charged = 0
        self.memory_floor = 0
        """GPU memory an attempt ran out of, raised; 0: never."""
        self.alone = False
        """Run on whole GPUs, one task per Pod, since it ran out of memory."""
        self.began_at: Micros = 0
        """When its first attempt started; 0: none has."""
        self.ran_us: Micros = 0
        """Time that attempts ran which ended without a result."""
        self.kept_us: Micros = 0
        """Time of it whose work a checkpoint holds."""
        self.kept_until: Micros = 0
        """When the current attempt last told of a checkpoint; 0: it has not."""
        # derived
        self.predicted_us: Micros = 1
        """Predicted run time."""
        demand = spec.demand
        self.price = (demand.gpus * demand.gpu_share or WHOLE_GPU) * spec.members
        """Thousandths of GPUs that its Pods hold."""
        self.shape: Any = None
        """What it asks for, as the waiting lines see it."""
        self.misjudged = False
        """Whether its estimate lacks the entry that serves every GPU model."""
        self.line_ticket = 0
        """What its entries in waiting lines carry while it waits; 0: it does not wait."""
        self.lines: Any = ()
        self.take_estimate(estimate)

    @property
    def whole(self) -> int:
        """Return the bit mask with one bit per member of the gang."""
        return (1 << self.spec.members) - 1

    def take_estimate(self, estimate: Estimate | None) -> None:
        """Take over an estimate; without one, what was declared holds, else one second."""
        self.estimate = estimate
        self.shape = None
        self.misjudged = estimate is not None and not estimate.serves_every_model
        if estimate is not None and not self.misjudged:
            self.predicted_us = max(1, estimate.duration().mean)
        else:
            self.predicted_us = max(1, self.spec.declared_us or 1_000_000)

    def cost_of(self, run_us: Micros) -> int:
        """Return the GPU-microseconds of a run time (CPU-only tasks count as one GPU)."""
        return run_us * self.price // (1000 if self.alone else 1000 * self.spec.slots)
