"""The study of elasticity: what does each way to size a fleet cost, for how long a wait, on GenTD26's ups and downs?

Compared are a fixed fleet, a utilisation target (as Kubernetes does it), tasks per GPU (as KEDA scales by queues),
and the engine's own level, which sees a demand forecast. Each way has a dial; its runs over the dial are its frontier, and what
matters is the GPU-hours at equal p99.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import simpy

from engine import profiles
from engine.ports import Forecaster
from engine.profile import Profile
from engine.protocol.fleet import NodeOffer
from engine.resources import NodeSpec
from engine.scheduler import Engine
from engine.tasks import SECOND, Micros
from predictors.challenger import ChallengerSettings
from predictors.demand import DemandModel
from predictors.demand_forecaster import DemandForecaster, keys_of
from predictors.duration import DurationSettings
from predictors.forecaster import OnlineForecaster
from predictors.predictor import Predictor
from sim.configuration import ConfigError
from sim.fleet import Scaler, SimFleet, View
from sim.metrics import Metrics
from sim.simulate import Progress, calm_collector
from sim.study.case import StudyCase
from sim.sweep_table import Interval, interval
from sim.workload import Workload
from sim.world import SimWorld, run

FIXED, REACTIVE, QUEUE, OURS = "fixed", "utilisation", "queue", "forecast"
DIALS: dict[str, tuple[float, ...]] = {
    FIXED: (1.0, 1.5, 2.0, 2.5),
    REACTIVE: (0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    QUEUE: (0.4, 0.55, 0.7, 0.85, 1.0, 1.2),
    OURS: (0.6, 0.7, 0.8, 0.9),
}
"""Fixed: nodes as a multiple of the mean demand; utilisation: target share of busy GPUs; queue: open tasks per GPU; forecast: share
of the GPUs meant to be in use."""
DAY_US = 86_400 * SECOND
SERIES = 24
_TOLERANCE = 0.1
_USE_US = 60 * SECOND
"""The horizontal autoscaler looks every 15 s at figures that are averages."""
_POLL_US = 30 * SECOND
"""KEDA's default."""
_RECENT_US = 900 * SECOND


