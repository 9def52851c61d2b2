"""Reservations: when and where tasks that find no room now will have it, and what others may do until then.

Times follow from predictions (`endings`). A plan is made anew in every step, from the state alone. Where whole GPUs are given it
counts (`timeline`); elsewhere it plays a node forward on the node's plain values, device by device, and takes everything back
before it returns. As long as predictions hold, nobody who starts under a plan delays a reservation in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from engine.entities import Node, Pod, Task
from engine.fit import Fit, places_on
from engine.kinds import RoomLine, Shape
from engine.levels.endings import Release, ends_at, releases, run_of
from engine.levels.room import has_room
from engine.levels.timeline import Need, Timeline, held_by, is_uniform, need_of
from engine.resources import WHOLE_GPU, Demand, GpuGrant
from engine.tasks import NEVER, Affinity, Micros
from engine.turn import Turn


@dataclass(frozen=True, slots=True)
class Reservation:
    """Room for `count` Pods of a demand on one node, over a span of time."""

    start: Micros
    end: Micros
    fit: Fit
    count: int
    req_no: str = ""


class Plan:
    """The reservations of one step."""

    __slots__ = ("_ends", "_lines", "_needs", "_soonest", "_turn", "made", "rows")

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._ends: dict[int, list[Release]] = {}
        self._lines: dict[int, Timeline | None] = {}
        """By row; None for nodes whose devices must be looked at one by one."""
        self._needs: dict[tuple[Fit, int], Need] = {}
        self._soonest: dict[tuple[Fit, Micros], dict[int, Micros]] = {}
        """Per demand and least run time, by row: when such a run could start when that was asked last."""
        self.rows: dict[int, list[Reservation]] = {}
        self.made = 0
        """Tasks that have a reservation."""

    def changed(self, node: Node) -> None:
        """Note that something was placed on a node."""
        self._ends.pop(node.index, None)
        self._lines.pop(node.index, None)

    # --- may it start? -------------------------------------------------------------------------------------------------

    def allows(self, node: Node, fit: Fit, count: int, run_us: Micros) -> bool:
        """Tell whether Pods may be started on a node now and stay that long without delaying a reservation there."""
        if node.index not in self.rows:
            return True
        now = self._turn.now
        line = self._line(node) if _counts(fit) else None
        if line is not None:
            return line.holds(self._need(fit, count), now, now + run_us)
        return self._holds(node, Reservation(now, now + run_us, fit, count))

    def allows_in(self, pod: Pod, run_us: Micros) -> bool:
        """Tell whether a Pod may go on for that long without delaying a reservation on its node."""
        if pod.node.index not in self.rows:
            return True
        line, until = self._line(pod.node), self._turn.now + run_us
        if line is not None:
            amounts = self._turn.state.cluster.amounts(pod.demand)
            return line.holds(held_by(amounts, pod.grants), ends_at(self._turn, pod), until)
        return self._holds(pod.node, None, pod.number, until)

    def blamed(self, node: Node) -> str:
        """Return for whom a node is reserved first."""
        return self.rows[node.index][0].req_no if node.index in self.rows else ""

    def reserved_for(self) -> str:
        """Return for whom anything is reserved first."""
        return next((each[0].req_no for each in self.rows.values()), "")

    def in_the_way(self, task: Task) -> dict[int, list[Pod]]:
        """Return the idle Pods, by row, that must go for a task whose room is reserved; those idle longest go first."""
        cluster, idle = self._turn.state.cluster, self._turn.backlog.idle
        found: dict[int, list[Pod]] = {}
        for row, reserved in self.rows.items():
            node = cluster.nodes[row]
            for each in reserved:
                if each.req_no == task.req_no:
                    pods = [p for p in node.pods.values() if p.number in idle and not self._turn.is_kept(p)]
                    pods.sort(key=lambda pod: (pod.idle_since, pod.number))
                    found[row] = self._spared(node, each, pods)
        return found

    def _spared(self, node: Node, wanted: Reservation, idle: list[Pod]) -> list[Pod]:
        """Return as many of the idle Pods as a reservation needs to go, besides those that are going anyway."""
        cluster = self._turn.state.cluster
        going = [p for p in node.pods.values() if p.number not in self._turn.backlog.idle]
        free = [p for p in going if ends_at(self._turn, p) <= self._turn.now + 1]
        for pod in free:
            cluster.suppose(node, pod.grants, pod.demand, 1)
        gone: list[Pod] = []
        for pod in idle:
            if not wanted.fit.empty and has_room(self._turn, node, wanted.fit, wanted.count):
                break
            cluster.suppose(node, pod.grants, pod.demand, 1)
            gone.append(pod)
        for pod in [*free, *gone]:
            cluster.suppose(node, pod.grants, pod.demand, -1)
        return gone

    # --- when will it start? -------------------------------------------------------------------------------------------

    def reserve(self, task: Task, line: RoomLine, shape: Shape) -> Micros:
        """Reserve the earliest room for a task; return when that is, NEVER when no node can be foreseen to have it."""
        members = task.spec.members
        if members == 1 or line.node >= 0 or self._together(task):
            found = self._earliest_on_one(task, line, members)
        else:
            found = self._earliest_anywhere(task, line, members)
        if found is None:
            return NEVER
        start, counts = found
        end = start + run_of(task)
        for row, count in counts.items():
            self.rows.setdefault(row, []).append(Reservation(start, end, line.fit, count, task.req_no))
            counted = self._lines.get(row)
            if counted is not None and _counts(line.fit):
                counted.take(start, end, self._need(line.fit, count))
            else:
                self._lines.pop(row, None)
        self.made += 1
        return start

    def forget(self, task: Task) -> None:
        """Drop the reservation of a task again."""
        for row in list(self.rows):
            self.rows[row] = [each for each in self.rows[row] if each.req_no != task.req_no]
            if not self.rows[row]:
                del self.rows[row]
        self._lines.clear()
        self._soonest.clear()
        self.made -= 1

    def _together(self, task: Task) -> bool:
        return task.group is not None and task.spec.affinity in (Affinity.STRICT, Affinity.EXCLUSIVE)

    def _nodes(self, task: Task, line: RoomLine) -> list[Node]:
        """Return the nodes that could hold a task once others have gone."""
        cluster, waiting = self._turn.state.cluster, self._turn.backlog.waiting
        assert waiting is not None
        able = waiting.able(line.fit.demand)
        nodes = cluster.nodes if line.node < 0 else [cluster.nodes[line.node]]
        return [
            node
            for node in nodes
            if node.up and not node.draining and node.exclusive in (None, task.group) and able[node.index]
        ]

    def _earliest_on_one(self, task: Task, line: RoomLine, count: int) -> tuple[Micros, dict[int, int]] | None:
        run_us = run_of(task)
        if count == 1 and _counts(line.fit):
            return self._earliest_by_count(task, line, run_us)
        best, row = NEVER, -1
        for node in self._nodes(task, line):
            if count > 1 and places_on(self._turn.state.cluster, node, line.fit.demand, count) < count:
                continue
            start = self._first_time(node, line.fit, count, run_us, best)
            if start < best:
                best, row = start, node.index
        return None if row < 0 else (best, {row: count})

    def _earliest_by_count(self, task: Task, line: RoomLine, run_us: Micros) -> tuple[Micros, dict[int, int]] | None:
        """Ask the nodes' timelines, those first that had room soonest when they were asked last.

        What was answered stays a bound: without reservations until something on the node changes, also in later steps; with them as
        long as this plan only grows, for runs that are no shorter.
        """
        fit, soon = line.fit, self._turn.now + 1
        need, least = self._need(fit, 1), 1 << (run_us.bit_length() - 1)
        bounds, always = self._soonest.setdefault((fit, least), {}), self._known(fit)
        order = sorted((max(bounds.get(n.index, 0), always.get(n.index, 0)), n.index) for n in self._nodes(task, line))
        best, row = NEVER, -1
        for at_least, index in order:
            if (at_least, index) >= (best, row) and row >= 0:
                break
            node = self._turn.state.cluster.nodes[index]
            counted = self._line(node)
            if counted is None:
                start = self._first_time(node, fit, 1, run_us, best)
            elif index not in self.rows:
                start = bounds[index] = counted.earliest(need, 1, soon, NEVER)
                if not self._turn.state.claims:
                    always[index] = start
            else:
                start = bounds[index] = counted.earliest(need, least, soon, NEVER)
                if start <= best and start != NEVER and least != run_us:
                    start = counted.earliest(need, run_us, start, min(best + 1, NEVER))
            if start < best or (start == best != NEVER and index < row):
                best, row = start, index
        return None if row < 0 else (best, {row: 1})

    def _known(self, fit: Fit) -> dict[int, Micros]:
        """Return, by row, when a demand has room at the soonest if nothing is reserved, as far as earlier steps found out.

        Ends that are expected only move backwards while nothing changes on a node, unless deployments decide which Pods stay.
        """
        waiting = self._turn.backlog.waiting
        if waiting is None or self._turn.state.deployments:
            return {}
        return waiting.soonest(fit)

    def _earliest_anywhere(self, task: Task, line: RoomLine, count: int) -> tuple[Micros, dict[int, int]] | None:
        """Take the first moment at which enough nodes together have room."""
        run_us = run_of(task)
        offers: list[tuple[Micros, int]] = []
        for node in self._nodes(task, line):
            if node.index not in self.rows:
                counted = self._line(node) if _counts(line.fit) else None
                if counted is not None:
                    need = self._need(line.fit, 1)
                    times = counted.offers(need, count, self._turn.now + 1, NEVER)
                else:
                    times = self._times(node, line.fit, count)
                offers += [(at, node.index) for at in times]
                continue
            for several in range(1, count + 1):
                at = self._first_time(node, line.fit, several, run_us, NEVER)
                if at == NEVER:
                    break
                offers.append((at, node.index))
        offers.sort()
        while len(offers) >= count:
            start = offers[count - 1][0]
            counts: dict[int, int] = {}
            for _, row in offers[:count]:
                counts[row] = counts.get(row, 0) + 1
            wrong = self._wrong(counts, line.fit, start, run_us)
            if not wrong:
                return start, counts
            offers = [offer for offer in offers if offer[1] not in wrong]
        return None

    def _wrong(self, counts: dict[int, int], fit: Fit, start: Micros, run_us: Micros) -> list[int]:
        """Return the nodes with reservations on which a gang's common start would not hold after all."""
        nodes = self._turn.state.cluster.nodes
        return [
            row
            for row, count in counts.items()
            if row in self.rows and not self._holds(nodes[row], Reservation(start, start + run_us, fit, count))
        ]

    def _first_time(self, node: Node, fit: Fit, count: int, run_us: Micros, before: Micros) -> Micros:
        """Return when a node first has room for `count` Pods that stay for `run_us`, if that is sooner than `before`."""
        line = self._line(node) if _counts(fit) else None
        if line is not None:
            return line.earliest(self._need(fit, count), run_us, self._turn.now + 1, before)
        if node.index not in self.rows:
            times = self._times(node, fit, count, before)
            return times[count - 1] if len(times) >= count else NEVER
        soon = self._turn.now + 1
        candidates = {soon, *(release[0] for release in self._releases(node))}
        candidates.update(each.end for each in self.rows[node.index])
        for start in sorted(candidates):
            if start >= before or start == NEVER:
                break
            if start >= soon and self._holds(node, Reservation(start, start + run_us, fit, count)):
                return start
        return NEVER

    def _times(self, node: Node, fit: Fit, count: int, before: Micros = NEVER) -> list[Micros]:
        """Return when a node without reservations has room for one, two, ... `count` Pods as those in it end."""
        cluster, demand = self._turn.state.cluster, fit.demand
        undo: list[tuple[tuple[GpuGrant, ...], Demand, int]] = []
        times: list[Micros] = []
        soon = self._turn.now + 1
        releases = self._releases(node)
        left = len(releases)
        for at, _, grants, held in [(soon, 0, (), _NOTHING), *releases]:
            if at >= before or at == NEVER:
                break
            cluster.suppose(node, grants, held, 1)
            undo.append((grants, held, -1))
            left -= held is not _NOTHING
            while len(times) < count and fit.fits(node) and not (fit.empty and left):
                taken = fit.grants(node)
                assert taken is not None
                cluster.suppose(node, taken, demand, -1)
                undo.append((taken, demand, 1))
                times.append(max(at, soon))
            if len(times) == count:
                break
        for grants, held, sign in reversed(undo):
            cluster.suppose(node, grants, held, sign)
        return times

    def _holds(self, node: Node, wanted: Reservation | None, moved: int = 0, moved_to: Micros = 0) -> bool:
        """Play a node forward: tell whether every reservation on it, and the wanted one, finds its room at its time.

        The Pod `moved` ends at `moved_to` instead of when it would.
        """
        cluster, demand_of = self._turn.state.cluster, self.rows.get(node.index, [])
        events: list[tuple[Micros, int, int, tuple[GpuGrant, ...], Demand]] = [
            (moved_to if moved and number == moved else at, 0, order, grants, held)
            for order, (at, number, grants, held) in enumerate(self._releases(node))
        ]
        alive = order = len(events)
        steps = [*demand_of] if wanted is None else [*demand_of, wanted]
        events += [(each.start, 1, index, (), each.fit.demand) for index, each in enumerate(steps)]
        heapify(events)
        undo: list[tuple[tuple[GpuGrant, ...], Demand, int]] = []
        left, good = len(steps), True
        while left and good:
            _, kind, index, grants, held = heappop(events)
            if kind == 0:
                cluster.suppose(node, grants, held, 1)
                undo.append((grants, held, -1))
                alive -= 1
                continue
            left -= 1
            step = steps[index]
            for _ in range(step.count):
                taken = step.fit.grants(node) if step.fit.fits(node) and not (step.fit.empty and alive) else None
                if taken is None:
                    good = False
                    break
                cluster.suppose(node, taken, held, -1)
                undo.append((taken, held, 1))
                order += 1
                heappush(events, (step.end, 0, order, taken, held))
                alive += 1
        for grants, held, sign in reversed(undo):
            cluster.suppose(node, grants, held, sign)
        return good

    def _need(self, fit: Fit, count: int) -> Need:
        need = self._needs.get((fit, count))
        if need is None:
            need = need_of(self._turn.state.cluster.amounts(fit.demand), fit.demand, count)
            self._needs[fit, count] = need
        return need

    def _line(self, node: Node) -> Timeline | None:
        """Return a node's timeline, or None where counts do not say whether something fits."""
        row = node.index
        if row in self._lines:
            return self._lines[row]
        cluster, line = self._turn.state.cluster, None
        reserved = self.rows.get(row, ())
        claims = self._turn.state.claims
        whole = not claims or all(
            grant.share == WHOLE_GPU for claim in claims.values() if claim.node is node for grant in claim.grants
        )
        if whole and is_uniform(node) and all(_counts(each.fit) for each in reserved):
            line = Timeline(node, self._turn.now)
            for at, _, grants, held in self._releases(node):
                line.release(at, held_by(cluster.amounts(held), grants))
            for each in reserved:
                line.take(each.start, each.end, self._need(each.fit, each.count))
        self._lines[row] = line
        return line

    def _releases(self, node: Node) -> list[Release]:
        known = self._ends.get(node.index)
        if known is None:
            known = self._ends[node.index] = releases(self._turn, node)
        return known


def _counts(fit: Fit) -> bool:
    """Tell whether a demand takes whole GPUs or none, on any node."""
    demand = fit.demand
    return not fit.empty and (not demand.gpus or demand.gpu_share == WHOLE_GPU)


_NOTHING = Demand(gpus=0)
