"""One run of the study of elasticity: watched while it goes, and kept in a file, so that an interrupted study goes on from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from engine.commands import Command, Notify
from engine.events import Event, TaskStarted, TaskSubmitted
from engine.tasks import SECOND, Micros, TaskState
from sim.configuration import ConfigError
from sim.fleet import SimFleet
from sim.run_lines import RunLines
from sim.sweep_store import code_fingerprint
from sim.world import SimWorld

if TYPE_CHECKING:
    from sim.study.elasticity import ElasticityPlan

SCHEMA = 1
BIN_US = 300 * SECOND
_LOOK_US = 10 * SECOND
_RESULTS = ("seeds", "first_seed", "dials")
"""Fields of a plan that say which runs there are, not how one comes out."""
_OWN = ("autoscalers.py", "case.py", "elasticity.py", "elasticity_runs.py", "scaled.py")


@dataclass(frozen=True, slots=True)
class Run:
    """One way at one setting under one seed, as it was from when the beginning had settled."""

    way: str
    dial: float
    seed: int
    gpu_hours: float
    cost: float
    p99_completion_s: float
    p99_waiting_s: float
    mean_waiting_s: float
    tasks: int
    """That finished and are judged."""
    unfinished: int
    changes_per_hour: float
    reversals_per_hour: float
    """Changes of direction within a cool-down and a start-up time."""
    sizes: tuple[tuple[float, int], ...]
    """(hour, nodes wanted)."""
    used: tuple[float, ...] = ()
    """GPUs in use, on average over every five minutes from the beginning."""


class Watch:
    """A journal that keeps how long tasks took that came when the beginning had settled, and what the fleet cost since."""

    def __init__(self, world: SimWorld, fleet: SimFleet, settle_us: Micros) -> None:
        self._world, self._fleet, self._settle_us = world, fleet, settle_us
        self._submitted: dict[str, Micros] = {}
        self._started: dict[str, Micros] = {}
        self._took: list[tuple[Micros, Micros]] = []
        """(waiting, completion)."""
        self._settled_hours = 0.0
        self._used: list[list[float]] = []
        """By bin: GPUs in use at every look."""
        world.after(settle_us, self._settle)
        world.after(0, self._look)

    def __call__(self, now: Micros, events: Sequence[Event], commands: Sequence[Command]) -> None:
        """Fold one step in."""
        for event in events:
            if isinstance(event, TaskSubmitted):
                self._submitted.setdefault(event.task.req_no, now)
            elif isinstance(event, TaskStarted):
                self._started.setdefault(event.req_no, now)
        for command in commands:
            if isinstance(command, Notify) and command.state is TaskState.FINISHED:
                came = self._submitted.pop(command.req_no, None)
                began = self._started.pop(command.req_no, now)
                if came is not None and came >= self._settle_us:
                    self._took.append((began - came, now - came))

    def _settle(self) -> None:
        self._settled_hours = self._fleet.node_hours(self._world.now())

    def _look(self) -> None:
        world = self._world
        place = world.now() // BIN_US
        while len(self._used) <= place:
            self._used.append([])
        self._used[place].append(self._fleet.view().busy)
        if not world.settled:
            world.after(_LOOK_US, self._look)

    def run(self, plan: ElasticityPlan, way: str, dial: float, seed: int) -> Run:
        """Return what there was to see; raises `ConfigError` when no task is judged."""
        if not self._took:
            raise ConfigError("settle_s: no task finished that came after it; simulate more hours, or let less settle")
        world, fleet, offer = self._world, self._fleet, plan.offer
        node_hours = fleet.node_hours(world.now()) - self._settled_hours
        waiting, completion = (np.array(each) / SECOND for each in zip(*self._took, strict=True))
        hours = world.now() / SECOND / 3600
        return Run(
            way,
            dial,
            seed,
            node_hours * plan.gpus_per_node,
            node_hours * offer.price_per_hour,
            float(np.percentile(completion, 99)),
            float(np.percentile(waiting, 99)),
            float(waiting.mean()),
            len(self._took),
            len(world.open_tasks),
            len(fleet.changes) / hours,
            fleet.reversals(offer.cool_down_us + offer.start_us) / hours,
            tuple((at / SECOND / 3600, nodes) for at, nodes in fleet.sizes),
            tuple(round(sum(each) / len(each), 3) if each else 0.0 for each in self._used),
        )


class FinishedRuns:
    """The runs of a plan that are finished, by (way, setting, seed); without a file they are kept for as long as this lives."""

    def __init__(self, path: Path | None, plan: ElasticityPlan) -> None:
        self.runs: dict[tuple[str, float, int], Run] = {}
        self._key = _key(plan) if path is not None else ""
        self._file = RunLines(path, self._take) if path is not None else None

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _take(self, line: dict[str, Any]) -> None:
        if (line["schema"], line["key"]) == (SCHEMA, self._key):
            run = _run_of(line["run"])
            self.runs[run.way, run.dial, run.seed] = run

    def add(self, run: Run) -> None:
        """Take in a finished run; it is on the disk before this returns."""
        self.runs[run.way, run.dial, run.seed] = run
        if self._file is not None:
            self._file.add({"schema": SCHEMA, "key": self._key, "run": asdict(run)})


def _run_of(values: dict[str, Any]) -> Run:
    if set(values) != {field.name for field in fields(Run)}:
        raise ValueError("a run has other fields")
    sizes = tuple((at, nodes) for at, nodes in values["sizes"])
    return Run(**{**values, "sizes": sizes, "used": tuple(values["used"])})


def _key(plan: ElasticityPlan) -> str:
    """Return a short hash of everything that decides how a run comes out."""
    held = {name: str(value) for name, value in asdict(plan).items() if name not in _RESULTS}
    try:
        for name in ("trace", "load_times"):
            path: Path | None = getattr(plan, name)
            if path is not None:
                held[name] = _contents(path)
        if plan.profile.endswith(".toml"):
            held["profile"] = _contents(Path(plan.profile))
    except OSError as error:
        raise ConfigError(f"trace: cannot read {error.filename}: {error.strerror}; check the path") from None
    return hashlib.blake2b(json.dumps([held, _code()], sort_keys=True).encode(), digest_size=12).hexdigest()


def _contents(path: Path) -> str:
    fold = hashlib.blake2b(digest_size=12)
    for each in sorted(path.iterdir()) if path.is_dir() else [path]:
        if each.is_file():
            fold.update(each.name.encode() + hashlib.blake2b(each.read_bytes()).digest())
    return fold.hexdigest()


@cache
def _code() -> str:
    own = [(Path(__file__).parent / name).read_bytes() for name in _OWN]
    return code_fingerprint() + hashlib.blake2b(b"\0".join(own), digest_size=8).hexdigest()
