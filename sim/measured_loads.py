"""Load times as a real service measured them, instead of bytes over bandwidths: GenTD26's monitoring files.

They give the load of a base model, of an adapter and of a pipeline, each with the container that it happened in. Which container it
was explains most of a base model's load time: some load in 3 s every time, most in 20 to 45 s, whatever was loaded before. So here
every GPU is one of the containers, drawn by its identity, and its loads are drawn from what that container measured; where the
files of a model lie makes no difference then. ControlNet loads are left out: the requests do not say which of them use one.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from engine.tasks import Micros
from sim.draws import choice
from sim.workload import WorkloadError

BASE, LORA, PIPELINE = (
    "basemodel_update_latency_anon.csv",
    "lora_update_latency_anon.csv",
    "pipeline_update_latency_anon.csv",
)
_ENOUGH = 20
"""Loads that a container must have measured to stand for a GPU."""


@dataclass(frozen=True, slots=True)
class Container:
    """What one container of the service measured, in microseconds."""

    base_us: tuple[Micros, ...]
    lora_us: tuple[Micros, ...]
    pipeline_us: tuple[Micros, ...]


@dataclass(frozen=True, slots=True)
class MeasuredLoads:
    """The containers that stand for GPUs."""

    containers: tuple[Container, ...]
    scale: float = 1.0
    """All loads take so many times as long."""

    def base_us(self, gpu: str, seed: int, *identity: str | int) -> Micros:
        """Draw the load of a base model onto this GPU."""
        return self._draw(self._container(gpu, seed).base_us, seed, "base", *identity)

    def lora_us(self, gpu: str, seed: int, *identity: str | int) -> Micros:
        """Draw the load of an adapter."""
        return self._draw(self._container(gpu, seed).lora_us, seed, "lora", *identity)

    def pipeline_us(self, gpu: str, seed: int, *identity: str | int) -> Micros:
        """Draw the time to put another pipeline together (text to image, image to image, inpainting) around a loaded model."""
        return self._draw(self._container(gpu, seed).pipeline_us, seed, "pipeline", *identity)

    def scaled(self, scale: float) -> MeasuredLoads:
        """Return loads that take `scale` times as long."""
        return replace(self, scale=self.scale * scale)

    def _container(self, gpu: str, seed: int) -> Container:
        return self.containers[choice(len(self.containers), seed, "container", gpu)]

    def _draw(self, values: tuple[Micros, ...], seed: int, *identity: str | int) -> Micros:
        return round(values[choice(len(values), seed, "measured", *identity)] * self.scale)


@lru_cache(maxsize=4)
def read(folder: Path) -> MeasuredLoads:
    """Read the monitoring files from a folder, packed or not; raises `WorkloadError` naming file, line and column."""
    base, lora, pipeline = (_by_container(folder, name) for name in (BASE, LORA, PIPELINE))
    found = tuple(
        Container(tuple(base[name]), tuple(lora[name]), tuple(pipeline[name]))
        for name in sorted(base)
        if min(len(table.get(name, ())) for table in (base, lora, pipeline)) >= _ENOUGH
    )
    if not found:
        raise WorkloadError(
            f"loads: no container in {folder} has {_ENOUGH} loads of each kind; are the files cut short?"
        )
    return MeasuredLoads(found)


def present(folder: Path) -> bool:
    """Whether all three files are in a folder."""
    return all((folder / name).is_file() or (folder / f"{name}.gz").is_file() for name in (BASE, LORA, PIPELINE))


def _by_container(folder: Path, name: str) -> dict[str, list[Micros]]:
    found: dict[str, list[Micros]] = {}
    for line, row in _rows(folder, name):
        try:
            value = float(row["value"])
            container = row["container_ip"]
        except KeyError as error:
            raise WorkloadError(f"{name}: column {error} is missing; GenTD26's own file has it") from None
        except (TypeError, ValueError):
            raise WorkloadError(
                f"{name}, line {line}, value: {row.get('value')!r} is not a number of milliseconds"
            ) from None
        if not 0 <= value < 1e9:
            raise WorkloadError(f"{name}, line {line}, value: {value} is out of range (0 to 1e9 ms)")
        found.setdefault(container, []).append(round(value * 1000))
    return found


def _rows(folder: Path, name: str) -> Iterator[tuple[int, dict[str, str]]]:
    path = folder / name
    packed = folder / f"{name}.gz"
    try:
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                for row in reader:
                    yield reader.line_num, row
        else:
            with gzip.open(packed, "rt", newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                for row in reader:
                    yield reader.line_num, row
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise WorkloadError(
            f"loads: cannot read {name} or {name}.gz in {folder}: {error}; give the folder that holds GenTD26's monitoring files"
        ) from None
