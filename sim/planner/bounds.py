"""What no scheduler could do: clusters that are too small for the work that arrives, found without simulating.

An objective says that all but a share of the tasks start within a limit. Take a span of time with its arrivals, leave out as
many of the largest tasks as may be late, and the rest must have started by the end of the span plus the limit. What they bring
is then done, or runs: at most one largest task per GPU. So a cluster with

    sum over GPUs of (speed x (span + limit) + largest task)  <  work of the span

cannot keep the objective, whatever its policy, unless it starts tasks only to interrupt them. The search begins above this bound,
and simulates the cluster below its answer all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.tasks import SECOND, URGENT_PRIORITY
from sim.hardware import GIB, GPU_MODELS, Hardware
from sim.planner.objectives import ALL, Objective
from sim.planner.request import PlanRequest, Pool
from sim.planner.runs import Runs
from sim.workload import Arrival, Workload

_SPANS_S = (600.0, 3600.0, 6 * 3600.0, 24 * 3600.0)
_MEAN_SHARE = 0.1
"""A mean below m leaves at most this share of the tasks above m divided by this share."""
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Demand:
    """What a workload asks for, in GPU-seconds of the reference GPU."""

    at_s: Floats
    work_s: Floats
    """GPU-seconds by task: run time x GPUs."""
    run_s: Floats
    """Run time by task."""
    gpus: Floats
    """GPUs by task, in parts of one where tasks share."""

    @property
    def span_s(self) -> float:
        """Time from the first to the last arrival."""
        return max(1e-6, float(self.at_s[-1] - self.at_s[0])) if len(self.at_s) else 1e-6

    @property
    def erlangs(self) -> float:
        """Mean number of reference GPUs that the work keeps busy."""
        return float(self.work_s.sum()) / self.span_s


@dataclass(frozen=True, slots=True)
class _Span:
    length_s: float
    largest_s: float
    work_s: float


class Bound:
    """Says which clusters are impossible. A cluster is, when it is so with every seed's workload."""

    def __init__(self, request: PlanRequest, runs: Runs) -> None:
        self._hardware = request.config(request.pool((1,) * len(request.offers))).hardware()
        self._request = request
        self._workload = runs.workload(request.base)
        self.demand = demand_of(self._workload, self._hardware, [offer.gpu_model for offer in request.offers])
        self._by_seed: list[list[_Span]] = []
        for number in range(request.seeds):
            workload = runs.workload(request.config((), number))
            spans = [span for each in request.objectives for span in self._spans(workload, each, request)]
            self._by_seed.append(spans)

    def impossible(self, pool: Pool) -> bool:
        """Whether a cluster is too small for the work, whoever schedules it."""
        speeds = [(self._hardware.speed(model), count) for model, count in pool]

        def short(span: _Span) -> bool:
            done = sum(count * (speed * span.length_s + span.largest_s) for speed, count in speeds)
            return done < span.work_s

        return all(any(short(span) for span in spans) for spans in self._by_seed)

    def fewest(self, model: str, most: int) -> int:
        """Return the smallest number of GPUs of one model that is not impossible; `most` + 1 when all up to it are."""
        low, high = 0, most + 1
        while high - low > 1:
            middle = (low + high) // 2
            if self.impossible(((model, middle),)):
                low = middle
            else:
                high = middle
        return high

    def unfit(self, model: str) -> str:
        """Say why too many tasks can never run on a model for an objective to be kept; empty when they can."""
        gpu, per_node = GPU_MODELS[model], self._request.base.gpus_per_node
        for objective in self._request.objectives:
            inside = [each.task.demand for each in self._workload.arrivals if _in_class(each, objective.selector)]
            bad = [
                demand
                for demand in inside
                if demand.gpus
                and (
                    demand.gpu_memory_bytes > gpu.memory_bytes
                    or demand.gpus > per_node
                    or (demand.gpu_models and model not in demand.gpu_models)
                )
            ]
            if len(bad) > (objective.tail or 0.0) * len(inside):
                most = max(demand.gpu_memory_bytes for demand in bad) / GIB
                gpus = max(demand.gpus for demand in bad)
                return (
                    f"{model}: {len(bad) / len(inside):.0%} of the tasks do not fit; they ask for up to {most:.3g} GiB of a GPU's "
                    f"memory (it has {gpu.memory_bytes / GIB:.3g}) and {gpus} GPUs on one node (of {per_node}): offer "
                    "another model, or larger nodes"
                )
        return ""

    def load(self, pool: Pool) -> float:
        """Return the offered load: the share of the cluster's time that the work takes, loads and luck apart."""
        capacity = sum(self._hardware.speed(model) * count for model, count in pool)
        return self.demand.erlangs / capacity if capacity else float("inf")

    def speed(self, model: str) -> float:
        """Return how fast a GPU model is beside the one that run times hold on."""
        return self._hardware.speed(model)

    def _spans(self, workload: Workload, objective: Objective, request: PlanRequest) -> list[_Span]:
        inside = [each for each in workload.arrivals if _in_class(each, objective.selector)]
        if not inside:
            return []
        demand = demand_of(
            Workload(workload.name, tuple(inside)), self._hardware, [offer.gpu_model for offer in request.offers]
        )
        wait_s, late = _allowance(objective, demand)
        found = []
        for length in (*_SPANS_S, demand.span_s):
            if length > demand.span_s and length != demand.span_s:
                continue
            found += _heaviest(demand, length, wait_s, late)
        return found


