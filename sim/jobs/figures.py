"""Every metric of a run of jobs, worked out in columns: the names and the meaning of `sim.summary`, exact instead of sketched."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from engine.tasks import SECOND
from sim.jobs.workload import Ints
from sim.sketches import Spread, jain
from sim.summary import Series

if TYPE_CHECKING:
    from sim.jobs.result import JobsResult

_BINS = 240
_KINDS = 16
"""Sizes of jobs that fragmentation is judged by; rarer ones count to nobody, as in `sim.gpu_ledger`."""
_BOUND_S = 10.0
"""Run times below this count as this in the bounded slowdown (Feitelson's threshold)."""


@dataclass(frozen=True, slots=True)
class JobFigures:
    """What a run showed. Durations are in seconds, by ``all`` and ``tenant NAME``."""

    waiting: dict[str, Spread]
    completion: dict[str, Spread]
    slowdown: dict[str, Spread]
    """Bounded slowdown: completion over run time, which counts as 10 s where it is less; never below 1."""
    ends: dict[str, int]
    gpu: dict[str, float]
    """GPU hours, and shares: ``allocated`` and ``busy`` of what was there, ``fragmented`` of what was free."""
    fairness: dict[str, float]
    tenant_gpu_hours: dict[str, float]
    makespan_s: float
    series: dict[str, Series]
    """Means per bin: ``queue``, ``running``, ``allocated``, ``fragmented``."""

    def to_json(self) -> dict[str, Any]:
        """Return plain dictionaries and lists."""
        return asdict(self)


class _Steps:
    """A step function of time and its integral."""

    __slots__ = ("area", "at", "value")

    def __init__(self, at: Ints, change: npt.NDArray[Any]) -> None:
        order = np.argsort(at, kind="stable")
        self.at = at[order]
        self.value = np.cumsum(change[order])
        self.area = np.concatenate(([0.0], np.cumsum(self.value[:-1] * np.diff(self.at).astype(np.float64))))

    def integral(self, until: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Return the integral from the first step to each of the given times."""
        row = np.searchsorted(self.at, until, side="right") - 1
        known = np.maximum(row, 0)
        area = self.area[known] + self.value[known] * (until - self.at[known])
        return np.where(row >= 0, area, 0.0)

    def series(self, edges: npt.NDArray[np.float64]) -> Series:
        """Return the means between edges."""
        areas = np.diff(self.integral(edges))
        width = float(edges[1] - edges[0])
        return Series(width / SECOND, tuple((areas / width).tolist()))


def measure(result: JobsResult) -> JobFigures:
    """Work out the figures of a run."""
    jobs = result.jobs
    ran = result.start_us >= 0
    refused = int(len(jobs) - ran.sum())
    capacity = result.nodes * result.gpus_per_node
    if not ran.any():
        empty = {"capacity_hours": 0.0, "allocated_hours": 0.0, "busy_hours": 0.0}
        return JobFigures(
            {}, {}, {}, {"finished": 0, "rejected": refused, "open": 0},
            {**empty, "allocated": 0.0, "busy": 0.0, "fragmented": 0.0}, {"jain": 1.0, "contended_hours": 0.0}, {}, 0.0, {},
        )  # fmt: skip
    submit, start, end = jobs.submit_us[ran], result.start_us[ran], result.end_us[ran]
    gpus, tenant = jobs.gpus[ran], jobs.tenant[ran]
    first, last = int(submit.min()), int(end.max())
    span = max(1, last - first)
    waiting, completion = start - submit, end - submit
    bounded = np.maximum(completion / np.maximum(jobs.run_us[ran], _BOUND_S * SECOND), 1.0)
    used = float((gpus * (end - start)).sum())
    queue = _Steps(np.concatenate((submit, start)), _plus_minus(np.ones(len(submit), np.int64)))
    running = _Steps(np.concatenate((start, end)), _plus_minus(np.ones(len(submit), np.int64)))
    allocated = _Steps(np.concatenate((start, end)), _plus_minus(gpus))
    splinters = _splinters(result, ran)
    edges = np.linspace(first, last if last > first else first + 1, _BINS + 1)
    hours = SECOND * 3600.0
    lost = float(splinters.integral(np.asarray([last]))[0])
    free = capacity * span - used
    contended_hours, served = _contended(submit, start, end, gpus, tenant, len(jobs.tenants))
    shares = used / (capacity * span)
    return JobFigures(
        waiting=_spreads(waiting / SECOND, tenant, jobs.tenants),
        completion=_spreads(completion / SECOND, tenant, jobs.tenants),
        slowdown=_spreads(bounded, tenant, jobs.tenants),
        ends={"finished": int(ran.sum()), "rejected": refused, "open": 0},
        gpu={
            "capacity_hours": capacity * span / hours,
            "allocated_hours": used / hours,
            "busy_hours": used / hours,
            "allocated": shares,
            "busy": shares,
            "fragmented": min(1.0, max(0.0, lost / free)) if free > 0 else 0.0,
        },
        fairness={
            "jain": jain(dict(zip(jobs.tenants, served, strict=True))),
            "contended_hours": contended_hours,
        },
        tenant_gpu_hours={
            name: float(total) / hours
            for name, total in zip(
                jobs.tenants, np.bincount(tenant, gpus * (end - start), len(jobs.tenants)), strict=True
            )
        },
        makespan_s=span / SECOND,
        series={
            "queue": queue.series(edges),
            "running": running.series(edges),
            "allocated": allocated.series(edges),
            "fragmented": splinters.series(edges),
        },
    )


def _plus_minus(amounts: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.concatenate((amounts, -amounts))


def spread_of(values: npt.NDArray[Any]) -> Spread:
    """Return a distribution in short; quantiles are values that occur (the smallest that so many are not above)."""
    if not len(values):
        return Spread(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    p50, p90, p99 = np.quantile(values, (0.5, 0.9, 0.99), method="inverted_cdf").tolist()
    return Spread(len(values), float(values.mean()), p50, p90, p99, float(values.max()))


def _spreads(values: npt.NDArray[np.float64], tenant: Ints, tenants: tuple[str, ...]) -> dict[str, Spread]:
    found = {"all": spread_of(values)}
    order = np.argsort(tenant, kind="stable")
    sorted_values, bounds = values[order], np.searchsorted(tenant[order], np.arange(len(tenants) + 1))
    for row, name in enumerate(tenants):
        part = sorted_values[bounds[row] : bounds[row + 1]]
        if len(part):
            found[f"tenant {name}"] = spread_of(part)
    return found


def _contended(
    submit: Ints, start: Ints, end: Ints, gpus: Ints, tenant: Ints, tenants: int
) -> tuple[float, list[float]]:
    """Return the hours in which at least two tenants had jobs waiting, and each tenant's service in that time."""
    at, change = np.concatenate((submit, start)), _plus_minus(np.ones(len(submit), np.int64))
    whose = np.concatenate((tenant, tenant))
    order = np.argsort(whose, kind="stable")
    bounds = np.searchsorted(whose[order], np.arange(tenants + 1))
    in_need_at, in_need = [], []
    for row in range(tenants) if tenants > 1 else ():
        mine = order[bounds[row] : bounds[row + 1]]
        if not len(mine):
            continue
        steps = _Steps(at[mine], change[mine])
        last_of_moment = np.concatenate((np.diff(steps.at) > 0, [True]))
        waits = (steps.value[last_of_moment] > 0).astype(np.int64)
        in_need_at.append(steps.at[last_of_moment])
        in_need.append(np.diff(waits, prepend=0))
    if not in_need_at:
        return 0.0, [0.0] * tenants
    need = _Steps(np.concatenate(in_need_at), np.concatenate(in_need))
    both = _Steps.__new__(_Steps)
    both.at, both.value = need.at, (need.value >= 2).astype(np.int64)
    both.area = np.concatenate(([0.0], np.cumsum(both.value[:-1] * np.diff(both.at).astype(np.float64))))
    service = gpus * (both.integral(end) - both.integral(start))
    return float(both.area[-1]) / SECOND / 3600, np.bincount(tenant, service, tenants).tolist()


def _splinters(result: JobsResult, ran: npt.NDArray[np.bool_]) -> _Steps:
    """Return the free GPUs, over time, that a job like those seen so far could not use: on nodes that have fewer than it wants."""
    if result.spread:
        return _Steps(np.zeros(1, np.int64), np.zeros(1))
    jobs, per_node = result.jobs, result.gpus_per_node
    on_one = result.node >= 0
    flat = np.asarray(list(result.flat_pieces()), np.int64).reshape(-1, 3)
    job = np.concatenate((np.flatnonzero(on_one), flat[:, 0]))
    node = np.concatenate((result.node[on_one], flat[:, 1]))
    amount = np.concatenate((jobs.gpus[on_one], flat[:, 2]))
    at = np.concatenate((result.start_us[job], result.end_us[job]))
    change = np.concatenate((-amount, amount))
    node = np.concatenate((node, node))
    order = np.lexsort((at, node))
    at, change, node = at[order], change[order], node[order]
    begins = np.flatnonzero(np.diff(node, prepend=-1))
    total = np.cumsum(change)
    base = np.repeat(total[begins] - change[begins], np.diff(np.append(begins, len(node))))
    after = per_node + total - base
    before = after - change
    seen = np.sort(jobs.submit_us)
    kinds, counts = np.unique(np.minimum(jobs.gpus, per_node), return_counts=True)
    kinds = np.sort(kinds[np.argsort(-counts, kind="stable")[:_KINDS]])
    times, values = [at], [np.zeros(len(at))]
    for kind in kinds[kinds > 1].tolist():
        useless = np.where(after < kind, after, 0) - np.where(before < kind, before, 0)
        share_at, share = seen, None
        mine = np.cumsum(np.minimum(jobs.gpus, per_node) == kind)
        share = mine / np.arange(1, len(jobs) + 1)
        lost = _Steps(at, useless)
        moments = np.concatenate((lost.at, share_at))
        moments.sort()
        level = lost.value[np.maximum(np.searchsorted(lost.at, moments, side="right") - 1, 0)]
        level = np.where(moments < lost.at[0], 0, level)
        weight = share[np.maximum(np.searchsorted(share_at, moments, side="right") - 1, 0)]
        times.append(moments)
        values.append(np.diff(level * weight, prepend=0.0))
    return _Steps(np.concatenate(times), np.concatenate(values))
