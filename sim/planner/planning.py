"""Makes a plan: searches each GPU model and the mixes, then asks of the answer what a planner would ask."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from sim.planner.bounds import Bound
from sim.planner.objectives import shown
from sim.planner.questions import headroom, other_policies, sways_of, warnings_of
from sim.planner.request import PlanError, PlanRequest, Pool, gpus_of, pool_text
from sim.planner.results import Plan, Sway, money
from sim.planner.runs import Runs
from sim.planner.search import Fewest, Search, enlarged
from sim.planner.theory import compare, servers_for
from sim.planner.trials import Trial, Trials, binding
from sim.simulate import Progress

_CURVE = (-2, 2, 0.25, 0.5, 1.0)
"""Clusters beside the answer that are simulated for the curve: GPUs more or less, then parts of it more."""


def plan(
    request: PlanRequest,
    on_progress: Progress | None = None,
    *,
    store: Path | None = None,
    jobs: int | None = None,
) -> Plan:
    """Search for the cheapest cluster that keeps the objectives; raises `ValueError` naming the field and the remedy.

    Every finished run goes to `store` at once: the same request with the same store goes on where it was interrupted.
    `jobs` is the number of processes, None every core; neither changes the plan.
    """
    runs = Runs(request.workload, store, jobs)
    try:
        return _Planning(request, runs, on_progress).make()
    finally:
        runs.close()


_LEFT = 0.95
"""What a run leaves of a stage's progress."""
_SLACK = 1.05
"""How much weaker than what is reached an objective is made that should have an answer."""


class _Stages:
    """Tells how far a plan has come. How many runs a search takes is not known before: each one closes part of what is left."""

    def __init__(self, report: Progress | None, weights: dict[str, float]) -> None:
        self._report = report
        self._total = sum(weights.values())
        self._weights = weights
        self._before = 0.0
        self._now, self._text = "", ""
        self._runs = 0

    def enter(self, name: str) -> None:
        self._before += self._weights.get(self._now, 0.0)
        self._now, self._text, self._runs = name, "", 0
        self._tell()

    def heard(self, text: str) -> None:
        self._text = text
        self._tell()

    def ran(self) -> None:
        self._runs += 1
        self._tell()

    def _tell(self) -> None:
        if self._report is not None:
            part = self._weights.get(self._now, 0.0) * (1 - _LEFT**self._runs)
            self._report((self._before + part) / self._total, f"{self._now}: {self._text}" if self._text else self._now)


