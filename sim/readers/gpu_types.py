"""Brings the GPU types that a trace names together with those that a cluster has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from sim.workload import Arrival, Workload


def held_to(workload: Workload, models: Iterable[str]) -> Workload:
    """Return the workload with every task held to those of its types that are there, and to none when all are missing.

    The notes say how many tasks may run anywhere for that reason.
    """
    there = frozenset(models)
    freed = 0
    arrivals: list[Arrival] = []
    for arrival in workload.arrivals:
        named = arrival.task.demand.gpu_models
        if named and not there.issuperset(named):
            kept = tuple(name for name in named if name in there)
            freed += not kept
            demand = replace(arrival.task.demand, gpu_models=kept)
            arrival = replace(arrival, task=replace(arrival.task, demand=demand))
        arrivals.append(arrival)
    if not freed and all(new is old for new, old in zip(arrivals, workload.arrivals, strict=True)):
        return workload
    notes = (*workload.notes, ("GPU types missing, so any will do", freed)) if freed else workload.notes
    return replace(workload, arrivals=tuple(arrivals), notes=notes)