def demand_of(workload: Workload, hardware: Hardware, models: Sequence[str]) -> Demand:
    """Return a workload's demand; tasks whose run time the hardware decides count as on the model that does most with its time."""
    at, work, run, gpus = [], [], [], []
    for arrival in workload.arrivals:
        task, truth = arrival.task, arrival.truth
        if truth.cancel_after_us is not None:
            continue
        if truth.work_us is not None:
            run_us = float(truth.work_us)
        else:
            run_us = min(hardware.run_us(task, model) * hardware.speed(model) for model in models)
        share = task.demand.gpus * task.demand.gpu_share / 1000 * task.members
        if task.slots > 1:
            share /= max(hardware.shared_gain(model, task.slots) for model in models)
        at.append(arrival.at / SECOND)
        run.append(run_us / SECOND)
        gpus.append(share)
        work.append(run_us / SECOND * share)
    return Demand(np.array(at), np.array(work), np.array(run), np.array(gpus))


def _allowance(objective: Objective, demand: Demand) -> tuple[float, int]:
    """Return the longest waiting that most tasks may have, and how many may have a longer one."""
    limit = objective.limit
    if objective.measure == "slowdown":
        limit = (limit - 1) * float(demand.run_s.max())
    if objective.tail is None:
        return limit / _MEAN_SHARE, int(_MEAN_SHARE * len(demand.at_s))
    return limit, int(objective.tail * len(demand.at_s) + 1e-9)


def _heaviest(demand: Demand, length_s: float, wait_s: float, late: int) -> list[_Span]:
    """Return the span of this length that brings most work, without its `late` largest tasks."""
    best: _Span | None = None
    begin = float(demand.at_s[0])
    while begin <= demand.at_s[-1]:
        first, last = np.searchsorted(demand.at_s, (begin, begin + length_s), side="left")
        if length_s >= demand.span_s:
            last = len(demand.at_s)
        if last - first > late:
            kept = np.sort(demand.work_s[first:last])[: int(last - first) - late]
            span = _Span(length_s + wait_s, float(kept[-1]), float(kept.sum()))
            if best is None or span.work_s / span.length_s > best.work_s / best.length_s:
                best = span
        begin += length_s / 2
    return [] if best is None else [best]


def _in_class(arrival: Arrival, selector: str) -> bool:
    task = arrival.task
    if selector in {"urgent", "ordinary"}:
        return (task.priority >= URGENT_PRIORITY) == (selector == "urgent")
    return selector in {ALL, f"tenant {task.tenant}", f"type {task.task_type}"}
