"""Batch jobs as columns: what the fast job-level core reads. Tasks of the platform become rows of it, traces too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine.entities import Task, Tenant
from engine.levels.ordering import Ordering
from engine.resources import Demand
from engine.tasks import SECOND, Estimate, Quantiles, TaskSpec, TaskType
from sim.workload import Workload, WorkloadError

Ints = npt.NDArray[np.int64]
_LONGEST_US = 2**58


@dataclass(frozen=True, slots=True)
class Jobs:
    """Jobs in the order of their submission; every column has one entry per job. Times are whole microseconds."""

    submit_us: Ints
    run_us: Ints
    """True run time."""
    gpus: Ints
    estimate_us: Ints
    """Run time that backfilling counts on."""
    priority: Ints
    """Higher is sooner, where a policy looks at it."""
    tenant: Ints
    """Row of `tenants`."""
    tenants: tuple[str, ...] = ("all",)
    names: tuple[str, ...] = field(default=(), repr=False)
    """What each job is called in messages; empty: by its number."""

    def __post_init__(self) -> None:
        count = len(self.submit_us)
        for name in ("run_us", "gpus", "estimate_us", "priority", "tenant"):
            if len(getattr(self, name)) != count:
                raise WorkloadError(
                    f"{name}: has {len(getattr(self, name))} entries for {count} jobs; give one for each job"
                )
        if self.names and len(self.names) != count:
            raise WorkloadError(f"names: has {len(self.names)} entries for {count} jobs; give one each, or none at all")
        for name, least in (("submit_us", 0), ("run_us", 0), ("estimate_us", 0), ("gpus", 1)):
            self._check(name, getattr(self, name) < least, f"must be at least {least}")
        for name in ("submit_us", "run_us", "estimate_us"):
            self._check(
                name, getattr(self, name) >= _LONGEST_US, "is more than any simulation lasts; give microseconds"
            )
        if count and (self.tenant.min() < 0 or self.tenant.max() >= len(self.tenants)):
            raise WorkloadError(f"tenant: must be a row of tenants, 0 to {len(self.tenants) - 1}")
        if count > 1:
            late = np.diff(self.submit_us) < 0
            self._check("submit_us", np.concatenate(([False], late)), "comes before the one ahead; sort jobs by it")

    def _check(self, name: str, wrong: npt.NDArray[np.bool_], what: str) -> None:
        if wrong.any():
            row = int(np.argmax(wrong))
            called = self.names[row] if self.names else str(row)
            raise WorkloadError(f"{name}: job {called} has {int(getattr(self, name)[row])}, which {what}")

    def __len__(self) -> int:
        return len(self.submit_us)

    def only(self, rows: npt.NDArray[np.bool_] | Ints) -> Jobs:
        """Return some of the jobs: those where a mask is true, or those of the given rows in ascending order."""
        return Jobs(
            self.submit_us[rows],
            self.run_us[rows],
            self.gpus[rows],
            self.estimate_us[rows],
            self.priority[rows],
            self.tenant[rows],
            self.tenants,
            tuple(np.asarray(self.names, object)[rows]) if self.names else (),
        )

    def of_tenant(self, tenant: str) -> Jobs:
        """Return one tenant's jobs; raises `WorkloadError` for one that is not there."""
        if tenant not in self.tenants:
            raise WorkloadError(f"tenant: there is no {tenant!r}; known are {', '.join(self.tenants[:20])}")
        return self.only(self.tenant == self.tenants.index(tenant))


def make_jobs(
    submit_s: Sequence[float] | npt.NDArray[np.float64],
    run_s: Sequence[float] | npt.NDArray[np.float64],
    gpus: Sequence[int] | Ints,
    *,
    estimate_s: Sequence[float] | npt.NDArray[np.float64] | None = None,
    priority: Sequence[int] | Ints | None = None,
    tenant: Sequence[str] | None = None,
    names: Sequence[str] = (),
) -> Jobs:
    """Make jobs from plain columns in seconds, sorted by submission here (those of one moment keep their order).

    Without `estimate_s`, true run times are known; without `priority` and `tenant`, all jobs are equal.
    """
    submit = _micros(submit_s)
    order = np.argsort(submit, kind="stable")
    count = len(submit)
    run = _micros(run_s)
    labels = list(tenant) if tenant is not None else ["all"] * count
    tenants = tuple(dict.fromkeys(labels)) or ("all",)
    row_of = {name: row for row, name in enumerate(tenants)}
    columns = {
        "run_s": run,
        "gpus": np.asarray(gpus, np.int64),
        "estimate_s": run if estimate_s is None else _micros(estimate_s),
        "priority": np.zeros(count, np.int64) if priority is None else np.asarray(priority, np.int64),
        "tenant": np.asarray([row_of[name] for name in labels], np.int64),
    }
    for name, column in columns.items():
        if len(column) != count:
            raise WorkloadError(f"{name}: has {len(column)} entries for {count} jobs; give one for each job")
    return Jobs(
        submit[order],
        columns["run_s"][order],
        columns["gpus"][order],
        columns["estimate_s"][order],
        columns["priority"][order],
        columns["tenant"][order],
        tenants,
        tuple(names[row] for row in order) if names else (),
    )


