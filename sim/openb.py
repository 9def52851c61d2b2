"""Reads the GPU-sharing trace openb (cluster-trace-gpu-v2023) as it is published: node lists and pod lists, CSV or CSV.gz.

Pod lists differ in their columns: some have no QoS, times or GPU specification. What a list lacks is left empty; what placement
needs (CPU, memory, GPUs, their share) must be there.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from engine.resources import WHOLE_GPU
from sim.workload import WorkloadError

NODE_COLUMNS = ("sn", "cpu_milli", "memory_mib", "gpu", "model")
_MOST = float(1 << 40)
POD_COLUMNS = ("name", "cpu_milli", "memory_mib", "num_gpu", "gpu_milli")


@dataclass(frozen=True, slots=True)
class NodeRow:
    """A machine of the trace."""

    name: str
    cpu_milli: int
    memory_mib: int
    gpus: int
    model: str
    """GPU model; empty without GPUs."""


@dataclass(frozen=True, slots=True)
class PodRow:
    """A Pod of the trace."""

    name: str
    cpu_milli: int
    memory_mib: int
    gpus: int
    gpu_milli: int
    """Thousandths of each GPU; 0 without GPUs."""
    gpu_models: tuple[str, ...] = ()
    """GPU models it may run on; empty: any."""
    qos: str = ""
    creation_s: int | None = None
    deletion_s: int | None = None


def read_nodes(path: Path) -> tuple[NodeRow, ...]:
    """Read a node list; raises `WorkloadError` naming line, column and remedy."""
    found: dict[str, NodeRow] = {}
    for line, row in _rows(path, NODE_COLUMNS):
        name = row["sn"]
        if not name or name in found:
            raise WorkloadError(
                f"{path}, line {line}, sn: {name!r} is empty or comes twice; give every node its own name"
            )
        gpus = _whole(path, line, row, "gpu")
        found[name] = NodeRow(
            name,
            _whole(path, line, row, "cpu_milli"),
            _whole(path, line, row, "memory_mib"),
            gpus,
            (row["model"] or "").strip(),
        )
    if not found:
        raise WorkloadError(f"{path}: holds no node; is it a node list of openb?")
    return tuple(found.values())


def read_pods(path: Path) -> tuple[PodRow, ...]:
    """Read a pod list; raises `WorkloadError` naming line, column and remedy."""
    pods = tuple(_pod(path, line, row) for line, row in _rows(path, POD_COLUMNS))
    if not pods:
        raise WorkloadError(f"{path}: holds no pod; is it a pod list of openb?")
    return pods


def _pod(path: Path, line: int, row: dict[str, str]) -> PodRow:
    gpus = _whole(path, line, row, "num_gpu")
    share = _whole(path, line, row, "gpu_milli")
    if gpus == 0:
        share = 0
    elif not 1 <= share <= WHOLE_GPU:
        raise WorkloadError(f"{path}, line {line}, gpu_milli: {share} is wrong; a GPU has 1 to {WHOLE_GPU} thousandths")
    elif gpus > 1 and share != WHOLE_GPU:
        raise WorkloadError(
            f"{path}, line {line}, gpu_milli: {share} with {gpus} GPUs is wrong; several GPUs are whole ({WHOLE_GPU})"
        )
    models = dict.fromkeys(part.strip() for part in (row.get("gpu_spec") or "").split("|"))
    return PodRow(
        row["name"],
        _whole(path, line, row, "cpu_milli"),
        _whole(path, line, row, "memory_mib"),
        gpus,
        share,
        tuple(sorted(name for name in models if name)) if gpus else (),
        row.get("qos") or "",
        _time(path, line, row, "creation_time"),
        _time(path, line, row, "deletion_time"),
    )


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with _open(path) as file:
            reader = csv.DictReader(file)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise WorkloadError(
                    f"{path}, line 1: the columns {', '.join(missing)} are missing; is it a list of openb?"
                )
            for row in reader:
                yield reader.line_num, row
    except (UnicodeDecodeError, csv.Error, gzip.BadGzipFile, EOFError) as error:
        raise WorkloadError(f"{path}: cannot be read as CSV ({error}); give a CSV file or its gzip") from error


def _open(path: Path) -> IO[str]:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if packed:
        return gzip.open(path, "rt", newline="", encoding="utf-8")
    return path.open(newline="", encoding="utf-8")


def _whole(path: Path, line: int, row: dict[str, str], column: str) -> int:
    text = (row.get(column) or "").strip()
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= _MOST or value != int(value):
        raise WorkloadError(f"{path}, line {line}, {column}: {text!r} is wrong; use a whole number of at least 0")
    return int(value)


def _time(path: Path, line: int, row: dict[str, str], column: str) -> int | None:
    return _whole(path, line, row, column) if (row.get(column) or "").strip() else None
