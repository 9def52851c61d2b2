"""Quotas: a tree of queues with guaranteed GPUs, limits and weights; what a queue leaves others borrow, until it is reclaimed.

A tenant belongs to one queue. A queue may hold as many GPUs as its limit and those of its ancestors allow. Whoever is within its
guarantee goes first, among the rest the one that holds least for its weight; both hold at every level of the tree. A task that is
within the guarantees of its queues and finds no room takes it back from a queue that holds more than its guarantee.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.entities import Task, Tenant
from engine.levels.ordering import GPUS, Holdings
from engine.resources import WHOLE_GPU

BILLION = 10**9
OTHERS = "*"
"""Stands among a queue's tenants for all that no queue names."""

Path = tuple[int, ...]
"""A queue and its ancestors as numbers, the root first."""


@dataclass(frozen=True, slots=True)
class QueueSpec:
    """One queue of the tree. GPUs are in thousandths."""

    name: str
    guaranteed: int = 0
    limit: int = 0
    """Most that it may hold; 0: no limit of its own."""
    weight: int = 1
    parent: str = ""
    tenants: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Quotas:
    """The tree. Raises ValueError, naming the queue, when it is none."""

    queues: tuple[QueueSpec, ...]
    _number: dict[str, int] = field(init=False, repr=False, compare=False, default_factory=dict)
    _paths: list[Path] = field(init=False, repr=False, compare=False, default_factory=list)
    _of_tenant: dict[str, int] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Check the tree and find every queue's way from the root."""
        for number, queue in enumerate(self.queues):
            if queue.name in self._number:
                raise ValueError(f"quotas.{queue.name}: there are two queues of this name")
            self._number[queue.name] = number
            if queue.weight < 1:
                raise ValueError(f"quotas.{queue.name}.weight: {queue.weight} is out of range; use at least 1")
            if min(queue.guaranteed, queue.limit) < 0 or (queue.limit and queue.limit < queue.guaranteed):
                raise ValueError(f"quotas.{queue.name}: the limit is below the guarantee, or one of them below 0")
            for tenant in queue.tenants:
                if tenant in self._of_tenant:
                    raise ValueError(f"quotas.{queue.name}.tenants: {tenant!r} belongs to another queue already")
                self._of_tenant[tenant] = number
        for queue in self.queues:
            self._paths.append(self._way(queue))
        for queue in self.queues:
            inside = sum(each.guaranteed for each in self.queues if each.parent == queue.name)
            if queue.guaranteed and inside > queue.guaranteed:
                raise ValueError(
                    f"quotas.{queue.name}.guaranteed_gpus: the queues in it have {inside / WHOLE_GPU:g} together, more than its own"
                )

    def _way(self, queue: QueueSpec) -> Path:
        way: list[int] = []
        at = queue
        while True:
            number = self._number[at.name]
            if number in way:
                raise ValueError(f"quotas.{queue.name}.parent: the queue is its own ancestor")
            way.append(number)
            if not at.parent:
                return tuple(reversed(way))
            if at.parent not in self._number:
                raise ValueError(f"quotas.{at.name}.parent: there is no queue {at.parent!r}")
            at = self.queues[self._number[at.parent]]

    def path(self, tenant: Tenant) -> Path:
        """Return the queues that a tenant's tasks count in, the root first; empty when it belongs to none."""
        number = self._of_tenant.get(tenant.name, self._of_tenant.get(OTHERS, -1))
        return self._paths[number] if number >= 0 else ()


class Balance:
    """What every queue holds now, from what its tenants hold."""

    __slots__ = ("_paths", "held", "quotas")

    def __init__(self, quotas: Quotas, tenants: list[Tenant], holdings: Holdings) -> None:
        self.quotas = quotas
        self.held = [0] * len(quotas.queues)
        self._paths: dict[int, Path] = {}
        for tenant in tenants:
            amount = holdings.held(tenant).get(GPUS, 0)
            if amount:
                self.add(tenant, amount)

    def path(self, tenant: Tenant) -> Path:
        """Return a tenant's queues."""
        found = self._paths.get(tenant.seq)
        if found is None:
            found = self._paths[tenant.seq] = self.quotas.path(tenant)
        return found

    def add(self, tenant: Tenant, amount: int) -> None:
        """Note that a tenant holds more, or (below 0) less."""
        for number in self.path(tenant):
            self.held[number] += amount

    def standing(self, task: Task) -> tuple[int, ...]:
        """Return what tasks of a queue stand by: per level (beyond the guarantee?, what it holds for its weight, number)."""
        wanted = gpus_of(task)
        found: list[int] = []
        for number in self.path(task.tenant):
            queue, held = self.quotas.queues[number], self.held[number]
            found += (int(held + wanted > queue.guaranteed), held * BILLION // queue.weight, number)
        return tuple(found) or (1, 0, len(self.held))

    def exceeded(self, task: Task) -> QueueSpec | None:
        """Return the queue whose limit keeps a task from starting, or None."""
        wanted = gpus_of(task)
        for number in self.path(task.tenant):
            queue = self.quotas.queues[number]
            if queue.limit and self.held[number] + wanted > queue.limit:
                return queue
        return None

    def may_reclaim(self, waiting: Task, running: Task) -> bool:
        """Tell whether a running task's queue holds borrowed GPUs that a waiting task's queue is guaranteed.

        The two are compared where their ways from the root part: there the one must be within its guarantee with the waiting task,
        and the other beyond its own.
        """
        mine, other = self.path(waiting.tenant), self.path(running.tenant)
        depth = 0
        while depth < min(len(mine), len(other)) and mine[depth] == other[depth]:
            depth += 1
        if depth >= len(mine):
            return False
        queues, wanted = self.quotas.queues, gpus_of(waiting)
        if any(self.held[number] + wanted > queues[number].guaranteed for number in mine[depth:]):
            return False
        if depth >= len(other):
            return not other  # a tenant without a queue has no guarantee at all
        return self.held[other[depth]] > queues[other[depth]].guaranteed


def gpus_of(task: Task) -> int:
    """Return the thousandths of GPUs that a task holds in its slots; none for one that asks for no GPU."""
    demand = task.spec.demand
    if not demand.gpus:
        return 0
    if task.alone:
        return demand.gpus * WHOLE_GPU * task.spec.members
    return demand.gpus * demand.gpu_share * task.spec.members // task.spec.slots
