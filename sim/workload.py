"""What arrives when, and what will really happen to it: the one form that every reader and generator produces.

The `TaskSpec` is all that the engine and the forecaster ever see. The `Truth` beside it is for the world, which acts it out, and
for the oracle, against which predictions are measured.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from engine.resources import Demand
from engine.tasks import URGENT_PRIORITY, FailureCause, Micros, TaskSpec
from sim.draws import choice, lognormal, unit


class WorkloadError(ValueError):
    """A workload cannot be read; the message names the file, the line and the field, and what to do."""


@dataclass(frozen=True, slots=True)
class Truth:
    """What really happens to a task, hidden from the engine."""

    work_us: Micros | None = None
    """Run time on the hardware's reference GPU; None: the hardware model works it out from the task's features."""
    fails_with: FailureCause | None = None
    """Every attempt runs its time and then fails with this."""
    peak_gpu_memory_bytes: int = 0
    """0: from the hardware model."""
    loras: tuple[str, ...] = ()
    """Identities of the adapters, where known: an adapter that its Pod holds already is not loaded again."""
    cancel_after_us: Micros | None = None
    """The customer cancels this long after submitting, unless the task is over."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One task and its moment; `at` counts microseconds from the workload's beginning."""

    at: Micros
    task: TaskSpec
    truth: Truth = field(default_factory=Truth)


@runtime_checkable
class Rows(Protocol):
    """Arrivals that are kept as columns: they know how to change themselves without being made into tasks."""

    @property
    def demand(self) -> Demand:
        """What every task asks for."""
        ...

    def digest(self) -> str:
        """Return a fingerprint of every row."""
        ...

    def limited(self, count: int) -> Sequence[Arrival]:
        """Return the first rows."""
        ...

    def scaled(self, rate: float) -> Sequence[Arrival]:
        """Return the rows `rate` times as fast."""
        ...

    def demanding(self, demand: Demand, slots: int) -> Sequence[Arrival]:
        """Have every task ask for this."""
        ...

    def declared(self, sigma: float, seed: int) -> Sequence[Arrival]:
        """Let callers declare run times."""
        ...


@dataclass(frozen=True, slots=True)
class Workload:
    """Arrivals in time order, and how they were come by."""

    name: str
    arrivals: Sequence[Arrival]
    """A tuple, or `sim.columns.Columns` for workloads that would not fit into memory as tasks."""
    notes: tuple[tuple[str, int | float | str], ...] = ()
    """What the reader kept, skipped and assumed, for the report."""

    def __post_init__(self) -> None:
        if not isinstance(self.arrivals, tuple):
            return
        last = 0
        seen: set[str] = set()
        for number, arrival in enumerate(self.arrivals):
            if arrival.task.req_no in seen:
                raise WorkloadError(
                    f"workload {self.name!r}: req_no {arrival.task.req_no!r} occurs twice; every task has its own"
                )
            seen.add(arrival.task.req_no)
            if arrival.at < last:
                raise WorkloadError(
                    f"workload {self.name!r}: arrival {number} ({arrival.task.req_no}) at {arrival.at} us comes before the one "
                    f"ahead of it ({last} us); sort the rows by time"
                )
            last = arrival.at

    @property
    def span_us(self) -> Micros:
        """Time from zero to the last arrival."""
        return self.arrivals[-1].at if self.arrivals else 0

    def digest(self) -> str:
        """Return a short fingerprint of everything the simulation depends on."""
        rows = self.arrivals
        if isinstance(rows, Rows):
            return rows.digest()
        fold = hashlib.blake2b(digest_size=8)
        for arrival in self.arrivals:
            fold.update(repr(arrival).encode())
        return fold.hexdigest()

    def limited(self, count: int | None) -> Workload:
        """Return the first `count` arrivals; all of them for None."""
        if count is None or count >= len(self.arrivals):
            return self
        if count < 1:
            raise WorkloadError(f"limit: must be at least 1, got {count}; leave it out to take every task")
        rows = self.arrivals
        return replace(self, arrivals=rows.limited(count) if isinstance(rows, Rows) else rows[:count])

    def scaled(self, rate: float) -> Workload:
        """Return the same arrivals `rate` times as fast.

        Time between arrivals is divided by `rate`, which keeps their coefficient of variation and every dispersion at
        correspondingly shorter windows; run times stay as they are.
        """
        if not rate > 0:
            raise WorkloadError(f"rate_scale: must be greater than 0, got {rate}")
        if rate == 1:
            return self
        rows = self.arrivals
        if isinstance(rows, Rows):
            arrivals: Sequence[Arrival] = rows.scaled(rate)
        else:
            arrivals = tuple(replace(arrival, at=round(arrival.at / rate)) for arrival in rows)
        return replace(self, arrivals=arrivals, notes=(*self.notes, ("rate_scale", rate)))


