"""Reads GenTD26 (`lora_request_trace.csv`) as it is published: a real Stable Diffusion service's requests.

What is kept and why:

- SUCCEED: kept; the recorded seconds are the true run time on the reference GPU. They are whole seconds from creation to the last
  change, so queueing and loading are in them: simulated totals are on the safe side.
- FAILED: kept; an attempt runs the recorded time and fails for good, as the service's own attempts had when the row was written.
- PENDING: skipped; they never ran, and most have no parameters. PROCESSING: skipped; their time is cut off.

The trace knows neither tenants nor urgency nor picture sizes; tenants and urgency are drawn (`sim.workload.ranked`). Its clock is
shifted: do not read weekdays or hours as local.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from engine.resources import Demand
from engine.tasks import SECOND, Affinity, FailureCause, TaskSpec, TaskType
from sim.hardware import GIB
from sim.readers.rows import open_text
from sim.workload import Arrival, Truth, Workload, WorkloadError, ranked

COLUMNS = (
    "gmt_create",
    "predict_type",
    "predict_status",
    "exec_time_seconds",
    "groupId",
    "num_images_per_prompt",
    "num_inference_steps",
    "checkpoint_model_version_id",
    "num_lora",
)
DEMAND = Demand(gpus=1, gpu_share=1000, gpu_memory_bytes=24 * GIB, cpu_milli=4_000, memory_bytes=16 * GIB)
"""What one generating Pod takes: a whole GPU of which it may use 24 GiB."""
KEPT = {"SUCCEED", "FAILED"}
SKIPPED = {"PENDING", "PROCESSING"}


def read(
    path: Path,
    *,
    tenants: int = 4,
    urgent_share: float = 0.1,
    seed: int = 0,
    limit: int | None = None,
) -> Workload:
    """Read the file; raises `WorkloadError` naming line, column and remedy.

    `limit` keeps the first tasks only.
    """
    counts: Counter[str] = Counter()
    rows: list[tuple[datetime, Arrival]] = []
    for line, row in records(path):
        status = row["predict_status"]
        if status in SKIPPED:
            counts[f"skipped {status}"] += 1
            continue
        if status not in KEPT:
            raise WorkloadError(
                f"{path}, line {line}, predict_status: {status!r} is unknown; expected SUCCEED, FAILED, PENDING or PROCESSING"
            )
        counts[f"kept {status}"] += 1
        rows.append(arrival_of(path, line, row))
        if limit is not None and len(rows) >= limit:
            break
    if not rows:
        raise WorkloadError(f"{path}: holds no request that ended; is it lora_request_trace.csv?")
    rows.sort(key=lambda pair: pair[0])
    origin = rows[0][0]
    arrivals = tuple(
        Arrival(round((moment - origin).total_seconds()) * SECOND, arrival.task, arrival.truth)
        for moment, arrival in rows
    )
    notes: tuple[tuple[str, int | float | str], ...] = (("origin", origin.isoformat(sep=" ")), *sorted(counts.items()))
    return Workload(path.name, ranked(arrivals, tenants=tenants, urgent_share=urgent_share, seed=seed), notes)


def records(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield every row of the file, packed with gzip or not, with its line."""
    try:
        with open_text(path) as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise WorkloadError(
                    f"{path}: column {missing[0]!r} is missing; GenTD26's lora_request_trace.csv has it. For tasks of your "
                    "own use a CSV with the columns of sim.own_tasks"
                )
            for row in reader:
                yield reader.line_num, row
    except OSError as error:
        raise WorkloadError(
            f"trace: cannot read {path}: {error.strerror}; give the path of lora_request_trace.csv"
        ) from None
    except UnicodeDecodeError as error:
        raise WorkloadError(
            f"trace: {path} is not UTF-8 text ({error.reason} at byte {error.start}); unpack it first"
        ) from None


def arrival_of(path: Path, line: int, row: dict[str, str]) -> tuple[datetime, Arrival]:
    """Return a row's moment and its task; raises `WorkloadError` naming line, column and remedy."""

    def number(column: str, default: float | None = None) -> float:
        text = row[column]
        if not text and default is not None:
            return default
        try:
            value = float(text)
        except (TypeError, ValueError):
            raise WorkloadError(f"{path}, line {line}, {column}: {text!r} is not a number") from None
        if not 0 <= value < 1e9:
            raise WorkloadError(f"{path}, line {line}, {column}: {text} is out of range (0 to 1e9)")
        return value

    try:
        moment = datetime.fromisoformat(row["gmt_create"]).replace(tzinfo=UTC)
    except ValueError:
        raise WorkloadError(
            f"{path}, line {line}, gmt_create: {row['gmt_create']!r} is not a time like 2024-11-15 16:57:50"
        ) from None
    group = row["groupId"]
    features: dict[str, str | int | float] = {
        "images": int(number("num_images_per_prompt", 1)),
        "kind": row["predict_type"],
        "loras": int(number("num_lora", 0)),
        "prompt_length": int(number("prompt_length", 0)) if "prompt_length" in row else 0,
        "steps": int(number("num_inference_steps", 30)),
        "user": group,
    }
    task = TaskSpec(
        req_no=f"gentd26-{line - 1:06d}",
        tenant="tenant-0",
        group=group,
        task_type=TaskType.GC,
        method="text_to_image",
        model=row["checkpoint_model_version_id"],
        demand=DEMAND,
        affinity=Affinity.PREFERRED,
        features=tuple(sorted(features.items())),
    )
    work_us = max(1, round(number("exec_time_seconds") * SECOND))
    failure = FailureCause.BAD_INPUT if row["predict_status"] == "FAILED" else None
    return moment, Arrival(0, task, Truth(work_us=work_us, fails_with=failure))
