"""Reads the Standard Workload Format of the Parallel Workloads Archive: eighteen numbers a line, comments behind semicolons.

Processors are taken for GPUs. The number asked for counts, or the number allocated where none was asked for. Every job that ran
runs its recorded time, however it ended; those that never ran are skipped. -1 means unknown throughout.
Source: Feitelson et al., "Experience with using the Parallel Workloads Archive", JPDC 2014, and the format's version 2.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from engine.resources import Demand
from engine.tasks import SECOND
from sim.readers.rows import Fields, Intake, ReaderOptions, TraceRow, batch_task, gang, lines
from sim.workload import Truth

FIELDS = (
    "job_number",
    "submit_time",
    "wait_time",
    "run_time",
    "allocated_processors",
    "average_cpu_time",
    "used_memory",
    "requested_processors",
    "requested_time",
    "requested_memory",
    "status",
    "user",
    "group",
    "executable",
    "queue",
    "partition",
    "preceding_job",
    "think_time",
)
_HEADER_FACTS = ("Version", "Computer", "MaxJobs", "MaxNodes", "MaxProcs", "UnixStartTime", "TimeZoneString")
_FEATURES = {"group": "unix_group"}
_CANCELLED = 5
_PARTIAL = 2
"""A checkpointed piece of a job whose whole is a record of its own."""


def matches(path: Path, head: str) -> bool:
    """Tell whether the beginning of a file looks like this format."""
    for text in head.splitlines():
        words = text.split()
        if not words or text.lstrip().startswith(";"):
            continue
        return len(words) == len(FIELDS) and all(_is_number(word) for word in words)
    return path.name.removesuffix(".gz").endswith(".swf")


def rows(path: Path, intake: Intake, options: ReaderOptions) -> Iterator[TraceRow]:
    """Yield the jobs in the order of the file."""
    for line, text in lines(path):
        words = text.split()
        if not words:
            continue
        if words[0].startswith(";"):
            _comment(text, intake)
            continue
        row = intake.attempt(lambda line=line, words=words: _row(line, words, intake, options))  # type: ignore[misc]
        if row is not None:
            yield row


def _comment(text: str, intake: Intake) -> None:
    name, separator, value = text.strip().lstrip("; ").partition(":")
    if separator and name.strip() in _HEADER_FACTS:
        intake.facts.setdefault(name.strip(), value.strip())


def _row(line: int, words: list[str], intake: Intake, options: ReaderOptions) -> TraceRow | None:
    if len(words) != len(FIELDS):
        intake.refuse(line, "fields", f"expected {len(FIELDS)} numbers, got {len(words)}", "count")
    fields = Fields(intake, line, dict(zip(FIELDS, words, strict=True)))
    number = fields.whole("job_number", low=-1, high=10**12)
    at = round(fields.number("submit_time") * SECOND)
    run = fields.number("run_time", low=-1)
    status = fields.whole("status", low=-1, high=5)
    if status in {_PARTIAL, 3, 4}:
        intake.skip(line, "partial run of a checkpointed job")
        return None
    if run < 0 or (status == _CANCELLED and run == 0):
        intake.skip(line, "cancelled before it ran" if status == _CANCELLED else "run time is unknown")
        return None
    allocated = fields.whole("allocated_processors", low=-1, high=10**9)
    asked = fields.whole("requested_processors", low=-1, high=10**9)
    processors = asked if asked > 0 else allocated
    if processors <= 0:
        intake.skip(line, "number of processors is unknown")
        return None
    if asked > 0 and allocated > 0 and asked != allocated:
        intake.counts["processors asked for and allocated differ"] += 1
    limit = fields.number("requested_time", low=-1)
    if 0 < limit < run:
        intake.counts["ran longer than asked for"] += 1
    members, gpus = gang(processors, options.gpus_per_node)
    features: dict[str, str | int | float] = {"total_gpus": processors}
    names = {
        name: fields.whole(name, low=-1, high=10**12) for name in ("user", "group", "executable", "queue", "partition")
    }
    features.update({_FEATURES.get(name, name): f"{name}-{value}" for name, value in names.items() if value >= 0})
    tenant = next((f"{name}-{names[name]}" for name in ("group", "user") if names[name] >= 0), "tenant-0")
    task = batch_task(
        f"job-{number}" if number >= 0 else f"line-{line}",
        tenant,
        Demand(gpus=gpus),
        members,
        features,
        round(limit * SECOND) if limit > 0 else None,
    )
    return TraceRow(line, at, task, Truth(work_us=max(1, round(run * SECOND))))


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
