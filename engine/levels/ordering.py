"""Level 2, ordering: who is next. A policy ranks a task once, when it enters a line; virtual times do the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from engine.entities import Task
from engine.tasks import SECOND, URGENT_PRIORITY, Micros

URGENT, AGED, ORDINARY = range(3)
"""The bands. The aged stand among themselves by their key alone, whoever they belong to."""


class Ordering(Protocol):
    """Ranks tasks. A lower band goes first; inside it tenants and groups share fairly where asked; then the key counts."""

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

    def rank(self, task: Task, now: Micros) -> tuple[int, int]:
        """Return (band, key); the smaller key is sooner, and equal keys go by submission."""
        ...


@dataclass(frozen=True, slots=True)
class Fifo:
    """First come, first served, whoever comes."""

    fair_tenants: bool = False
    fair_groups: bool = False
    age_us: Micros = 0
    aged_every: int = 0

    def rank(self, task: Task, now: Micros) -> tuple[int, int]:
        """Everyone is equal."""
        return 0, 0


@dataclass(frozen=True, slots=True)
class ByPriority:
    """The higher priority first, as kube-scheduler's PrioritySort does; equals by submission."""

    fair_tenants: bool = False
    fair_groups: bool = False
    age_us: Micros = 0
    aged_every: int = 0

    def rank(self, task: Task, now: Micros) -> tuple[int, int]:
        """Rank by priority alone."""
        return 0, -task.spec.priority


@dataclass(frozen=True, slots=True)
class Fair:
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
            return URGENT, task.submitted_at - (task.spec.priority - URGENT_PRIORITY) * self.priority_step_us
        if self.age_us and task.submitted_at + self.age_us <= now:
            return AGED, task.submitted_at + self.age_us
        return ORDINARY, task.predicted_us if self.shortest_first else 0


ORDERINGS: dict[str, type[Fifo] | type[ByPriority] | type[Fair]] = {"fifo": Fifo, "priority": ByPriority, "fair": Fair}
