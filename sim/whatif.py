"""What if there were more nodes, another policy, more load? Two futures of one journal side by side, tenant by tenant.

Both futures begin at the same moment and, seed by seed, meet the same arrivals, run times and Pod starts, so that the interval of
the paired difference says whether the change matters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table

from engine import snapshot
from engine.commands import Command, Notify
from engine.events import Event, TaskFailed, TaskFinished, TaskStarted, TaskStopped, TaskSubmitted
from engine.state import State
from engine.tasks import SECOND, TERMINAL_STATES, Micros, TaskSpec, TaskState
from sim.fork import Change, Fork, ForkError, run_forward
from sim.paired import Difference, difference

ALL = "(all)"
OTHERS = "(others)"
_TENANTS = 50
"""Tenants that are told apart; the rest are ``(others)``."""
_HOUR_US = 3600 * SECOND
MEASURES = (
    "mean waiting, s",
    "p99 waiting, s",
    "mean completion, s",
    "p99 completion, s",
    "GPU hours",
    "finished",
    "failed",
)

Progress = Callable[[float, str], None]


@dataclass(slots=True)
class _Open:
    spec: TaskSpec
    tenant: str
    since: Micros
    """When waiting begins to count: the fork, or the submission after it."""
    waits: bool
    runs: dict[tuple[int, int], Micros]
    """(attempt, rank) -> start of what runs now; before the fork, the fork."""


class Tally:
    """Folds one future, tenant by tenant; a journal. Time before the fork does not count."""

    def __init__(self, state: State, tenants: Sequence[str]) -> None:
        self._told_apart = set(tenants)
        self._open: dict[str, _Open] = {}
        self.waits: dict[str, list[Micros]] = {}
        self.stays: dict[str, list[Micros]] = {}
        self.gpu_us: dict[str, float] = {}
        self.failed: dict[str, int] = {}
        self.submitted = 0
        for task in state.live_tasks():
            known = self._enter(task.spec, state.now, waits=task.state in (TaskState.PENDING, TaskState.BACKOFF))
            known.waits = known.waits or task.state in (TaskState.BOUND, TaskState.STARTING)
            for rank in range(len(task.pods)):
                if task.rank_started >> rank & 1 and task.live >> rank & 1:
                    known.runs[task.attempt, rank] = state.now

    def __call__(self, now: Micros, events: Sequence[Event], commands: Sequence[Command]) -> None:
        """Fold one step in."""
        for event in events:
            match event:
                case TaskSubmitted(task) if task.req_no not in self._open:
                    self.submitted += 1
                    self._enter(task, now, waits=True)
                case TaskStarted(req_no, attempt, rank) if req_no in self._open:
                    known = self._open[req_no]
                    known.runs[attempt, rank] = now
                    if known.waits:
                        known.waits = False
                        self._add(self.waits, known, now - known.since)
                case TaskFinished(req_no, attempt, rank) | TaskStopped(req_no, attempt, rank) if req_no in self._open:
                    self._end(self._open[req_no], (attempt, rank), now)
                case TaskFailed(req_no, attempt, _, rank) if req_no in self._open:
                    self._end(self._open[req_no], (attempt, rank), now)
                case _:
                    pass
        for command in commands:
            if isinstance(command, Notify) and command.req_no in self._open:
                self._heed(now, command)

    def measures(self) -> dict[tuple[str, str], float]:
        """Return every measure by (tenant, name); those that have no data are left out."""
        found: dict[tuple[str, str], float] = {}
        tenants = sorted(self.waits.keys() | self.stays.keys() | self.gpu_us.keys() | self.failed.keys())
        for tenant in tenants:
            for name, values in (("waiting", self.waits.get(tenant)), ("completion", self.stays.get(tenant))):
                if values:
                    found[tenant, f"mean {name}, s"] = float(np.mean(values)) / SECOND
                    found[tenant, f"p99 {name}, s"] = float(np.quantile(values, 0.99)) / SECOND
            found[tenant, "GPU hours"] = self.gpu_us.get(tenant, 0.0) / _HOUR_US
            found[tenant, "finished"] = float(len(self.stays.get(tenant, ())))
            found[tenant, "failed"] = float(self.failed.get(tenant, 0))
        return found

    @property
    def unfinished(self) -> int:
        """Tasks that were never over."""
        return len(self._open)

    def _enter(self, spec: TaskSpec, now: Micros, waits: bool) -> _Open:
        tenant = spec.tenant if spec.tenant in self._told_apart else OTHERS
        known = self._open[spec.req_no] = _Open(spec, tenant, now, waits, {})
        return known

    def _end(self, known: _Open, key: tuple[int, int], now: Micros) -> None:
        began = known.runs.pop(key, None)
        if began is not None:
            demand = known.spec.demand
            weight = demand.gpus * demand.gpu_share / 1000 / known.spec.slots
            for tenant in (ALL, known.tenant):
                self.gpu_us[tenant] = self.gpu_us.get(tenant, 0.0) + (now - began) * weight

    def _heed(self, now: Micros, notice: Notify) -> None:
        known = self._open[notice.req_no]
        if notice.state in TERMINAL_STATES or notice.state in (TaskState.BACKOFF, TaskState.PENDING):
            # However an attempt ended - its Pod may have died - it runs no more.
            for key in list(known.runs):
                self._end(known, key, now)
        if notice.state not in TERMINAL_STATES:
            return
        del self._open[notice.req_no]
        if notice.state is TaskState.FINISHED:
            self._add(self.stays, known, now - known.since)
        elif notice.state is not TaskState.CANCELLED:
            for tenant in (ALL, known.tenant):
                self.failed[tenant] = self.failed.get(tenant, 0) + 1

    def _add(self, table: dict[str, list[Micros]], known: _Open, value: Micros) -> None:
        for tenant in (ALL, known.tenant):
            table.setdefault(tenant, []).append(value)


@dataclass(frozen=True, slots=True)
class Line:
    """One measure of one tenant in both futures."""

    tenant: str
    measure: str
    unchanged: float
    changed: float
    half_width: float
    """Of the 95% interval of the mean difference, by Student's t over the seeds."""
    clear: bool
    """Whether the interval leaves out zero."""


