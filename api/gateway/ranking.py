"""Which of the waiting submissions enters the queue next: the ranking before the queue, pure and with the time as an argument.

The window holds submissions that arrived faster than the queue takes them. The next one is chosen so:

1. An ordinary submission that waited longer than `ordinary_wait_us` goes first (one at a time, alternating with urgent ones), so
   that a stream of urgent work never starves the rest.
2. Urgent before ordinary.
3. Inside a class the tenant with the smallest virtual time: each submission costs its tenant 1/weight, a tenant that comes back
   from idleness starts at the class's current virtual time, so that idleness earns no credit (start-time fair queueing, Goyal et
   al. 1996).
4. Inside a tenant the higher priority, then the earlier arrival.

It is bounded in all and per tenant. When it is full, an urgent submission pushes out the newest ordinary one of the tenant that has
most of them waiting; that one is refused, as every other is that finds no room.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from engine.tasks import URGENT_PRIORITY, Micros

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Waiting(Generic[T]):
    """A submission in the window."""

    item: T
    tenant: str
    priority: int
    arrived_at: Micros
    number: int

    @property
    def urgent(self) -> bool:
        """Tell whether it ranks with the urgent ones."""
        return self.priority >= URGENT_PRIORITY


@dataclass(slots=True)
class _Lane(Generic[T]):
    """The waiting submissions of one tenant in one class."""

    start: float
    heap: list[tuple[int, int, Waiting[T]]] = field(default_factory=list)


class WindowFull(Exception):
    """No room: `scope` is ``tenant`` or ``window``."""

    def __init__(self, scope: str) -> None:
        super().__init__(f"the admission window of the {scope} is full")
        self.scope = scope


class AdmissionWindow(Generic[T]):
    """Ranks submissions. `push` costs O(log n); `pop` looks at every tenant, and at the ordinary ones while both classes wait."""

    def __init__(self, size: int, ordinary_wait_us: Micros) -> None:
        if size < 1:
            raise ValueError("size: must be at least 1")
        self._size = size
        self._ordinary_wait_us = ordinary_wait_us
        self._lanes: tuple[dict[str, _Lane[T]], dict[str, _Lane[T]]] = ({}, {})
        self._virtual = [0.0, 0.0]
        self._finish: tuple[dict[str, float], dict[str, float]] = ({}, {})
        self._weights: dict[str, int] = {}
        self._count = 0
        self._number = 0
        self._favoured_ordinary = False

    def __len__(self) -> int:
        return self._count

    def waiting(self, tenant: str) -> int:
        """Return how many submissions of a tenant wait."""
        return sum(len(lanes[tenant].heap) for lanes in self._lanes if tenant in lanes)

    def push(
        self, item: T, *, tenant: str, weight: int, priority: int, now: Micros, max_waiting: int
    ) -> Waiting[T] | None:
        """Add a submission; returns the one it pushed out, if any. Raises WindowFull."""
        if self.waiting(tenant) >= max_waiting:
            raise WindowFull("tenant")
        entry = Waiting(item, tenant, priority, now, self._number)
        pushed_out = None
        if self._count >= self._size:
            pushed_out = self._push_out() if entry.urgent else None
            if pushed_out is None:
                raise WindowFull("window")
        self._number += 1
        kind = int(entry.urgent)
        lanes = self._lanes[kind]
        self._weights[tenant] = max(1, weight)
        if tenant not in lanes:
            lanes[tenant] = _Lane(max(self._virtual[kind], self._finish[kind].get(tenant, 0.0)))
        heapq.heappush(lanes[tenant].heap, (-priority, entry.number, entry))
        self._count += 1
        return pushed_out

    def pop(self, now: Micros) -> Waiting[T] | None:
        """Take the submission that ranks first; None when nothing waits."""
        ordinary, urgent = self._lanes
        if not ordinary and not urgent:
            return None
        if ordinary and urgent:
            overdue = self._overdue(now)
            if overdue is not None and not self._favoured_ordinary:
                self._favoured_ordinary = True
                return self._take(0, overdue)
            self._favoured_ordinary = False
            return self._take(1, self._first(1))
        kind = 1 if urgent else 0
        return self._take(kind, self._first(kind))

    def _first(self, kind: int) -> str:
        lanes = self._lanes[kind]
        return min(lanes, key=lambda tenant: (lanes[tenant].start, lanes[tenant].heap[0][:2], tenant))

    def _overdue(self, now: Micros) -> str | None:
        """Return the tenant of the longest overdue ordinary submission."""
        oldest, chosen = now - self._ordinary_wait_us, None
        for tenant, lane in self._lanes[0].items():
            arrived = min(entry.arrived_at for _, _, entry in lane.heap)
            if arrived <= oldest and (chosen is None or arrived < oldest):
                oldest, chosen = arrived, tenant
        return chosen

    def _take(self, kind: int, tenant: str) -> Waiting[T]:
        lanes = self._lanes[kind]
        lane = lanes[tenant]
        _, _, entry = heapq.heappop(lane.heap)
        self._virtual[kind] = max(self._virtual[kind], lane.start)
        lane.start += 1.0 / self._weights[tenant]
        self._count -= 1
        if not lane.heap:
            self._finish[kind][tenant] = lane.start
            del lanes[tenant]
            if not lanes:
                self._finish[kind].clear()
        return entry

    def _push_out(self) -> Waiting[T] | None:
        lanes = self._lanes[0]
        if not lanes:
            return None
        tenant = max(lanes, key=lambda name: (len(lanes[name].heap), name))
        lane = lanes[tenant]
        newest = max(lane.heap, key=lambda row: row[1])
        lane.heap.remove(newest)
        heapq.heapify(lane.heap)
        if not lane.heap:
            self._finish[0][tenant] = lane.start
            del lanes[tenant]
        self._count -= 1
        return newest[2]
