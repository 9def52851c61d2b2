"""What waits and what is free for it: indices over the state, kept by watching it, rebuilt from it after a recovery.

A task that waits stands in two lines: one for a slot in a warm Pod of its kind, one for room for a new Pod of its demand. Lines of
which nothing is free sleep, and cost nothing however long they are; what becomes free wakes exactly the lines it may serve.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from engine.asked import Asked
from engine.entities import Account, Group, Pod, Task, Tenant
from engine.fit import places_on
from engine.idle import IdlePods
from engine.kinds import Kind, RoomLine, Shape, WarmLine, WarmSet, cap_of
from engine.levels.ordering import AGED, ORDINARY
from engine.levels.waiting import Waiting
from engine.lines import Line, Parked, Rank
from engine.profile import Profile
from engine.resources import WHOLE_GPU, Demand
from engine.state import State
from engine.states import POD_CREATING, POD_GONE, PREFERRED
from engine.tasks import NEVER, Affinity, Micros, PodState, TaskState
from engine.timers import Timers

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
"""2**64 divided by the golden ratio."""


class Backlog:
    """Implements `state.Watch`."""

    def __init__(self, state: State, profile: Profile) -> None:
        self.state = state
        self.profile = profile
        self.asked = Asked(state, profile)
        self.room_lines: dict[tuple[Demand, bool, int, int], RoomLine] = {}
        self.bound: dict[int, dict[RoomLine, None]] = {}
        """Room lines of one node, by its row."""
        self.kinds_waiting: dict[Kind, None] = {}
        """Kinds that tasks wait for, in no order that may matter: a recovered engine has another."""
        self.kinds_awake: dict[Kind, None] = {}
        """Kinds with warm lines that a slot may be free for."""
        self.active: dict[RoomLine, None] = {}
        """Room lines that room may be free for."""
        self.woken: dict[RoomLine, None] = {}
        """Room lines that were woken or got a task since the placement looked last."""
        self.open_rooms: dict[RoomLine, None] = {}
        """Room lines for which any node will do."""
        self.parked: Parked = {}
        """Tenant -> lines in which tasks of it may be parked."""
        self.idle_pods = IdlePods(profile)
        self.idle = self.idle_pods.pods
        self.overdue: dict[int, Pod] = {}
        """Pods that are idle for too long, by their number."""
        self.preempt_at: Micros = -1
        """Stopping tasks for urgent ones is not thought about sooner: the last time nobody could be stopped."""
        self.preempt_armed_for: Micros = -1
        """For which of these moments there will be a step."""
        self.look_back_at: Micros = -1
        """When tasks that stand back for the Pods of their models are looked at again."""
        self.no_room_at = (-1, -1, -1, -1)
        """What was idle, free and waiting when idle Pods could make room for nobody."""
        self.urgent = 0
        """Urgent tasks in lines."""
        self.beside = 0
        """Those of them that may go beside others in a full Pod."""
        self.may_be_aged = False
        """Whether the aged have turns of their own, and any has entered a line since the last rebuild."""
        self.by_model: dict[tuple[str, str], dict[int, Pod]] = {}
        """(method, model) -> its Pods that are not gone."""
        self.timers = Timers(state.limits.look_us)
        self.ages: list[tuple[Micros, int, int, Task]] = []
        self._ticket = 0
        self._cursor = 0
        self._epoch = -1
        self._cards: list[tuple[str, int]] = []
        self._topology = -1
        self._columns = 0
        self._common = Tenant("", -1)
        ordering = profile.ordering
        self._rank = ordering.rank
        self._fair_tenants = ordering.fair_tenants
        self._fair_groups = ordering.fair_groups
        self.young_at: Micros = -1
        """When preemption looks again for attempts that were too young to be stopped."""
        self._age_us = ordering.age_us
        self._aged_every = ordering.aged_every
        self._warm_reuse = profile.warm_reuse
        self._spread_slots = profile.spread_slots
        self.waiting = Waiting(state, profile) if profile.in_order else None
        self.rebuild()

    def rebuild(self) -> None:
        """Build every index anew from the state."""
        state = self.state
        self.asked.clear()
        self.room_lines.clear()
        self.bound.clear()
        self.urgent = self.beside = 0
        if self.waiting is not None:
            self.waiting.clear()
        self.active.clear()
        self.kinds_awake.clear()
        self.kinds_waiting.clear()
        self.woken.clear()
        self.open_rooms.clear()
        self.parked.clear()
        self.idle_pods.clear()
        self.overdue.clear()
        self.by_model.clear()
        self.may_be_aged = False
        self.look_anew()
        self.ages.clear()
        self.timers = Timers(state.limits.look_us)
        self._cards = sorted(state.cluster.cards)
        self._columns = len(state.cluster.columns)
        self._topology = state.cluster.topology
        for pod in state.pods.values():
            pod.warm, pod.offered, pod.check_at = None, -1, NEVER
            pod.look_at_devices()
            self.pod_changed(pod)
            self.timers.watch_pod(pod, state.now)
        for group in state.groups.values():
            group.waiting.clear()
        for task in state.tasks.values():
            task.line_ticket, task.lines, task.shape = 0, (), None
            if task.req_no in state.terminal:
                continue
            if task.deadline is not None:
                self.task_due(task, task.deadline)
            if task.retry_at is not None:
                self.task_due(task, task.retry_at)
            if task.admitted and task.state is TaskState.PENDING and task.req_no not in state.claims:
                self.waits(task)

    # --- what the state tells ------------------------------------------------------------------------------------------

    def waits(self, task: Task) -> None:
        """Put a task into its lines."""
        shape: Shape | None = task.shape
        if shape is None:
            shape = task.shape = self.asked.shape_of(task)
        group = task.group
        row, empty = -1, False
        if group is not None:
            if task.spec.affinity is not PREFERRED or (group.node is not None and group.node.exclusive is not None):
                row, empty = self.where(task, shape)
            group.waiting[task.req_no] = task
        members = task.spec.members
        room = shape.rooms.get((empty, row, members))
        if room is None or room.dropped:
            room = shape.rooms[empty, row, members] = self._room_line(shape.demand, empty, row, members)
        self._ticket = ticket = self._ticket + 1
        task.line_ticket = ticket
        band, key = self._rank(task, self.state.now)
        entry = (key, task.seq, ticket, task)
        tenant: Account = self._common
        account: Account = self._common
        tenant_seq = group_seq = -1
        if self._fair_tenants and band != AGED:
            tenant, tenant_seq = task.tenant, task.tenant.seq
            if group is not None and self._fair_groups:
                account, group_seq = group, group.seq
        if self._warm_reuse and not empty and members == 1:
            warm = shape.kind.lines.get((shape.need, row))
            if warm is None:
                warm = shape.kind.lines[shape.need, row] = WarmLine(
                    shape.kind, shape.need, row, self.parked, self._common
                )
            task.lines = (warm, room)
            shape.kind.comes(task)
            if shape.kind.waiting == 1:
                self.kinds_waiting[shape.kind] = None
            warm.push(entry, band, tenant, tenant_seq, account, group_seq)
            if not warm.active and shape.kind.offers(shape.need):
                self.wake(warm)
        else:
            task.lines = (room,)
        room.push(entry, band, tenant, tenant_seq, account, group_seq)
        self.active[room] = self.woken[room] = None
        room.active = True
        if self.waiting is not None:
            self.waiting.add(task, band, key)
        if band == AGED:
            self.may_be_aged = self._aged_every > 0
        if task.urgent:
            self.urgent += 1
            if task.spec.urgent_slots:
                self.beside += 1
            if self.profile.preempt:
                patient_until = task.pending_since + self.profile.preempt_patience_us
                self.task_due(task, patient_until + -patient_until % self.state.limits.look_us)
        if band == ORDINARY and self._age_us:
            heappush(self.ages, (task.submitted_at + self._age_us, task.seq, ticket, task))
            if len(self.ages) > 1024 + 2 * self.state.pending:
                self.ages = [each for each in self.ages if each[3].line_ticket == each[2]]
                heapify(self.ages)

    def leaves(self, task: Task) -> None:
        """Void a task's ticket."""
        if not task.line_ticket:
            return
        task.line_ticket = 0
        if self.waiting is not None:
            self.waiting.drop(task)
        if task.urgent:
            self.urgent -= 1
            if task.spec.urgent_slots:
                self.beside -= 1
        for line in task.lines:
            line.live -= 1
            if isinstance(line, WarmLine):
                line.kind.goes(task)
                if not line.kind.waiting:
                    del self.kinds_waiting[line.kind]
        task.lines = ()
        if task.group is not None:
            task.group.waiting.pop(task.req_no, None)
        if task.tenant.seq in self.parked:
            self.tenant_changed(task.tenant)

    def regrouped(self, group: Group) -> None:
        """Move the waiting tasks of a group to the lines of its node, or back."""
        for task in list(group.waiting.values()):
            room = task.lines[-1]
            if self.where(task, task.shape) != (room.node, room.fit.empty):
                self.leaves(task)
                self.waits(task)

    def tenant_changed(self, tenant: Tenant) -> None:
        """Let tasks that waited for their tenant's quota be seen again."""
        if self.waiting is not None:
            self.waiting.all_may_start = True
        if tenant.seq in self.parked and not (tenant.max_running and tenant.running >= tenant.max_running):
            for line in list(self.parked[tenant.seq]):
                if not line.unpark(tenant):
                    del self.parked[tenant.seq][line]
                if line.live:
                    self.wake(line)
            if not self.parked[tenant.seq]:
                del self.parked[tenant.seq]

    def pod_changed(self, pod: Pod) -> None:
        """Offer a Pod's free slots, or withdraw them."""
        if self.waiting is not None:
            self.waiting.pod_changed(pod)
        warm = pod.warm
        if warm is None:
            warm = pod.warm = self.asked.kind(pod.method, pod.model, pod.slots, pod.demand).set_of(cap_of(pod))
            self.by_model.setdefault((pod.method, pod.model), {})[pod.number] = pod
        number, row, busy = pod.number, pod.node.index, len(pod.tasks)
        if busy >= pod.slots or not pod.usable:
            if pod.offered >= 0:
                pod.offered = -1
                here = warm.by_node[row]
                del here[number]
                if not here:
                    del warm.by_node[row]
            self.idle_pods.drop(number)
            if pod.state is POD_GONE:
                self._forget(pod)
            return
        if pod.offered < 0:
            if row in warm.by_node:
                warm.by_node[row][number] = pod
            else:
                warm.by_node[row] = {number: pod}
        pod.offered = busy
        if self.profile.warm_first_loads and pod.demand.gpu_share < WHOLE_GPU and not busy:
            self.idle_pods.neighbours_loaded(pod)
        exclusive = pod.node.exclusive is not None
        creating = pod.state is POD_CREATING
        if not exclusive:
            heap = warm.heap
            heappush(heap, (creating, busy if self._spread_slots else -busy, number, busy, pod))
            if len(heap) > 64 + 8 * len(warm.by_node):
                self._compact(warm)
        if busy or creating:
            self.idle_pods.drop(number)
        elif number not in self.idle:
            self.idle_pods.add(pod)
        for (need, line_row), line in warm.kind.lines.items():
            if (
                line.live
                and not line.active
                and need <= warm.cap
                and (line_row == row or (line_row < 0 and not exclusive))
            ):
                self.wake(line)

    def check_pod(self, pod: Pod, at: Micros) -> None:
        """Look at a Pod at a time."""
        if self.waiting is not None:
            self.waiting.touched(pod)
        self.timers.watch_pod(pod, at)

    def task_due(self, task: Task, at: Micros) -> None:
        """Look at a task at a time."""
        self.timers.watch_task(task, at)

    # --- what the levels ask -------------------------------------------------------------------------------------------

    def wake(self, line: Line) -> None:
        """Let a line be looked at."""
        line.active = True
        if isinstance(line, WarmLine):
            line.kind.awake[line] = None
            self.kinds_awake[line.kind] = None
        else:
            assert isinstance(line, RoomLine)
            self.active[line] = None
            self.woken[line] = None

    def sleep(self, line: Line) -> None:
        """Let a line be until something is free for it."""
        line.active = False
        if isinstance(line, WarmLine):
            awake = line.kind.awake
            del awake[line]
            if not awake:
                del self.kinds_awake[line.kind]
        else:
            assert isinstance(line, RoomLine)
            del self.active[line]
            self.woken.pop(line, None)

    @property
    def pushed(self) -> int:
        """How many times a task was put into its lines."""
        return self._ticket

    @property
    def stirred(self) -> bool:
        """Tell whether any line may be served: one is awake, or nodes changed since lines were woken by that."""
        cluster = self.state.cluster
        return bool(
            self.kinds_awake
            or self.active
            or self._cursor != len(cluster.changes)
            or self._epoch != cluster.epoch
            or self._topology != cluster.topology
        )

    def promote(self, now: Micros) -> None:
        """Move tasks that have waited long enough to the band of the aged."""
        ages = self.ages
        while ages and ages[0][0] <= now:
            _, _, ticket, task = heappop(ages)
            if task.line_ticket == ticket:
                self.leaves(task)
                self.waits(task)

    def is_turn_of_aged(self) -> bool:
        """Tell whether the next placement is the aged tasks' own: one of `aged_every`, never 14 apart when that is 8.

        Multiples of the golden ratio are spread so evenly that this holds for every third or tenth placement as well. Counting
        off plainly could keep in step with the nodes or kinds, and then the same ones would have all the turns.
        """
        return self.may_be_aged and (self.state.placed * _GOLDEN & _MASK) * self._aged_every <= _MASK

    def wake_by_changes(self) -> None:
        """Wake the lines for which nodes that changed since the last call may have room."""
        cluster = self.state.cluster
        if cluster.topology != self._topology:
            self._topology = cluster.topology
            if sorted(cluster.cards) != self._cards or len(cluster.columns) != self._columns:
                self.rebuild()
        whole = self._epoch != cluster.epoch
        changed = cluster.changes if whole else cluster.changes[self._cursor :]
        if not changed and not whole:
            return
        self._epoch, self._cursor = cluster.epoch, len(cluster.changes)
        for row in list(self.bound) if whole else dict.fromkeys(changed):
            for line in list(self.bound.get(row, ())):
                if line.live:
                    self.wake(line)
                else:
                    self._drop_room_line(line)
        for line in list(self.open_rooms):
            if line.active:
                continue
            if not line.live:
                self._drop_room_line(line)
            elif line.members > 1 or line.fit.best() is not None:
                self.wake(line)

    def pick_warm(self, line: WarmLine, task: Task) -> Pod | None:
        """Return the warm Pod for a task: on its group's node if there is one, else the one that slots are taken from next."""
        group, row = task.group, line.node
        prefer = row
        if row < 0 and group is not None and group.node is not None and self.prefers_group_node(task):
            prefer = group.node.index
        found = None
        for warm in line.kind.sets:
            if warm.cap < line.need or not warm.by_node:
                continue
            if prefer >= 0 and prefer in warm.by_node:
                here = [
                    p for p in warm.by_node[prefer].values() if p.node.exclusive is None or p.node.exclusive is group
                ]
                if len(here) == 1:
                    return here[0]
                if here:
                    return min(here, key=lambda p: (p.state is POD_CREATING, p.offered, p.number))
            if row < 0 and found is None:
                found = self._top(warm)
        return found

    def next_for(self, pod: Pod, band: int) -> Task | None:
        """Return the task that would take a slot of this Pod next, of a better band than the given one, or None."""
        warm, row, exclusive = pod.warm, pod.node.index, pod.node.exclusive
        best: tuple[Rank, Task] | None = None
        for (need, line_row), line in warm.kind.lines.items():
            if need > warm.cap or line_row not in (-1, row):
                continue
            head = line.head()
            if head is None or head[0][0] >= band or (exclusive is not None and exclusive is not head[1].group):
                continue
            if best is None or head[0] < best[0]:
                best = head
        return best[1] if best is not None else None

    def prefers_group_node(self, task: Task) -> bool:
        """Tell whether the task's group draws it to its node."""
        affinity = task.spec.affinity
        return affinity is not Affinity.NONE and (self.profile.group_affinity or affinity is not Affinity.PREFERRED)

    def look_anew(self) -> None:
        """Put nothing off any longer: as an engine would that begins from a snapshot."""
        self.preempt_at = self.preempt_armed_for = self.look_back_at = self.young_at = -1
        self.no_room_at = (-1, -1, -1, -1)

    def loose_line(self, demand: Demand) -> RoomLine:
        """Return a line of a demand that nobody stands in: for Pods that are made for no task."""
        return RoomLine(self.asked.fit(demand), -1, 1, {}, self._common)

    def _forget(self, pod: Pod) -> None:
        key = (pod.method, pod.model)
        self.by_model[key].pop(pod.number, None)
        if not self.by_model[key]:
            del self.by_model[key]

    def where(self, task: Task, shape: Shape) -> tuple[int, bool]:
        """Return the row of the only node that will do (-1: any), and whether the node must be empty.

        A strict or exclusive group keeps its tasks on its node; if that could never hold a task, the group moves with it.
        """
        group = task.group
        if group is None:
            return -1, False
        kind, node = task.spec.affinity, group.node
        if kind is Affinity.PREFERRED and (node is None or node.exclusive is None):
            return -1, False
        if node is not None and (kind in (Affinity.STRICT, Affinity.EXCLUSIVE) or node.exclusive is group):
            members = task.spec.members
            if places_on(self.state.cluster, node, shape.demand, members) >= members:
                return node.index, False
        return -1, kind is Affinity.EXCLUSIVE

    def _room_line(self, demand: Demand, empty: bool, row: int, members: int) -> RoomLine:
        key = (demand, empty, row, members)
        line = self.room_lines.get(key)
        if line is None:
            line = self.room_lines[key] = RoomLine(
                self.asked.fit(demand, empty), row, members, self.parked, self._common
            )
            if row >= 0:
                self.bound.setdefault(row, {})[line] = None
            else:
                self.open_rooms[line] = None
        return line

    def _drop_room_line(self, line: RoomLine) -> None:
        line.dropped = True
        if line.active:
            self.sleep(line)
        for lines in self.parked.values():
            lines.pop(line, None)
        del self.room_lines[line.fit.demand, line.fit.empty, line.node, line.members]
        if line.node >= 0:
            del self.bound[line.node][line]
            if not self.bound[line.node]:
                del self.bound[line.node]
        else:
            del self.open_rooms[line]

    def _top(self, warm: WarmSet) -> Pod | None:
        heap = warm.heap
        while heap:
            creating, _, _, busy, pod = heap[0]
            if pod.offered == busy and (pod.state is POD_CREATING) == creating and pod.node.exclusive is None:
                return pod
            heappop(heap)
        return None

    def _compact(self, warm: WarmSet) -> None:
        sign = 1 if self.profile.spread_slots else -1
        warm.heap = [
            (pod.state is PodState.CREATING, sign * pod.offered, pod.number, pod.offered, pod)
            for pods in warm.by_node.values()
            for pod in pods.values()
            if pod.node.exclusive is None
        ]
        heapify(warm.heap)