@dataclass(frozen=True, slots=True)
class WhatIf:
    """The answer: two futures of one moment."""

    at_us: Micros
    waiting: int
    running: int
    nodes: int
    profile: str
    """Of the unchanged future."""
    change: dict[str, Any]
    window_hours: float
    horizon_hours: float
    seeds: int
    arrivals: tuple[float, float]
    """Mean number of tasks that arrive after the fork, unchanged and changed."""
    unfinished: tuple[int, int]
    """Tasks that were never over, over all seeds: they found no room for ever."""
    lines: tuple[Line, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"schema": 1, **asdict(self)}


def compare_futures(
    fork: Fork,
    unchanged: Change,
    changed: Change,
    *,
    hours: float | None = None,
    window_hours: float | None = None,
    seeds: int = 5,
    first_seed: int = 0,
    on_progress: Progress | None = None,
) -> WhatIf:
    """Run both futures over several seeds and compare them tenant by tenant.

    `window_hours` of the journal before the fork arrive once more (None: all of it, at most 24) for `hours` (None: as long as the
    window); both run on until everything is over. Raises ForkError.
    """
    if not 2 <= seeds <= 1_000:
        raise ForkError(f"seeds: an interval needs at least 2 and at most 1000, got {seeds}")
    for name, value in (("hours", hours), ("window_hours", window_hours)):
        if value is not None and not 0 <= value <= 24 * 366:
            raise ForkError(f"{name}: must be at least 0 and at most a year, got {value}")
    recorded_us = fork.recorded_us
    window_us = min(recorded_us, 24 * _HOUR_US if window_hours is None else round(window_hours * _HOUR_US))
    horizon_us = window_us if hours is None else round(hours * _HOUR_US)
    state = snapshot.restore(fork.state)
    tenants = _tenants(fork, state)
    tallies: list[tuple[Tally, Tally]] = []
    for number in range(seeds):
        pair = []
        for side, change in enumerate((unchanged, changed)):
            tally = Tally(state, tenants)
            run_forward(fork, change, tally, seed=first_seed + number, window_us=window_us, horizon_us=horizon_us)
            pair.append(tally)
            if on_progress is not None:
                on_progress((2 * number + side + 1) / (2 * seeds), f"seed {number + 1} of {seeds}")
        tallies.append((pair[0], pair[1]))
    live = state.live_tasks()
    return WhatIf(
        at_us=fork.now,
        waiting=sum(task.state in (TaskState.PENDING, TaskState.BACKOFF) for task in live),
        running=sum(task.state in (TaskState.RUNNING, TaskState.STOPPING) for task in live),
        nodes=sum(node.up for node in state.cluster.nodes),
        profile=unchanged.profile.name,
        change=_described(unchanged, changed),
        window_hours=window_us / _HOUR_US,
        horizon_hours=horizon_us / _HOUR_US,
        seeds=seeds,
        arrivals=(_mean(pair[0].submitted for pair in tallies), _mean(pair[1].submitted for pair in tallies)),
        unfinished=(sum(pair[0].unfinished for pair in tallies), sum(pair[1].unfinished for pair in tallies)),
        lines=_lines(tallies),
    )


