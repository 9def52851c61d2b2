"""Reads tasks of one's own from CSV or JSON lines: one task a row, only `submitted_s` and `seconds` needed.

Columns: ``submitted_s`` (seconds from the beginning), ``seconds`` (true run time on the reference GPU), and optionally ``req_no,
tenant, group, type (TP or GC), method, model, priority, gpus, gpu_share (thousandths), gpu_memory_gib, members, slots, declared_s,
deadline_s, cancel_after_s, affinity, gpu_models (several with | between), cpu_milli, memory_gib, fails_with``. Any other column
is a feature that predictions may use. Either may be packed with gzip.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.resources import WHOLE_GPU, Demand
from engine.tasks import SECOND, Affinity, FailureCause, TaskSpec, TaskType
from sim.hardware import GIB
from sim.readers.rows import open_text
from sim.workload import Arrival, Truth, Workload, WorkloadError

COLUMNS = (
    "submitted_s",
    "seconds",
    "req_no",
    "tenant",
    "group",
    "type",
    "method",
    "model",
    "priority",
    "gpus",
    "gpu_share",
    "gpu_memory_gib",
    "members",
    "slots",
    "declared_s",
    "deadline_s",
    "cancel_after_s",
    "affinity",
    "gpu_models",
    "cpu_milli",
    "memory_gib",
    "fails_with",
)
"""Every column with a meaning of its own, in the order in which they are written."""


def read(path: Path, limit: int | None = None) -> Workload:
    """Read ``.csv`` or ``.jsonl``; raises `WorkloadError` naming line, column and remedy. Rows need not be sorted."""
    if kind(path) not in {".csv", ".jsonl"}:
        raise WorkloadError(f"trace: {path.name} is neither .csv nor .jsonl; rename or convert it")
    arrivals = []
    seen: set[str] = set()
    for line, row in records(path):
        arrival = arrival_of(path, line, row)
        if arrival.task.req_no in seen:
            raise WorkloadError(
                f"{path}, line {line}, req_no: {arrival.task.req_no!r} occurs twice; every task has its own"
            )
        seen.add(arrival.task.req_no)
        arrivals.append(arrival)
    if not arrivals:
        raise WorkloadError(f"{path}: holds no task; give one row per task with submitted_s and seconds")
    arrivals.sort(key=lambda arrival: arrival.at)
    return Workload(path.name, tuple(arrivals)).limited(limit)


def kind(path: Path) -> str:
    """Return what a file's name says it is: ``.csv`` for ``tasks.csv`` and ``tasks.csv.gz``."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def arrival_of(path: Path, line: int, row: Mapping[str, Any]) -> Arrival:
    """Return a row's task; raises `WorkloadError` naming line, column and remedy."""
    return _Row(path, line, row).arrival()


def records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield every row of the file, packed with gzip or not, with its line."""
    try:
        with open_text(path) as file:
            if kind(path) == ".csv":
                reader = csv.DictReader(file)
                for row in reader:
                    yield (
                        reader.line_num,
                        {name: value for name, value in row.items() if name is not None and value != ""},
                    )
                return
            for line, text in enumerate(file, 1):
                if text.strip():
                    yield line, _object(path, line, text)
    except OSError as error:
        raise WorkloadError(f"trace: cannot read {path}: {error.strerror}; check the path") from None
    except UnicodeDecodeError as error:
        raise WorkloadError(f"trace: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def _object(path: Path, line: int, text: str) -> Mapping[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        raise WorkloadError(f"{path}, line {line}: not JSON; every line is one object") from None
    if not isinstance(row, dict):
        raise WorkloadError(f"{path}, line {line}: expected a JSON object, got {type(row).__name__}")
    return row


class _Row:
    """One row and where it stands, for messages."""

    def __init__(self, path: Path, line: int, row: Mapping[str, Any]) -> None:
        self._where = f"{path}, line {line}"
        self._line = line
        self._row = row

    def number(self, name: str, default: float | None = None, low: float = 0.0) -> float:
        if name not in self._row:
            if default is None:
                raise WorkloadError(f"{self._where}, {name}: is missing; every task needs submitted_s and seconds")
            return default
        try:
            value = float(self._row[name])
        except (TypeError, ValueError):
            raise WorkloadError(f"{self._where}, {name}: {self._row[name]!r} is not a number") from None
        if not (math.isfinite(value) and low <= value < 1e12):
            raise WorkloadError(f"{self._where}, {name}: {value:g} is out of range; at least {low:g}, below 1e12")
        return value

    def micros(self, name: str) -> int | None:
        return round(self.number(name) * SECOND) if name in self._row else None

    def arrival(self) -> Arrival:
        row = self._row
        at = round(self.number("submitted_s") * SECOND)
        try:
            task_type = TaskType(str(row.get("type", "GC")))
            affinity = Affinity(str(row.get("affinity", "preferred")))
            fails_with = FailureCause(str(row["fails_with"])) if "fails_with" in row else None
        except ValueError as error:
            raise WorkloadError(
                f"{self._where}, type, affinity or fails_with: {error}; types are TP and GC, affinities "
                f"{', '.join(Affinity)}, causes {', '.join(FailureCause)}"
            ) from None
        features = tuple(sorted((str(name), _feature(value)) for name, value in row.items() if name not in COLUMNS))
        demand = Demand(
            gpus=int(self.number("gpus", 1)),
            gpu_share=int(self.number("gpu_share", WHOLE_GPU)),
            gpu_memory_bytes=round(self.number("gpu_memory_gib", 0) * GIB),
            gpu_models=tuple(name for name in str(row.get("gpu_models", "")).split("|") if name),
            cpu_milli=int(self.number("cpu_milli", 0)),
            memory_bytes=round(self.number("memory_gib", 0) * GIB),
        )
        deadline = self.micros("deadline_s")
        task = TaskSpec(
            req_no=str(row.get("req_no", f"row-{self._line:07d}")),
            tenant=str(row.get("tenant", "tenant-0")),
            group=str(row.get("group", "")),
            task_type=task_type,
            method=str(row.get("method", "text_to_image" if task_type is TaskType.GC else "dreambooth")),
            model=str(row.get("model", "")),
            priority=int(self.number("priority", 0)),
            demand=demand,
            slots=int(self.number("slots", 1, low=1)),
            members=int(self.number("members", 1, low=1)),
            affinity=affinity,
            start_deadline=None if deadline is None else at + deadline,
            declared_us=self.micros("declared_s"),
            features=features,
        )
        truth = Truth(
            work_us=max(1, round(self.number("seconds") * SECOND)),
            fails_with=fails_with,
            cancel_after_us=self.micros("cancel_after_s"),
        )
        return Arrival(at, task, truth)


def _feature(value: Any) -> str | int | float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return json.dumps(value)
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value
