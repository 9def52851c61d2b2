"""What the metrics remember of tasks that are not over, and of the Pods they run in."""

from __future__ import annotations

from engine.tasks import Estimate, Micros, TaskSpec
from sim.gpu_ledger import LedgerPod
from sim.shares import Share
from sim.sketches import Sketch


class Sort:
    """Tasks of one type, urgency and tenant: their waiting and their completion, and what their tenant gets."""

    __slots__ = ("completion", "keys", "share", "waiting")

    def __init__(self, keys: tuple[str, ...], share: Share) -> None:
        self.keys = keys
        """What they are counted under: all, their type, their priority, their tenant."""
        self.share = share
        self.waiting = Sketch()
        self.completion = Sketch()


class PodSeen:
    """What is remembered of a Pod."""

    __slots__ = ("created", "devices", "held_before", "node", "tasks", "used")

    def __init__(self) -> None:
        self.node = ""
        self.created: Micros = -1
        """When it was ordered; -1: it was not, or it is up."""
        self.held_before = False
        """Whether its node had a Pod of its model before."""
        self.devices: LedgerPod | None = None
        self.tasks: dict[str, None] = {}
        """Tasks that were started in it and are not known to have ended."""
        self.used = False


class OpenTask:
    """What is remembered of a task that is not over."""

    __slots__ = ("estimate", "first_started", "pods", "running", "share", "sort", "spec", "submitted_at")

    def __init__(self, spec: TaskSpec, estimate: Estimate | None, now: Micros, sort: Sort) -> None:
        self.spec = spec
        self.estimate = estimate
        self.submitted_at = now
        self.first_started: Micros | None = None
        self.sort = sort
        demand = spec.demand
        self.share: float = demand.gpus * demand.gpu_share / spec.slots
        """Thousandths of GPUs that serve it while it runs."""
        self.running = 0
        """How many of its members run now."""
        self.pods: dict[int, int] = {}
        """Member of an attempt (`member`) -> its Pod, or the Pod's complement once it runs."""


def member(attempt: int, rank: int) -> int:
    """Return the key of a member of an attempt."""
    return (attempt << 20) + rank
