"""Level 2, ordering: who is next. A policy ranks a task once, when it enters a line; virtual times do the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from engine.entities import Task, Tenant
from engine.tasks import NEVER, SECOND, URGENT_PRIORITY, Micros

URGENT, AGED, ORDINARY = range(3)
"""The bands. The aged stand among themselves by their key alone, whoever they belong to."""

_BAND = NEVER << 16
"""More than any key."""

GPUS = -1
"""The column of GPUs, in thousandths, in what tenants hold; the others are the cluster's."""


class Holdings(Protocol):
    """Who holds how much of the cluster now, in Pods and in claimed room."""

    @property
    def total(self) -> Mapping[int, int]:
        """Column -> amount that all nodes have that take work."""
        ...

    @property
    def tenants(self) -> int:
        """Tenants that hold or wait for anything."""
        ...

    def held(self, tenant: Tenant) -> Mapping[int, int]:
        """Return column -> amount that a tenant holds."""
        ...


class Ordering(Protocol):
    """Ranks tasks. A lower band goes first; inside it tenants and groups share fairly where asked; then the key counts.

    Derive from `Policy`, which answers everything but the key.
    """

    ranks_anew: ClassVar[bool]
    """Whether `key_at` ranks waiting tasks anew in every step, by the time and by what others hold."""
    shares: ClassVar[bool]
    """Whether tenants stand by `share`, which is asked in every step, instead of by virtual time."""

    @property
    def fair_tenants(self) -> bool:
        """Whether tenants share by weight."""
        ...

    @property
    def fair_groups(self) -> bool:
        """Whether groups share within a tenant."""
        ...

    @property
    def age_us(self) -> Micros:
        """An ordinary task that has waited this long since it was submitted moves to the band of the aged; 0: never."""
        ...

    @property
    def aged_every(self) -> int:
        """One of so many placements goes to an aged task before urgent ones; 0: none."""
        ...

    @property
    def preemptive(self) -> bool:
        """Whether running tasks are stopped for waiting ones that outrank them."""
        ...

    def rank(self, task: Task, now: Micros) -> tuple[int, int]:
        """Return (band, key); the smaller key is sooner, and equal keys go by submission."""
        ...

    def key_at(self, task: Task, now: Micros, holdings: Holdings) -> int:
        """Return the key of a waiting task now, where the policy `ranks_anew`."""
        ...

    def share(self, tenant: Tenant, holdings: Holdings) -> int:
        """Return how well served a tenant is, where the policy `shares`: the smallest is next, and more holdings never lower it."""
        ...

    def outranks(self, waiting: Task, running: Task, now: Micros, loss_us: Micros) -> bool:
        """Tell whether a running task should go for a waiting one, where that loses `loss_us` of work and loading."""
        ...

    def standing(self, running: Task, now: Micros) -> int:
        """Return how far behind a running task ranks: of several that may go, the largest goes first.

        It has to agree with `outranks`: at the same loss, whoever is outranked is so at every larger standing as well.
        """
        ...

    def next_change_at(self, running: Task, now: Micros) -> Micros:
        """Return when `outranks` may change its answer about a running task by time alone; NEVER: it does not."""
        ...


@dataclass(frozen=True, slots=True)
class Policy:
    """What policies have in common; one of your own derives from it and answers `key`."""

    ranks_anew: ClassVar[bool] = False
    shares: ClassVar[bool] = False

    fair_tenants: bool = False
    fair_groups: bool = False
    age_us: Micros = 0
    aged_every: int = 0
    preemptive: bool = False

    def key(self, task: Task, now: Micros) -> int:
        """Return what tasks stand by; the smaller is sooner. It must not change while the task waits."""
        return 0

    def rank(self, task: Task, now: Micros) -> tuple[int, int]:
        """Rank by the key, the aged before all others."""
        if self.age_us and task.submitted_at + self.age_us <= now:
            return AGED, task.submitted_at + self.age_us
        return ORDINARY, self.key(task, now)

    def key_at(self, task: Task, now: Micros, holdings: Holdings) -> int:
        """Rank by the key, whatever the time."""
        return self.key(task, now)

    def share(self, tenant: Tenant, holdings: Holdings) -> int:
        """All tenants are equal."""
        return 0

    def outranks(self, waiting: Task, running: Task, now: Micros, loss_us: Micros) -> bool:
        """Tell whether the waiting task's key is the smaller one."""
        return self.rank(waiting, now) < self.rank(running, now)

    def standing(self, running: Task, now: Micros) -> int:
        """Rank running tasks by their bands, then by their keys."""
        band, key = self.rank(running, now)
        return band * _BAND + key

    def next_change_at(self, running: Task, now: Micros) -> Micros:
        """Nothing changes by time alone."""
        return NEVER


def came_at(task: Task) -> Micros:
    """Return when a task came, or when its place was quoted."""
    return task.submitted_at - task.spec.credit_us


@dataclass(frozen=True, slots=True)
class Fifo(Policy):
    """First come, first served, whoever comes."""

    def key(self, task: Task, now: Micros) -> int:
        """Rank by when it came."""
        return came_at(task)


@dataclass(frozen=True, slots=True)
class ByPriority(Policy):
    """The higher priority first, as kube-scheduler's PrioritySort does; equals by submission."""

    def key(self, task: Task, now: Micros) -> int:
        """Rank by priority alone."""
        return -task.spec.priority


@dataclass(frozen=True, slots=True)
class Fair(Policy):
    """Urgent first, with ageing; weighted fair share between tenants and between groups; then the shortest predicted first.

    A higher urgent priority counts as having come `priority_step_us` earlier per step, so that no urgent task waits for ever. Tasks
    that have waited for `age_us` go before ordinary ones, in the order in which they came, and one of `aged_every` placements is
    theirs even before urgent ones: so they do not drown urgent work, and urgent work does not starve them.
    """

    fair_tenants: bool = True
    fair_groups: bool = True
    age_us: Micros = 600 * SECOND
    aged_every: int = 8
    priority_step_us: Micros = 1 * SECOND
    shortest_first: bool = True

    def rank(self, task: Task, now: Micros) -> tuple[int, int]:
        """Rank by band, then as the class says."""
        if task.urgent:
            return URGENT, came_at(task) - (task.spec.priority - URGENT_PRIORITY) * self.priority_step_us
        if self.age_us and task.submitted_at + self.age_us <= now:
            return AGED, came_at(task) + self.age_us
        return ORDINARY, task.predicted_us if self.shortest_first else 0
