"""Is the simulator right about real executors? Compares a real run's journal with simulations of the same workload.

The workload is run for real to calibrate (`sim.calibration`) and, drawn with another seed, to be judged. The judged run is
simulated from its arrivals alone: run times are the predictor's medians, scattered as the calibrating runs scatter around them.
Real runs are made by whoever calls (`aigc fidelity`); everything here is a pure function of journals.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import simpy
from rich.table import Table

from engine.events import TaskFinished, TaskStarted, TaskSubmitted
from engine.journal import MemoryJournal
from engine.limits import Limits
from engine.profile import Profile
from engine.scheduler import Engine
from engine.tasks import SECOND, Micros, TaskSpec
from predictors.forecaster import OnlineForecaster
from sim.calibration import (
    Calibration,
    MeasuredFirstRuns,
    RunTimes,
    first_runs,
    learned,
    measure,
    measured_hardware,
    nodes_of,
    run_ratios,
    shared_as_measured,
)
from sim.draws import choice, exponential, unit
from sim.from_journal import StepRecord
from sim.paired import student_95
from sim.world import SimWorld, run

WORKLOADS = ("sleep", "tiny")
AIMS_PERCENT = {"mean completion, s": 3.0, "p99 completion, s": 5.0}
_TINY_STEPS = (4, 8, 12, 16, 24, 32)
_TINY_STEP_S = 0.015
_TRAININGS = 0.2
"""Share of the sleep workload that counts as training."""
_REMEMBERED = 10_000

Progress = Callable[[float, str], None]


class FidelityError(ValueError):
    """A comparison cannot be made; says why and what to change."""


@dataclass(frozen=True, slots=True)
class DrawnJob:
    """One job of the workload: when it is submitted, and what it asks for."""

    at_s: float
    method: str
    task_type: str
    model: str
    parameters: Mapping[str, str | int | float]
    expected_s: float


def draw_jobs(
    workload: str, tasks: int, nodes: int, load: float, seed: int, mean_s: float | None = None
) -> tuple[DrawnJob, ...]:
    """Draw a workload: Poisson arrivals that keep `nodes` single-slot nodes busy for a share `load` of the time.

    ``sleep``: waits of 50-200 ms (GC) and, one in five, 200-500 ms (TP). ``tiny``: pictures by the bundled model in 4 to 32 steps.
    `mean_s` is the mean run time to count with, where it is known better than beforehand.
    """
    if workload not in WORKLOADS:
        raise FidelityError(f"workload: unknown {workload!r}; choose one of {', '.join(WORKLOADS)}")
    if tasks < 2 or nodes < 1:
        raise FidelityError(f"tasks, nodes: at least 2 and 1 are needed, got {tasks} and {nodes}")
    if not 0 < load < 1:
        raise FidelityError(f"load: must lie between 0 and 1, got {load}; a queue that grows for ever has no mean")
    draw = _sleep if workload == "sleep" else _tiny
    drawn = [draw(seed, number) for number in range(tasks)]
    mean_s = mean_s or sum(job.expected_s for job in drawn) / tasks
    at_s, placed = 0.0, []
    for number, job in enumerate(drawn):
        placed.append(DrawnJob(at_s, job.method, job.task_type, job.model, job.parameters, job.expected_s))
        at_s += exponential(mean_s / (load * nodes), seed, "gap", number)
    return tuple(placed)


def _sleep(seed: int, number: int) -> DrawnJob:
    training = unit(seed, "training", number) < _TRAININGS
    low, high = (0.2, 0.5) if training else (0.05, 0.2)
    seconds = round(low + (high - low) * unit(seed, "seconds", number), 4)
    return DrawnJob(0.0, "sleep", "TP" if training else "GC", "", {"seconds": seconds, "steps": 1}, seconds)


def _tiny(seed: int, number: int) -> DrawnJob:
    steps = _TINY_STEPS[choice(len(_TINY_STEPS), seed, "steps", number)]
    parameters: dict[str, str | int | float] = {"prompt": "a red circle on a white background", "seed": number}
    return DrawnJob(0.0, "text_to_image", "GC", "tiny", {**parameters, "steps": steps}, steps * _TINY_STEP_S)


# --- what happened --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TaskTimes:
    """One finished task; times in microseconds."""

    task_type: str
    submitted: Micros
    started: Micros
    """Of the attempt that finished."""
    finished: Micros


@dataclass(frozen=True, slots=True)
class Observed:
    """The finished tasks of one run, real or simulated."""

    tasks: tuple[TaskTimes, ...]
    submitted: int

    def measures(self) -> dict[tuple[str, str], float]:
        """Return every measure by (task type, name), in seconds."""
        kinds = sorted({task.task_type for task in self.tasks})
        found: dict[tuple[str, str], float] = {}
        for kind in ["all", *kinds] if len(kinds) > 1 else kinds:
            chosen = [task for task in self.tasks if kind in ("all", task.task_type)]
            stays = np.array([task.finished - task.submitted for task in chosen]) / SECOND
            found[kind, "mean completion, s"] = float(stays.mean())
            found[kind, "p99 completion, s"] = float(np.quantile(stays, 0.99))
            begun, over = min(task.submitted for task in chosen), max(task.finished for task in chosen)
            found[kind, "makespan, s"] = (over - begun) / SECOND
            found[kind, "mean waiting, s"] = float(np.mean([task.started - task.submitted for task in chosen])) / SECOND
            found[kind, "mean run, s"] = float(np.mean([task.finished - task.started for task in chosen])) / SECOND
        return found


def observe(records: Iterable[StepRecord]) -> Observed:
    """Read a journal's finished tasks."""
    submitted: dict[str, tuple[Micros, TaskSpec]] = {}
    started: dict[tuple[str, int], Micros] = {}
    done: dict[str, TaskTimes] = {}
    for record in records:
        for event in record.events:
            match event:
                case TaskSubmitted(task):
                    submitted.setdefault(task.req_no, (record.now, task))
                case TaskStarted(req_no, attempt):
                    started.setdefault((req_no, attempt), record.now)
                case TaskFinished(req_no, attempt) if (req_no, attempt) in started and req_no in submitted:
                    at, task = submitted[req_no]
                    begun = started[req_no, attempt]
                    done.setdefault(req_no, TaskTimes(task.task_type.value, at, begun, record.now))
                case _:
                    pass
    return Observed(tuple(done.values()), len(submitted))


