"""Reads Alibaba's PAI trace (cluster-trace-gpu-v2020, NSDI 2022): the task table, and the job lists of the authors' simulator.

Both count GPUs per instance, and a task's instances start together: they are the members of a gang, counted once each. The task
table gives hundredths of a GPU (50 is half a GPU), the job lists whole GPUs with fractions; more than one GPU that is not whole is
rounded up. The task table knows when a task was launched, not when it was submitted: its arrivals have some waiting behind them
already. Tasks that still ran or waited when the log was taken are skipped; failed ones run their recorded time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from engine.resources import WHOLE_GPU, Demand
from engine.tasks import SECOND, Micros
from sim.hardware import GIB
from sim.readers.rows import Fields, Intake, ReaderOptions, TraceRow, batch_task, columns_of, csv_records, lines
from sim.workload import Truth

TASK_COLUMNS = (
    "job_name",
    "task_name",
    "inst_num",
    "status",
    "start_time",
    "end_time",
    "plan_cpu",
    "plan_mem",
    "plan_gpu",
    "gpu_type",
)
"""The published table has no header; its columns are these."""
JOB_COLUMNS = ("job_id", "num_gpu", "submit_time", "duration")
STATES = frozenset({"Running", "Terminated", "Failed", "Waiting", "Interrupted", "Ready"})
_UNFINISHED = frozenset({"Running", "Waiting", "Ready"})


def matches_tasks(path: Path, head: str) -> bool:
    """Tell whether the first line is the table's header, or a row of the published file, which has none."""
    cells = columns_of(head)
    return cells[: len(TASK_COLUMNS)] == list(TASK_COLUMNS) or (len(cells) == len(TASK_COLUMNS) and cells[3] in STATES)


def matches_jobs(path: Path, head: str) -> bool:
    """Tell whether the header is that of a job list."""
    return set(JOB_COLUMNS) <= set(columns_of(head))


def task_rows(path: Path, intake: Intake, options: ReaderOptions) -> Iterator[TraceRow]:
    """Yield the task table's rows."""
    with_header = next((columns_of(text)[:1] == [TASK_COLUMNS[0]] for _, text in lines(path)), False)
    for fields in csv_records(path, intake, TASK_COLUMNS, None if with_header else TASK_COLUMNS):
        row = intake.attempt(partial(_task_row, fields, intake, options))
        if row is not None:
            yield row


def job_rows(path: Path, intake: Intake, options: ReaderOptions) -> Iterator[TraceRow]:
    """Yield a job list's rows."""
    for fields in csv_records(path, intake, JOB_COLUMNS):
        row = intake.attempt(partial(_job_row, fields, intake, options))
        if row is not None:
            yield row


def _task_row(fields: Fields, intake: Intake, options: ReaderOptions) -> TraceRow | None:
    status = fields.text("status")
    if status not in STATES:
        fields.refuse("status", f"{status!r} is unknown; expected one of {', '.join(sorted(STATES))}")
    if status in _UNFINISHED or not fields.known("start_time") or not fields.known("end_time"):
        intake.skip(
            fields.line, "was not over when the log was taken" if status in _UNFINISHED else "start or end is unknown"
        )
        return None
    work = fields.span("start_time", "end_time")
    hundredths = fields.number("plan_gpu", 0, high=1e5) if fields.known("plan_gpu") else 0.0
    intake.counts[f"status {status}"] += 1
    name = f"{fields.text('job_name')}/{fields.text('task_name')}"
    features: dict[str, str | int | float] = {"role": fields.text("task_name")}
    cpu = fields.number("plan_cpu", 0, high=1e7) * 10
    memory = fields.number("plan_mem", 0, high=1e6) * GIB
    return _row(
        fields, intake, options, name, fields.moment("start_time"), work, hundredths / 100, cpu, memory, features
    )


def _job_row(fields: Fields, intake: Intake, options: ReaderOptions) -> TraceRow | None:
    gpus = fields.number("num_gpu", 0, high=1e3)
    cpu = fields.number("num_cpu", 0, high=1e5) * 1000 if fields.known("num_cpu") else 0.0
    work = round(fields.number("duration") * SECOND)
    features: dict[str, str | int | float] = {}
    for name, feature in (("user", "user"), ("group", "job_group")):
        if fields.known(name):
            features[feature] = f"{name}-{fields.text(name)}"
    at = round(fields.number("submit_time") * SECOND)
    return _row(fields, intake, options, f"job-{fields.text('job_id')}", at, work, gpus, cpu, 0.0, features)


def _row(
    fields: Fields,
    intake: Intake,
    options: ReaderOptions,
    name: str,
    at: Micros,
    work: Micros,
    gpus: float,
    cpu_milli: float,
    memory_bytes: float,
    features: dict[str, str | int | float],
) -> TraceRow | None:
    """Make a gang of instances that ask for the same."""
    if gpus == 0 and not options.cpu_tasks:
        intake.skip(fields.line, "asks for no GPU")
        return None
    if gpus > 1 and gpus != int(gpus):
        intake.counts["GPUs rounded up to whole ones"] += 1
    share = max(1, round(gpus * WHOLE_GPU)) if 0 < gpus < 1 else WHOLE_GPU
    members = fields.whole("inst_num", 1, low=1) if fields.known("inst_num") else 1
    if fields.known("num_inst"):
        members = fields.whole("num_inst", 1, low=1)
    kind = fields.text("gpu_type").lower() if fields.known("gpu_type") else ""
    models = (kind,) if kind and kind != "cpu" and options.gpu_types else ()
    demand = Demand(
        gpus=-int(-gpus // 1),
        gpu_share=share,
        gpu_models=models,
        cpu_milli=round(cpu_milli),
        memory_bytes=round(memory_bytes),
    )
    tenant = str(features.get("user", "tenant-0"))
    task = batch_task(name, tenant, demand, members, {"total_gpus": round(gpus, 3), "instances": members, **features})
    return TraceRow(fields.line, at, task, Truth(work_us=max(1, work)))
