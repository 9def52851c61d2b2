"""Every trace format the platform reads, by name, and how to tell them apart: the one entry for whoever has a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from engine.tasks import SECOND
from sim.readers import helios_csv, openb_csv, pai_csv, philly, service, swf
from sim.readers.rows import Intake, ReaderOptions, TraceRow, lines
from sim.workload import Arrival, Workload, WorkloadError

__all__ = ["FORMATS", "Intake", "ReaderOptions", "TraceFormat", "TraceRow", "detect", "format_named", "read", "stream"]

_HEAD = 4096
_DATED = 200_000_000 * SECOND
"""Clocks beyond this (mid-1976) are calendar time and are shown as a date."""


@dataclass(frozen=True, slots=True)
class TraceFormat:
    """One format: how it is recognised and read."""

    name: str
    title: str
    matches: Callable[[Path, str], bool]
    """Given the path and the first few thousand characters."""
    rows: Callable[[Path, Intake, ReaderOptions], Iterator[TraceRow]]
    whole: Callable[[Path, ReaderOptions], Workload] | None = None
    """Reads the file its own way; None: rows, sorted, counted from the first."""
    from_zero: bool = False
    """The file's clock is the workload's; the others are moved to begin at zero."""
    batch: bool = False
    """Jobs of another cluster, whose run times hold on that cluster's GPUs."""
    service: bool = False
    """Requests to a service, whose demand the simulation's own settings decide."""


FORMATS: tuple[TraceFormat, ...] = (
    TraceFormat(
        "gentd26",
        "GenTD26 lora_request_trace.csv",
        service.matches_gentd26,
        service.gentd26_rows,
        whole=service.read_gentd26,
        service=True,
    ),
    TraceFormat("philly", "Philly slice (CSV)", philly.matches_csv, philly.csv_rows, batch=True),
    TraceFormat("philly-json", "Philly cluster_job_log (JSON)", philly.matches_json, philly.json_rows, batch=True),
    TraceFormat("openb", "openb pod list (CSV)", openb_csv.matches, openb_csv.rows, batch=True),
    TraceFormat("helios", "Helios cluster_log.csv", helios_csv.matches, helios_csv.rows, batch=True),
    TraceFormat("pai", "PAI pai_task_table.csv", pai_csv.matches_tasks, pai_csv.task_rows, batch=True),
    TraceFormat("pai-jobs", "PAI job list (CSV of its simulator)", pai_csv.matches_jobs, pai_csv.job_rows, batch=True),
    TraceFormat(
        "own", "tasks of one's own (CSV or JSON lines)", service.matches_own, service.own_rows, service.read_own, True
    ),
    TraceFormat("swf", "Standard Workload Format", swf.matches, swf.rows, batch=True),
)
"""In the order in which they are tried."""


def format_named(name: str) -> TraceFormat:
    """Return a format by its name; raises `WorkloadError`."""
    for each in FORMATS:
        if each.name == name:
            return each
    raise WorkloadError(f"trace_format: unknown {name!r}; known are {', '.join(each.name for each in FORMATS)}")


def detect(path: Path) -> TraceFormat:
    """Return the format of a file by its beginning; raises `WorkloadError` when none fits."""
    head = _head(path)
    for each in FORMATS:
        if each.matches(path, head):
            return each
    shown = head.partition("\n")[0][:100]
    raise WorkloadError(
        f"trace: {path} is in no known format (it begins {shown!r}); name one with trace_format "
        f"({', '.join(each.name for each in FORMATS)}), or give a CSV or JSONL with submitted_s and seconds"
    )


def _head(path: Path) -> str:
    if path.is_dir():
        raise WorkloadError(f"trace: {path} is a directory; give one file of it")
    found = ""
    for _, text in lines(path):
        found += text
        if len(found) >= _HEAD and not _only_comments(found):
            break
    if "\0" in found:
        raise WorkloadError(
            f"trace: {path} is no text but an archive or a binary file; unpack it and give one file of it"
        )
    if not found.strip():
        raise WorkloadError(f"trace: {path} is empty; give a file with tasks")
    return found


def _only_comments(text: str) -> bool:
    return all(not each.strip() or each.lstrip().startswith(";") for each in text.splitlines())


def stream(path: Path, intake: Intake, options: ReaderOptions, name: str | None = None) -> Iterator[TraceRow]:
    """Yield a trace's rows in the order of the file; `intake` keeps the account."""
    return (format_named(name) if name else detect(path)).rows(path, intake, options)


def read(path: Path, options: ReaderOptions | None = None, name: str | None = None) -> Workload:
    """Read a trace of any known format; raises `WorkloadError` naming file, line, field and remedy.

    `name` is the format's, None to tell by the file. Rows need not be sorted. Time counts from the first arrival.
    """
    options = options or ReaderOptions()
    form = format_named(name) if name else detect(path)
    if form.whole is not None:
        return form.whole(path, options)
    intake = Intake(path)
    found = sorted(form.rows(path, intake, options), key=lambda row: row.at)
    if not found:
        why = "; ".join(f"{problem.count} skipped: {reason}" for reason, problem in intake.skipped.items())
        raise WorkloadError(f"{path}: holds no task to simulate as {form.name} ({why or 'no record'})")
    _refuse_duplicates(path, intake, found)
    origin = 0 if form.from_zero else found[0].at
    arrivals = tuple(Arrival(row.at - origin, row.task, row.truth) for row in found)
    return Workload(path.name, arrivals, _notes(form, intake, origin, options)).limited(options.limit)


def _refuse_duplicates(path: Path, intake: Intake, found: list[TraceRow]) -> None:
    seen: dict[str, int] = {}
    for row in found:
        first = seen.setdefault(row.task.req_no, row.line)
        if first != row.line:
            raise WorkloadError(
                f"{path}, {intake.unit} {max(first, row.line)}, identity: {row.task.req_no!r} stands in {intake.unit} "
                f"{min(first, row.line)} already; every task has its own (see `aigc trace check`)"
            )


def _notes(
    form: TraceFormat, intake: Intake, origin: int, options: ReaderOptions
) -> tuple[tuple[str, int | float | str], ...]:
    notes: list[tuple[str, int | float | str]] = [("format", form.name)]
    if not form.from_zero:
        notes.append(("origin", stamp(origin)))
    notes += sorted(intake.facts.items())
    notes += [(f"skipped: {reason}", problem.count) for reason, problem in sorted(intake.skipped.items())]
    notes += sorted(intake.counts.items())
    if not options.gpu_types:
        notes.append(("GPU types", "left out"))
    return tuple(notes)


def stamp(at: int) -> str:
    """Write a moment of a trace's clock for people: a date, or seconds where the clock counts from anywhere."""
    if at < _DATED:
        return f"{at / SECOND:g} s"
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=at)).replace(tzinfo=None).isoformat(sep=" ")
