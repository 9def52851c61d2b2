"""Reads Helios' `cluster_log.csv` (SenseTime, SC 2021), and job lists in its form.

Virtual clusters become tenants; a job on several nodes becomes a gang with a member per node. Every job runs its recorded time,
however it ended. Jobs without a GPU are skipped unless asked for: the trace has more of them than of the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from engine.resources import Demand
from engine.tasks import SECOND
from sim.readers.rows import Fields, Intake, ReaderOptions, TraceRow, batch_task, columns_of, csv_records, gang
from sim.workload import Truth

COLUMNS = ("job_id", "vc", "gpu_num", "submit_time", "duration")
STATES = frozenset({"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "SUSPENDED", "PASS", "KILLED"})
"""Slurm's words in Helios, and Philly's in the lists that its artifact makes from that trace."""


def matches(path: Path, head: str) -> bool:
    """Tell whether the header is this format's."""
    return set(COLUMNS) <= set(columns_of(head))


def rows(path: Path, intake: Intake, options: ReaderOptions) -> Iterator[TraceRow]:
    """Yield the jobs in the order of the file."""
    for fields in csv_records(path, intake, COLUMNS):
        row = intake.attempt(partial(_row, fields, intake, options))
        if row is not None:
            yield row


def _row(fields: Fields, intake: Intake, options: ReaderOptions) -> TraceRow | None:
    total = fields.whole("gpu_num", high=100_000)
    if total == 0 and not options.cpu_tasks:
        intake.skip(fields.line, "asks for no GPU")
        return None
    at = fields.moment("submit_time")
    seconds = fields.number("duration")
    if fields.known("state"):
        state = fields.text("state").upper()
        if state not in STATES:
            fields.refuse("state", f"{state!r} is unknown; expected one of {', '.join(sorted(STATES))}")
        intake.counts[f"state {state}"] += 1
    if fields.known("start_time") and fields.known("end_time"):
        recorded = fields.span("start_time", "end_time") / SECOND
        if abs(recorded - seconds) > 1:
            intake.counts["duration is not end less start; duration counts"] += 1
    nodes = fields.whole("node_num", 1, low=0) if fields.known("node_num") else 0
    if nodes > 0 and total and total % nodes == 0:
        members, gpus = nodes, total // nodes
    else:
        members, gpus = gang(total, options.gpus_per_node)
    cores = fields.whole("cpu_num", 0) if fields.known("cpu_num") else 0
    features: dict[str, str | int | float] = {"total_gpus": total, "nodes": max(1, nodes)}
    if fields.known("user"):
        features["user"] = f"user-{fields.text('user')}"
    demand = Demand(gpus=gpus, gpu_share=1000, cpu_milli=-(-cores * 1000 // members))
    task = batch_task(f"job-{fields.text('job_id')}", fields.text("vc"), demand, members, features)
    return TraceRow(fields.line, at, task, Truth(work_us=max(1, round(seconds * SECOND))))
