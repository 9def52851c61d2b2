"""Who holds how much now: kept per Pod as slots are taken and freed, for policies that share what is held, not what was used."""

from __future__ import annotations

from collections.abc import Mapping

from engine.entities import Pod, Task, Tenant
from engine.levels.ordering import GPUS
from engine.state import State
from engine.tasks import PodState

_NOTHING: dict[int, int] = {}


class Accounts:
    """Implements `ordering.Holdings`. A task holds its part of the Pods in which it has slots, and the room it has claimed."""

    __slots__ = ("_claimed", "_held", "_of_pod", "_state", "_total")

    def __init__(self, state: State) -> None:
        self._state = state
        self._held: dict[int, dict[int, int]] = {}
        self._of_pod: dict[int, list[tuple[int, int, int]]] = {}
        """Pod -> (tenant, column, amount) as counted."""
        self._claimed: list[tuple[int, int, int]] = []
        self._total: dict[int, int] = {}

    @property
    def total(self) -> Mapping[int, int]:
        """Return column -> amount that all nodes have that take work."""
        return self._total

    @property
    def tenants(self) -> int:
        """Return how many tenants hold or wait for anything."""
        return sum(1 for tenant in self._state.tenants.values() if tenant.pending or tenant.running)

    def held(self, tenant: Tenant) -> Mapping[int, int]:
        """Return column -> amount that a tenant holds."""
        return self._held.get(tenant.seq, _NOTHING)

    def pod_changed(self, pod: Pod) -> None:
        """Count anew what the tasks in a Pod hold of it."""
        for tenant, column, amount in self._of_pod.pop(pod.number, ()):
            self._held[tenant][column] -= amount
        if pod.state is PodState.GONE or not pod.tasks:
            return
        parts = self._parts(pod)
        counted = []
        for req_no in pod.tasks:
            tenant = self._state.tasks[req_no].tenant.seq
            for column, amount in parts:
                counted.append((tenant, column, amount))
                self._add(tenant, column, amount)
        self._of_pod[pod.number] = counted

    def _parts(self, pod: Pod) -> list[tuple[int, int]]:
        demand, slots = pod.demand, pod.slots
        parts = [(column, amount // slots) for column, amount in self._state.cluster.amounts(demand)]
        if demand.gpus:
            parts.append((GPUS, demand.gpus * demand.gpu_share // slots))
        return parts

    def _add(self, tenant: int, column: int, amount: int) -> None:
        held = self._held.setdefault(tenant, {})
        held[column] = held.get(column, 0) + amount

    def begin(self) -> None:
        """Look at the cluster and the claims as they are at the beginning of a step's placements."""
        for tenant, column, amount in self._claimed:
            self._held[tenant][column] -= amount
        self._claimed.clear()
        for req_no in self._state.claims:
            self.claims(self._state.tasks[req_no])
        cluster = self._state.cluster
        rows = cluster.is_open[: len(cluster)]
        sums = cluster.total[: len(cluster)][rows].sum(axis=0).tolist()
        self._total = dict(enumerate(sums))
        self._total[GPUS] = 1000 * int((cluster.gpu_size[: len(cluster)][rows] >= 0).sum())

    def claims(self, task: Task) -> None:
        """Count the room that a task has claimed."""
        claim = self._state.claims[task.req_no]
        demand, tenant, slots = claim.demand, task.tenant.seq, task.spec.slots
        parts = [(column, amount // slots) for column, amount in self._state.cluster.amounts(demand)]
        if demand.gpus:
            parts.append((GPUS, demand.gpus * demand.gpu_share // slots))
        for column, amount in parts:
            self._claimed.append((tenant, column, amount))
            self._add(tenant, column, amount)