@dataclass(frozen=True, slots=True)
class ElasticityPlan:
    """The whole study."""

    trace: Path
    load_times: Path | None = None
    busy_gpus: float = 6.0
    hours: float = 24.0
    warm_days: int = 3
    """Days before the simulated ones that the demand forecast has seen."""
    seeds: int = 3
    first_seed: int = 0
    gpus_per_node: int = 2
    nodes_max: int = 48
    start_s: float = 120.0
    cool_down_s: float = 300.0
    price_per_gpu_hour: float = 2.0
    fail_ppm: int = 10_000
    """Nodes that fail to start, in parts per million."""
    first_day: str | None = None
    last_day: str | None = None
    rate_method: str = "days"
    dials: dict[str, tuple[float, ...]] = field(default_factory=lambda: dict(DIALS))
    """The settings that are tried, by way."""
    profile: str = "aigc"

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        for name in ("seeds", "gpus_per_node", "nodes_max", "warm_days"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("busy_gpus", "hours", "start_s", "cool_down_s", "price_per_gpu_hour"):
            if not 0 < getattr(self, name) < 1e6:
                raise ConfigError(f"{name}: must be greater than 0 and below 1e6, got {getattr(self, name)}")
        if not 0 <= self.fail_ppm < 1_000_000:
            raise ConfigError(f"fail_ppm: must lie between 0 and 999999, got {self.fail_ppm}")
        for name, dial in self.dials.items():
            if name not in DIALS:
                raise ConfigError(f"ways: unknown {name!r}; known are {', '.join(DIALS)}")
            if not dial or not all(0 < each < 100 for each in dial):
                raise ConfigError(f"ways: {name} needs settings above 0, got {dial}")

    @property
    def offer(self) -> NodeOffer:
        """The terms of nodes."""
        return NodeOffer(
            self.nodes_max,
            1,
            self.gpus_per_node,
            round(self.start_s * SECOND),
            round(self.cool_down_s * SECOND),
            self.price_per_gpu_hour * self.gpus_per_node,
        )

    def case(self, seed: int) -> StudyCase:
        """Return the workload and hardware of a seed; its hours include the days before."""
        return StudyCase(
            trace=self.trace,
            loads=self.load_times,
            busy_gpus=self.busy_gpus,
            hours=self.warm_days * 24 + self.hours,
            rate_method=self.rate_method,
            first_day=self.first_day,
            last_day=self.last_day,
            nodes=1,
            gpus_per_node=self.gpus_per_node,
            seed=seed,
        )


@dataclass(frozen=True, slots=True)
class Run:
    """One way at one setting under one seed."""

    way: str
    dial: float
    seed: int
    gpu_hours: float
    cost: float
    p99_completion_s: float
    p99_waiting_s: float
    mean_waiting_s: float
    tasks: int
    unfinished: int
    changes_per_hour: float
    reversals_per_hour: float
    """Changes of direction within a cool-down and a start-up time."""
    sizes: tuple[tuple[float, int], ...]
    """(hour, nodes wanted)."""


@dataclass(frozen=True, slots=True)
class Point:
    """All seeds of one way at one setting."""

    way: str
    dial: float
    figures: dict[str, Interval]


@dataclass(frozen=True, slots=True)
class Saving:
    """GPU-hours that the engine's way spares against another at the same p99, seed by seed."""

    dial: float
    against: str
    interval: Interval
    beyond: int
    """Seeds in which the other way reached that p99 at none of its settings: there its quickest one counts."""


@dataclass(frozen=True, slots=True)
class ElasticityStudy:
    """Everything that the study found."""

    plan: ElasticityPlan
    points: tuple[Point, ...]
    savings: tuple[Saving, ...]
    runs: tuple[Run, ...]

    def saving(self, dial: float, against: str) -> Saving | None:
        """Return what the engine's way spares at one of its settings against another way."""
        return next((each for each in self.savings if (each.dial, each.against) == (dial, against)), None)


MEASURES: dict[str, Callable[[Run], float]] = {
    "GPU-hours": lambda run: run.gpu_hours,
    "cost": lambda run: run.cost,
    "p99 completion, s": lambda run: run.p99_completion_s,
    "p99 waiting, s": lambda run: run.p99_waiting_s,
    "mean waiting, s": lambda run: run.mean_waiting_s,
    "changes per hour": lambda run: run.changes_per_hour,
    "reversals per hour": lambda run: run.reversals_per_hour,
}


def run_elasticity(plan: ElasticityPlan, jobs: int = 1, on_progress: Progress | None = None) -> ElasticityStudy:
    """Run the study; raises `ValueError` naming the field and the remedy."""
    asked = [
        (plan, way, dial, plan.first_seed + number)
        for number in range(plan.seeds)
        for way, dial_values in plan.dials.items()
        for dial in dial_values
    ]
    runs: list[Run] = []

    def done(each: Run) -> None:
        runs.append(each)
        if on_progress is not None:
            on_progress(len(runs) / len(asked), f"seed {each.seed}: {each.way} {each.dial:g}")

    if jobs > 1:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            for each in pool.map(_run_asked, asked):
                done(each)
    else:
        for each in map(_run_asked, asked):
            done(each)
    points = [
        Point(way, dial, _figures([each for each in runs if (each.way, each.dial) == (way, dial)]))
        for way, dial_values in plan.dials.items()
        for dial in dial_values
    ]
    return ElasticityStudy(plan, tuple(points), tuple(_savings(plan, runs)), tuple(runs))


def _run_asked(asked: tuple[ElasticityPlan, str, float, int]) -> Run:
    return run_one(*asked)


def run_one(plan: ElasticityPlan, way: str, dial: float, seed: int) -> Run:
    """Simulate one way at one setting under one seed."""
    case, workload, model, before = _prepared(plan, seed)
    hardware = case.hardware()
    spec: NodeSpec = hardware.nodes[0]
    hardware = replace(hardware, nodes=(replace(spec, name="node-that-never-is"),))
    world = SimWorld(simpy.Environment(), hardware, workload, seed, known_nodes=frozenset({"node-that-never-is"}))
    world.nodes.clear()
    mean_nodes = max(1, math.ceil(plan.busy_gpus / plan.gpus_per_node))
    offer = plan.offer
    scaler = None if way == OURS else make_scaler(way, dial, offer, mean_nodes)
    first = max(1, math.ceil(dial * mean_nodes)) if way == FIXED else before
    first = min(offer.nodes_max, first)
    fleet = SimFleet(world, offer, spec, scaler=scaler, fail_ppm=plan.fail_ppm, first=first)
    profile: Profile = profiles.load(plan.profile)
    # Trees on top of the predictor's residuals would change all ways alike, and take longer than the runs.
    inner = OnlineForecaster(Predictor(DurationSettings(challenger=ChallengerSettings(refit_every=0))))
    forecaster: Forecaster = inner
    if way == OURS:
        profile = replace(profile, scale_fill_permille=round(1000 * dial), warm_ahead=True)
        forecaster = DemandForecaster(inner, deepcopy(model), offset_us=plan.warm_days * DAY_US)
    metrics = Metrics()
    with calm_collector():
        run(Engine(profile), world, inner.watching(metrics), forecaster)
    summary = metrics.summary()
    hours = world.now() / SECOND / 3600
    node_hours = fleet.node_hours(world.now())
    completion, waiting = summary.completion.get("all"), summary.waiting.get("all")
    return Run(
        way,
        dial,
        seed,
        node_hours * plan.gpus_per_node,
        node_hours * offer.price_per_hour,
        completion.p99 if completion is not None else math.inf,
        waiting.p99 if waiting is not None else math.inf,
        waiting.mean if waiting is not None else math.inf,
        len(workload.arrivals),
        len(world.open_tasks),
        len(fleet.changes) / hours,
        fleet.reversals(offer.cool_down_us + offer.start_us) / hours,
        tuple((at / SECOND / 3600, nodes) for at, nodes in fleet.sizes),
    )


_PREPARED: dict[tuple[Any, ...], tuple[StudyCase, Workload, DemandModel, int]] = {}


def _prepared(plan: ElasticityPlan, seed: int) -> tuple[StudyCase, Workload, DemandModel, int]:
    """Return the case, what is simulated, a demand model that has seen the days before, and the nodes to begin with."""
    key = (
        plan.trace,
        plan.busy_gpus,
        plan.hours,
        plan.warm_days,
        plan.first_day,
        plan.last_day,
        plan.rate_method,
        seed,
    )
    known = _PREPARED.get(key)
    if known is None:
        case = plan.case(seed)
        whole = case.workload()
        begin = plan.warm_days * DAY_US
        model = DemandModel(SERIES)
        for arrival in whole.arrivals:
            if arrival.at >= begin:
                break
            run_us = arrival.truth.work_us or 0
            keys = keys_of(arrival.task)
            place = model.arrived(keys, arrival.at, run_us)
            model.finished(keys, place, run_us, run_us)
        later = tuple(replace(each, at=each.at - begin) for each in whole.arrivals if each.at >= begin)
        if not later:
            raise ConfigError("hours: no request arrives in them; simulate more hours or take other days")
        recent = sum(each.truth.work_us or 0 for each in whole.arrivals if begin - _RECENT_US <= each.at < begin)
        before = max(1, math.ceil(1.2 * recent / _RECENT_US / plan.gpus_per_node))
        _PREPARED.clear()
        known = _PREPARED[key] = case, replace(whole, arrivals=later), model, before
    return known


# --- other ways to size a fleet -----------------------------------------------------------------------------------------


def make_scaler(way: str, dial: float, offer: NodeOffer, mean_nodes: int) -> Scaler:
    """Return an autoscaler as others have it."""
    match way:
        case "fixed":
            fixed = max(1, math.ceil(dial * mean_nodes))
            return lambda view: fixed
        case "utilisation":
            return _Stabilised(_ByUse(dial), offer.cool_down_us)
        case "queue":
            return _Stabilised(_ByQueue(dial), offer.cool_down_us)
        case _:
            raise ConfigError(f"ways: unknown {way!r}; known are {', '.join(DIALS)}")


class _ByUse:
    """Returns ceil(nodes x use / target) by the use of the last minute, unless that is within a tenth of what there is."""

    def __init__(self, target: float) -> None:
        self._target = target
        self._seen: list[tuple[Micros, float]] = []

    def __call__(self, view: View) -> int:
        if not view.ready:
            return view.nodes
        self._seen.append((view.now, view.busy / (view.ready * view.gpus)))
        while self._seen[0][0] + _USE_US <= view.now:
            del self._seen[0]
        ratio = sum(use for _, use in self._seen) / len(self._seen) / self._target
        return view.nodes if abs(ratio - 1) <= _TOLERANCE else math.ceil(view.ready * ratio)


class _ByQueue:
    """Returns the nodes for so many open tasks per GPU, as of the last poll."""

    def __init__(self, per_gpu: float) -> None:
        self._per_gpu = per_gpu
        self._polled_at: Micros = -_POLL_US
        self._nodes = 1

    def __call__(self, view: View) -> int:
        if view.now >= self._polled_at + _POLL_US:
            self._polled_at = view.now
            self._nodes = math.ceil(view.open / (self._per_gpu * view.gpus))
        return self._nodes


class _Stabilised:
    """Grows at once; shrinks only to the most that was recommended during the cool-down."""

    def __init__(self, wanted: Scaler, cool_down_us: Micros) -> None:
        self._wanted = wanted
        self._cool_down_us = cool_down_us
        self._told: list[tuple[Micros, int]] = []

    def __call__(self, view: View) -> int:
        wanted = max(1, self._wanted(view))
        if not self._told:
            self._told.append((view.now, view.nodes))  # what there is at first was wanted by somebody
        while self._told and self._told[-1][1] <= wanted:
            self._told.pop()
        self._told.append((view.now, wanted))
        while self._told[0][0] + self._cool_down_us < view.now:
            del self._told[0]
        return wanted if wanted >= view.nodes else min(view.nodes, self._told[0][1])


# --- figures --------------------------------------------------------------------------------------------------------------


def _figures(runs: Sequence[Run]) -> dict[str, Interval]:
    return {name: interval([measure(each) for each in runs]) for name, measure in MEASURES.items()}


def _savings(plan: ElasticityPlan, runs: Sequence[Run]) -> list[Saving]:
    found = []
    for dial in plan.dials.get(OURS, ()):
        for way in plan.dials:
            if way == OURS:
                continue
            shares, beyond = [], 0
            for number in range(plan.seeds):
                seed = plan.first_seed + number
                own = next(each for each in runs if (each.way, each.dial, each.seed) == (OURS, dial, seed))
                frontier = [each for each in runs if (each.way, each.seed) == (way, seed)]
                hours, reached = hours_at(frontier, own.p99_completion_s)
                shares.append(1 - own.gpu_hours / hours)
                beyond += not reached
            found.append(Saving(dial, way, interval(shares), beyond))
    return found


def hours_at(frontier: Sequence[Run], p99_s: float) -> tuple[float, bool]:
    """Return the GPU-hours with which a way reaches a p99: on the lower edge of its runs, with lines between them.

    (hours of its quickest run, False) when none is that quick.
    """
    quick = sorted(frontier, key=lambda each: (each.p99_completion_s, each.gpu_hours))
    edge: list[Run] = []
    for each in quick:
        if not edge or each.gpu_hours < edge[-1].gpu_hours:
            edge.append(each)
    if p99_s < edge[0].p99_completion_s:
        return edge[0].gpu_hours, False
    for fast, slow in pairwise(edge):
        if fast.p99_completion_s <= p99_s <= slow.p99_completion_s:
            span = slow.p99_completion_s - fast.p99_completion_s
            share = (p99_s - fast.p99_completion_s) / span if span else 0.0
            return fast.gpu_hours + share * (slow.gpu_hours - fast.gpu_hours), True
    return edge[-1].gpu_hours, True