class _Planning:
    def __init__(self, request: PlanRequest, runs: Runs, on_progress: Progress | None) -> None:
        self._request = request
        self._runs = runs
        weights = {f"searching {offer.gpu_model}": 3.0 for offer in request.offers}
        weights |= {"trying mixes": 2.0 if len(request.offers) > 1 else 0.0, "drawing the curve": 1.0}
        weights |= {"varying assumptions": 2.0 if request.sensitivity else 0.0}
        weights |= {f"asking for {name}": 2.0 for name in request.policies}
        self._stages = _Stages(on_progress, weights)
        runs.on_run = self._stages.ran
        self._trials = Trials(request, runs, self._heard)

    def make(self) -> Plan:
        """Make the plan."""
        request, trials = self._request, self._trials
        workload = self._runs.workload(request.base)
        if not workload.arrivals:
            raise PlanError("workload: holds no task; give a trace with tasks, or a synthetic workload")
        bound = Bound(request, self._runs)
        search = Search(request, trials, bound.impossible, bound.fewest, bound.unfit)
        pure = self._pure(search, bound)
        self._stages.enter("trying mixes")
        mixes, untried = search.mixes(pure)
        made = Plan(request, workload.name, workload.digest(), tuple(pure), tuple(mixes), untried)
        found = min((each for each in pure if each.trial is not None), key=self._cost, default=None)
        if found is not None and found.trial is not None:
            answer = min([found.trial, *mixes], key=lambda trial: (request.cost(trial.pool), gpus_of(trial.pool)))
            made = self._asked(made, answer, found, search, bound)
        else:
            made = replace(made, within_reach=self._within_reach(pure, bound))
        curve = sorted(trials.all(), key=lambda trial: (request.cost(trial.pool), pool_text(trial.pool)))
        return replace(made, curve=tuple(curve), runs=self._runs.done + self._runs.reused, reused=self._runs.reused)

    def _asked(self, made: Plan, answer: Trial, found: Fewest, search: Search, bound: Bound) -> Plan:
        """Ask the questions that follow an answer. `found` is the cheapest cluster of a single model."""
        request, trials = self._request, self._trials
        below, above = self._neighbours(answer)
        self._stages.enter("drawing the curve")
        self._draw(answer)
        sways: tuple[Sway, ...] = ()
        if request.sensitivity:
            self._stages.enter("varying assumptions")
            sways = sways_of(request, trials, answer, self._stages.heard)
        pure = found.trial or answer
        number = binding(request.objectives, pure)
        theory = compare(request.objectives[number], bound.demand, bound.speed(found.model), pure, gpus_of(pure.pool))
        made = replace(
            made,
            answer=answer,
            below=below,
            above=above,
            load=bound.load(answer.pool),
            sways=sways,
            hours=headroom(answer),
            theory=theory,
            policies=other_policies(request, trials, answer, found, search, self._stages.enter),
        )
        return replace(made, warnings=warnings_of(made))

    def _pure(self, search: Search, bound: Bound) -> list[Fewest]:
        found: list[Fewest] = []
        for offer in self._request.offers:
            model = offer.gpu_model
            self._stages.enter(f"searching {model}")
            speed = bound.speed(model)
            known = next((each for each in found if each.count), None)
            if known is not None and known.count:
                start = round(known.count * bound.speed(known.model) / speed)
            else:
                start = self._guess(bound, speed)
            found.append(search.fewest(model, max(1, start)))
        return found

    def _guess(self, bound: Bound, speed: float) -> int:
        """Return where Erlang C would begin."""
        demand = bound.demand
        rate, mean = len(demand.at_s) / demand.span_s, float(demand.run_s.mean()) / speed
        share = float(demand.work_s.sum() / max(1e-12, demand.run_s.sum()))
        counts = [servers_for(each, rate, mean) for each in self._request.objectives]
        return math.ceil(max((count for count in counts if count), default=1) * share)

    def _within_reach(self, pure: list[Fewest], bound: Bound) -> str:
        """Return the objectives weakened to what the largest clusters do reach, and the cheapest cluster for them."""
        request, found = self._request, []
        for each in pure:
            if each.largest is None:
                continue
            pairs = zip(request.objectives, each.largest.estimates, strict=True)
            weaker = tuple(
                replace(objective, limit=_rounded(max(objective.limit, estimate.high * _SLACK)))
                for objective, estimate in pairs
                if not math.isinf(estimate.high)
            )
            if len(weaker) < len(request.objectives):
                continue
            easier = replace(request, objectives=weaker)
            trials = Trials(easier, self._runs, self._heard)
            search = Search(easier, trials, bound.impossible, bound.fewest, bound.unfit)
            less = search.fewest(each.model, gpus_of(each.largest.pool))
            if less.trial is not None:
                found.append((request.cost(less.trial.pool), less.trial, weaker))
        if not found:
            return ""
        cost, trial, weaker = min(found, key=lambda item: item[0])
        promised = " and ".join(str(objective) for objective in weaker)
        return f"{promised} with {pool_text(trial.pool)} ({money(cost, request.currency)}/h)"

    def _neighbours(self, answer: Trial) -> tuple[Trial | None, Trial | None]:
        """Return the trials with one GPU less and one more, every seed. In a mix: of the model that the cluster has most of."""
        less = enlarged(answer.pool, -1)
        below = self._trials.judge(less, full=True) if less else None
        return below, self._trials.judge(enlarged(answer.pool), full=True)

    def _draw(self, answer: Trial) -> None:
        """Simulate clusters beside the answer, for the curve; a mix has its own neighbours already."""
        if len(answer.pool) > 1:
            return
        ((model, count),) = answer.pool
        steps = (round(step) if abs(step) > 1 else max(3, round(step * count)) for step in _CURVE)
        pools: list[Pool] = [((model, count + step),) for step in steps if 1 <= count + step <= self._request.most_gpus]
        self._trials.prepare(pools, seeds=1)
        for pool in pools:
            self._trials.judge(pool)

    def _cost(self, each: Fewest) -> tuple[float, int]:
        return (math.inf, 0) if each.trial is None else (self._request.cost(each.trial.pool), each.count or 0)

    def _heard(self, trial: Trial) -> None:
        number = binding(self._request.objectives, trial)
        objective = self._request.objectives[number]
        value = shown(trial.estimates[number].mean, objective.unit)
        self._stages.heard(f"{pool_text(trial.pool)} {trial.verdict.value} ({objective.name} {value})")


def _rounded(limit: float) -> float:
    """Return the limit with two significant digits, rounded up."""
    unit = math.pow(10, math.floor(math.log10(limit)) - 1)
    return math.ceil(limit / unit - 1e-9) * unit
