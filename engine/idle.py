"""Pods that nobody uses, in the order in which they go when others need the room, and what exchanging their models would take."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from engine.entities import Pod
from engine.profile import Profile
from engine.tasks import SECOND, Micros

ALIKE_US = 3 * SECOND
"""Loads that differ by less are alike, and no load counts for less."""

_Entry = tuple[int, Micros, int, int, Pod]
"""`order` of a Pod, then the token with which it became idle."""


class IdlePods:
    """A lazy heap over the idle Pods of a backlog, rebuilt with it."""

    __slots__ = ("_fresh", "_heap", "_profile", "_tokens", "pods", "version")

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self.pods: dict[int, Pod] = {}
        """By number."""
        self.version = 0
        """Grows when a Pod becomes idle."""
        self._tokens: dict[int, int] = {}
        """The version with which each became idle."""
        self._heap: list[_Entry] = []
        self._fresh: dict[int, Pod] = {}
        """Idle Pods that are not in the heap yet: most are taken again before anybody asks who goes first."""

    def clear(self) -> None:
        """Forget them all."""
        self.pods.clear()
        self._tokens.clear()
        self._heap.clear()
        self._fresh.clear()

    def add(self, pod: Pod) -> None:
        """Take a Pod in, or take it in anew because its place in the order changed."""
        self.version += 1
        self.pods[pod.number] = pod
        self._tokens[pod.number] = self.version
        self._fresh[pod.number] = pod

    def _sorted_in(self) -> list[_Entry]:
        """Return the heap with everyone in it."""
        heap = self._heap
        if self._fresh:
            for pod in self._fresh.values():
                quick, since, number = self.order(pod)
                heappush(heap, (quick, since, number, self._tokens[number], pod))
            self._fresh.clear()
            if len(heap) > 64 + 4 * len(self.pods):
                heap[:] = [entry for entry in heap if self._tokens.get(entry[2]) == entry[3]]
                heapify(heap)
        return heap

    def drop(self, number: int) -> None:
        """Take a Pod out, if it is in."""
        if self.pods.pop(number, None) is not None:
            del self._tokens[number]
            self._fresh.pop(number, None)

    def neighbours_loaded(self, pod: Pod) -> None:
        """Take in that a Pod started on shared devices: what loads take there may have changed for the idle ones beside it."""
        for number, other in pod.node.pods.items():
            if number in self.pods and other is not pod:
                self.add(other)

    def first(self) -> Pod | None:
        """Return the one that goes first."""
        heap = self._sorted_in()
        while heap:
            if self._tokens.get(heap[0][2]) == heap[0][3]:
                return heap[0][4]
            heappop(heap)
        return None

    def first_few(self, most: int) -> list[Pod]:
        """Return those that go first, at most so many."""
        heap = self._sorted_in()
        found: list[_Entry] = []
        while heap and len(found) < most:
            entry = heappop(heap)
            if self._tokens.get(entry[2]) == entry[3]:
                found.append(entry)
        for entry in found:
            heappush(heap, entry)
        return [entry[4] for entry in found]

    def order(self, pod: Pod) -> tuple[int, Micros, int]:
        """Return what they are sorted by: where loads are quick first, if the profile counts loads; then by idle time."""
        quick = self.load_us(pod) // ALIKE_US if self._profile.warm_first_loads else 0
        return quick, pod.idle_since, pod.number

    def load_us(self, pod: Pod) -> Micros:
        """Return what loading another model where a Pod is would take, by what its devices took lately."""
        by_uuid = pod.node.by_uuid
        longest = 0
        for grant in pod.grants:
            spent = by_uuid[grant.uuid].load_us
            if spent > longest:
                longest = spent
        return max(longest, ALIKE_US) if longest else self._profile.reload_us

    def pays_for_load(self, pod: Pod, now: Micros) -> bool:
        """Tell whether a Pod has to stay: tasks wait for its model, and it has not served long enough for its load."""
        times = self._profile.serve_loads
        if not times or pod.created_at + (times + 1) * self.load_us(pod) <= now:
            return False
        for line in pod.warm.kind.lines.values():  # noqa: SIM110 - a generator costs more than all the rest
            if line.live and line.node in (-1, pod.node.index):
                return True
        return False
