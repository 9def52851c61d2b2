"""Runs the production engine over a workload on a simulated cluster, once or side by side under several profiles."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import simpy

from engine import profiles
from engine.ports import Forecaster, Journal, NoForecast
from engine.profile import Profile
from engine.scheduler import Engine
from engine.tasks import Micros
from predictors.forecaster import DeclaredForecaster, OnlineForecaster, OracleForecaster
from sim.configuration import FORECASTERS, ConfigError, SimulationConfig
from sim.gantt import Gantt, GanttSink
from sim.hardware import Hardware
from sim.metrics import Metrics
from sim.report import render_table, write_html, write_json
from sim.summary import Summary
from sim.timeline import Follower
from sim.workload import Workload
from sim.world import SimWorld, run

__all__ = [
    "FORECASTERS",
    "ConfigError",
    "SimulationConfig",
    "SimulationResult",
    "compare",
    "render_table",
    "simulate",
    "write_html",
    "write_json",
]

Progress = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """What one run showed, and everything needed to run it again."""

    config: SimulationConfig
    config_hash: str
    workload: str
    workload_digest: str
    workload_notes: tuple[tuple[str, int | float | str], ...]
    decisions_digest: str
    """Equal digests: the same placements, starts, stops and ends at the same times."""
    summary: Summary
    world: dict[str, int]
    """What only the simulated world knows: where loads found their bytes, failures, prefetches."""
    simulated_s: float
    wall_s: float
    gantt: Gantt | None = None
    """A piece of the schedule to draw, where it was asked for."""

    @property
    def profile(self) -> str:
        """The profile's name."""
        return Path(self.config.profile).stem

    @property
    def tasks_per_s(self) -> float:
        """Tasks simulated per second of real time."""
        return self.summary.counts.get("submitted", 0) / self.wall_s if self.wall_s else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return plain values. `wall_s` and `tasks_per_s` are the only ones that differ between two equal runs."""
        return {
            "schema": 1,
            "profile": self.profile,
            "seed": self.config.seed,
            "config": self.config.to_json(),
            "config_hash": self.config_hash,
            "workload": {"name": self.workload, "digest": self.workload_digest, "notes": dict(self.workload_notes)},
            "decisions_digest": self.decisions_digest,
            "summary": self.summary.to_json(),
            "world": dict(sorted(self.world.items())),
            "simulated_s": self.simulated_s,
            "wall_s": self.wall_s,
            "tasks_per_s": self.tasks_per_s,
        }


def simulate(
    config: SimulationConfig,
    on_progress: Progress | None = None,
    *,
    workload: Workload | None = None,
    journal: Journal | None = None,
    gantt: bool = False,
    beside: Callable[[Engine], Journal] | None = None,
) -> SimulationResult:
    """Run one simulation; raises `ValueError` naming the field and the remedy.

    `workload` spares reading it again; `journal` is told every step as well, for example to keep its records; `gantt` keeps a
    piece of the schedule for the page; `beside` makes a journal that looks at the engine itself after each step.
    """
    profile = _profile(config.profile)
    if workload is None:
        if on_progress is not None:
            on_progress(0.0, "reading the workload")
        workload = config.workload()
    hardware = config.hardware()
    world = SimWorld(simpy.Environment(), hardware, workload, config.seed, config.fault_plan())
    metrics = Metrics()
    engine = Engine(profile)
    forecaster = _forecaster(config, workload, hardware)
    began = perf_counter()
    chart = GanttSink() if gantt else None
    follower = Follower([chart]) if chart is not None else None
    keep = _both(_both(metrics, journal), follower)
    if beside is not None:
        keep = _both(keep, beside(engine))
    if isinstance(forecaster, OnlineForecaster):
        keep = forecaster.watching(keep)
    with calm_collector():
        run(engine, world, keep, forecaster, config.until_us(), on_progress, round(config.step_ms * 1_000))
    wall_s = perf_counter() - began
    if follower is not None:
        follower.close()
    return SimulationResult(
        config=config,
        config_hash=config.digest(),
        workload=workload.name,
        workload_digest=workload.digest(),
        workload_notes=workload.notes,
        decisions_digest=metrics.decisions_digest(),
        summary=metrics.summary(),
        world=dict(world.counts),
        simulated_s=world.now() / 1_000_000,
        wall_s=wall_s,
        gantt=chart.chart() if chart is not None else None,
    )


@contextmanager
def calm_collector() -> Iterator[None]:
    """Let Python's garbage collector look less often, and not at what was there before: the simulator makes few cycles."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(1_000_000, 20, 1_000)
    try:
        yield
    finally:
        gc.freeze()  # what the run made counts as old: it is not looked through now
        gc.set_threshold(*before)
        gc.unfreeze()


def compare(
    config: SimulationConfig, names: Sequence[str], on_progress: Progress | None = None, *, gantt: bool = False
) -> list[SimulationResult]:
    """Run the same workload and the same luck under several profiles, in the order given; `gantt` as in `simulate`."""
    if not names:
        raise ConfigError("compare: name at least one profile, such as fifo,kube-default,aigc")
    for name in names:
        _profile(name)
    workload = config.workload()
    results = []
    for number, name in enumerate(names):
        step = _part(on_progress, number, len(names), name)
        results.append(simulate(replace(config, profile=name), step, workload=workload, gantt=gantt))
    return results


def _part(on_progress: Progress | None, number: int, count: int, name: str) -> Progress | None:
    if on_progress is None:
        return None
    report = on_progress

    def part(share: float, text: str) -> None:
        report((number + share) / count, f"{name}: {text}")

    return part


def _both(last: Journal, first: Journal | None) -> Journal:
    if first is None:
        return last
    keep = first

    def both(now: Micros, events: Sequence[Any], commands: Sequence[Any]) -> None:
        keep(now, events, commands)
        last(now, events, commands)

    return both


def _profile(name: str) -> Profile:
    text = name
    if name.endswith(".toml"):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"profile: cannot read {name}: {error}; give a profile's name or a TOML file") from None
    return profiles.load(text)


def _forecaster(config: SimulationConfig, workload: Workload, hardware: Hardware) -> Forecaster:
    match config.forecaster:
        case "online":
            return OnlineForecaster()
        case "declared":
            return DeclaredForecaster()
        case "oracle":
            speeds = {gpu.model: hardware.speed(gpu.model) for node in hardware.nodes for gpu in node.gpus}
            factors = {model: 1.0 / speed for model, speed in speeds.items()}
            return OracleForecaster(_true_durations(workload, hardware), factors)
        case _:
            return NoForecast()


def _true_durations(workload: Workload, hardware: Hardware) -> dict[str, Micros]:
    """Return true run times on the reference GPU; where the hardware model decides, its median."""
    known = {}
    for arrival in workload.arrivals:
        work = arrival.truth.work_us
        known[arrival.task.req_no] = hardware.run_us(arrival.task, hardware.reference_gpu) if work is None else work
    return known
