"""Runs many simulations: over seeds, profiles, sizes or any other field, on all cores, and never the same one twice.

Every finished run goes to a store at once (`sim.sweep_store`), so an interruption loses the runs in flight and nothing else.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from sim.configuration import ConfigError, SimulationConfig
from sim.simulate import Progress, simulate
from sim.sweep_store import Store, code_fingerprint, run_key
from sim.sweep_workers import SweepError, work_through
from sim.workload import Workload

__all__ = ["RunRecord", "SweepError", "grid", "run_sweep"]

_WORKLOADS_KEPT = 2
_NOT_OF_THE_WORKLOAD: dict[str, Any] = {
    "profile": "fifo",
    "nodes": 1,
    "gpus_per_node": 1,
    "pools": (),
    "until_hours": None,
    "mtbf_hours": None,
    "gpu_mtbf_hours": None,
    "attempt_crash_ppm": 0,
    "faults": (),
}
"""Fields that the workload does not depend on, with a value that stands for all others."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One finished run, in plain values."""

    config: SimulationConfig
    hash: str
    """Of the configuration and of what its files hold: the trace, the profile."""
    summary: dict[str, Any]
    """`Summary.to_json()` without the curves and the nodes' heat."""
    world: dict[str, int]
    workload_digest: str
    decisions_digest: str
    simulated_s: float
    wall_s: float
    reused: bool = False
    """Whether it was in the store already."""


def grid(base: SimulationConfig, axes: Mapping[str, Sequence[Any]]) -> list[SimulationConfig]:
    """Return every combination of the axes' values, the last axis fastest; an axis is a field of `SimulationConfig`."""
    known = {field.name for field in fields(SimulationConfig)}
    for name, values in axes.items():
        if name not in known:
            raise ConfigError(f"sweep: {name!r} is no field of a simulation; known are {', '.join(sorted(known))}")
        if not values:
            raise ConfigError(f"sweep: the axis {name!r} has no values; give at least one")
    return [replace(base, **dict(zip(axes, point, strict=True))) for point in product(*axes.values())]


def run_sweep(
    configs: Sequence[SimulationConfig],
    store: Path | None = None,
    jobs: int | None = None,
    on_progress: Progress | None = None,
) -> list[RunRecord]:
    """Simulate every configuration and return the records in the order given; equal ones are run once.

    `jobs` is the number of processes; None takes every core that this process may use, 1 stays in this process.
    Raises `SweepError` naming the configuration that could not be run; what finished before is in the store.
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs: must be at least 1, got {jobs}; leave it out to take every core")
    code = code_fingerprint()
    keys = [run_key(config) for config in configs]
    kept = Store(store, code) if store is not None else None
    lines: dict[str, dict[str, Any]] = {}
    if kept is not None:
        lines = {key: kept.lines[key] for key in keys if key in kept.lines}
    reused = frozenset(lines)
    todo = {key: config for key, config in zip(keys, configs, strict=True) if key not in lines}
    clock = _Clock(len(todo), len(set(keys)), on_progress)
    clock.tell(0, "")
    order = _workloads_together(todo)

    def finished(key: str, line: dict[str, Any]) -> None:
        lines[key] = line
        if kept is not None:
            kept.add(key, line)
        clock.tell(1, "")

    width = min(jobs or len(os.sched_getaffinity(0)), len(order))
    try:
        if width <= 1:
            workloads: dict[str, Workload] = {}
            for key, config in order:
                finished(key, _checked(config, workloads, clock.within))
        else:
            work_through(order, run_one, width, finished)
    finally:
        if kept is not None:
            kept.close()
    return [_record(config, key, lines[key], key in reused) for key, config in zip(keys, configs, strict=True)]


def run_one(
    config: SimulationConfig, workloads: dict[str, Workload], on_progress: Progress | None = None
) -> dict[str, Any]:
    """Simulate one configuration; `workloads` keeps the last ones for the runs that share them."""
    key = _workload_key(config)
    workload = workloads.pop(key, None)
    if workload is None:
        workload = config.workload()
    workloads[key] = workload
    while len(workloads) > _WORKLOADS_KEPT:
        del workloads[next(iter(workloads))]
    result = simulate(config, on_progress, workload=workload)
    summary = result.summary.to_json()
    for bulky in ("heat", "waiting_curve"):
        summary.pop(bulky, None)
    return {
        "config": result.config.to_json(),
        "summary": summary,
        "world": dict(sorted(result.world.items())),
        "workload_digest": result.workload_digest,
        "decisions_digest": result.decisions_digest,
        "simulated_s": result.simulated_s,
        "wall_s": result.wall_s,
    }


def _workloads_together(todo: Mapping[str, SimulationConfig]) -> list[tuple[str, SimulationConfig]]:
    """Order the runs so that those of one workload follow each other, in the order in which the workloads first occur."""
    groups: dict[str, list[tuple[str, SimulationConfig]]] = {}
    for key, config in todo.items():
        groups.setdefault(_workload_key(config), []).append((key, config))
    return [item for group in groups.values() for item in group]


def _checked(config: SimulationConfig, workloads: dict[str, Workload], on_progress: Progress | None) -> dict[str, Any]:
    try:
        return run_one(config, workloads, on_progress)
    except ValueError as error:
        raise SweepError(config, str(error)) from error


def _workload_key(config: SimulationConfig) -> str:
    neutral = dict(_NOT_OF_THE_WORKLOAD)
    if config.forecaster != "declared":
        neutral |= {"forecaster": "none", "declared_sigma": 0.5}
    return f"{config.trace}|{replace(config, **neutral).digest()}"


def _record(config: SimulationConfig, key: str, line: dict[str, Any], reused: bool) -> RunRecord:
    return RunRecord(
        config=config,
        hash=key,
        summary=line["summary"],
        world=line["world"],
        workload_digest=line["workload_digest"],
        decisions_digest=line["decisions_digest"],
        simulated_s=line["simulated_s"],
        wall_s=line["wall_s"],
        reused=reused,
    )


class _Clock:
    """Counts finished runs and estimates what is left."""

    def __init__(self, todo: int, total: int, report: Progress | None) -> None:
        self._todo, self._total, self._report = todo, total, report
        self._done = 0
        self._began = time.monotonic()

    def tell(self, more: int, text: str) -> None:
        self._done += more
        if self._report is None:
            return
        over = self._total - self._todo + self._done
        note = f"{over} of {self._total} runs"
        if 0 < self._done < self._todo:
            left_s = (time.monotonic() - self._began) / self._done * (self._todo - self._done)
            note += f", about {_span(left_s)} left"
        self._report(over / self._total if self._total else 1.0, note + text)

    def within(self, share: float, text: str) -> None:
        if self._report is not None:
            over = self._total - self._todo + self._done
            self._report(min(1.0, (over + share) / self._total), f"run {over + 1} of {self._total}: {text}")


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
