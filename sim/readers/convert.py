"""Writes any workload as tasks of one's own (`sim.own_tasks`): CSV or JSON lines that people can read and edit.

What that form cannot hold is left out and counted: identities of adapters, peak memory, limits of run time and attempts, disk,
network and named resources.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.resources import WHOLE_GPU, Demand
from engine.tasks import SECOND, Affinity, TaskSpec
from sim.hardware import GIB
from sim.own_tasks import COLUMNS, kind
from sim.workload import Arrival, Workload, WorkloadError

_PLAIN = TaskSpec.__dataclass_fields__["max_attempts"].default


def write(workload: Workload, path: Path) -> dict[str, int]:
    """Write ``.csv`` or ``.jsonl``, packed when the name ends in ``.gz``; return what was left out, by kind and number of tasks.

    Reading the file again gives the same arrivals, but for what was left out. Raises `WorkloadError` for another ending, or
    for a task that has no run time.
    """
    form = kind(path)
    if form not in {".csv", ".jsonl"}:
        raise WorkloadError(f"output: {path.name} ends in neither .csv nor .jsonl (.gz may follow); name it so")
    lost: Counter[str] = Counter()
    rows = [_row(arrival, lost) for arrival in workload.arrivals]
    buffer = io.StringIO(newline="")
    if form == ".csv":
        names = {name for row in rows for name in row}
        features = sorted(names - set(COLUMNS))
        writer = csv.DictWriter(
            buffer, [name for name in COLUMNS if name in names] + features, restval="", lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows)
    else:
        for row in rows:
            buffer.write(json.dumps(row, ensure_ascii=False) + "\n")
    data = buffer.getvalue().encode()
    try:
        path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    except OSError as error:
        raise WorkloadError(f"output: cannot write {path}: {error.strerror}") from None
    return dict(sorted(lost.items()))


def _row(arrival: Arrival, lost: Counter[str]) -> dict[str, Any]:
    task, truth, demand = arrival.task, arrival.truth, arrival.task.demand
    if truth.work_us is None:
        raise WorkloadError(
            f"task {task.req_no!r}: has no run time of its own, so no row can hold it; convert a trace that does"
        )
    row: dict[str, Any] = {
        "submitted_s": _seconds(arrival.at),
        "seconds": _seconds(truth.work_us),
        "req_no": task.req_no,
        "tenant": task.tenant,
        "type": task.task_type.value,
        "method": task.method,
        "gpus": demand.gpus,
    }
    row.update(_unusual(arrival))
    for name, value in task.features:
        if name in COLUMNS:
            lost[f"feature {name}, which is a column"] += 1
        else:
            row[name] = value
    for what in _beyond(arrival):
        lost[what] += 1
    return row


def _unusual(arrival: Arrival) -> Iterator[tuple[str, Any]]:
    """Yield the columns that differ from what the reader takes when they are not there."""
    task, truth, demand = arrival.task, arrival.truth, arrival.task.demand
    if task.group:
        yield "group", task.group
    if task.model:
        yield "model", task.model
    if task.priority:
        yield "priority", task.priority
    if demand.gpu_share != WHOLE_GPU:
        yield "gpu_share", demand.gpu_share
    if demand.gpu_memory_bytes:
        yield "gpu_memory_gib", demand.gpu_memory_bytes / GIB
    if task.members != 1:
        yield "members", task.members
    if task.slots != 1:
        yield "slots", task.slots
    if task.declared_us is not None:
        yield "declared_s", _seconds(task.declared_us)
    if task.start_deadline is not None:
        yield "deadline_s", _seconds(task.start_deadline - arrival.at)
    if truth.cancel_after_us is not None:
        yield "cancel_after_s", _seconds(truth.cancel_after_us)
    if task.affinity is not Affinity.PREFERRED:
        yield "affinity", task.affinity.value
    if demand.gpu_models:
        yield "gpu_models", "|".join(demand.gpu_models)
    if demand.cpu_milli:
        yield "cpu_milli", demand.cpu_milli
    if demand.memory_bytes:
        yield "memory_gib", demand.memory_bytes / GIB
    if truth.fails_with is not None:
        yield "fails_with", truth.fails_with.value


def _beyond(arrival: Arrival) -> Iterator[str]:
    """Yield what a row cannot hold."""
    task, truth = arrival.task, arrival.truth
    if truth.loras:
        yield "identities of adapters"
    if truth.peak_gpu_memory_bytes:
        yield "peak memory"
    if task.run_limit_us is not None:
        yield "limit of run time"
    if task.max_attempts != _PLAIN or not task.preemptible:
        yield "attempts or preemptibility"
    spare = Demand()
    if (task.demand.disk_bytes, task.demand.network_bps, task.demand.extra) != (
        spare.disk_bytes,
        spare.network_bps,
        spare.extra,
    ):
        yield "disk, network and named resources"


def _seconds(micros: int) -> int | float:
    return micros // SECOND if micros % SECOND == 0 else micros / SECOND
