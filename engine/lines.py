"""Waiting lines: who is next among tasks that wait for the same thing.

A line has bands (urgent, aged and ordinary tasks; one of so many turns is the aged tasks' own), a band has tenants by virtual
time, a tenant has groups by virtual time, a group has tasks by their key. Virtual times only grow, so the heaps are lazy: an entry
that is out of date is moved to its place when it comes to the top. A task that leaves is not searched for: its ticket is void, and
its entry is dropped when met.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush, heapreplace

from engine.entities import Account, Task, Tenant

Rank = tuple[int, int, int, int, int, int, int]
"""(band, tenant's virtual time, tenant, group's virtual time, group, key, sequence number): smaller is sooner.

The band is -1 for an aged task whose turn it is.
"""

Entry = tuple[int, int, int, Task]
"""(key, sequence number, ticket, task)."""

Head = tuple[Rank, Task]
"""Who is next, with the rank to compare with others."""

_EMPTIED = 16
"""A line in which nobody waits any more is emptied when it holds more void entries than this."""

_Waiting = list[Entry]
"""Tasks of one account (a group, or all of a tenant) as a heap."""


class _Tenants:
    """Groups of one tenant by virtual time."""

    __slots__ = ("account", "by_group", "heap", "seq")

    def __init__(self, account: Account, seq: int) -> None:
        self.account = account
        self.seq = seq
        self.heap: list[tuple[int, int, Account, _Waiting]] = []
        self.by_group: dict[int, _Waiting] = {}

    def head(self) -> tuple[int, int, Account, _Waiting] | None:
        """Return the group that is next, with an entry that is up to date, or None when nobody waits."""
        heap = self.heap
        while heap:
            first = heap[0]
            vtime, seq, account, tasks = first
            while tasks and tasks[0][3].line_ticket != tasks[0][2]:
                heappop(tasks)
            if not tasks:
                heappop(heap)
                del self.by_group[seq]
            elif vtime != account.vtime:
                heapreplace(heap, (account.vtime, seq, account, tasks))
            else:
                return first
        return None


Parked = dict[int, dict["Line", None]]
"""Tenant -> lines in which tasks of it are parked."""


class _Band:
    """Tenants by virtual time; what belongs to a tenant at its limit of running tasks is parked.

    Where tenants share fairly, a tenant is parked as a whole; where they stand mixed, its tasks are parked one by one.
    """

    __slots__ = ("by_tenant", "heap", "line", "parked_tasks", "parked_tenants")

    def __init__(self, line: Line) -> None:
        self.line = line
        self.heap: list[tuple[int, int, _Tenants]] = []
        self.by_tenant: dict[int, _Tenants] = {}
        self.parked_tenants: dict[int, _Tenants] = {}
        self.parked_tasks: dict[int, list[Entry]] = {}

    def push(self, entry: Entry, tenant: Account, tenant_seq: int, group: Account, group_seq: int) -> None:
        tenants = self.by_tenant.get(tenant_seq)
        if tenants is None:
            tenants = self.by_tenant[tenant_seq] = _Tenants(tenant, tenant_seq)
            heappush(self.heap, (tenant.vtime, tenant_seq, tenants))
        tasks = tenants.by_group.get(group_seq)
        if tasks is None:
            tasks = tenants.by_group[group_seq] = [entry]
            heappush(tenants.heap, (group.vtime, group_seq, group, tasks))
        else:
            heappush(tasks, entry)

    def head(self, band: int) -> Head | None:
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
            waiting = first[3][0]
            tenant = waiting[3].tenant
            if tenant.max_running and tenant.running >= tenant.max_running:
                self._park(tenant, tenants, first[3])
                continue
            return (band, entry[0], entry[1], first[0], first[1], waiting[0], waiting[1]), waiting[3]
        return None

    def _park(self, tenant: Tenant, tenants: _Tenants, tasks: _Waiting) -> None:
        self.line.parked.setdefault(tenant.seq, {})[self.line] = None
        if tenants.seq == tenant.seq:
            heappop(self.heap)
            self.parked_tenants[tenant.seq] = tenants
        else:
            heappush(self.parked_tasks.setdefault(tenant.seq, []), heappop(tasks))

    def unpark(self, tenant: Tenant) -> None:
        tenants = self.parked_tenants.pop(tenant.seq, None)
        if tenants is not None:
            heappush(self.heap, (tenants.account.vtime, tenants.seq, tenants))
        tasks = self.parked_tasks.get(tenant.seq, [])
        room = tenant.max_running - tenant.running if tenant.max_running else len(tasks)
        while tasks and room > 0:
            entry = heappop(tasks)
            if entry[3].line_ticket == entry[2]:
                self.push(entry, *self.line.common, *self.line.common)
                room -= 1
        if not tasks:
            self.parked_tasks.pop(tenant.seq, None)

    def holds(self, tenant: Tenant) -> bool:
        return tenant.seq in self.parked_tenants or tenant.seq in self.parked_tasks


class Line:
    """Tasks that wait for the same thing: a slot in a warm Pod of their kind, or room for a new Pod of their demand."""

    __slots__ = (
        "_first",
        "_group",
        "_group_vtime",
        "_tenant",
        "_tenant_vtime",
        "_ticket",
        "active",
        "bands",
        "common",
        "live",
        "node",
        "parked",
        "pushed",
    )

    def __init__(self, node: int, parked: Parked, common: Tenant) -> None:
        self.node = node
        """The only node that will do (its row), or -1."""
        self.parked = parked
        self.common = (common, -1)
        """The account that ranks everyone where tenants or groups do not share fairly."""
        self.bands: tuple[_Band, _Band, _Band] = (_Band(self), _Band(self), _Band(self))
        """Urgent, aged, ordinary; the aged stand under the common account, by their key alone."""
        self.live = 0
        self.pushed = 0
        self.active = False
        self._first: Head | None = None
        """Who was next when that was asked last; None: it has to be looked for.

        It still holds while nobody came who ranks before, its ticket is good, and its own accounts are as they were: the virtual
        times of others only grow.
        """
        self._ticket = 0
        self._tenant: Account = common
        self._group: Account = common
        self._tenant_vtime = self._group_vtime = 0

    def push(self, entry: Entry, band: int, tenant: Account, tenant_seq: int, group: Account, group_seq: int) -> None:
        """Add a task under its ticket, and under the accounts that rank it."""
        if self.live == 0 and self.pushed > _EMPTIED:
            self._empty()
        first = self._first
        if (
            first is not None
            and (band, tenant.vtime, tenant_seq, group.vtime, group_seq, entry[0], entry[1]) < first[0]
        ):
            self._first = None
        self.live += 1
        self.pushed += 1
        into = self.bands[band]
        tenants = into.by_tenant.get(tenant_seq)
        tasks = tenants.by_group.get(group_seq) if tenants is not None else None
        if tasks is not None:
            heappush(tasks, entry)
        else:
            into.push(entry, tenant, tenant_seq, group, group_seq)
        if self.pushed > 64 + 2 * self.live:
            self.compact()

    def _empty(self) -> None:
        """Drop every entry, where none is of a task that waits: cheaper than to look at each, and the accounts are few."""
        for band in self.bands:
            if band.parked_tenants or band.parked_tasks:
                return
        self.pushed = 0
        self._first = None
        for band in self.bands:
            band.heap.clear()
            band.by_tenant.clear()

    def compact(self) -> None:
        """Drop the entries whose tickets are void, so that memory follows what waits, not what ever waited."""
        self.pushed = 0
        for band in self.bands:
            for tenants in band.by_tenant.values():
                for tasks in tenants.by_group.values():
                    tasks[:] = [each for each in tasks if each[3].line_ticket == each[2]]
                    heapify(tasks)
                    self.pushed += len(tasks)

    def head(self) -> Head | None:
        """Return who is next, with the rank to compare with other lines, or None."""
        if self.live == 0:
            return None
        first = self._first
        if first is not None:
            task = first[1]
            if (
                task.line_ticket == self._ticket
                and self._tenant.vtime == self._tenant_vtime
                and self._group.vtime == self._group_vtime
            ):
                tenant = task.tenant
                if not tenant.max_running or tenant.running < tenant.max_running:
                    return first
        return self._look()

    def _look(self) -> Head | None:
        """Look for who is next in the bands, and remember it."""
        urgent, aged, ordinary = self.bands
        found = urgent.head(0) if urgent.heap else None
        if found is None and aged.heap:
            found = aged.head(1)
        if found is None and ordinary.heap:
            found = ordinary.head(2)
        self._first = found
        if found is not None:
            rank, task = found
            self._ticket = task.line_ticket
            common = self.common[0]
            self._tenant = common if rank[2] < 0 else task.tenant
            self._group = common if rank[4] < 0 or task.group is None else task.group
            self._tenant_vtime, self._group_vtime = rank[1], rank[3]
        return found

    def aged_head(self) -> Head | None:
        """Return the aged task that is next, with the rank it has when it is the turn of the aged, or None."""
        aged = self.bands[1]
        return aged.head(-1) if self.live and aged.heap else None

    def unpark(self, tenant: Tenant) -> bool:
        """Let as many of a tenant's tasks be seen again as it may run; tell whether some stay parked."""
        self._first = None
        for band in self.bands:
            band.unpark(tenant)
        return any(band.holds(tenant) for band in self.bands)
