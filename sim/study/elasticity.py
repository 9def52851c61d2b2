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
from sim.fleet import SimFleet
from sim.simulate import Progress, calm_collector
from sim.study.autoscalers import FIXED, QUEUE, REACTIVE, make_scaler
from sim.study.case import StudyCase
from sim.study.elasticity_runs import FinishedRuns, Run, Watch
from sim.sweep_table import Interval, interval
from sim.workload import Workload
from sim.world import SimWorld, run

OURS = "forecast"
DIALS: dict[str, tuple[float, ...]] = {
    FIXED: (1.0, 1.5, 2.0, 2.5),
    REACTIVE: (0.3, 0.4, 0.5, 0.6, 0.7),
    QUEUE: (0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2),
    OURS: (1.5, 2.0, 2.5),
}
"""Fixed: nodes as a multiple of the mean demand; utilisation: target share of busy GPUs; queue: open tasks per GPU; forecast: GPUs
free for bursts, in roots of those in use."""
DAY_US = 86_400 * SECOND
SERIES = 24
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
    settle_s: float | None = None
    """Not judged at the beginning, where every way waits for cold nodes; None: a tenth of the hours, at most half an hour."""
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
        if self.settle_s is not None and not 0 <= self.settle_s < 3600 * self.hours:
            raise ConfigError(f"settle_s: must be at least 0 and end before the hours do, got {self.settle_s}")
        if not 0 <= self.fail_ppm < 1_000_000:
            raise ConfigError(f"fail_ppm: must lie between 0 and 999999, got {self.fail_ppm}")
        for name, dial in self.dials.items():
            if name not in DIALS:
                raise ConfigError(f"ways: unknown {name!r}; known are {', '.join(DIALS)}")
            if not dial or not all(0 < each < 100 for each in dial):
                raise ConfigError(f"ways: {name} needs settings above 0, got {dial}")

    @property
    def settle_us(self) -> Micros:
        """What is not judged at the beginning."""
        settle_s = min(1800.0, 360.0 * self.hours) if self.settle_s is None else self.settle_s
        return round(settle_s * SECOND)

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


def run_elasticity(
    plan: ElasticityPlan, jobs: int = 1, on_progress: Progress | None = None, store: Path | None = None
) -> ElasticityStudy:
    """Run the study; raises `ValueError` naming the field and the remedy.

    Runs that are finished are kept in the file `store` and not run again, as long as plan, trace and code are the same.
    """
    asked = [
        (plan, way, dial, plan.first_seed + number)
        for number in range(plan.seeds)
        for way, dial_values in plan.dials.items()
        for dial in dial_values
    ]
    with FinishedRuns(store, plan) as kept:
        lacking = [each for each in asked if each[1:] not in kept.runs]

        def done(each: Run) -> None:
            kept.add(each)
            if on_progress is not None:
                share = 1 - sum(one[1:] not in kept.runs for one in asked) / len(asked)
                on_progress(share, f"seed {each.seed}: {each.way} {each.dial:g}")

        if jobs > 1 and len(lacking) > 1:
            with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
                for each in pool.map(_run_asked, lacking):
                    done(each)
        else:
            for each in map(_run_asked, lacking):
                done(each)
        runs = [kept.runs[each[1:]] for each in asked]
    points = [
        Point(way, dial, _figures([each for each in runs if (each.way, each.dial) == (way, dial)]))
        for way, dial_values in plan.dials.items()
        for dial in dial_values
    ]
    return ElasticityStudy(plan, tuple(points), tuple(_savings(plan, runs)), tuple(runs))


def follow(trace: Path, load_times: Path | None = None, *, hours: float = 24.0, warm_days: int = 2) -> ElasticityStudy:
    """Return how one fleet sized by the forecast follows a trace's demand."""
    plan = ElasticityPlan(trace, load_times, hours=hours, warm_days=warm_days, seeds=1, dials={OURS: (2.0,)})
    return run_elasticity(plan)


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
        profile = replace(profile, scale_headroom_permille=round(1000 * dial), warm_ahead=True)
        forecaster = DemandForecaster(inner, deepcopy(model), offset_us=plan.warm_days * DAY_US)
    watch = Watch(world, fleet, plan.settle_us)
    with calm_collector():
        run(Engine(profile), world, inner.watching(watch), forecaster)
    return watch.run(plan, way, dial, seed)


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
