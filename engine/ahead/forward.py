"""The forward run: who is served when, draw by draw, if places serve the waiting lines as the engine does.

A place that becomes free serves its own model's line first; an empty line leaves the place to another model, which loads. Urgent
tasks that are still to come overtake ordinary ones, and ordinary ones of the same line come between, at the measured rates. Far
back in a long line neighbours are run as one lump, whose length is an eighth of what each place has before it: so a run costs
about as many steps as there are places times the logarithm of the queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import exp, log
from statistics import NormalDist
from typing import Final

import numpy as np

from engine.ahead.draws import DRAWS, NORMALS, ROWS, Floats
from engine.ahead.measured import Measured
from engine.ahead.picture import ANY_NODE, Kind, LineKey, Painter, Picture, Place, Waiter, price_of
from engine.levels.ordering import ByPriority, Fifo
from engine.profile import Profile

LUMP: Final = 8
FAR_US: Final = 30 * 86_400 * 1_000_000
"""Nothing is foreseen beyond 30 days: a task that finds no place by then has no promise."""
MOST_BUSY: Final = 0.5
"""Most of the places that tasks still to come are taken to need, however fast they came lately: no flood lasts for ever."""
MOST_BUSY_AGEING: Final = 0.95
"""The same for ordinary tasks of one line, where those that wait for long are served first."""
FLOW_SPREAD: Final = 0.8
"""Standard deviation of the logarithm of how the rate of arrivals goes on, from the last quarter of an hour's."""
FLOWS: Final[list[float]] = [
    exp(FLOW_SPREAD * NormalDist().inv_cdf((int(f"{draw:04b}"[::-1], 2) + 0.5) / DRAWS)) for draw in range(DRAWS)
]
"""By draw: what the rates are multiplied by. With bits reversed every second draw has the lower half, every fourth a quarter.

Draws share runs where lines are long, and surges that made them so end; with the whole range long waits came out too long there.
"""
FIRST_BARE: Final = 4
"""How many lines without a Pod are looked at before a Pod serves on."""
_NOBODY: Final = 1 << 60
_LUCKS: Final = 4_096
LUCK: Final[list[list[float]]] = np.random.Generator(np.random.PCG64(100)).random((DRAWS, _LUCKS)).tolist()
"""Uniform numbers for each draw: the same in every run."""


@dataclass(slots=True)
class _Line:
    """Waiting tasks of one kind, as lumps."""

    kind: int
    node: int
    price: int
    slots: int
    gpu_models: tuple[str, ...]
    load_us: float
    """Median of what a new Pod takes until it is ready."""
    load_sigma: float
    rate: float
    """Ordinary tasks of this line still to come, a microsecond."""
    work: float
    lumps: list[int]
    left: int = 0


@dataclass(slots=True)
class _Plan:
    """Everything that is the same in every draw."""

    now: float
    lines: list[_Line]
    kinds: dict[Kind, int]
    kind_of: list[int]
    """By place; -1: nothing is loaded there."""
    warm: list[list[tuple[int, ...]]]
    """By node row and kind: lines that a Pod there may serve."""
    loads_us: list[float]
    """By kind: median of a load."""
    places: list[Place]
    size: list[int]
    urgent: list[bool]
    since: list[float]
    """When a lump's first task began to wait."""
    submitted: list[float]
    ages_at: list[float]
    line_of: list[int]
    tenant_of: list[int]
    room_of: dict[int, int]
    """Tenant -> how many more of its tasks may run now, for tenants that have a limit."""
    ends_of: dict[int, list[Floats]]
    """Tenant -> when its tasks end that run now."""
    urgent_rate: float
    urgent_work: float
    gathers: bool
    stands_loads: float
    """How many loads longer another task must have waited, in the same band, before a Pod with work changes its model."""
    stands_us: float
    serve_loads: int


