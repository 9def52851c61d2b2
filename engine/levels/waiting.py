"""All that waits in exact order, for policies under which who may start depends on who comes before, whatever each waits for.

Tasks that could stand in for each other (the same lines, tenant and group) share a bucket, sorted; who is next among the buckets is
decided in every step, by what tenants and queues hold then. Profiles that need no such order do not keep one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort

from engine.entities import Pod, Task
from engine.fit import Fit, places_on
from engine.kinds import RoomLine, WarmLine
from engine.levels.accounts import Accounts
from engine.levels.quotas import Balance
from engine.lines import Line
from engine.profile import Profile
from engine.resources import Demand
from engine.state import State
from engine.tasks import Micros

Place = tuple[int, int, int]
"""(band, key, sequence number): where a task stands in its bucket."""
Entry = tuple[int, int, int, Task]

FIRST: Place = (-1, 0, 0)


class Bucket:
    """Waiting tasks of one tenant (and group, where groups share) that ask for the same."""

    __slots__ = ("entries", "key", "room", "warm")

    def __init__(self, key: tuple[tuple[Line, ...], int, int]) -> None:
        self.key = key
        lines = key[0]
        room = lines[-1]
        assert isinstance(room, RoomLine)
        self.room = room
        self.warm: WarmLine | None = lines[0] if isinstance(lines[0], WarmLine) else None
        self.entries: list[Entry] = []

    def after(self, place: Place) -> Entry | None:
        """Return the first entry that comes after a place."""
        entries = self.entries
        if entries and entries[0][:3] > place:
            return entries[0]
        index = bisect_right(entries, place, key=_place)
        return entries[index] if index < len(entries) else None


def _place(entry: Entry) -> Place:
    return entry[:3]


class Waiting:
    """The buckets, and what the last step's placements found out about them."""

    def __init__(self, state: State, profile: Profile) -> None:
        self.state = state
        self.buckets: dict[tuple[tuple[Line, ...], int, int], Bucket] = {}
        self._where: dict[int, tuple[Bucket, Entry]] = {}
        self._touched: dict[int, None] = {}
        self._soonest: dict[Fit, dict[int, Micros]] = {}
        self._epoch, self._cursor = -1, 0
        self._able: dict[Demand, list[bool]] = {}
        self._topology = -1
        self._groups = profile.ordering.fair_groups
        ordering = profile.ordering
        self.accounts: Accounts | None = None
        self._needs_accounts = ordering.shares or ordering.ranks_anew or profile.quotas is not None
        self._anew = ordering.ranks_anew
        self._key_at = ordering.key_at
        self.all_may_start = True
        """Whether a limit was raised since the last placements: every bucket is looked at again."""
        self.moved = False
        """Whether a task entered or changed its bucket since this was set to False."""
        self.blocked: list[Task] = []
        """Tasks that found no room in this step, in order; preemption may make it."""
        self.making: dict[int, None] = {}
        """Gangs, by sequence number, for which room is being made."""
        self.held_back: dict[int, str] = {}
        """Task, by its sequence number -> the task for which the room it would fit in is reserved."""
        self.balance: Balance | None = None
        self.clear()

    def clear(self) -> None:
        """Forget everything: the indices are rebuilt from the state."""
        self.buckets.clear()
        self._where.clear()
        self.blocked.clear()
        self.making.clear()
        self.held_back.clear()
        self._touched.clear()
        self._soonest.clear()
        self.all_may_start = True
        self.accounts = Accounts(self.state) if self._needs_accounts else None

    def __len__(self) -> int:
        return len(self._where)

    def add(self, task: Task, band: int, key: int) -> None:
        """Take in a task that waits."""
        group = task.group.seq if self._groups and task.group is not None else -1
        name = (task.lines, task.tenant.seq, group)
        bucket = self.buckets.get(name)
        if bucket is None:
            bucket = self.buckets[name] = Bucket(name)
        entry = (band, key, task.seq, task)
        insort(bucket.entries, entry, key=_place)
        self._where[task.seq] = (bucket, entry)
        self.moved = True

    def drop(self, task: Task) -> None:
        """Let a task go."""
        bucket, entry = self._where.pop(task.seq)
        entries = bucket.entries
        del entries[bisect_left(entries, entry[:3], key=_place)]
        if not entries:
            del self.buckets[bucket.key]
        self.held_back.pop(task.seq, None)

    def pod_changed(self, pod: Pod) -> None:
        """Take in that slots of a Pod were taken or freed."""
        self._touched[pod.node.index] = None
        if self.accounts is not None:
            self.accounts.pod_changed(pod)

    def touched(self, pod: Pod) -> None:
        """Note that a Pod may end sooner than was expected: attempts in it are stopped, or have another estimate."""
        self._touched[pod.node.index] = None

    def soonest(self, fit: Fit) -> dict[int, Micros]:
        """Return what is known about when a demand has room, by row; what changed since then is forgotten here."""
        cluster = self.state.cluster
        whole = self._epoch != cluster.epoch or len(self._soonest) > 1_000
        if whole:
            self._soonest.clear()
        else:
            rows = dict.fromkeys(cluster.changes[self._cursor :])
            rows.update(self._touched)
            for known in self._soonest.values():
                for row in rows:
                    known.pop(row, None)
        self._touched.clear()
        self._epoch, self._cursor = cluster.epoch, len(cluster.changes)
        return self._soonest.setdefault(fit, {})

    def able(self, demand: Demand) -> list[bool]:
        """Tell of every node whether it could hold a Pod of a demand, were it empty."""
        cluster = self.state.cluster
        if self._topology != cluster.topology or len(self._able) > 1_000:
            self._topology = cluster.topology
            self._able.clear()
        found = self._able.get(demand)
        if found is None:
            found = self._able[demand] = [places_on(cluster, node, demand) > 0 for node in cluster.nodes]
        return found

    def rank_anew(self, now: Micros) -> None:
        """Sort every bucket by the keys of now, where the policy ranks so."""
        if not self._anew or self.accounts is None:
            return
        for bucket in self.buckets.values():
            entries = [(e[0], self._key_at(e[3], now, self.accounts), e[2], e[3]) for e in bucket.entries]
            entries.sort(key=_place)
            bucket.entries = entries
            for entry in entries:
                self._where[entry[2]] = (bucket, entry)
