"""Writes a timeline as Parquet tables: tasks, runs, Pods, nodes, levels and every event and order, for pandas, DuckDB or Polars.

Rows go to disk in groups as things end, so a run of any length takes little memory. Times are microseconds of the journal's
clock; columns end in their unit. Needs pyarrow, which the extra ``parquet`` brings.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.commands import Command
from engine.events import Event
from engine.resources import WHOLE_GPU, GpuSpec
from engine.tasks import Micros
from sim.timeline import PodRecord, RunRecord, TaskRecord, TimelineError

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ModuleNotFoundError:
    raise TimelineError(
        "timeline: Parquet needs pyarrow, which comes with the extra `parquet`: pip install 'aigc-platform[parquet]'"
    ) from None

_GROUP = 50_000
_COLUMNS: dict[str, dict[str, str]] = {
    "tasks": {
        "req_no": "string",
        "tenant": "string",
        "group": "string",
        "type": "string",
        "method": "string",
        "model": "string",
        "priority": "int64",
        "gpus": "int64",
        "members": "int64",
        "submitted_us": "int64",
        "first_started_us": "int64",
        "ended_us": "int64",
        "state": "string",
        "reason": "string",
        "attempts": "int64",
        "features": "string",
    },
    "runs": {
        "req_no": "string",
        "attempt": "int64",
        "rank": "int64",
        "pod": "int64",
        "node": "string",
        "gpus": "string",
        "ordered_us": "int64",
        "started_us": "int64",
        "ended_us": "int64",
        "outcome": "string",
        "reason": "string",
    },
    "pods": {
        "pod": "int64",
        "node": "string",
        "method": "string",
        "model": "string",
        "gpus": "string",
        "gpu_share": "double",
        "gpu_memory_bytes": "int64",
        "slots": "int64",
        "created_us": "int64",
        "ready_us": "int64",
        "ended_us": "int64",
        "runs": "int64",
        "why": "string",
    },
    "nodes": {"at_us": "int64", "node": "string", "up": "bool", "gpus": "int64", "gpu_models": "string"},
    "levels": {"at_us": "int64", "waiting": "int64", "running": "int64", "pods": "int64"},
    "events": {
        "at_us": "int64",
        "step": "int64",
        "kind": "string",
        "name": "string",
        "req_no": "string",
        "attempt": "int64",
        "rank": "int64",
        "pod": "int64",
        "node": "string",
        "detail": "string",
    },
}
TABLES = tuple(_COLUMNS)
"""One file each in the directory."""


class _Table:
    """One file, written group by group."""

    def __init__(self, folder: Path, name: str, facts: dict[str, str]) -> None:
        kinds = {
            kind: getattr(pa, "bool_" if kind == "bool" else "float64" if kind == "double" else kind)()
            for kind in set(_COLUMNS[name].values())
        }
        self._schema = pa.schema([(column, kinds[kind]) for column, kind in _COLUMNS[name].items()], metadata=facts)
        self._columns: list[list[Any]] = [[] for _ in self._schema]
        self._writer = pq.ParquetWriter(folder / f"{name}.parquet", self._schema, compression="zstd")
        self.rows = 0

    def add(self, *values: Any) -> None:
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)
        self.rows += 1
        if len(self._columns[0]) >= _GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._columns[0]:
            try:
                self._write()
            except OSError as error:
                raise TimelineError(
                    f"timeline: cannot go on writing: {error}; free the disk or write elsewhere"
                ) from None

    def _write(self) -> None:
        columns = dict(zip(self._schema.names, self._columns, strict=True))
        self._writer.write_table(pa.table(columns, schema=self._schema))
        for column in self._columns:
            column.clear()

    def close(self) -> None:
        self._flush()
        self._writer.close()


class ParquetTables:
    """A sink that writes as it goes; `close` completes the files. `facts` go into each file's metadata."""

    def __init__(self, folder: Path, facts: dict[str, str | int | float] | None = None) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            about = {name: str(value) for name, value in (facts or {}).items()}
            self._tables = {name: _Table(folder, name, about) for name in _COLUMNS}
        except OSError as error:
            raise TimelineError(
                f"timeline: cannot write into {folder}: {error.strerror or error}; check the path"
            ) from None
        self._step = 0

    @property
    def rows(self) -> dict[str, int]:
        """Rows by table."""
        return {name: table.rows for name, table in self._tables.items()}

    def step(self, now: Micros, events: Sequence[Event], commands: Sequence[Command]) -> None:
        """Write a step's events and orders as they are."""
        self._step += 1
        table = self._tables["events"]
        for kind, items in (("event", events), ("command", commands)):
            for item in items:
                task = getattr(item, "task", None)
                spec = getattr(item, "spec", None)
                node = getattr(item, "node", "") if spec is None else spec.name
                node = node if isinstance(node, str) else getattr(node, "name", "")
                table.add(
                    now,
                    self._step,
                    kind,
                    type(item).__name__,
                    task.req_no if task is not None else getattr(item, "req_no", ""),
                    getattr(item, "attempt", None),
                    getattr(item, "rank", None),
                    getattr(item, "pod", None),
                    node,
                    _detail(item),
                )

    def node(self, now: Micros, name: str, gpus: Sequence[GpuSpec], up: bool) -> None:
        """Write a node's coming, change or going."""
        models = "|".join(sorted({gpu.model for gpu in gpus}))
        self._tables["nodes"].add(now, name, up, sum(gpu.healthy for gpu in gpus), models)

    def run(self, record: RunRecord) -> None:
        """Write a run."""
        self._tables["runs"].add(
            record.req_no,
            record.attempt,
            record.rank,
            record.pod,
            record.node,
            "|".join(grant.uuid for grant in record.grants),
            record.ordered_at,
            record.started_at,
            record.ended_at,
            record.outcome,
            record.reason,
        )

    def pod(self, record: PodRecord) -> None:
        """Write a Pod."""
        self._tables["pods"].add(
            record.pod,
            record.node,
            record.method,
            record.model,
            "|".join(grant.uuid for grant in record.grants),
            sum(grant.share for grant in record.grants) / WHOLE_GPU,
            sum(grant.memory_bytes for grant in record.grants),
            record.slots,
            record.created_at,
            record.ready_at,
            record.ended_at,
            record.runs,
            record.why,
        )

    def task(self, record: TaskRecord) -> None:
        """Write a task."""
        spec = record.spec
        self._tables["tasks"].add(
            spec.req_no,
            spec.tenant,
            spec.group,
            spec.task_type.value,
            spec.method,
            spec.model,
            spec.priority,
            spec.demand.gpus,
            spec.members,
            record.submitted_at,
            record.first_started_at,
            record.ended_at,
            record.state,
            record.reason,
            record.attempts,
            json.dumps(dict(spec.features)) if spec.features else "",
        )

    def levels(self, now: Micros, waiting: int, running: int, pods: int) -> None:
        """Write a change of the levels."""
        self._tables["levels"].add(now, waiting, running, pods)

    def close(self) -> None:
        """Complete the files."""
        for table in self._tables.values():
            table.close()


def _detail(item: Event | Command) -> str:
    for name in ("cause", "state", "reason", "outcome"):
        value = getattr(item, name, "")
        if value:
            return str(value.value) if hasattr(value, "value") else str(value)
    return ""
