"""Reads openb's pod lists (cluster-trace-gpu-v2023, ATC 2023) as tasks in time; `sim.openb` reads them for packing, without time.

A Pod arrives at its creation and runs from when it was scheduled until it was deleted; those in the phase Running were cut off by
the end of the log. Lists without times cannot be played. Pods without a GPU are skipped unless asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from engine.resources import WHOLE_GPU, Demand
from engine.tasks import SECOND
from sim.readers.rows import Fields, Intake, ReaderOptions, TraceRow, batch_task, columns_of, csv_records
from sim.workload import Truth, WorkloadError

POD_COLUMNS = ("name", "cpu_milli", "memory_mib", "num_gpu", "gpu_milli")
_TIMES = ("creation_time", "deletion_time")


def matches(path: Path, head: str) -> bool:
    """Tell whether the header is a pod list's."""
    return set(POD_COLUMNS) <= set(columns_of(head))


def rows(path: Path, intake: Intake, options: ReaderOptions) -> Iterator[TraceRow]:
    """Yield the Pods in the order of the file."""
    for fields in csv_records(path, intake, POD_COLUMNS):
        if not fields.has(*_TIMES):
            raise WorkloadError(
                f"{path}: has no {' and '.join(_TIMES)}; a list without times is for `aigc reproduce fgd`"
            )
        row = intake.attempt(partial(_row, fields, intake, options))
        if row is not None:
            yield row


def _row(fields: Fields, intake: Intake, options: ReaderOptions) -> TraceRow | None:
    gpus = fields.whole("num_gpu", high=1000)
    if gpus == 0 and not options.cpu_tasks:
        intake.skip(fields.line, "asks for no GPU")
        return None
    share = fields.whole("gpu_milli", high=WHOLE_GPU) if gpus else WHOLE_GPU
    if share == 0 or (gpus > 1 and share != WHOLE_GPU):
        fields.refuse("gpu_milli", f"{share} with {gpus} GPUs is wrong; several are whole, one has 1 to {WHOLE_GPU}")
    if not fields.known("deletion_time"):
        intake.skip(fields.line, "was not over when the log was taken")
        return None
    began = "scheduled_time" if fields.known("scheduled_time") else "creation_time"
    if began == "creation_time" and fields.known("pod_phase"):
        intake.skip(fields.line, "was never scheduled")
        return None
    if fields.known("pod_phase"):
        intake.counts[f"phase {fields.text('pod_phase')}"] += 1
    work = fields.span(began, "deletion_time")
    models = (
        {part.strip().lower() for part in fields.text("gpu_spec").split("|")} if fields.known("gpu_spec") else set()
    )
    demand = Demand(
        gpus=gpus,
        gpu_share=share,
        gpu_models=tuple(sorted(models - {""})) if gpus and options.gpu_types else (),
        cpu_milli=fields.whole("cpu_milli", high=10**7),
        memory_bytes=fields.whole("memory_mib", high=10**8) << 20,
    )
    features: dict[str, str | int | float] = {"total_gpus": round(gpus * share / WHOLE_GPU, 3)}
    if fields.known("qos"):
        features["qos"] = fields.text("qos")
    task = batch_task(fields.text("name"), "tenant-0", demand, 1, features)
    return TraceRow(fields.line, round(fields.number("creation_time") * SECOND), task, Truth(work_us=max(1, work)))