# --- the comparison -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One measure, real and simulated."""

    task_type: str
    measure: str
    real: float
    simulated: float
    """Mean over the simulations."""
    half_width: float
    """Of the 95% interval of that mean, by Student's t over the simulations."""
    lowest: float
    highest: float
    """Over the simulations: where a single real run is to be expected."""
    aim_percent: float | None

    @property
    def error_percent(self) -> float:
        """Simulated over real, less 1, in percent."""
        return 100 * (self.simulated / self.real - 1) if self.real else math.nan

    @property
    def met(self) -> bool | None:
        """Whether the error is within its aim; None without an aim."""
        return None if self.aim_percent is None else abs(self.error_percent) <= self.aim_percent


@dataclass(frozen=True, slots=True)
class FidelityReport:
    """How well the simulator foretold a real run."""

    workload: str
    profile: str
    seed: int
    nodes: int
    load: float
    tasks: int
    replications: int
    cores: int
    busy: float
    """The machine's load average around the judged run: far above its cores, other work disturbed it."""
    calibration: Calibration
    rows: tuple[Row, ...]
    real: Observed
    simulated: Observed
    """The first simulation, for the picture."""

    @property
    def met(self) -> bool:
        """Whether every aim is met."""
        return all(row.met is not False for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        rows = [
            {**asdict(row), "error_percent": row.error_percent if row.real else None, "met": row.met}
            for row in self.rows
        ]
        names = ("workload", "profile", "seed", "nodes", "load", "tasks", "replications", "cores", "busy")
        head = {"schema": 1, **{name: getattr(self, name) for name in names}}
        finished = {"real": len(self.real.tasks), "simulated": len(self.simulated.tasks)}
        return {**head, "finished": finished, "met": self.met, "calibration": self.calibration.to_json(), "rows": rows}


@dataclass(frozen=True, slots=True)
class Run:
    """What was run for real, for the report's head."""

    workload: str
    profile: Profile
    seed: int
    nodes: int
    load: float
    cores: int = 0
    """Of the machine; 0: not known."""
    busy: float = 0.0
    """The machine's load average around the judged run."""


def judge(
    run_of: Run,
    calibrating: Sequence[StepRecord],
    judged: Sequence[StepRecord],
    replications: int = 20,
    on_progress: Progress | None = None,
) -> FidelityReport:
    """Simulate the judged run from what the calibrating one teaches, and compare.

    Raises FidelityError or CalibrationError when a journal holds too little.
    """
    if replications < 2:
        raise FidelityError(f"replications: an interval needs at least 2, got {replications}")
    real = observe(judged)
    if len(real.tasks) < 2 or len(real.tasks) < real.submitted:
        raise FidelityError(
            f"only {len(real.tasks)} of {real.submitted} real tasks finished; a comparison needs them all"
        )
    calibration = measure(calibrating)
    runs = []
    for number in range(replications):
        runs.append(simulate_once(run_of.profile, calibrating, calibration, judged, run_of.seed * 1000 + number))
        if on_progress is not None:
            on_progress((number + 1) / replications, f"{number + 1} of {replications} simulations")
    return FidelityReport(
        workload=run_of.workload,
        profile=run_of.profile.name,
        seed=run_of.seed,
        nodes=run_of.nodes,
        load=run_of.load,
        tasks=real.submitted,
        replications=replications,
        cores=run_of.cores,
        busy=run_of.busy,
        calibration=calibration,
        rows=_rows(real, runs),
        real=real,
        simulated=runs[0],
    )


def simulate_once(
    profile: Profile,
    calibrating: Sequence[StepRecord],
    calibration: Calibration,
    judged: Sequence[StepRecord],
    seed: int,
) -> Observed:
    """Simulate the arrivals of a judged run once, under one seed's luck."""
    nodes = nodes_of(judged)
    if not nodes:
        raise FidelityError("no node joined in the judged journal; the run needs at least one agent")
    forecaster = learned(calibrating)
    hardware = shared_as_measured(measured_hardware(calibration, nodes), calibrating)
    longer = first_runs(calibrating, forecaster, hardware.reference_gpu)
    hardware = replace(hardware, first_runs=MeasuredFirstRuns(longer))
    ratios = run_ratios(calibrating, forecaster, hardware.reference_gpu)
    times = RunTimes(forecaster, calibration, hardware.reference_gpu, ratios)
    began = judged[0].now
    submitted = [
        (record.now - began, event.task)
        for record in judged
        for event in record.events
        if isinstance(event, TaskSubmitted)
    ]
    world = SimWorld(simpy.Environment(), hardware, times.workload(submitted, seed), seed)
    journal, online = MemoryJournal(), OnlineForecaster()
    run(Engine(profile, Limits(remembered=_REMEMBERED)), world, online.watching(journal), online)
    return observe(journal.records)


def _rows(real: Observed, runs: Sequence[Observed]) -> tuple[Row, ...]:
    simulated = [run.measures() for run in runs]
    rows = []
    for (kind, name), value in real.measures().items():
        values = [measures[kind, name] for measures in simulated if (kind, name) in measures]
        if len(values) < 2:
            continue
        half_width = student_95(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
        mean = float(np.mean(values))
        rows.append(Row(kind, name, value, mean, half_width, min(values), max(values), AIMS_PERCENT.get(name)))
    return tuple(rows)


def render(report: FidelityReport) -> Table:
    """Return the comparison as a table for people."""
    title = f"{report.tasks} {report.workload} tasks on {report.nodes} nodes at load {report.load:g}, profile {report.profile}"
    table = Table(title=title, title_justify="left")
    for heading in ("type", "measure", "real", "simulated", "range", "error", "aim", ""):
        table.add_column(heading, justify="left" if heading in {"type", "measure", ""} else "right")
    last = ""
    for row in report.rows:
        if last and row.task_type != last:
            table.add_section()
        table.add_row(
            row.task_type if row.task_type != last else "",
            row.measure,
            f"{row.real:.3f}",
            f"{row.simulated:.3f} ± {row.half_width:.3f}",
            f"{row.lowest:.3f} .. {row.highest:.3f}",
            f"{row.error_percent:+.2f}%",
            "" if row.aim_percent is None else f"{row.aim_percent:g}%",
            {True: "met", False: "missed", None: ""}[row.met],
        )
        last = row.task_type
    return table


def to_text(report: FidelityReport) -> str:
    """Return the report as JSON text."""
    return json.dumps(report.to_json(), indent=1, sort_keys=True) + "\n"
