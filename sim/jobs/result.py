"""Runs jobs and keeps what happened to each, as columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import simpy

from engine.levels.ordering import Ordering
from sim.jobs.core import BACKFILLS, JobCore
from sim.jobs.figures import JobFigures, measure
from sim.jobs.nodes import PLACEMENTS, Nodes, Pieces
from sim.jobs.processors import Groups, Processors, spelled_out
from sim.jobs.workload import Ints, Jobs, keys
from sim.workload import WorkloadError


@dataclass(frozen=True, slots=True)
class JobsResult:
    """What happened. Columns have one entry per job, in the workload's order; times are whole microseconds."""

    jobs: Jobs
    nodes: int
    gpus_per_node: int
    spread: bool
    start_us: Ints
    """-1: larger than the cluster, so refused as it came."""
    end_us: Ints
    node: Ints
    """-1: on several (`pieces_of` tells which), or never started."""
    pieces: dict[int, Pieces] = field(repr=False)
    groups: dict[int, Groups] = field(repr=False)
    decisions: int
    events: int
    """Events on SimPy's clock."""
    longest_line: int

    @property
    def waiting_us(self) -> Ints:
        """Time from submission to start, of those that started."""
        ran = self.start_us >= 0
        return self.start_us[ran] - self.jobs.submit_us[ran]

    @property
    def completion_us(self) -> Ints:
        """Time from submission to end, of those that ran."""
        ran = self.start_us >= 0
        return self.end_us[ran] - self.jobs.submit_us[ran]

    def pieces_of(self, job: int) -> Pieces:
        """Return (node, GPUs there) of a job; empty when it never started."""
        node = int(self.node[job])
        if node >= 0:
            return [(node, int(self.jobs.gpus[job]))]
        return spelled_out(self.groups[job]) if job in self.groups else self.pieces.get(job, [])

    def figures(self) -> JobFigures:
        """Work out every metric."""
        return measure(self)

    def flat_pieces(self) -> Iterator[tuple[int, int, int]]:
        """Yield (job, node, GPUs there) of jobs on several nodes."""
        for job, pieces in self.pieces.items():
            for node, gpus in pieces:
                yield job, node, gpus


def simulate_jobs(
    jobs: Jobs,
    nodes: int,
    gpus_per_node: int = 8,
    policy: str | Ordering = "fifo",
    *,
    backfill: str = "none",
    placement: str = "best-fit",
    spread: bool = False,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> JobsResult:
    """Run jobs on nodes of equal size, without preemption.

    `policy` is one of `sim.jobs.workload.POLICIES` or an engine's `Ordering`. `backfill` is ``none`` (nobody overtakes the first in
    line), ``skip`` (whoever fits goes), ``easy`` (whoever does not delay the first, by `Jobs.estimate_us`) or ``accasim`` (that
    simulator's own reading of EASY, for comparisons with it; docs/reproduce.md). `placement` is ``best-fit``, ``first-fit``,
    ``worst-fit`` or ``random`` (drawn from `seed`), ties to the lowest number. A job of more than a node takes whole nodes and a
    remainder on one more; with `spread`, any GPUs anywhere. Equal arguments give equal results.
    """
    for name, value in (("nodes", nodes), ("gpus_per_node", gpus_per_node)):
        if value < 1:
            raise WorkloadError(f"{name}: must be at least 1, got {value}")
    if backfill not in BACKFILLS:
        raise WorkloadError(f"backfill: unknown {backfill!r}; known are {', '.join(BACKFILLS)}")
    if placement not in PLACEMENTS:
        raise WorkloadError(f"placement: unknown {placement!r}; known are {', '.join(PLACEMENTS)}")
    if spread:
        possible = jobs.gpus <= nodes * gpus_per_node
    else:
        possible = -(-jobs.gpus // gpus_per_node) <= nodes
    every = bool(possible.all())
    chosen = jobs if every else jobs.only(possible)
    order = np.lexsort(tuple(reversed(keys(chosen, policy))) or (np.zeros(len(chosen)),))
    rank = np.empty(len(chosen), np.int64)
    rank[order] = np.arange(len(chosen))
    core = JobCore(
        simpy.Environment(),
        Nodes(nodes, gpus_per_node, PLACEMENTS[placement], seed),
        Processors(nodes, gpus_per_node, PLACEMENTS[placement], seed) if spread else None,
        chosen.submit_us.tolist(),
        chosen.run_us.tolist(),
        chosen.gpus.tolist(),
        chosen.estimate_us.tolist(),
        rank.tolist(),
        BACKFILLS[backfill],
    )
    core.run(progress)
    rows = np.flatnonzero(possible)
    start, node = np.full(len(jobs), -1, np.int64), np.full(len(jobs), -1, np.int64)
    start[rows], node[rows] = core.start, core.node
    numbered = rows.tolist()
    return JobsResult(
        jobs=jobs,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        spread=spread,
        start_us=start,
        end_us=np.where(start >= 0, start + jobs.run_us, -1),
        node=node,
        pieces={numbered[job]: where for job, where in core.pieces.items()},
        groups={numbered[job]: where for job, where in core.groups.items()},
        decisions=core.decisions,
        events=core.events,
        longest_line=core.longest_line,
    )
