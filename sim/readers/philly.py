"""Reads Microsoft's Philly trace (ATC 2019): the original JSON list of jobs, and slices of it as a CSV with four columns.

Virtual clusters become tenants. In the original form a job's time is the sum of its attempts and its GPUs are those of the first
attempt that lists any; jobs that never started, or were still running when the log was taken, are skipped. Times carry no zone
and are subtracted as they stand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from engine.resources import Demand
from engine.tasks import SECOND, Micros
from sim.readers.rows import (
    Fields,
    Intake,
    ReaderOptions,
    TraceRow,
    batch_task,
    columns_of,
    csv_records,
    gang,
    open_text,
)
from sim.workload import Truth, WorkloadError

COLUMNS = ("vc", "gpu_num", "submit_time", "duration_s")
_KEYS = ("submitted_time", "attempts", "vc")


def matches_csv(path: Path, head: str) -> bool:
    """Tell whether the header is the slice's."""
    return set(COLUMNS) <= set(columns_of(head))


def matches_json(path: Path, head: str) -> bool:
    """Tell whether the beginning is that of the original job log."""
    return head.lstrip().startswith("[") and ('"attempts"' in head or '"submitted_time"' in head or '"jobid"' in head)


def csv_rows(path: Path, intake: Intake, options: ReaderOptions) -> Iterator[TraceRow]:
    """Yield the jobs of a slice."""
    for fields in csv_records(path, intake, COLUMNS):
        row = intake.attempt(partial(_csv_row, fields, intake, options))
        if row is not None:
            yield row


def _csv_row(fields: Fields, intake: Intake, options: ReaderOptions) -> TraceRow | None:
    gpus = fields.whole("gpu_num", high=100_000)
    at = fields.moment("submit_time")
    seconds = fields.number("duration_s")
    if gpus == 0 and not options.cpu_tasks:
        intake.skip(fields.line, "asks for no GPU")
        return None
    return _job(f"line-{fields.line}", fields.line, at, gpus, round(seconds * SECOND), fields.text("vc"), {}, options)


def json_rows(path: Path, intake: Intake, options: ReaderOptions) -> Iterator[TraceRow]:
    """Yield the jobs of the original log."""
    intake.unit = "job"
    try:
        with open_text(path) as file:
            jobs = json.load(file)
    except (ValueError, RecursionError, EOFError) as error:
        raise WorkloadError(f"{path}: not JSON ({error}); the job log is one list of objects") from None
    if not isinstance(jobs, list):
        raise WorkloadError(f"{path}: expected a list of jobs, got {type(jobs).__name__}")
    for number, job in enumerate(jobs, 1):
        row = intake.attempt(partial(_json_row, number, job, intake, options))
        if row is not None:
            yield row


def _json_row(number: int, job: Any, intake: Intake, options: ReaderOptions) -> TraceRow | None:
    if not isinstance(job, dict):
        intake.refuse(number, "job", f"expected an object, got {type(job).__name__}")
    for key in _KEYS:
        if key not in job:
            intake.refuse(number, key, "is missing; every job of the log has it", "missing")
    attempts = job["attempts"]
    if not isinstance(attempts, list) or not all(isinstance(attempt, dict) for attempt in attempts):
        intake.refuse(number, "attempts", "expected a list of objects")
    if not attempts:
        intake.skip(number, "never started")
        return None
    at = Fields(intake, number, job).moment("submitted_time")
    total: Micros = 0
    for attempt in attempts:
        fields = Fields(intake, number, attempt)
        if fields.known("start_time") and fields.known("end_time"):
            total += fields.span("start_time", "end_time")
        elif attempt is attempts[-1]:
            intake.skip(number, "end is unknown: still running, or lost by the log")
            return None
        else:
            intake.counts["attempts without a start or an end, left out"] += 1
    sizes = [size for size in (_gpus(number, attempt, intake) for attempt in attempts) if size]
    if not sizes and not options.cpu_tasks:
        intake.skip(number, "lists no GPU")
        return None
    if len(set(sizes)) > 1:
        intake.counts["attempts on different numbers of GPUs; the first counts"] += 1
    intake.counts[f"status {job.get('status')}"] += 1
    features: dict[str, str | int | float] = {"user": f"user-{job['user']}"} if job.get("user") else {}
    name = str(job.get("jobid") or f"job-{number}")
    return _job(name, number, at, sizes[0] if sizes else 0, total, str(job["vc"]), features, options)


def _gpus(number: int, attempt: dict[str, Any], intake: Intake) -> int:
    detail = attempt.get("detail") or []
    if not isinstance(detail, list) or not all(isinstance(machine, dict) for machine in detail):
        intake.refuse(number, "detail", "expected a list of machines")
    return sum(len(machine.get("gpus") or ()) for machine in detail)


def _job(
    name: str,
    line: int,
    at: Micros,
    total: int,
    work_us: Micros,
    tenant: str,
    features: dict[str, str | int | float],
    options: ReaderOptions,
) -> TraceRow:
    members, gpus = gang(total, options.gpus_per_node)
    task = batch_task(name, tenant, Demand(gpus=gpus), members, {"total_gpus": total, **features})
    return TraceRow(line, at, task, Truth(work_us=max(1, work_us)))
