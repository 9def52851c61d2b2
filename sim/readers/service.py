"""GenTD26 and tasks of one's own as streams of rows: the readers in `sim.gentd26` and `sim.own_tasks`, with an account."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from sim import gentd26, own_tasks
from sim.readers.rows import Intake, ReaderOptions, TraceRow
from sim.workload import Workload, WorkloadError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def matches_gentd26(path: Path, head: str) -> bool:
    """Tell whether the header is GenTD26's."""
    return "gmt_create" in head.partition("\n")[0]


def matches_own(path: Path, head: str) -> bool:
    """Tell whether a CSV's header, or the first object of JSON lines, has the two fields that every task needs."""
    first = head.lstrip().partition("\n")[0]
    return "submitted_s" in first and "seconds" in first


def gentd26_rows(path: Path, intake: Intake, options: ReaderOptions) -> Iterator[TraceRow]:
    """Yield the requests that ended."""
    for line, record in gentd26.records(path):
        row = intake.attempt(partial(_gentd26_row, path, line, record, intake))
        if row is not None:
            yield row


def _gentd26_row(path: Path, line: int, record: dict[str, str], intake: Intake) -> TraceRow | None:
    status = record["predict_status"]
    if status in gentd26.SKIPPED:
        intake.skip(line, status)
        return None
    if status not in gentd26.KEPT:
        intake.refuse(line, "predict_status", f"{status!r} is unknown; expected SUCCEED, FAILED, PENDING or PROCESSING")
    for name in ("num_images_per_prompt", "num_inference_steps", "prompt_length"):
        if name in record and not record[name]:
            intake.lack(line, name, "the usual value")
    try:
        moment, arrival = gentd26.arrival_of(path, line, record)
    except WorkloadError as error:
        _adopt(intake, line, error)
        return None
    intake.counts[f"kept {status}"] += 1
    return TraceRow(line, (moment - _EPOCH) // timedelta(microseconds=1), arrival.task, arrival.truth)


def own_rows(path: Path, intake: Intake, options: ReaderOptions) -> Iterator[TraceRow]:
    """Yield the tasks of a CSV or of JSON lines."""
    for line, record in own_tasks.records(path):
        row = intake.attempt(partial(_own_row, path, line, record, intake, options))
        if row is not None:
            yield row


def _own_row(
    path: Path, line: int, record: Mapping[str, Any], intake: Intake, options: ReaderOptions
) -> TraceRow | None:
    try:
        arrival = own_tasks.arrival_of(path, line, record)
    except WorkloadError as error:
        _adopt(intake, line, error)
        return None
    task = arrival.task
    if task.demand.gpu_models and not options.gpu_types:
        task = replace(task, demand=replace(task.demand, gpu_models=()))
    return TraceRow(line, arrival.at, task, arrival.truth)


def _adopt(intake: Intake, line: int, error: WorkloadError) -> None:
    """Refuse a record in the words of the reader that refused it."""
    text = str(error).partition(f", line {line}, ")[2] or str(error)
    name, _, message = text.partition(": ")
    intake.refuse(line, name, message or text)


def read_gentd26(path: Path, options: ReaderOptions) -> Workload:
    """Read GenTD26 as `sim.gentd26` does."""
    return gentd26.read(
        path,
        tenants=options.tenants,
        urgent_share=options.urgent_share,
        seed=options.seed,
        limit=options.limit,
    )


def read_own(path: Path, options: ReaderOptions) -> Workload:
    """Read tasks of one's own as `sim.own_tasks` does."""
    workload = own_tasks.read(path, options.limit)
    if options.gpu_types or not any(arrival.task.demand.gpu_models for arrival in workload.arrivals):
        return workload
    arrivals = tuple(
        replace(each, task=replace(each.task, demand=replace(each.task.demand, gpu_models=())))
        for each in workload.arrivals
    )
    return replace(workload, arrivals=arrivals, notes=(*workload.notes, ("GPU types", "left out")))
