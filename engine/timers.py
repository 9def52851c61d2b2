"""Everything that is due at a time, in one lazy heap: retries, deadlines, and looks at Pods."""

from __future__ import annotations

from heapq import heappop, heappush

from engine.entities import Pod, Task
from engine.tasks import Micros

Due = tuple[Micros, int, int, Task | Pod]


class Timers:
    """Due times of tasks and Pods. A Pod has at most one entry that counts: the earliest; the look decides on the next."""

    __slots__ = ("_grid_us", "_heap", "_order")

    def __init__(self, grid_us: Micros) -> None:
        self._heap: list[Due] = []
        self._order = 0
        self._grid_us = grid_us
        """Looks at Pods wait for the next multiple of this, so that one wakeup serves many."""

    def watch_pod(self, pod: Pod, at: Micros) -> None:
        """Look at a Pod at a time or a little later, unless it is looked at before that."""
        at += -at % self._grid_us
        if at < pod.check_at:
            pod.check_at = at
            heappush(self._heap, (at, 1, pod.number, pod))

    def watch_task(self, task: Task, at: Micros) -> None:
        """Look at a task at a time."""
        self._order += 1
        heappush(self._heap, (at, 0, self._order, task))

    def next_at(self) -> Micros | None:
        """Return when the next look is due."""
        return self._heap[0][0] if self._heap else None

    def take_due(self, now: Micros) -> list[Task | Pod]:
        """Return whatever is due, tasks by sequence number, then Pods by number, each once."""
        heap = self._heap
        if not heap or heap[0][0] > now:
            return []
        tasks: dict[int, Task] = {}
        pods: dict[int, Pod] = {}
        while heap and heap[0][0] <= now:
            at, _, _, item = heappop(heap)
            if isinstance(item, Task):
                tasks[item.seq] = item
            elif item.check_at == at:
                pods[item.number] = item
        return [tasks[key] for key in sorted(tasks)] + [pods[key] for key in sorted(pods)]
