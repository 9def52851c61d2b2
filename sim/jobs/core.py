"""The fast job-level core: gang jobs on nodes of equal size, event by event on SimPy's clock.

Ends are timeouts in SimPy's queue, arrivals one armed timeout at a time; everything happens in callbacks. Decisions are made once
per instant, after all that is due then. The module keeps to plain integers, lists and heaps: it is the hot path of batch research.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Final

import simpy

from sim.jobs.line import NONE, SizeLine
from sim.jobs.nodes import Nodes, Pieces
from sim.jobs.processors import Groups, Processors
from sim.jobs.promise import on_any, on_one, on_several

BLOCKING: Final = 0
SKIP: Final = 1
EASY: Final = 2
ACCASIM: Final = 3
"""EASY as AccaSim 1.1.3 has it: the first in line is promised a time once and not tried before, and others overtake it freely."""
BACKFILLS = {"none": BLOCKING, "skip": SKIP, "easy": EASY, "accasim": ACCASIM}

_PROGRESS_EVERY = 8192


class JobCore:
    """One run. Read `start`, `node` and `pieces` after `run`."""

    def __init__(
        self,
        env: simpy.Environment,
        nodes: Nodes,
        processors: Processors | None,
        submit: list[int],
        run: list[int],
        gpus: list[int],
        estimate: list[int],
        rank: list[int],
        backfill: int,
    ) -> None:
        count = len(submit)
        self.env = env
        self.nodes = nodes
        self.processors = processors
        """Where GPUs of a job may lie anywhere; `nodes` is not used then."""
        self.submit = submit
        self.run_us = run
        self.gpus = gpus
        self.estimate = estimate
        self.rank = rank
        """Place of each job in the order of the policy, were all waiting at once."""
        self.job_at: list[int] = [0] * count
        for job, place in enumerate(rank):
            self.job_at[place] = job
        self.backfill = backfill
        self.start: list[int] = [-1] * count
        self.node: list[int] = [-1] * count
        """Node of a job that is on one; -1: see `pieces`, or it never started."""
        self.pieces: dict[int, Pieces] = {}
        self.groups: dict[int, Groups] = {}
        self.now = 0
        self.events = 0
        self.decisions = 0
        self.longest_line = 0
        self._next = 0
        self._fresh: list[int] = []
        """Ranks of jobs that came at this instant."""
        self._line: list[int] = []
        """Ranks of the waiting, as a heap; where backfilling takes some out of the middle, started ones are dropped when met."""
        self._waiting = 0
        self._freed = False
        self._sizes: list[SizeLine] = []
        self._size_of: dict[int, SizeLine] = {}
        if backfill:
            self._make_sizes()
        self._ends: list[tuple[int, int]] = []
        """(expected end, job) of running jobs, ascending; kept where reservations are made."""
        self._reserves = backfill in (EASY, ACCASIM)
        self._reserved_for = NONE
        self._shadow = NONE
        self._closed = 0
        self._extra_node = -1
        self._extra = 0
        self._stale = True

    def _make_sizes(self) -> None:
        ranks: dict[int, list[int]] = {}
        for place, job in enumerate(self.job_at):
            ranks.setdefault(self.gpus[job], []).append(place)
        for gpus in sorted(ranks):
            self._size_of[gpus] = SizeLine(gpus, ranks[gpus])
        self._sizes = list(self._size_of.values())

    # --- the clock ------------------------------------------------------------------------------------------------------

    def run(self, progress: Callable[[float], None] | None = None) -> None:
        """Simulate until every job has ended. Every job must fit the empty cluster."""
        env = self.env
        peek, step = env.peek, env.step
        self._arm()
        due = False
        while True:
            at = peek()
            if due and at > self.now:
                due = False
                self.decisions += 1
                if self.backfill == ACCASIM:
                    self._decide_as_accasim(self.now)
                else:
                    self._decide(self.now)
                if self._waiting > self.longest_line:
                    self.longest_line = self._waiting
                continue
            if at == simpy.core.Infinity:
                if not self._waiting:
                    break
                self._await_promise()
                continue
            step()
            due = True
            self.events += 1
            if progress is not None and self.events % _PROGRESS_EVERY == 0:
                progress(self._next / len(self.submit))

    def _arm(self) -> None:
        if self._next < len(self.submit):
            self.env.timeout(self.submit[self._next] - self.now).callbacks.append(self._arrive)

    def _await_promise(self) -> None:
        """Nothing is under way, and the first still waits for the time that it was promised."""
        if self._shadow <= self.now:
            raise AssertionError("jobs wait on an empty cluster; report this with the workload")
        self.env.timeout(self._shadow - self.now, self._shadow).callbacks.append(self._promised)

    def _promised(self, event: Any) -> None:
        self.now = event.value

    def _arrive(self, _event: Any) -> None:
        submit, rank, fresh = self.submit, self.rank, self._fresh
        job, count = self._next, len(submit)
        now = self.now = submit[job]
        while job < count and submit[job] == now:
            fresh.append(rank[job])
            job += 1
        self._next = job
        self._arm()

    def _end(self, event: Any) -> None:
        job = event.value
        self.now = self.start[job] + self.run_us[job]
        self._freed = True
        nodes = self.nodes
        node = self.node[job]
        if self.processors is not None:
            self.processors.give(self.groups[job])
        elif node >= 0:
            nodes.take(node, -self.gpus[job])
        else:
            for where, gpus in self.pieces[job]:
                nodes.take(where, -gpus)
        if self._reserves:
            expected = self.start[job] + self.estimate[job]
            ends = self._ends
            del ends[bisect_left(ends, (expected, job))]
            if expected != self.now:
                self._stale = True

    # --- decisions ------------------------------------------------------------------------------------------------------

    def _decide(self, now: int) -> None:
        """Start whom the policy lets start now."""
        fresh = self._fresh
        blocked = self._waiting > 0 and not self._freed
        if fresh:
            fresh = self._admit(now, fresh)
        self._freed = False
        line = self._line
        head = NONE
        while self._waiting:
            head = line[0]
            job = self.job_at[head]
            if self.start[job] >= 0:
                heappop(line)
                continue
            if not self._place(job, now):
                break
            heappop(line)
            self._leave(head, job)
        if self.backfill and self._waiting > 1:
            if self.backfill == EASY and (self._stale or head != self._reserved_for or self._shadow <= now):
                self._reserve(head, self.gpus[self.job_at[head]], now)
                blocked = False
            if blocked and head not in fresh:
                for rank in fresh:
                    if self.start[self.job_at[rank]] < 0:
                        self._fill(rank, now)
            else:
                self._fill_all(now)

    def _decide_as_accasim(self, now: int) -> None:
        fresh = self._admit(now, self._fresh) if self._fresh else self._fresh
        line, job_at, promised = self._line, self.job_at, self._reserved_for
        freed, self._freed = self._freed, False
        if self._reserved_for != NONE and self._shadow <= now and self._place(job_at[self._reserved_for], now):
            self._waiting -= 1
            self._reserved_for = NONE
        while self._waiting and self._reserved_for == NONE:
            head = heappop(line)
            job = job_at[head]
            if self.start[job] >= 0:
                continue
            if self._place(job, now):
                self._leave(head, job)
            else:
                self._reserve(head, self.gpus[job], now)
                self._size_of[self.gpus[job]].go(head)
        if self._waiting > 1:
            if freed or promised == NONE or self._reserved_for != promised:
                self._fill_all(now)
            else:
                for rank in fresh:
                    self._fill(rank, now)

    def _admit(self, now: int, fresh: list[int]) -> list[int]:
        """Let those that came at this instant start when nobody waits, and wait otherwise; return those that wait."""
        self._fresh = []
        if len(fresh) > 1:
            fresh.sort()
        first = 0
        if not self._waiting:  # The line is empty, so this is what trying its head comes to.
            while first < len(fresh) and self._place(self.job_at[fresh[first]], now):
                first += 1
            if first:
                fresh = fresh[first:]
        line = self._line
        for rank in fresh:
            heappush(line, rank)
            if self.backfill:
                job = self.job_at[rank]
                self._size_of[self.gpus[job]].come(rank, self.estimate[job])
        self._waiting += len(fresh)
        return fresh

    def _leave(self, rank: int, job: int) -> None:
        self._waiting -= 1
        if self.backfill:
            self._size_of[self.gpus[job]].go(rank)

    def _place(self, job: int, now: int, closed: int = 0) -> bool:
        """Start a job if there is room on nodes that are not closed."""
        nodes, gpus = self.nodes, self.gpus[job]
        if self.processors is not None:
            if gpus > self.processors.total_free:
                return False
            self.groups[job] = self.processors.take(gpus)
        elif gpus > nodes.total_free:
            return False
        elif gpus <= nodes.per_node:
            node = nodes.pick(gpus, closed)
            if node < 0:
                return False
            nodes.take(node, gpus)
            self.node[job] = node
        else:
            pieces = nodes.pick_whole(gpus, closed)
            if pieces is None:
                return False
            self._take(job, pieces)
        self.start[job] = now
        self.env.timeout(self.run_us[job], job).callbacks.append(self._end)
        if self._reserves:
            insort(self._ends, (now + self.estimate[job], job))
        return True

    def _take(self, job: int, pieces: Pieces) -> None:
        take = self.nodes.take
        for node, gpus in pieces:
            take(node, gpus)
        self.pieces[job] = pieces

    # --- backfilling ----------------------------------------------------------------------------------------------------

    def _fill_all(self, now: int) -> None:
        """Start whoever may go ahead of the first, in the order of the line."""
        window = self._shadow - now if self.backfill == EASY else NONE - 1
        within = self.nodes.per_node if self.processors is None else self.processors.total_free
        while True:
            best = NONE
            anywhere, beside = self._rooms()
            for size in self._sizes:
                gpus = size.gpus
                if gpus > anywhere:
                    break
                shortest = size.tree[1]
                if shortest == NONE:
                    continue
                longest = NONE - 1
                if gpus > beside:
                    if gpus <= within:
                        longest = window
                    elif self._pick_whole_beside(gpus) is None:
                        longest = window if self.nodes.pick_whole(gpus) is not None else -1
                if shortest > longest:
                    continue
                rank = size.first(longest)
                if rank < best:
                    best = rank
            if best == NONE or not self._fill(best, now):
                return

    def _rooms(self) -> tuple[int, int]:
        """Return how large a job could be now, and how large one that is in nobody's way however long it takes."""
        nodes = self.nodes
        if self.processors is not None:
            free = self.processors.total_free
            return free, min(free, self._extra) if self.backfill == EASY else free
        levels = nodes.levels
        most = nodes.per_node
        while most and not levels[most]:
            most -= 1
        beside = most
        if self.backfill == EASY:
            open_nodes = ~self._closed
            while beside and not levels[beside] & open_nodes:
                beside -= 1
            if self._extra > beside and self._extra_node >= 0:
                beside = max(beside, min(self._extra, nodes.free[self._extra_node]))
        if most == nodes.per_node:
            most = nodes.total_free
        return most, beside

    def _pick_whole_beside(self, gpus: int) -> Pieces | None:
        return self.nodes.pick_whole(gpus, self._closed if self.backfill == EASY else 0)

    def _fill(self, rank: int, now: int) -> bool:
        """Start one job ahead of the first if that delays the first in no way, as far as estimates hold."""
        job = self.job_at[rank]
        gpus = self.gpus[job]
        if self.backfill != EASY or self.estimate[job] <= self._shadow - now:
            started = self._place(job, now)
        elif self.processors is not None:
            started = gpus <= self._extra and self._place(job, now)
            if started:
                self._extra -= gpus
        else:
            closed = self._closed
            if self._extra_node >= 0 and gpus <= self._extra:
                closed &= ~(1 << self._extra_node)
            started = self._place(job, now, closed)
            if started and self._extra_node >= 0 and self.node[job] == self._extra_node:
                self._extra -= gpus
        if started:
            self._leave(rank, job)
        return started

    def _reserve(self, rank: int, gpus: int, now: int) -> None:
        """Find when and where the first in line will have its room if running jobs take as long as expected."""
        self._reserved_for = rank
        self._stale = False
        if self.processors is not None:
            found = on_any(gpus, now, self._ends, self.gpus, self.processors.total_free)
        elif gpus <= self.nodes.per_node:
            found = on_one(gpus, now, self._ends, self.gpus, self.nodes, self.node, self.pieces)
        else:
            found = on_several(gpus, now, self._ends, self.gpus, self.nodes, self.node, self.pieces)
        self._shadow, self._closed, self._extra_node, self._extra = found
