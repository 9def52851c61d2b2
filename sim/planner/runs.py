"""Runs the planner's simulations: in this process or on several, each kept in a sweep's store so that a plan can be resumed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from sim.configuration import SimulationConfig
from sim.planner import figures, resampling
from sim.planner.figures import Recorder
from sim.planner.request import PlanError, gpus_of, workload_of
from sim.simulate import simulate
from sim.sweep_store import Store, code_fingerprint, run_key
from sim.sweep_workers import SweepError, work_through
from sim.workload import Workload

_WORKLOADS_KEPT = 8
_WORTH_PROCESSES_S = 4.0
"""Work, in seconds, below which starting processes costs more than they save."""


class Runs:
    """Figures of simulations by configuration; none is run twice.

    `given` is a workload that no configuration can name. `done` and `reused` count runs made and found in the store.
    """

    def __init__(self, given: Workload | None, store: Path | None, jobs: int | None) -> None:
        if jobs is not None and jobs < 1:
            raise PlanError(f"jobs: must be at least 1, got {jobs}; leave it out to take every core")
        self._given = given
        self._given_digest = "" if given is None else given.digest()
        self._jobs = jobs or len(os.sched_getaffinity(0))
        self._store = None if store is None else Store(store, code_fingerprint())
        self._known: dict[str, dict[str, Any]] = {}
        self._workloads: dict[str, Workload] = {}
        self._seconds = 0.0
        self.on_run: Callable[[], None] | None = None
        """Called after every run, once it is in the store."""
        self.done = 0
        self.reused = 0

    def of(self, configs: Sequence[SimulationConfig]) -> list[dict[str, Any]]:
        """Return the figures of every configuration, in order. Raises `PlanError` for one that cannot be run."""
        keys = [self._key(config) for config in configs]
        missing: dict[str, SimulationConfig] = {}
        for key, config in zip(keys, configs, strict=True):
            if key in self._known:
                continue
            line = None if self._store is None else self._store.lines.get(key)
            if line is not None and "figures" in line:
                self._known[key] = line["figures"]
                self.reused += 1
            else:
                missing[key] = config
        if missing:
            self._run(missing)
        return [self._known[key] for key in keys]

    def workload(self, config: SimulationConfig) -> Workload:
        """Return the workload of a configuration."""
        return _workload(config, self._workloads, self._given)

    def close(self) -> None:
        """Close the store."""
        if self._store is not None:
            self._store.close()
            self._store = None

    def _run(self, missing: dict[str, SimulationConfig]) -> None:
        work_s = self._seconds / max(1, self.done) * len(missing)
        if self._jobs > 1 and len(missing) > 1 and self.done and work_s > _WORTH_PROCESSES_S:
            run = partial(run_case, given=self._given)
            try:
                work_through(list(missing.items()), run, min(self._jobs, len(missing)), self._finished)
            except SweepError as error:
                raise PlanError(error.why) from error
            return
        for key, config in missing.items():
            self._finished(key, run_case(config, self._workloads, given=self._given))

    def _finished(self, key: str, line: dict[str, Any]) -> None:
        self._known[key] = line["figures"]
        self._seconds += line["wall_s"]
        self.done += 1
        if self._store is not None:
            self._store.add(key, line)
        if self.on_run is not None:
            self.on_run()

    def _key(self, config: SimulationConfig) -> str:
        return f"plan-{run_key(config)}-{self._given_digest}-{_own_code()}"


def run_case(config: SimulationConfig, workloads: dict[str, Workload], given: Workload | None = None) -> dict[str, Any]:
    """Simulate one configuration and return a line for a store; `workloads` keeps the last ones for runs that share them."""
    began = time.perf_counter()
    workload = _workload(config, workloads, given)
    recorder = Recorder(gpus_of(config.pools), _clock(workload, config.rate_scale))
    result = simulate(config, workload=workload, journal=recorder)
    return {
        "figures": recorder.figures(),
        "summary": {},
        "world": dict(sorted(result.world.items())),
        "workload_digest": result.workload_digest,
        "decisions_digest": result.decisions_digest,
        "simulated_s": result.simulated_s,
        "wall_s": time.perf_counter() - began,
    }


def _workload(config: SimulationConfig, workloads: dict[str, Workload], given: Workload | None) -> Workload:
    parts: tuple[object, ...] = (
        config.trace,
        config.synthetic,
        config.synthetic_tasks,
        config.limit,
        config.tenants,
        config.urgent_share,
    )
    parts += (config.gpu_share, config.gpu_memory_gib, config.slots, config.seed, config.rate_scale, config.model_scale)
    parts += (config.declared_sigma if config.forecaster == "declared" else None,)
    key = repr(parts)
    found = workloads.pop(key, None)
    if found is None:
        found = workload_of(config, given)
    workloads[key] = found
    while len(workloads) > _WORKLOADS_KEPT:
        del workloads[next(iter(workloads))]
    return found


def _clock(workload: Workload, rate_scale: float) -> tuple[float, float]:
    """Return the hour of day at the workload's beginning (0 where it names none), and its hours per simulated hour."""
    origin = dict(workload.notes).get("origin")
    try:
        begun = datetime.fromisoformat(str(origin))
    except ValueError:
        return 0.0, rate_scale
    return begun.hour + begun.minute / 60 + begun.second / 3600, rate_scale


@cache
def _own_code() -> str:
    """Return a hash of the code that makes figures: a sweep's fingerprint does not reach into this package."""
    code = b"".join(Path(module.__file__ or "").read_bytes() for module in (figures, resampling))
    return blake2b(code, digest_size=4).hexdigest()
