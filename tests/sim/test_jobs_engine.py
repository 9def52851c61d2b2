"""The fast core against the production engine in a world where nothing takes time but the jobs: same starts on the same nodes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import profiles
from engine.commands import Command, StartTask
from engine.events import Event
from engine.resources import Demand
from engine.scheduler import Engine
from engine.tasks import Affinity, TaskSpec, TaskType
from predictors.forecaster import OracleForecaster
from sim.hardware import Hardware, cluster
from sim.jobs import from_workload, simulate_jobs
from sim.workload import Arrival, Truth, Workload
from sim.world import SimWorld, run

PROFILE = """
name = "bare"
[ordering]
policy = "{policy}"
backfill = "{backfill}"
[placement]
group_affinity = false
[binding]
warm_reuse = false
"""


class Starts:
    """When and where each job was ordered to start; a journal."""

    def __init__(self) -> None:
        self.at: dict[str, int] = {}
        self.nodes: dict[str, list[str]] = {}

    def __call__(self, now: int, events: Sequence[Event], commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, StartTask):
                self.at.setdefault(command.req_no, now)
                self.nodes.setdefault(command.req_no, []).append(command.node)


def _workload(rows: list[tuple[int, int, int, int]], per_node: int) -> Workload:
    """Rows are (gap, run time, size, priority). Arrivals fall on whole milliseconds and ends between them: they never coincide."""
    at, arrivals = 0, []
    for number, (gap, length, size, priority) in enumerate(rows):
        at += gap * 1_000
        members = max(1, size // per_node)
        spec = TaskSpec(
            str(number), "t", "", TaskType.TP, "sleep",
            demand=Demand(gpus=min(size, per_node)), members=members, priority=priority, affinity=Affinity.NONE,
        )  # fmt: skip
        arrivals.append(Arrival(at, spec, Truth(work_us=length * 1_000 + 1)))
    return Workload("w", tuple(arrivals))


def _both(rows, nodes: int, per_node: int, policy: str, backfill: str):
    workload = _workload(rows, per_node)
    hardware = Hardware(cluster(nodes, per_node), pod_start_us=0, dispatch_us=0, pod_stop_us=0)
    world = SimWorld(simpy.Environment(), hardware, workload, 0)
    starts = Starts()
    truths = {arrival.task.req_no: arrival.truth.work_us for arrival in workload.arrivals}
    run(
        Engine(profiles.load(PROFILE.format(policy=policy, backfill=backfill))), world, starts, OracleForecaster(truths)
    )
    result = simulate_jobs(from_workload(workload), nodes, per_node, policy, backfill=backfill, placement="first-fit")
    begun = [(row, name) for row, name in enumerate(result.jobs.names) if result.start_us[row] >= 0]
    ours = {name: int(result.start_us[row]) for row, name in begun}
    places = {
        name: sorted(f"node-{node:0{len(str(nodes - 1))}d}" for node, _ in result.pieces_of(row)) for row, name in begun
    }
    return starts, ours, places


def _rows(sizes: Sequence[int]):
    return st.lists(
        st.tuples(st.integers(0, 6), st.integers(1, 12), st.sampled_from(sizes), st.integers(0, 2)),
        min_size=1,
        max_size=30,
    )


@pytest.mark.parametrize("policy", ["fifo", "priority", "sjf"])
@settings(max_examples=60, deadline=None)
@given(rows=_rows([1, 2, 3, 4, 8, 12]), nodes=st.integers(1, 4))
def test_without_backfill_the_engine_starts_every_job_at_the_same_time_on_the_same_nodes(policy, rows, nodes) -> None:
    starts, ours, places = _both(rows, nodes, 4, policy, "none")
    assert starts.at == ours
    assert {name: sorted(where) for name, where in starts.nodes.items()} == places


@settings(max_examples=100, deadline=None)
@given(rows=_rows([1, 2, 3, 4]), nodes=st.integers(1, 3))
def test_with_easy_the_engine_starts_every_job_at_the_same_time_on_the_same_node(rows, nodes) -> None:
    # Jobs of at most a node: for larger ones the engine reserves the nodes that are free first, the core those with the
    # lowest numbers, and others go ahead differently.
    starts, ours, places = _both(rows, nodes, 4, "fifo", "easy")
    assert starts.at == ours
    assert {name: sorted(where) for name, where in starts.nodes.items()} == places
