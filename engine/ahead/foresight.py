"""When will it be done: promises for every live task, kept up to date, scored, and made for tasks that are not there yet.

`step` follows the journal and costs little; `look` is the forward run, as often as its caller can afford it. Nothing that it
knows is part of the scheduler's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final

import numpy as np

from engine.ahead.calibration import Calibration, Coverage, Score
from engine.ahead.draws import NORMALS, Floats
from engine.ahead.forward import Forward, durations_of
from engine.ahead.measured import Measured, is_terminal
from engine.ahead.order import in_order
from engine.ahead.picture import Painter, Picture
from engine.commands import Command, Notify
from engine.entities import Group, Task, Tenant
from engine.events import Event, TaskRevived, TaskStarted, TaskSubmitted
from engine.profile import Profile
from engine.state import State
from engine.tasks import TERMINAL_STATES, Estimate, Micros, TaskSpec, TaskState

MANY_PROMISES: Final = 1_000
"""Where more promises wait for their outcome, only one in `SAMPLE` new ones is scored: enough to learn from, and cheap."""
SAMPLE: Final = 8


@dataclass(frozen=True, slots=True)
class Promise:
    """When a task starts and ends, as times in microseconds; the start of a running task is the true one."""

    made_at: Micros
    position: int
    """Place in the order of service, from 1; 0: it has a place already."""
    start_p50: Micros
    start_p90: Micros
    finish_p50: Micros
    finish_p90: Micros


@dataclass(frozen=True, slots=True)
class _Columns:
    """Quantiles of many tasks as columns."""

    position: list[int]
    start_p50: list[float]
    start_p90: list[float]
    finish_p50: list[float]
    finish_p90: list[float]
    stratum: list[int]
    tenant: list[str]
    raw: dict[str, list[float]]
    """Quantile -> what the forward run itself said, as times."""


class Outlook:
    """What one look saw: a promise for each task that will get a place. It never changes, so any thread may read it."""

    __slots__ = ("_columns", "_index", "at", "waiting")

    def __init__(self, at: Micros, index: dict[str, int], columns: _Columns, waiting: int) -> None:
        self.at = at
        self.waiting = waiting
        """How many tasks wait for a place."""
        self._index = index
        self._columns = columns

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, req_no: str) -> bool:
        return req_no in self._index

    def of(self, req_no: str, tenant: str = "") -> Promise | None:
        """Return the promise of a task; None: it is not known (or another tenant's), over, or nobody can say when."""
        number = self._index.get(req_no)
        if number is None or (tenant and self._columns.tenant[number] != tenant):
            return None
        return self._promise(number)

    def _promise(self, number: int) -> Promise | None:
        columns = self._columns
        if columns.start_p90[number] == float("inf"):
            return None
        return Promise(
            self.at,
            columns.position[number],
            int(columns.start_p50[number]),
            int(columns.start_p90[number]),
            int(columns.finish_p50[number]),
            int(columns.finish_p90[number]),
        )

    def positions(self) -> dict[str, int]:
        """Return the place of every waiting task in the order of service."""
        return {name: place for name, number in self._index.items() if (place := self._columns.position[number])}

    def room_at(self, tenant: str = "") -> Micros | None:
        """Return when the first waiting task is likely to leave the queue (of a tenant, where one is named); None: never."""
        columns = self._columns
        starts = [
            start
            for start, position, owner in zip(columns.start_p50, columns.position, columns.tenant, strict=True)
            if position and (not tenant or owner == tenant)
        ]
        soonest = min(starts, default=float("inf"))
        return None if soonest == float("inf") else int(soonest)


NOTHING: Final = Outlook(0, {}, _Columns([], [], [], [], [], [], [], {}), 0)


@dataclass(slots=True)
class _Owed:
    """A promise that waits for its outcome."""

    stratum: int
    made_at: Micros
    due: dict[str, float]
    """Quantile -> when it is over, for those not yet judged."""
    raw_us: dict[str, float]
    """Quantile -> how far ahead the forward run itself saw it."""
    broken: dict[str, Score]
    """Quantile -> what was taken for its score when it broke."""


class Foresight:
    """Follows one scheduler. Deterministic: equal steps and looks give equal promises."""

    def __init__(self, state: State, profile: Profile, calibration: Calibration | None = None) -> None:
        self.calibration = calibration or Calibration()
        self.outlook: Outlook = NOTHING
        self._state, self._profile = state, profile
        self._measured = Measured(state.now)
        self._painter = Painter(profile, self._measured)
        self._forward = Forward(profile, self._painter, self._measured)
        self._live: dict[str, Task] = {task.req_no: task for task in state.live_tasks()}
        self._fresh: dict[str, None] = {}
        """Tasks that came since the last look: their first promise is the one that is scored."""
        self._owed: dict[str, _Owed] = {}
        self._dues: list[tuple[float, str, str]] = []
        self.changed = True
        """Whether anything happened since the last look."""

    @property
    def live(self) -> int:
        """Return the number of tasks that have not ended."""
        return len(self._live)

    @property
    def fresh(self) -> tuple[str, ...]:
        """Return the tasks that have no promise yet."""
        return tuple(self._fresh)

    def coverage(self, name: str = "finish_p90") -> Coverage:
        """Return how often promises held lately."""
        return self.calibration.coverage(name)

    def step(self, now: Micros, events: Sequence[Event], commands: Sequence[Command]) -> None:
        """Take in one step of the scheduler, after it."""
        if not events and not commands:
            self._judge(now)
            return
        self.changed = True
        self._measured.step(now, events, commands)
        tasks = self._state.tasks
        for event in events:
            if isinstance(event, TaskStarted):
                if event.req_no in self._owed:
                    self._outcome(now, event.req_no, ("start_p50", "start_p90"))
            elif isinstance(event, TaskSubmitted):
                name = event.task.req_no
                task = tasks.get(name)
                if task is not None and name not in self._live and task.state not in TERMINAL_STATES:
                    self._live[name] = task
                    self._fresh[name] = None
            elif isinstance(event, TaskRevived):
                task = tasks.get(event.req_no)
                if task is not None and task.state not in TERMINAL_STATES:
                    self._live[event.req_no] = task
        self._judge(now)
        for command in commands:
            # Most are orders and news of tasks that go on: identity is cheaper to ask than membership.
            if isinstance(command, Notify) and is_terminal(command.state):
                if command.state is TaskState.FINISHED:
                    self._outcome(now, command.req_no, ("start_p50", "start_p90", "finish_p50", "finish_p90"))
                self._live.pop(command.req_no, None)
                self._fresh.pop(command.req_no, None)
                self._owed.pop(command.req_no, None)
                self._painter.forget(command.req_no)

    def look(self) -> Outlook:
        """Run forward from now and renew every promise."""
        state = self._state
        picture = self._painter.paint(state, self._live.values())
        ordered = self._ordered(picture)
        self.outlook = outlook = self._foresee(picture, ordered)
        self._promise_first(outlook)
        self.changed = False
        return outlook

    def quote(self, spec: TaskSpec, estimate: Estimate | None) -> Promise | None:
        """Return the promise that a task would get if it were submitted now; None: nobody can say when it would start."""
        state = self._state
        picture = self._painter.paint(state, self._live.values())
        task = _supposed(state, spec, estimate)
        picture.waiting.append(task)
        try:
            return self._foresee(picture, self._ordered(picture)).of(spec.req_no)
        finally:
            self._painter.forget(spec.req_no)

    def _ordered(self, picture: Picture) -> list[Task]:
        waiting = picture.waiting
        return [waiting[index] for index in in_order(waiting, self._profile.ordering, picture.now, picture.at_once)]

    def _foresee(self, picture: Picture, ordered: list[Task]) -> Outlook:
        """Run forward and return calibrated promises."""
        now, calibration = picture.now, self.calibration
        waiters = [self._painter.waiter(task) for task in ordered]
        starts = self._forward.run(picture, waiters)
        finishes = starts + durations_of(waiters) if waiters else starts
        if picture.under:
            starts = np.concatenate([np.array([each.start for each in picture.under]), starts])
            finishes = np.concatenate([np.array([each.finish for each in picture.under]), finishes])
        tasks = [each.task for each in picture.under] + ordered
        under = len(picture.under)
        if not tasks:
            return Outlook(now, {}, NOTHING._columns, 0)
        start_50, start_90 = _quantiles(starts)
        finish_50, finish_90 = _quantiles(finishes)
        urgent = np.array([task.urgent for task in tasks])
        never = ~np.isfinite(start_90)
        raw = {"start_p50": start_50, "start_p90": start_90, "finish_p50": finish_50, "finish_p90": finish_90}
        strata = calibration.strata(np.where(never, 0.0, finish_90 - now), urgent)
        stretched = {
            name: now + calibration.stretch(name, np.maximum(0.0, np.where(never, 0.0, each) - now), strata)
            for name, each in raw.items()
        }
        running = np.array([task.state is TaskState.RUNNING for task in tasks])
        start_50 = np.where(running, start_50, stretched["start_p50"])
        start_90 = np.where(running, start_90, np.maximum(stretched["start_p90"], start_50))
        finish_50 = np.maximum(stretched["finish_p50"], start_50)
        finish_90 = np.maximum(np.maximum(stretched["finish_p90"], finish_50), start_90)
        start_90 = np.where(never, np.inf, start_90)
        columns = _Columns(
            [0] * under + list(range(1, len(ordered) + 1)),
            start_50.tolist(),
            start_90.tolist(),
            finish_50.tolist(),
            finish_90.tolist(),
            strata.tolist(),
            [task.spec.tenant for task in tasks],
            {name: each.tolist() for name, each in raw.items()},
        )
        index = {task.req_no: number for number, task in enumerate(tasks)}
        return Outlook(now, index, columns, len(ordered))

    # --- keeping score ---------------------------------------------------------------------------------------------------

    def _promise_first(self, outlook: Outlook) -> None:
        columns = outlook._columns
        for name in self._fresh:
            number = outlook._index.get(name)
            if number is None or columns.start_p90[number] == float("inf"):
                continue
            if len(self._owed) >= MANY_PROMISES and self._live[name].seq % SAMPLE:
                continue
            due = {"finish_p50": columns.finish_p50[number], "finish_p90": columns.finish_p90[number]}
            if self._live[name].state is not TaskState.RUNNING:
                due["start_p50"], due["start_p90"] = columns.start_p50[number], columns.start_p90[number]
            raw_us = {what: max(0.0, columns.raw[what][number] - outlook.at) for what in due}
            self._owed[name] = _Owed(columns.stratum[number], outlook.at, due, raw_us, {})
            for what, at in due.items():
                heappush(self._dues, (at, name, what))
        self._fresh.clear()

    def _judge(self, now: Micros) -> None:
        """Count promises as broken whose time is over."""
        dues = self._dues
        while dues and dues[0][0] < now:
            _, name, what = heappop(dues)
            owed = self._owed.get(name)
            if owed is not None and owed.due.pop(what, None) is not None:
                passed_us = now - owed.made_at
                owed.broken[what] = self.calibration.overdue(what, owed.stratum, owed.raw_us[what], passed_us)

    def _outcome(self, now: Micros, name: str, quantiles: Sequence[str]) -> None:
        """Judge promises of a task that started or ended."""
        owed = self._owed.get(name)
        if owed is None:
            return
        real_us = now - owed.made_at
        for what in quantiles:
            if owed.due.pop(what, None) is not None:
                self.calibration.came(what, owed.stratum, owed.raw_us[what], real_us)
            elif (score := owed.broken.pop(what, None)) is not None:
                self.calibration.corrected(what, owed.stratum, score, owed.raw_us[what], real_us)


def _supposed(state: State, spec: TaskSpec, estimate: Estimate | None) -> Task:
    """Return a task as it would stand if it were submitted now; the state is left as it is."""
    known = state.tenants.get(spec.tenant)
    tenant = Tenant(spec.tenant, state.next_tenant if known is None else known.seq)
    tenant.vtime = state.floor
    if known is not None:
        tenant.weight, tenant.max_running, tenant.running = known.weight, known.max_running, known.running
        tenant.credit = known.credit
        tenant.vtime = known.vtime if known.pending else max(known.vtime, state.floor)
    group: Group | None = None
    if spec.group:
        old = state.groups.get((spec.tenant, spec.group))
        group = Group(tenant, spec.group, state.next_group if old is None else old.seq)
        group.vtime = 0 if known is None else known.floor
        if old is not None:
            group.node, group.credit = old.node, old.credit
            group.vtime = old.vtime if old.pending else max(old.vtime, group.vtime)
    task = Task(spec, state.next_seq, tenant, group, state.now, estimate)
    task.admitted = True
    return task


def _quantiles(drawn: Floats) -> tuple[Floats, Floats]:
    """Return P50 and P90 of each row of draws."""
    drawn = np.sort(drawn, axis=1)
    count = NORMALS.shape[1]
    found = []
    for level in (0.5, 0.9):
        place = level * count - 0.5
        low = int(place)
        share = place - low
        upper = drawn[:, low + 1]
        lower = np.where(np.isfinite(upper), drawn[:, low], 0.0)  # infinity less infinity would be no number
        found.append(lower + share * (upper - lower))
    return found[0], found[1]
