"""Helios' scheduling of virtual clusters (SC 2021), run again on a trace: each has its own nodes and its own line.

The semantics, as in the published artifact: time in whole seconds; what ends at a second gives its GPUs back before anyone is
placed in that second; nobody overtakes the first in line (by submission, or by true run time for SJF; equals in the trace's order);
a job of at most a node's GPUs goes on one node, the fullest that has room (ties: the lowest number); a larger one takes whole nodes
and, for what remains, the node with the most free. Only instants at which something happens are looked at: between them nothing can
change.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.tasks import SECOND
from sim.jobs.result import JobsResult, simulate_jobs
from sim.jobs.workload import Jobs
from sim.workload import WorkloadError

HELIOS_POLICIES = ("fifo", "sjf")
GPUS_PER_NODE = 8
ALL = "all"


@dataclass(frozen=True, slots=True)
class VirtualCluster:
    """What one virtual cluster's jobs saw; means are in seconds over the jobs that ran."""

    vc: str
    nodes: int
    jobs: int
    refused: int
    """Jobs larger than the virtual cluster: the artifact would wait for ever; here they are left out."""
    mean_completion_s: float
    mean_waiting_s: float
    waited: int
    """Jobs that did not start at once."""
    allocated: float
    """Share of the GPU time that jobs held."""

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary."""
        return asdict(self)


def read_clusters(path: Path) -> dict[str, int]:
    """Read nodes by virtual cluster from a CSV with the columns ``vc`` and ``node num`` (or ``nodes``)."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise WorkloadError(
            f"clusters: cannot read {path}: {error}; give a CSV with the columns vc and node num"
        ) from None
    found: dict[str, int] = {}
    for line, row in enumerate(rows, 2):
        name = (row.get("vc") or "").strip()
        text = row.get("node num") or row.get("node_num") or row.get("nodes") or ""
        if not name:
            raise WorkloadError(f"{path}, line {line}, vc: is missing; give the virtual cluster's name")
        if name in found:
            raise WorkloadError(f"{path}, line {line}, vc: {name!r} occurs twice; give each virtual cluster one line")
        if not text.strip().isdecimal() or int(text) < 1:
            raise WorkloadError(
                f"{path}, line {line}, node num: {text!r} is no whole number of at least 1; give its nodes"
            )
        found[name] = int(text)
    if not found:
        raise WorkloadError(f"{path}: names no virtual cluster; give a CSV with the columns vc and node num")
    return found


def reproduce(
    jobs: Jobs, clusters: Mapping[str, int], policy: str = "fifo", progress: Callable[[float, str], None] | None = None
) -> list[VirtualCluster]:
    """Run each virtual cluster (a tenant of `jobs`) by itself; return its figures, and at the end those of ``all`` jobs."""
    if policy not in HELIOS_POLICIES:
        raise WorkloadError(f"policy: unknown {policy!r}; known are {', '.join(HELIOS_POLICIES)}")
    strangers = [name for name in jobs.tenants if name not in clusters]
    if strangers:
        raise WorkloadError(
            f"clusters: virtual cluster {strangers[0]!r} of the trace is not listed ({len(strangers)} are missing); "
            f"add a line with its name and its number of nodes"
        )
    if (jobs.submit_us % SECOND).any() or (jobs.run_us % SECOND).any():
        raise WorkloadError("trace: holds fractions of seconds; Helios' clock ticks in whole seconds, so round them")
    names = [name for name in clusters if name in jobs.tenants]
    found, results = [], []
    for number, name in enumerate(names):
        if progress is not None:
            progress(number / len(names), name)
        result = simulate_jobs(jobs.of_tenant(name), clusters[name], GPUS_PER_NODE, policy)
        results.append(result)
        found.append(_row(name, clusters[name], [result]))
    return [*found, _row(ALL, sum(clusters[name] for name in names), results)] if found else []


def _row(name: str, nodes: int, results: list[JobsResult]) -> VirtualCluster:
    waiting = np.concatenate([result.waiting_us for result in results]) / SECOND
    completion = np.concatenate([result.completion_us for result in results]) / SECOND
    jobs = sum(len(result.jobs) for result in results)
    used = sum(int(((result.end_us - result.start_us) * result.jobs.gpus).sum()) for result in results)
    there = sum(result.nodes * result.gpus_per_node * _span(result) for result in results)
    return VirtualCluster(
        vc=name,
        nodes=nodes,
        jobs=jobs,
        refused=jobs - len(waiting),
        mean_completion_s=float(completion.mean()) if len(completion) else 0.0,
        mean_waiting_s=float(waiting.mean()) if len(waiting) else 0.0,
        waited=int((waiting > 0).sum()),
        allocated=used / there if there else 0.0,
    )


def _span(result: JobsResult) -> int:
    ran = result.start_us >= 0
    return int(result.end_us[ran].max() - result.jobs.submit_us[ran].min()) if ran.any() else 0
