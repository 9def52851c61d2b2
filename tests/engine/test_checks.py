"""The checker sees what it is there for, and the arrays of the cluster say what the plain values say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from engine import invariants
from engine.cluster import Cluster, pick_gpus
from engine.errors import InvariantViolated
from engine.fit import Fit, places_on, possible
from engine.levels.scorers import SCORERS
from engine.resources import Demand, GpuSpec, NodeSpec
from engine.tasks import Affinity, PodState, TaskState


def spoil_free(state: Any) -> None:
    state.cluster.nodes[0].free[0] -= 1


def spoil_gpu(state: Any) -> None:
    state.cluster.nodes[0].gpus[0].share_free += 1


def spoil_array(state: Any) -> None:
    state.cluster.gpu_share[0, 0] = 3


def spoil_task(state: Any) -> None:
    state.tasks["t"].state = TaskState.PENDING


def spoil_pod(state: Any) -> None:
    state.pods[1].state = PodState.IDLE


def spoil_counter(state: Any) -> None:
    state.tenants["a"].running += 1


def spoil_group(state: Any) -> None:
    state.groups["a", "g"].live += 1


def spoil_agenda(state: Any) -> None:
    state.agenda.append((0, None))


def spoil_terminal(state: Any) -> None:
    state.terminal["t"] = None


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_free,
        spoil_gpu,
        spoil_array,
        spoil_task,
        spoil_pod,
        spoil_counter,
        spoil_group,
        spoil_agenda,
        spoil_terminal,
    ],
)
def test_the_checker_sees_a_state_that_contradicts_itself(desk: Any, task: Any, spoil: Callable[[Any], None]) -> None:
    d = desk()
    d.node(cpu_milli=1000)
    d.answer(d.submit(task("t", group="g", affinity=Affinity.STRICT)))
    invariants.check(d.engine.state)
    spoil(d.engine.state)
    with pytest.raises(InvariantViolated):
        invariants.check(d.engine.state)


NODES = st.lists(
    st.tuples(
        st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 4), st.booleans()), max_size=4),
        st.integers(0, 4000),
        st.integers(0, 100),
        st.booleans(),
    ),
    min_size=1,
    max_size=6,
)
DEMANDS = st.builds(
    Demand,
    gpus=st.integers(0, 3),
    gpu_share=st.sampled_from((100, 300, 500, 1000)),
    gpu_memory_bytes=st.integers(0, 20),
    gpu_models=st.sampled_from(((), ("a",), ("b",), ("a", "b"))),
    cpu_milli=st.integers(0, 2000),
    memory_bytes=st.integers(0, 50),
    extra=st.sampled_from(((), (("x", 1),))),
)


def build(nodes: Any) -> Cluster:
    cluster = Cluster()
    for i, (gpus, cpu, memory, extra) in enumerate(nodes):
        specs = tuple(GpuSpec(f"g{j}", model, 8 * size, healthy) for j, (model, size, healthy) in enumerate(gpus))
        cluster.add(NodeSpec(f"n{i}", specs, cpu, memory, extra=(("x", 2),) if extra else ()))
    return cluster


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    nodes=NODES, wanted=DEMANDS, taken=st.lists(st.tuples(st.integers(0, 5), DEMANDS), max_size=8), empty=st.booleans()
)
def test_a_fit_that_looks_at_changes_equals_one_that_looks_at_everything(
    nodes: Any, wanted: Demand, taken: list[tuple[int, Demand]], empty: bool
) -> None:
    cluster = build(nodes)
    scorers = tuple((scorer, weight) for weight, scorer in enumerate(SCORERS.values(), start=1))
    kept = Fit(cluster, wanted, scorers, empty)
    kept.refresh()
    for at, demand in taken:
        node = cluster.nodes[at % len(cluster)]
        if Fit(cluster, demand, ()).fits(node):
            grants = pick_gpus(node, demand)
            assert grants is not None
            assert len({g.uuid for g in grants}) == demand.gpus
            cluster.take(node, grants, demand)
        kept.refresh()
        fresh = Fit(cluster, wanted, scorers, empty)
        fresh.refresh()
        assert kept.scores.tolist() == fresh.scores.tolist()
        for other in cluster.nodes:
            if not empty:
                assert (fresh.score(other) >= 0) == fresh.fits(other)
            if fresh.fits(other):
                assert places_on(cluster, other, wanted) == 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(nodes=NODES, wanted=DEMANDS, members=st.integers(1, 5))
def test_what_an_empty_cluster_can_be_filled_with_is_possible(nodes: Any, wanted: Demand, members: int) -> None:
    cluster = build([([(m, size, True) for m, size, _ in gpus], *rest) for gpus, *rest in nodes])
    fit, placed = Fit(cluster, wanted, ()), 0
    with cluster.trial():
        while placed < members and (node := fit.best()) is not None:
            grants = pick_gpus(node, wanted)
            assert grants is not None
            cluster.take(node, grants, wanted)
            placed += 1
    if placed == members:
        assert possible(cluster, wanted, members)
    if members == 1:
        assert possible(cluster, wanted) == (placed == 1)


def test_a_trial_leaves_no_trace_unless_it_is_committed() -> None:
    cluster = build([([("a", 1, True), ("a", 1, True)], 4000, 100, True)])
    node, demand = cluster.nodes[0], Demand(gpus=2, cpu_milli=100)
    grants = pick_gpus(node, demand)
    assert grants is not None
    before = (list(node.free), cluster.gpu_share.tolist())
    with cluster.trial():
        cluster.take(node, grants, demand)
        assert pick_gpus(node, demand) is None
    assert (list(node.free), cluster.gpu_share.tolist()) == before
    with cluster.trial() as outer, cluster.trial() as inner:
        cluster.take(node, grants, demand)
        inner.commit()
        outer.commit()
    assert pick_gpus(node, demand) is None


def test_the_change_log_is_cut_and_everything_is_looked_at_again() -> None:
    cluster = build([([("a", 1, True)], 4000, 100, True)] * 3)
    fit = Fit(cluster, Demand(), ())
    assert fit.best() is cluster.nodes[0]
    demand = Demand(gpus=0, cpu_milli=1)
    for _ in range(5000):
        cluster.take(cluster.nodes[1], (), demand)
        cluster.release(cluster.nodes[1], (), demand)
    grants = pick_gpus(cluster.nodes[0], Demand())
    assert grants is not None
    cluster.take(cluster.nodes[0], grants, Demand())
    assert cluster.epoch > 0
    assert fit.best() is cluster.nodes[1]
