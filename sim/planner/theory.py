"""The textbook's answer beside the simulation's: Erlang C for the same load, and what it leaves out, in figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sim.planner.bounds import Demand
from sim.planner.objectives import ALL, Objective, shown
from sim.planner.trials import Trial
from sim.theory import erlang_c, mmc_wait, mmc_wait_quantile

_MOST = 1_000_000
_PEAK_S = 3600.0
"""Window of the peak rate; a workload that is shorter than a day is cut into 24 windows."""


@dataclass(frozen=True, slots=True)
class Formula:
    """One formula's answer."""

    name: str
    rate_per_s: float
    service_s: float
    erlangs: float
    gpus: int | None
    """None: the formula has no answer, or no number of GPUs is enough."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The formulas' answers, and why the simulation's differs."""

    objective: str
    formulas: tuple[Formula, ...]
    reasons: tuple[str, ...]


def compare(objective: Objective, demand: Demand, speed: float, trial: Trial, gpus: int) -> Comparison:
    """Set formulas for one GPU model of some speed beside a simulated trial of so many GPUs."""
    share = float(demand.work_s.sum() / max(1e-12, demand.run_s.sum()))
    service = float(demand.run_s.mean()) / speed
    rate = len(demand.at_s) / demand.span_s
    tasks = max(1.0, trial.mean("tasks"))
    load_s = trial.mean("loading") * gpus * trial.mean("span_s") / tasks / max(share, 1e-12)
    window = min(_PEAK_S, demand.span_s / 24)
    peak = max(rate, float(np.bincount(((demand.at_s - demand.at_s[0]) // window).astype(np.int64)).max()) / window)
    when = shown(window)
    cases = (
        ("Erlang C, run times alone", rate, service),
        ("with the loads that were simulated", rate, service + load_s),
        (f"... at the rate of the fullest {when}", peak, service + load_s),
    )
    formulas = tuple(
        Formula(name, at, mean, at * mean * share, _gpus(objective, at, mean, share)) for name, at, mean in cases
    )
    return Comparison(
        str(objective), formulas, _reasons(objective, demand, service, load_s, (peak / rate, when), formulas, gpus)
    )


def servers_for(objective: Objective, rate: float, mean: float) -> int | None:
    """Return the fewest servers that keep an objective in M/M/c; None where no number does or no formula is known."""
    keeps = _keeper(objective, rate, mean)
    if keeps is None:
        return None
    low = max(0, math.floor(rate * mean))
    high = low + 1
    while not keeps(high):
        low, high = high, high * 2
        if high > _MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return high


def _gpus(objective: Objective, rate: float, mean: float, share: float) -> int | None:
    servers = servers_for(objective, rate, mean)
    return None if servers is None else max(1, math.ceil(servers * share - 1e-9))


def _keeper(objective: Objective, rate: float, mean: float) -> Callable[[int], bool] | None:
    limit, tail = objective.limit, objective.tail
    if objective.measure == "slowdown" or rate <= 0 or mean <= 0:
        return None
    if objective.measure == "wait":
        if tail is None:
            return lambda count: objective.kept(mmc_wait(count, rate, mean))
        return lambda count: objective.kept(mmc_wait_quantile(count, rate, mean, 1 - tail))
    if tail is None:
        return None if mean > limit else lambda count: objective.kept(mmc_wait(count, rate, mean) + mean)
    if math.exp(-limit / mean) > tail:
        return None
    return lambda count: _sojourn_above(count, rate, mean, limit) <= tail


def _sojourn_above(count: int, rate: float, mean: float, limit: float) -> float:
    """Return the chance that waiting and service together take longer than `limit` in M/M/c, first come first served."""
    if rate * mean >= count:
        return 1.0
    waits = erlang_c(count, rate * mean)
    done, freed = 1 / mean, count / mean - rate
    alone = math.exp(-done * limit)
    if abs(done - freed) < 1e-9 * done:
        both = (1 + done * limit) * alone
    else:
        both = (freed * alone - done * math.exp(-freed * limit)) / (freed - done)
    return (1 - waits) * alone + waits * both


def _reasons(
    objective: Objective,
    demand: Demand,
    service: float,
    load_s: float,
    peak: tuple[float, str],
    formulas: tuple[Formula, ...],
    gpus: int,
) -> tuple[str, ...]:
    found = []
    if objective.measure == "slowdown":
        found.append("Erlang C has no formula for slowdown: look at the load in Erlang only")
    gaps = np.diff(demand.at_s)
    if len(gaps) > 1 and gaps.mean() > 0:
        variation = float(gaps.std() / gaps.mean())
        if not 0.8 < variation < 1.25:
            found.append(
                f"arrivals are {'bursty' if variation > 1 else 'regular'}: their gaps vary {variation:.1f} times their mean "
                f"(Erlang: 1), and the fullest {peak[1]} have {peak[0]:.1f} times the mean rate"
            )
    spread = float(demand.run_s.std() / max(1e-12, demand.run_s.mean()))
    if not 0.8 < spread < 1.25:
        found.append(f"run times vary {spread:.2f} times their mean (Erlang: 1)")
    if load_s > 0.02 * service:
        found.append(f"every task costs {load_s:.1f} s of loading beside {service:.1f} s of running (Erlang: none)")
    if objective.selector != ALL:
        found.append(f"Erlang C knows no classes: it serves everybody as well as [{objective.selector}]")
    alone = formulas[0].gpus
    if alone is not None and gpus < alone:
        found.append("the scheduler does better than first come first served: it chooses who goes next")
    if not found and alone is not None:
        found.append("arrivals, run times and order are about what Erlang assumed: the answers should agree")
    return tuple(found)
