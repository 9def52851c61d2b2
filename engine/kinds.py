"""What waiting tasks ask for (shapes), the Pods that can serve them (kinds), and the two sorts of lines they stand in."""

from __future__ import annotations

from engine.entities import Pod, Task, Tenant
from engine.fit import Fit
from engine.lines import Line, Parked
from engine.resources import Demand
from engine.tasks import Micros


class WarmSet:
    """Pods of one kind with the same memory cap per GPU that have a free slot."""

    __slots__ = ("by_node", "cap", "heap", "kind")

    def __init__(self, kind: Kind, cap: int) -> None:
        self.kind = kind
        self.cap = cap
        self.heap: list[tuple[int, int, int, int, Pod]] = []
        """(still creating, order of slots, number, tasks in it, Pod), lazily."""
        self.by_node: dict[int, dict[int, Pod]] = {}


class Kind:
    """Pods that can stand in for each other: the same method, model, slots and demand besides GPU memory."""

    __slots__ = ("awake", "key", "lines", "serves", "sets", "since", "urgent", "waiting")

    def __init__(self, key: str, serves: tuple[str, str]) -> None:
        self.key = key
        """What kinds are sorted by."""
        self.serves = serves
        """(method, model)."""
        self.sets: list[WarmSet] = []
        """By rising cap."""
        self.lines: dict[tuple[int, int], WarmLine] = {}
        """(needed memory per GPU, node's row or -1) -> line."""
        self.awake: dict[WarmLine, None] = {}
        self.waiting = 0
        """Tasks in its lines."""
        self.urgent = 0
        """Urgent ones among them."""
        self.since: Micros = 0
        """None of them has waited since before this; it may be earlier than need be."""

    def comes(self, task: Task) -> None:
        """Count a task in."""
        self.waiting += 1
        if task.urgent:
            self.urgent += 1
        if self.waiting == 1 or task.pending_since < self.since:
            self.since = task.pending_since

    def goes(self, task: Task) -> None:
        """Count a task out."""
        self.waiting -= 1
        if task.urgent:
            self.urgent -= 1

    def set_of(self, cap: int) -> WarmSet:
        """Return the set of a cap, made on first sight."""
        for each in self.sets:
            if each.cap == cap:
                return each
        made = WarmSet(self, cap)
        self.sets.append(made)
        self.sets.sort(key=lambda each: each.cap)
        return made

    def offers(self, need: int) -> bool:
        """Tell whether any Pod with this much memory offers a slot."""
        for each in self.sets:  # noqa: SIM110 - a generator costs more than all the rest
            if each.by_node and each.cap >= need:
                return True
        return False


class WarmLine(Line):
    """Tasks that wait for a slot in a warm Pod."""

    __slots__ = ("kind", "need")

    def __init__(self, kind: Kind, need: int, node: int, parked: Parked, common: Tenant) -> None:
        super().__init__(node, parked, common)
        self.kind = kind
        self.need = need


class RoomLine(Line):
    """Tasks that wait for room for a new Pod (or, `members` > 1, for as many at once)."""

    __slots__ = ("dropped", "failed_at", "fit", "key", "members")

    def __init__(self, fit: Fit, node: int, members: int, parked: Parked, common: Tenant) -> None:
        super().__init__(node, parked, common)
        self.dropped = False
        self.fit = fit
        self.members = members
        self.key = (repr(fit.demand), node, fit.empty)
        """What lines are sorted by."""
        self.failed_at: tuple[int, int, int] = (-1, -1, -1)
        """What was idle and free when making room failed last."""


class Shape:
    """What a task asks for once predictions and past failures are taken in."""

    __slots__ = ("demand", "kind", "need", "possible", "rooms", "slots", "wrong")

    def __init__(self, kind: Kind, demand: Demand, slots: int) -> None:
        self.kind = kind
        self.demand = demand
        self.need = demand.gpu_memory_bytes
        self.slots = slots
        self.wrong: str | None = None
        """What is wrong with the demand of tasks of this shape, empty when nothing is; None: not looked at yet."""
        self.rooms: dict[tuple[bool, int, int], RoomLine] = {}
        """(empty, node's row or -1, members) -> line."""
        self.possible: dict[tuple[int, bool], tuple[int, bool]] = {}
        """(members, on one node) -> (topology, whether the known nodes could ever hold it)."""


def cap_of(pod: Pod) -> int:
    """Return the GPU memory that a task in the Pod may use."""
    return min((grant.memory_bytes for grant in pod.grants), default=0)


def rounded_up(memory_bytes: int) -> int:
    """Round predicted memory up by at most an eighth, so that similar predictions share a shape."""
    step = max(1 << 26, 1 << max(0, memory_bytes.bit_length() - 4))
    return -(-memory_bytes // step) * step