def _micros(seconds: Sequence[float] | npt.NDArray[np.float64]) -> Ints:
    values = np.asarray(seconds, np.float64)
    if values.size and not np.isfinite(values).all():
        raise WorkloadError(
            f"seconds: entry {int(np.argmin(np.isfinite(values)))} is not a finite number; mend the row"
        )
    return np.rint(values * SECOND).astype(np.int64)


def from_workload(workload: Workload) -> Jobs:
    """Turn a platform's workload into jobs of members times GPUs; tasks without a run time or on shares are refused."""
    rows = []
    for arrival in workload.arrivals:
        task, work_us = arrival.task, arrival.truth.work_us
        if work_us is None:
            raise WorkloadError(
                f"workload: task {task.req_no} brings no run time; jobs need one (the full simulator does not)"
            )
        if task.demand.gpu_share != 1000 or task.demand.gpus < 1:
            raise WorkloadError(f"workload: task {task.req_no} wants a share of a GPU or none; jobs take whole ones")
        expected = work_us if task.declared_us is None else task.declared_us
        size = task.members * task.demand.gpus
        rows.append((arrival.at, work_us, size, expected, task.priority, task.tenant, task.req_no))
    tenants = tuple(dict.fromkeys(row[5] for row in rows)) or ("all",)
    row_of = {name: row for row, name in enumerate(tenants)}
    submit, run, gpus, estimate, priority = (np.asarray([row[at] for row in rows], np.int64) for at in range(5))
    tenant = np.asarray([row_of[row[5]] for row in rows], np.int64)
    return Jobs(submit, run, gpus, estimate, priority, tenant, tenants, tuple(row[6] for row in rows))


POLICIES = ("fifo", "priority", "sjf", "ljf", "smallest", "shortest-estimate")
"""Orders known by name. ``sjf`` and ``ljf`` know true run times, ``shortest-estimate`` what backfilling counts on."""


def keys(jobs: Jobs, policy: str | Ordering) -> tuple[Ints, ...]:
    """Return what a policy sorts the waiting by, the most important first; equals go by submission.

    An engine's `Ordering` is asked for each job as it enters the line; one that shares between tenants or ages is refused, because
    here a rank does not change.
    """
    match policy:
        case "fifo":
            return ()
        case "priority":
            return (-jobs.priority,)
        case "sjf":
            return (jobs.run_us,)
        case "ljf":
            return (-jobs.run_us,)
        case "smallest":
            return (jobs.gpus,)
        case "shortest-estimate":
            return (jobs.estimate_us,)
        case str():
            raise WorkloadError(
                f"policy: unknown {policy!r}; known are {', '.join(POLICIES)}, or give an engine's Ordering"
            )
        case _:
            return _ranked(jobs, policy)


def _ranked(jobs: Jobs, ordering: Ordering) -> tuple[Ints, ...]:
    if ordering.fair_tenants or ordering.fair_groups or ordering.shares or ordering.age_us or ordering.ranks_anew:
        raise WorkloadError("policy: shares between tenants or ages, so ranks change; run it in the full simulator")
    if ordering.preemptive:
        raise WorkloadError("policy: stops running tasks for waiting ones; run it in the full simulator")
    tenants = [Tenant(name, row) for row, name in enumerate(jobs.tenants)]
    ranks = np.empty((len(jobs), 2), np.int64)
    for row in range(len(jobs)):
        gpus, estimate = int(jobs.gpus[row]), int(jobs.estimate_us[row])
        spec = TaskSpec(
            str(row), jobs.tenants[jobs.tenant[row]], "", TaskType.GC, "sleep",
            demand=Demand(gpus=gpus), priority=int(jobs.priority[row]),
        )  # fmt: skip
        known = Estimate((("*", Quantiles(estimate, estimate, estimate, estimate)),))
        now = int(jobs.submit_us[row])
        task = Task(spec, row, tenants[jobs.tenant[row]], None, now, known)
        ranks[row] = ordering.rank(task, now)
    return ranks[:, 0], ranks[:, 1]
