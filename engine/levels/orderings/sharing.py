"""Orderings that share: by weight over time, by the dominant resource held now, and by how much later than alone a task ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from engine.entities import Task, Tenant
from engine.levels.ordering import GPUS, Holdings, Policy
from engine.levels.orderings.by_time import remaining_us
from engine.tasks import Micros

BILLION = 10**9


@dataclass(frozen=True, slots=True)
class FairShare(Policy):
    """Weighted fair share: tenants by what they were given so far over their weight; inside a tenant as they came."""

    fair_tenants: bool = True


@dataclass(frozen=True, slots=True)
class Drf(Policy):
    """Dominant resource fairness: the tenant next whose largest share of any resource, over its weight, is smallest."""

    shares: ClassVar[bool] = True

    fair_tenants: bool = True

    def share(self, tenant: Tenant, holdings: Holdings) -> int:
        """Return the dominant share, in billionths of the cluster, over the tenant's weight."""
        return dominant_share(tenant, holdings) // tenant.weight


def dominant_share(tenant: Tenant, holdings: Holdings) -> int:
    """Return a tenant's largest share of any resource that the cluster has, in billionths."""
    total = holdings.total
    largest = 0
    for column, amount in holdings.held(tenant).items():
        if amount and total.get(column):
            largest = max(largest, amount * BILLION // total[column])
    return largest


@dataclass(frozen=True, slots=True)
class Themis(Policy):
    """Finish-time fairness: the task next whose end by now lies the most times later than with its equal share of the cluster.

    rho = (time since it was submitted + time it still runs) / (time it runs on an equal share of the GPUs). The largest is served
    first. The paper's auctions, in which apps bid for GPUs they may choose, are no part of this.
    """

    ranks_anew: ClassVar[bool] = True

    def key_at(self, task: Task, now: Micros, holdings: Holdings) -> int:
        """Rank by rho, in millionths, the largest first."""
        return -finish_time_fairness(task, now, holdings)


def finish_time_fairness(task: Task, now: Micros, holdings: Holdings) -> int:
    """Return rho in millionths. The equal share is the cluster's GPUs over the tenants that hold or wait for anything."""
    demand = task.spec.demand
    wanted = max(1, demand.gpus * demand.gpu_share * task.spec.members)
    equal = max(1, holdings.total.get(GPUS, 0) // max(1, holdings.tenants))
    alone: Micros = task.predicted_us if wanted <= equal else task.predicted_us * wanted // equal
    shared: Micros = now - task.submitted_at + remaining_us(task, now)
    return shared * 1_000_000 // max(1, alone)
