"""Waiting lines: who is next among tasks that wait for the same thing.

A line has bands (urgent and aged tasks before ordinary ones), a band has tenants by virtual time, a tenant has groups by virtual
time, a group has tasks by their key. Virtual times only grow, so the heaps are lazy: an entry that is out of date is moved to its
place when it comes to the top. A task that leaves is not searched for: its ticket is void, and its entry is dropped when met.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush, heapreplace

from engine.entities import Account, Group, Task, Tenant

Rank = tuple[int, int, int, int, int, int, int]
"""(band, tenant's virtual time, tenant, group's virtual time, group, key, sequence number): smaller is sooner."""


class _Groups:
    """Tasks of one account (a group, or all of a tenant), the soonest first."""

    __slots__ = ("account", "seq", "tasks")

    def __init__(self, account: Account, seq: int) -> None:
        self.account = account
        self.seq = seq
        self.tasks: list[tuple[int, int, int, Task]] = []


class _Tenants:
    """Groups of one tenant by virtual time."""

    __slots__ = ("account", "by_group", "heap", "seq")

    def __init__(self, account: Account, seq: int) -> None:
        self.account = account
        self.seq = seq
        self.heap: list[tuple[int, int, _Groups]] = []
        self.by_group: dict[int, _Groups] = {}

    def head(self) -> tuple[int, int, _Groups] | None:
        """Return the group that is next, with an entry that is up to date, or None when nobody waits."""
        heap = self.heap
        while heap:
            entry = heap[0]
            queue = entry[2]
            tasks = queue.tasks
            while tasks and tasks[0][3].line_ticket != tasks[0][2]:
                heappop(tasks)
            if not tasks:
                heappop(heap)
                del self.by_group[queue.seq]
            elif entry[0] != queue.account.vtime:
                heapreplace(heap, (queue.account.vtime, queue.seq, queue))
            else:
                return entry
        return None


class _Band:
    """Tenants by virtual time; tasks of a tenant that is at its limit of running tasks are parked."""

    __slots__ = ("by_tenant", "heap", "parked")

    def __init__(self) -> None:
        self.heap: list[tuple[int, int, _Tenants]] = []
        self.by_tenant: dict[int, _Tenants] = {}
        self.parked: dict[int, list[tuple[_Tenants, _Groups, tuple[int, int, int, Task]]]] = {}

    def push(
        self, task: Task, key: int, tenant: Account, tenant_seq: int, group: Account, group_seq: int, ticket: int
    ) -> None:
        tenants = self.by_tenant.get(tenant_seq)
        if tenants is None:
            tenants = self.by_tenant[tenant_seq] = _Tenants(tenant, tenant_seq)
            heappush(self.heap, (tenant.vtime, tenant_seq, tenants))
        groups = tenants.by_group.get(group_seq)
        if groups is None:
            groups = tenants.by_group[group_seq] = _Groups(group, group_seq)
            heappush(tenants.heap, (group.vtime, group_seq, groups))
        heappush(groups.tasks, (key, task.seq, ticket, task))

    def head(self, band: int) -> tuple[Rank, Task] | None:
        heap = self.heap
        while heap:
            entry = heap[0]
            tenants = entry[2]
            if entry[0] != tenants.account.vtime:
                heapreplace(heap, (tenants.account.vtime, tenants.seq, tenants))
                continue
            first = tenants.head()
            if first is None:
                heappop(heap)
                del self.by_tenant[tenants.seq]
                continue
            waiting = first[2].tasks[0]
            tenant = waiting[3].tenant
            if tenant.max_running and tenant.running >= tenant.max_running:
                heappop(first[2].tasks)
                self.parked.setdefault(tenant.seq, []).append((tenants, first[2], waiting))
                continue
            return (band, entry[0], entry[1], first[0], first[1], waiting[0], waiting[1]), waiting[3]
        return None

    def unpark(self, seq: int) -> bool:
        parked = self.parked.pop(seq, ())
        for tenants, groups, (key, _, ticket, task) in parked:
            if task.line_ticket == ticket:
                self.push(task, key, tenants.account, tenants.seq, groups.account, groups.seq, ticket)
        return bool(parked)


class Line:
    """Tasks that wait for the same thing: a slot in a warm Pod of their kind, or room for a new Pod of their demand."""

    __slots__ = ("active", "bands", "live", "node", "pushed")

    def __init__(self, node: int) -> None:
        self.node = node
        """The only node that will do (its row), or -1."""
        self.bands: tuple[_Band, _Band] = (_Band(), _Band())
        self.live = 0
        self.pushed = 0
        self.active = False

    def push(self, task: Task, band: int, key: int, accounts: tuple[Account, int, Account, int], ticket: int) -> None:
        """Add a task under its ticket."""
        self.live += 1
        self.pushed += 1
        self.bands[band].push(task, key, accounts[0], accounts[1], accounts[2], accounts[3], ticket)
        if self.pushed > 64 + 2 * self.live:
            self._compact()

    def head(self) -> tuple[Rank, Task] | None:
        """Return who is next, with the rank to compare with other lines, or None."""
        if self.live == 0:
            return None
        return self.bands[0].head(0) or self.bands[1].head(1)

    def unpark(self, tenant: Tenant) -> bool:
        """Let a tenant's tasks be seen again; tell whether there were any."""
        urgent = self.bands[0].unpark(tenant.seq)
        return self.bands[1].unpark(tenant.seq) or urgent

    def _compact(self) -> None:
        """Drop the entries whose tickets are void, so that memory follows what waits, not what ever waited."""
        self.pushed = 0
        for band in self.bands:
            for tenants in band.by_tenant.values():
                for groups in tenants.by_group.values():
                    groups.tasks = [t for t in groups.tasks if t[3].line_ticket == t[2]]
                    heapify(groups.tasks)
                    self.pushed += len(groups.tasks)


def account_of(task: Task, fair_tenants: bool, fair_groups: bool, common: Tenant) -> tuple[Account, int, Account, int]:
    """Return the tenant's and the group's account that rank a task; a level that is not shared fairly has one for all."""
    tenant: Account = task.tenant if fair_tenants else common
    tenant_seq = task.tenant.seq if fair_tenants else -1
    group: Group | None = task.group if fair_groups else None
    if group is None:
        return tenant, tenant_seq, common, -1
    return tenant, tenant_seq, group, group.seq