class Forward:
    """Runs pictures."""

    def __init__(self, profile: Profile, painter: Painter, measured: Measured) -> None:
        self._profile = profile
        self._painter = painter
        self._measured = measured
        self._overtakes = not isinstance(profile.ordering, Fifo | ByPriority)

    def run(self, picture: Picture, ordered: Sequence[Waiter]) -> Floats:
        """Return the start of each waiting task in each draw, in microseconds: (tasks, draws), not finite where never."""
        count = len(ordered)
        if not count:
            return np.empty((0, DRAWS))
        if not picture.places:
            return np.full((count, DRAWS), np.inf)
        plan, lump_of = self._plan(picture, ordered)
        durations = durations_of(ordered)
        by_lump = np.argsort(lump_of, kind="stable")
        begins = np.flatnonzero(np.diff(lump_of[by_lump], prepend=-1))
        work = np.add.reduceat(durations[by_lump], begins, axis=0)
        starts = np.empty((len(plan.size), DRAWS))
        every = _stride(len(plan.size))
        for draw in range(0, DRAWS, every):
            starts[:, draw : draw + every] = np.array(_Draw(plan, draw, work[:, draw].tolist()).run())[:, None]
        inside = np.cumsum(durations[by_lump], axis=0) - durations[by_lump]
        inside -= np.repeat(inside[begins], np.diff(np.append(begins, count)), axis=0)
        result = np.empty((count, DRAWS))
        result[by_lump] = starts[lump_of[by_lump]] + inside
        ready = np.array([float(waiter.task.retry_at or 0) for waiter in ordered])
        if ready.any():
            result = np.maximum(result, ready[:, None])
        return self._preempting(picture, ordered, result)

    def _preempting(self, picture: Picture, ordered: Sequence[Waiter], starts: Floats) -> Floats:
        """Cap the starts of urgent tasks for which ordinary ones would be stopped."""
        profile = self._profile
        if not profile.preempt:
            return starts
        victims = sum(1 for each in picture.under if not each.task.urgent and each.task.spec.preemptible)
        for index, waiter in enumerate(ordered):
            if victims <= 0 or not waiter.task.urgent:
                break
            patient = max(picture.now, waiter.task.pending_since + profile.preempt_patience_us)
            mean, _ = self._painter.load((waiter.task.spec.method, waiter.task.spec.model))
            starts[index] = np.minimum(starts[index], patient + exp(mean) + 1_000_000)
            victims -= 1
        return starts

    def _plan(
        self, picture: Picture, ordered: Sequence[Waiter]
    ) -> tuple[_Plan, np.ndarray[tuple[int], np.dtype[np.int64]]]:
        keys: dict[LineKey, int] = {}
        lines: list[_Line] = []
        slots = _slots_by_kind(picture)
        plan = self._empty_plan(picture, lines)
        lump_of = np.empty(len(ordered), dtype=np.int64)
        depth: list[int] = []
        open_lump: list[int] = []
        room: list[int] = []
        age_us = self._profile.ordering.age_us
        for index, waiter in enumerate(ordered):
            line = keys.get(waiter.line)
            if line is None:
                line = keys[waiter.line] = len(lines)
                lines.append(self._line(plan.kinds, waiter.line, slots.get(waiter.line[0], 1)))
                depth.append(0)
                open_lump.append(-1)
                room.append(0)
            task = waiter.task
            lump = open_lump[line]
            limited = task.tenant.max_running > 0
            tenant = task.tenant.seq if limited else -1
            if lump < 0 or room[line] <= 0 or plan.urgent[lump] != task.urgent or plan.tenant_of[lump] != tenant:
                lump = open_lump[line] = len(plan.size)
                lines[line].lumps.append(lump)
                plan.size.append(0)
                plan.urgent.append(task.urgent)
                plan.since.append(float(task.pending_since))
                plan.submitted.append(float(task.submitted_at))
                plan.ages_at.append(float(task.submitted_at + age_us) if age_us else np.inf)
                plan.line_of.append(line)
                plan.tenant_of.append(tenant)
                room[line] = 1 if limited else max(1, depth[line] // (LUMP * slots.get(waiter.line[0], 1)))
                if limited:
                    plan.room_of.setdefault(tenant, max(0, task.tenant.max_running - task.tenant.running))
            plan.size[lump] += 1
            room[line] -= 1
            depth[line] += 1
            lines[line].left += 1
            lump_of[index] = lump
        for under in picture.under:
            if under.task.tenant.seq in plan.room_of:
                plan.ends_of.setdefault(under.task.tenant.seq, []).append(under.finish)
        _match(plan, self._painter)
        return plan, lump_of

    def _empty_plan(self, picture: Picture, lines: list[_Line]) -> _Plan:
        profile, measured = self._profile, self._measured
        there = {(place.kind[0], place.kind[1]) for place in picture.places if place.kind is not None}
        urgent = {base: measured.urgent_of(base) for base in measured.urgent_bases()}
        rate = sum(urgent.values())
        cold = sum(each for base, each in urgent.items() if base not in there) / rate if rate > 0 else 0.0
        loads = profile.warm_first_loads
        work = measured.urgent.work_us + 2 * cold * profile.reload_us
        if rate * work > MOST_BUSY * picture.at_once:
            rate = MOST_BUSY * picture.at_once / work
        return _Plan(
            now=float(picture.now),
            lines=lines,
            kinds={},
            kind_of=[],
            warm=[],
            loads_us=[],
            places=picture.places,
            size=[],
            urgent=[],
            since=[],
            submitted=[],
            ages_at=[],
            line_of=[],
            tenant_of=[],
            room_of={},
            ends_of={},
            urgent_rate=rate if self._overtakes else 0.0,
            urgent_work=work,
            gathers=profile.gather_us > 0,
            stands_loads=float(loads),
            stands_us=float(profile.warm_first_us),
            serve_loads=profile.serve_loads,
        )

    def _line(self, kinds: dict[Kind, int], key: LineKey, slots: int) -> _Line:
        kind, node = key
        mean, sigma = self._painter.load((kind[0], kind[1]))
        rate, work = self._measured.ordinary((kind[0], kind[1])) if self._overtakes else (0.0, 0.0)
        # Who ages is overtaken no more then, so that a flood may take nearly all until then.
        most = (MOST_BUSY_AGEING if self._profile.ordering.age_us else MOST_BUSY) * slots
        if rate * work > most:
            rate = most / work
        number = kinds.setdefault(kind, len(kinds))
        return _Line(number, node, price_of(kind), kind[2], kind[5], exp(mean), sigma, rate, work, [])


def _stride(lumps: int) -> int:
    """Return how many draws share one run: the more waits, the less does a single task's luck count."""
    return 1 if lumps < 500 else 2 if lumps < 2_000 else 4


def durations_of(ordered: Sequence[Waiter]) -> Floats:
    """Return the run time of each task in each draw, in microseconds: (tasks, draws)."""
    means = np.array([waiter.mean for waiter in ordered])
    sigmas = np.array([waiter.sigma for waiter in ordered])
    rows = np.array([waiter.row for waiter in ordered])
    drawn: Floats = np.exp(means[:, None] + sigmas[:, None] * NORMALS[rows])
    return drawn


def _slots_by_kind(picture: Picture) -> dict[Kind, int]:
    slots: dict[Kind, int] = {}
    for place in picture.places:
        if place.kind is not None:
            slots[place.kind] = slots.get(place.kind, 0) + len(place.free_at)
    return slots


def _match(plan: _Plan, painter: Painter) -> None:
    """Work out which lines a Pod of a kind on a node serves."""
    for place in plan.places:
        kind = place.kind
        plan.kind_of.append(-1 if kind is None else plan.kinds.setdefault(kind, len(plan.kinds)))
    plan.loads_us = [exp(painter.load((kind[0], kind[1]))[0]) for kind in plan.kinds]
    rows = 1 + max(place.node for place in plan.places)
    by_kind: list[list[int]] = [[] for _ in plan.kinds]
    for number, line in enumerate(plan.lines):
        by_kind[line.kind].append(number)
    anywhere = [tuple(n for n in numbers if plan.lines[n].node == ANY_NODE) for numbers in by_kind]
    plan.warm = [anywhere] * rows
    for row in {line.node for line in plan.lines if ANY_NODE < line.node < rows}:
        plan.warm[row] = [tuple(n for n in numbers if plan.lines[n].node in (ANY_NODE, row)) for numbers in by_kind]


class _Draw:
    """One draw of the run."""

    def __init__(self, plan: _Plan, draw: int, work: list[float]) -> None:
        self._plan = plan
        self._work = work
        places = plan.places
        self._kind = plan.kind_of.copy()
        self._busy = [len(place.free_at) for place in places]
        self._ready = [float(place.ready_us) for place in places]
        self._heap = [(float(free[draw]), number) for number, place in enumerate(places) for free in place.free_at]
        heapify(self._heap)
        self._head = [line.lumps[0] for line in plan.lines]
        """By line: the lump that is next, or `_NOBODY`."""
        self._next = [1] * len(plan.lines)
        self._left = [line.left for line in plan.lines]
        self._pods = [0] * len(plan.kinds)
        for kind in self._kind:
            if kind >= 0:
                self._pods[kind] += 1
        self._open = list(range(len(plan.lines)))
        self._bare: list[int] = []
        """Open lines whose model no Pod holds, in the order of their first tasks."""
        self._find_bare()
        self._starts = [float("inf")] * len(plan.size)
        self._luck: list[float] = LUCK[draw]
        self._luck_at = 0
        self._flow = FLOWS[draw]
        self._next_urgent = plan.now + self._gap(plan.urgent_rate)
        self._urgent_due = 0
        self._idle = 0
        self._next_ordinary = [plan.now + self._gap(line.rate) for line in plan.lines]
        self._ordinary_due = [0] * len(plan.lines)
        self._rooms = dict(plan.room_of)
        self._ends = {
            tenant: sorted(float(each[draw]) for each in plan.ends_of.get(tenant, [])) for tenant in plan.room_of
        }
        self._gathered: dict[int, list[tuple[float, int]]] = {}

    def run(self) -> list[float]:
        """Return the start of each lump."""
        heap, plan = self._heap, self._plan
        left = len(plan.size)
        alone = 8 * left + len(heap)
        """So many turns later nobody overtakes any more: a flood must not go on for ever."""
        far = plan.now + FAR_US
        while heap and left:
            alone -= 1
            at, place = heappop(heap)
            if at > far:
                break
            self._busy[place] -= 1
            lump, line = self._own(place, at)
            cold = self._cold(place, at, lump)
            if cold >= 0:
                served = self._load(place, cold, at)
            elif lump == _NOBODY:
                self._idle += 1  # it serves those who overtake
                continue
            elif alone > 0 and self._overtaken(place, lump, line, at):
                continue
            else:
                served = self._start(place, lump, line, at)
            left -= served
        return self._starts

    def _own(self, place: int, at: float) -> tuple[int, int]:
        """Return the lump that the Pod in a place would serve next, and its line."""
        kind = self._kind[place]
        best, found = _NOBODY, -1
        if kind >= 0:
            plan = self._plan
            for line in plan.warm[plan.places[place].node][kind]:
                if self._head[line] < best:
                    best, found = self._head[line], line
        return best, found

    def _cold(self, place: int, at: float, own: int) -> int:
        """Return the line whose model is loaded in a place instead of serving on, or -1."""
        if self._busy[place] > 0 or not self._open:
            return -1
        if own == _NOBODY:
            return self._next_model(place, at)
        plan, kind = self._plan, self._kind[place]
        if not self._bare or (plan.serve_loads and self._ready[place] + plan.serve_loads * plan.loads_us[kind] > at):
            return -1
        best, best_key = -1, (3, 0)
        for line in self._bare[:FIRST_BARE]:
            lump = self._head[line]
            if lump > own:
                break
            if _hosts(plan.places[place], plan.lines[line]):
                band = self._band(lump, at)
                if (band, lump) < best_key and self._may_leave(plan.lines[line], lump, own, band, at):
                    best, best_key = line, (band, lump)
        return best

    def _next_model(self, place: int, at: float) -> int:
        """Return the line that earns a place which serves nobody, or -1."""
        plan = self._plan
        here = plan.places[place]
        best, best_key = -1, (3, 0.0, 0)
        for line in self._open:
            each = plan.lines[line]
            if not _hosts(here, each):
                continue
            lump, pods = self._head[line], self._pods[each.kind]
            urgent = plan.urgent[lump]
            if pods and not urgent and not self._earns(each, line, lump, pods):
                continue
            worth = -self._left[line] / (pods + 1) if plan.gathers and not urgent else 0.0
            key = (0 if urgent else 1, worth, lump)
            if key < best_key:
                best, best_key = line, key
        return best

    def _earns(self, line: _Line, number: int, lump: int, pods: int) -> bool:
        """Tell whether one more Pod of a model is worth its load."""
        each = self._work[lump] / self._plan.size[lump]
        return self._left[number] * each >= line.load_us * pods

    def _may_leave(self, line: _Line, lump: int, own: int, band: int, at: float) -> bool:
        plan = self._plan
        if band < self._band(own, at):
            return plan.since[lump] + line.load_us <= at
        longer = plan.stands_loads * line.load_us if plan.stands_loads else plan.stands_us
        return plan.submitted[lump] + longer <= plan.submitted[own]

    def _band(self, lump: int, at: float) -> int:
        plan = self._plan
        return 0 if plan.urgent[lump] else 1 if plan.ages_at[lump] <= at else 2

    def _find_bare(self) -> None:
        lines, pods = self._plan.lines, self._pods
        self._bare = sorted(
            (line for line in self._open if not pods[lines[line].kind]), key=lambda line: self._head[line]
        )

    def _overtaken(self, place: int, lump: int, line: int, at: float) -> bool:
        """Let a task that was not there yet have the slot, if one has come by now that goes before."""
        plan = self._plan
        if plan.urgent[lump]:
            return False
        while self._next_urgent <= at:
            self._urgent_due += 1
            self._next_urgent += self._gap(plan.urgent_rate)
        if self._urgent_due and self._uniform() * len(self._kind) < self._idle:
            self._urgent_due -= 1  # by a place that serves nobody
        if self._urgent_due:
            self._urgent_due -= 1
            self._push(place, at + plan.urgent_work)
            return True
        each = plan.lines[line]
        if each.rate <= 0 or self._band(lump, at) < 2:
            return False
        while self._next_ordinary[line] <= at:
            self._ordinary_due[line] += 1
            self._next_ordinary[line] += self._gap(each.rate)
        due = self._ordinary_due[line]
        if due and self._uniform() * (due + self._left[line]) < due:
            self._ordinary_due[line] -= 1
            self._push(place, at + each.work)
            return True
        return False

    def _load(self, place: int, line: int, at: float) -> int:
        """Give a place to a line's model; return how many lumps were served."""
        plan = self._plan
        each, here = plan.lines[line], plan.places[place]
        if each.price > here.price:
            gathered = self._gathered.setdefault(line, [])
            gathered.append((at, place))
            if sum(plan.places[number].price for _, number in gathered) < each.price:
                return 0
            del self._gathered[line]
        else:
            gathered = [(at, place)]
        took = each.load_us * exp(each.load_sigma * NORMALS[(line * 7 + place) % ROWS][0])
        ready = max(when for when, _ in gathered) + took
        for _, number in gathered:
            if self._kind[number] >= 0:
                self._pods[self._kind[number]] -= 1
            self._kind[number] = each.kind
            self._ready[number] = ready
        self._pods[each.kind] += len(gathered)
        self._find_bare()
        lump = self._head[line]
        if len(gathered) > 1:
            self._take(line, lump, ready)
            for _, number in gathered:
                self._push(number, ready + self._work[lump])
            return 1
        served = self._start(place, lump, line, ready)
        together = each.slots * (max(1, here.price // each.price) if each.price else 1)
        for _ in range(together - 1):
            self._push(place, ready)
        return served

    def _start(self, place: int, lump: int, line: int, at: float) -> int:
        """Start a lump in a place, unless its tenant runs all it may; return how many lumps were served."""
        tenant = self._plan.tenant_of[lump]
        if tenant >= 0:
            at = self._wait_for_tenant(tenant, at, self._work[lump])
        self._take(line, lump, at)
        self._push(place, at + self._work[lump])
        return 1

    def _wait_for_tenant(self, tenant: int, at: float, work: float) -> float:
        """Return when a tenant with a limit may run one more; its tasks hold on to their places meanwhile."""
        ends = self._ends[tenant]
        if self._rooms[tenant] > 0:
            self._rooms[tenant] -= 1
        elif ends:
            at = max(at, heappop(ends))
        heappush(ends, at + work)
        return at

    def _take(self, line: int, lump: int, at: float) -> None:
        self._starts[lump] = at
        self._left[line] -= self._plan.size[lump]
        lumps, following = self._plan.lines[line].lumps, self._next[line]
        if following < len(lumps):
            self._head[line] = lumps[following]
            self._next[line] = following + 1
        else:
            self._head[line] = _NOBODY
            self._open.remove(line)
            if line in self._bare:
                self._bare.remove(line)

    def _push(self, place: int, at: float) -> None:
        self._busy[place] += 1
        heappush(self._heap, (at, place))

    def _uniform(self) -> float:
        self._luck_at = at = (self._luck_at + 1) % _LUCKS
        return self._luck[at]

    def _gap(self, rate: float) -> float:
        """Return the time to the next arrival, in microseconds."""
        return -log(1.0 - self._uniform()) / (rate * self._flow) if rate > 0 else float("inf")


def _hosts(place: Place, line: _Line) -> bool:
    """Tell whether a Pod of a line may be created in a place (or, where it is larger, in several together)."""
    if line.node not in (ANY_NODE, place.node):
        return False
    if not line.price:
        return not place.price
    if not place.price:
        return False
    return not line.gpu_models or place.gpu_model in line.gpu_models