def _tenants(fork: Fork, state: State) -> list[str]:
    """Return the tenants with the most tasks, as many as are told apart."""
    counts: dict[str, int] = {task.spec.tenant: 1 for task in state.live_tasks()}
    for record in fork.history:
        for event in record.events:
            if isinstance(event, TaskSubmitted):
                counts[event.task.tenant] = counts.get(event.task.tenant, 0) + 1
    return sorted(counts, key=lambda name: (-counts[name], name))[:_TENANTS]


def _described(unchanged: Change, changed: Change) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if changed.profile != unchanged.profile:
        found["profile"] = changed.profile.name
    for name, pools in (("add_nodes", changed.add), ("remove_nodes", changed.remove)):
        if pools:
            found[name] = [f"{pool.nodes}x{pool.gpu_model}" + (f":{pool.gpus}" if pool.gpus else "") for pool in pools]
    if changed.load != unchanged.load:
        found["load"] = changed.load
    return found


def _mean(values: Iterable[int]) -> float:
    counted = list(values)
    return sum(counted) / len(counted)


def _lines(tallies: Sequence[tuple[Tally, Tally]]) -> tuple[Line, ...]:
    measured = [(before.measures(), after.measures()) for before, after in tallies]
    tenants = sorted(
        {tenant for before, after in measured for tenant, _ in (*before, *after)}, key=lambda name: (name != ALL, name)
    )
    lines = []
    for tenant in tenants:
        for name in MEASURES:
            pairs = [
                (before[tenant, name], after[tenant, name])
                for before, after in measured
                if (tenant, name) in before and (tenant, name) in after
            ]
            if len(pairs) < 2 or (name == "failed" and not any(any(pair) for pair in pairs)):
                continue
            found: Difference = difference("", name, pairs)
            changed = found.baseline_mean + found.mean
            lines.append(Line(tenant, name, found.baseline_mean, changed, found.half_width, found.clear))
    return tuple(lines)


def render(answer: WhatIf) -> Table:
    """Return the answer as a table for people."""
    table = Table(title=describe(answer), title_justify="left")
    for heading in ("tenant", "measure", "as it is", "changed", "difference", "95% interval", ""):
        table.add_column(heading, justify="left" if heading in {"tenant", "measure", ""} else "right")
    last = ""
    for line in answer.lines:
        if last and line.tenant != last:
            table.add_section()
        gap = line.changed - line.unchanged
        table.add_row(
            line.tenant if line.tenant != last else "",
            line.measure,
            _shown(line.unchanged, line.unchanged),
            _shown(line.changed, line.unchanged),
            _shown(gap, line.unchanged, "+"),
            f"{_shown(gap - line.half_width, line.unchanged, '+')} .. {_shown(gap + line.half_width, line.unchanged, '+')}",
            "clear" if line.clear else "may be luck" if gap or line.half_width else "the same",
        )
        last = line.tenant
    return table


def _shown(value: float, scale: float, sign: str = "") -> str:
    """Return a number with the decimals that its measure deserves."""
    digits = 1 if abs(scale) >= 100 else 2 if abs(scale) >= 1 else 4
    return f"{value:{sign}.{digits}f}"


def describe(answer: WhatIf) -> str:
    """Return what was asked, in one line."""
    asked = "; ".join(
        f"{name.replace('_', ' ')} {', '.join(value) if isinstance(value, list) else value}"
        for name, value in answer.change.items()
    )
    return (
        f"What if: {asked or 'nothing changed'} - from {answer.waiting} waiting and {answer.running} running tasks on "
        f"{answer.nodes} nodes, {answer.horizon_hours:.2f} h of arrivals, {answer.seeds} seeds"
    )