def ranked(arrivals: Iterable[Arrival], *, tenants: int, urgent_share: float, seed: int) -> tuple[Arrival, ...]:
    """Spread groups over tenants and make a share of the tasks urgent, for traces that know neither.

    Both are draws keyed by identity: the same group has the same tenant, and the same task is urgent, in every run of one seed.
    """
    if tenants < 1:
        raise WorkloadError(f"tenants: must be at least 1, got {tenants}")
    if not 0 <= urgent_share <= 1:
        raise WorkloadError(f"urgent_share: must lie between 0 and 1, got {urgent_share}")
    done = []
    for arrival in arrivals:
        task = arrival.task
        tenant = f"tenant-{choice(tenants, seed, 'tenant', task.group or task.req_no)}"
        urgent = unit(seed, "urgent", task.req_no) < urgent_share
        task = replace(task, tenant=tenant, priority=URGENT_PRIORITY if urgent else task.priority)
        done.append(replace(arrival, task=task))
    return tuple(done)


def demanding(workload: Workload, *, gpu_share: int, gpu_memory_gib: float, slots: int) -> Workload:
    """Have every task ask for this share of one GPU and this much of its memory, and Pods run `slots` tasks at once."""
    memory_bytes = round(gpu_memory_gib * (1 << 30))
    rows = workload.arrivals
    if isinstance(rows, Rows):
        demand = replace(rows.demand, gpu_share=gpu_share, gpu_memory_bytes=memory_bytes)
        return replace(workload, arrivals=rows.demanding(demand, slots))
    arrivals = []
    for arrival in rows:
        demand = replace(arrival.task.demand, gpu_share=gpu_share, gpu_memory_bytes=memory_bytes)
        arrivals.append(replace(arrival, task=replace(arrival.task, demand=demand, slots=slots)))
    return replace(workload, arrivals=tuple(arrivals))


def declared(workload: Workload, sigma: float, seed: int) -> Workload:
    """Let callers declare run times where none is declared: the true one times a lognormal error, rounded up to 5 s.

    No trace here has declarations; `sigma` is how well people are believed to guess (0: perfectly, up to the rounding).
    """
    notes = (*workload.notes, ("declared_sigma", sigma))
    rows = workload.arrivals
    if isinstance(rows, Rows):
        return replace(workload, arrivals=rows.declared(sigma, seed), notes=notes)
    step = 5_000_000
    arrivals = []
    for arrival in rows:
        task, work = arrival.task, arrival.truth.work_us
        if task.declared_us is None and work is not None:
            guess = work * lognormal(sigma, seed, "declared", task.req_no)
            arrival = replace(arrival, task=replace(task, declared_us=-(-round(guess) // step) * step))
        arrivals.append(arrival)
    return replace(workload, arrivals=tuple(arrivals), notes=notes)


def with_models(workload: Workload, scale: float) -> Workload:
    """Return the same tasks with `scale` times as many different models.

    Below 1 the least used models are taken for more used ones. Above 1 a model's groups are spread over copies of it, so that a
    group still stays with its model; the split depends on the names alone.
    """
    if not 0 < scale < 1e6:
        raise WorkloadError(f"model_scale: must be greater than 0 and below 1e6, got {scale}")
    if scale == 1:
        return workload
    uses = Counter(arrival.task.model for arrival in workload.arrivals if arrival.task.model)
    by_use = sorted(uses, key=lambda model: (-uses[model], model))
    kept = max(1, round(len(by_use) * min(1.0, scale)))
    name_of = {model: by_use[rank % kept] for rank, model in enumerate(by_use)}
    arrivals = []
    for arrival in workload.arrivals:
        task = arrival.task
        if task.model:
            model = name_of[task.model]
            copy = int(unit(0, "copy", model, task.group or task.req_no) * scale) if scale > 1 else 0
            task = replace(task, model=f"{model}+{copy}" if copy else model)
            arrival = replace(arrival, task=task)
        arrivals.append(arrival)
    return replace(workload, arrivals=tuple(arrivals), notes=(*workload.notes, ("model_scale", scale)))
