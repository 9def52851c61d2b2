"""The fast core against a simulation that is slow and obvious: same starts, same nodes, whatever the workload."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.levels.ordering import ByPriority, Fair, Fifo
from engine.levels.orderings.by_time import Sjf, Srtf
from engine.levels.orderings.sharing import Drf
from engine.resources import Demand
from engine.tasks import TaskSpec, TaskType
from sim.jobs import POLICIES, Jobs, JobsResult, from_workload, make_jobs, simulate_jobs
from sim.jobs.workload import keys
from sim.workload import Arrival, Truth, Workload, WorkloadError


@dataclass
class Obvious:
    """Walks the whole line at every instant and works out reservations from nothing each time."""

    jobs: Jobs
    nodes: int
    per_node: int
    backfill: str
    placement: str
    spread: bool
    order: list[int]
    free: list[int] = field(init=False)

    def run(self) -> tuple[list[int], list[list[tuple[int, int]]], list[tuple[int, int]]]:
        count = len(self.jobs)
        self.free = [self.per_node] * self.nodes
        start, where = [-1] * count, [[] for _ in range(count)]
        self.running: dict[int, int] = {}
        promises: list[tuple[int, int]] = []
        place_of = {job: place for place, job in enumerate(self.order)}
        waiting: list[int] = []
        coming = [job for job in range(count) if self.possible(int(self.jobs.gpus[job]))]
        while coming or self.running:
            ends = {job: start[job] + int(self.jobs.run_us[job]) for job in self.running}
            now = min([*ends.values(), *(int(self.jobs.submit_us[job]) for job in coming[:1])])
            for job in [job for job, end in ends.items() if end == now]:
                del self.running[job]
                for node, gpus in where[job]:
                    self.free[node] += gpus
            while coming and self.jobs.submit_us[coming[0]] == now:
                waiting.append(coming.pop(0))
            waiting.sort(key=place_of.__getitem__)
            for job in self.choose(waiting, now, where, promises):
                start[job] = now
                waiting.remove(job)
        return start, where, promises

    def possible(self, gpus: int) -> bool:
        return gpus <= self.nodes * self.per_node if self.spread else -(-gpus // self.per_node) <= self.nodes

    def choose(self, waiting, now, where, promises):
        begun = []
        ahead = True
        for job in list(waiting):
            gpus, estimate = int(self.jobs.gpus[job]), int(self.jobs.estimate_us[job])
            if ahead:
                pieces = self.fit(gpus, self.free, ())
                if pieces is None:
                    if self.backfill == "none":
                        break
                    ahead = False
                    if self.backfill == "easy":
                        at, kept, beside, spare = self.promise(gpus, now, where)
                        promises.append((job, at))
                    continue
            elif self.backfill == "skip" or now + estimate <= at:
                pieces = self.fit(gpus, self.free, ())
            elif self.spread:
                pieces = self.fit(gpus, self.free, ()) if gpus <= spare else None
                spare -= gpus if pieces else 0
            else:
                closed = kept - {beside} if gpus <= spare else kept
                pieces = self.fit(gpus, self.free, closed)
                if pieces and pieces[0][0] == beside and len(pieces) == 1:
                    spare -= gpus
            if pieces is not None:
                where[job] = pieces
                for node, taken in pieces:
                    self.free[node] -= taken
                self.running[job] = now + estimate
                begun.append(job)
        return begun

    def promise(self, gpus, now, where):
        free = list(self.free)
        for at in sorted({max(end, now) for end in self.running.values()}):
            for job, end in self.running.items():
                if max(end, now) == at:
                    for node, taken in where[job]:
                        free[node] += taken
            pieces = self.fit(gpus, free, ())
            if pieces is not None:
                if self.spread:
                    return at, set(), -1, sum(free) - gpus
                kept = {node for node, _ in pieces}
                node, taken = pieces[-1]
                full = free[node] == taken and taken == self.per_node
                return at, kept, -1 if full else node, 0 if full else free[node] - taken
        raise AssertionError("nothing ends")

    def fit(self, gpus, free, closed):
        nodes = [node for node in range(self.nodes) if node not in closed]
        taste = {
            "best-fit": lambda node: (free[node], node),
            "worst-fit": lambda node: (-free[node], node),
            "first-fit": lambda node: (0, node),
        }[self.placement]
        if self.spread:
            left, pieces = gpus, []
            for node in sorted((node for node in nodes if free[node]), key=taste):
                if left:
                    pieces.append((node, min(left, free[node])))
                    left -= pieces[-1][1]
            return None if left else pieces
        if gpus <= self.per_node:
            fitting = [node for node in nodes if free[node] >= gpus]
            return [(min(fitting, key=taste), gpus)] if fitting else None
        whole, rest = divmod(gpus, self.per_node)
        empty = [node for node in nodes if free[node] == self.per_node]
        if len(empty) < whole:
            return None
        pieces = [(node, self.per_node) for node in empty[:whole]]
        if rest:
            others = [node for node in nodes if node not in empty[:whole] and free[node] >= rest]
            if not others:
                return None
            pieces.append((min(others, key=lambda node: (-free[node], node)), rest))
        return pieces


@st.composite
def workloads(draw, largest: int = 12) -> Jobs:
    count = draw(st.integers(1, 40))
    small = st.integers(0, 30)
    submit = sorted(draw(st.lists(small, min_size=count, max_size=count)))
    run = draw(st.lists(st.integers(0, 20), min_size=count, max_size=count))
    slack = draw(st.lists(st.integers(-3, 15), min_size=count, max_size=count))
    gpus = draw(st.lists(st.integers(1, largest), min_size=count, max_size=count))
    priority = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    tenant = draw(st.lists(st.sampled_from("abc"), min_size=count, max_size=count))
    exact = draw(st.booleans())
    estimate = run if exact else [max(0, a + b) for a, b in zip(run, slack, strict=True)]
    return make_jobs(submit, run, gpus, estimate_s=estimate, priority=priority, tenant=tenant)


def _order(jobs: Jobs, policy: str) -> list[int]:
    columns = keys(jobs, policy)
    return sorted(range(len(jobs)), key=lambda job: (*(int(column[job]) for column in columns), job))


@settings(max_examples=150, deadline=None)
@given(
    jobs=workloads(),
    nodes=st.integers(1, 4),
    per_node=st.integers(1, 4),
    policy=st.sampled_from(POLICIES),
    backfill=st.sampled_from(["none", "skip", "easy"]),
    placement=st.sampled_from(["best-fit", "first-fit", "worst-fit"]),
    spread=st.booleans(),
)
def test_every_job_starts_when_and_where_the_obvious_simulation_starts_it(
    jobs, nodes, per_node, policy, backfill, placement, spread
) -> None:
    slow = Obvious(jobs, nodes, per_node, backfill, placement, spread, _order(jobs, policy))
    start, where, _ = slow.run()
    fast = simulate_jobs(jobs, nodes, per_node, policy, backfill=backfill, placement=placement, spread=spread)
    assert fast.start_us.tolist() == start
    assert [sorted(fast.pieces_of(job)) for job in range(len(jobs))] == [sorted(pieces) for pieces in where]


@settings(max_examples=100, deadline=None)
@given(jobs=workloads(), nodes=st.integers(1, 4), per_node=st.integers(1, 4), spread=st.booleans())
def test_easy_starts_the_first_in_line_no_later_than_it_was_first_promised(jobs, nodes, per_node, spread) -> None:
    longest = np.maximum(jobs.estimate_us, jobs.run_us)
    kept = Jobs(jobs.submit_us, jobs.run_us, jobs.gpus, longest, jobs.priority, jobs.tenant, jobs.tenants)
    slow = Obvious(kept, nodes, per_node, "easy", "best-fit", spread, _order(kept, "fifo"))
    _, _, promises = slow.run()
    fast = simulate_jobs(kept, nodes, per_node, "fifo", backfill="easy", spread=spread)
    for job, at in promises:
        assert fast.start_us[job] <= at


@pytest.mark.parametrize(
    "ordering, policy", [(Fifo(), "fifo"), (ByPriority(), "priority"), (Sjf(), "shortest-estimate")]
)
@settings(max_examples=50, deadline=None)
@given(jobs=workloads())
def test_an_ordering_of_the_engine_ranks_as_the_policy_of_the_same_name(ordering, policy, jobs) -> None:
    by_name = simulate_jobs(jobs, 3, 4, policy, backfill="easy")
    by_value = simulate_jobs(jobs, 3, 4, ordering, backfill="easy")
    assert by_value.start_us.tolist() == by_name.start_us.tolist()
    assert by_value.node.tolist() == by_name.node.tolist()


def test_random_placement_depends_on_the_seed_alone() -> None:
    jobs = make_jobs([0] * 30, [10] * 30, [1] * 30)
    first, again, other = (
        simulate_jobs(jobs, 30, 1, placement="random", seed=seed).node.tolist() for seed in (1, 1, 2)
    )
    assert first == again != other
    assert sorted(first) == list(range(30))


def test_a_job_larger_than_the_cluster_is_refused_and_holds_nobody_up() -> None:
    result = simulate_jobs(make_jobs([0, 1, 2], [5, 5, 5], [2, 9, 2]), 2, 4)
    assert result.start_us.tolist() == [0, -1, 2_000_000]
    assert result.end_us.tolist() == [5_000_000, -1, 7_000_000]
    assert result.pieces_of(1) == []
    assert result.figures().ends == {"finished": 2, "rejected": 1, "open": 0}


def test_a_textbook_schedule_under_each_way_of_backfilling() -> None:
    # Four processors. The second job needs all of them and waits for the first; the third would delay it, the fourth would not.
    jobs = make_jobs([0, 1, 2, 3], [10, 5, 20, 4], [2, 4, 1, 2], names=["wide", "head", "long", "short"])
    starts = {
        backfill: (simulate_jobs(jobs, 4, 1, backfill=backfill, spread=True).start_us // 1_000_000).tolist()
        for backfill in ("none", "skip", "easy")
    }
    assert starts == {"none": [0, 10, 15, 15], "skip": [0, 22, 2, 10], "easy": [0, 10, 15, 3]}


def test_no_job_at_all_is_a_run_too() -> None:
    result = simulate_jobs(make_jobs([], [], []), 1, 1)
    assert len(result.start_us) == 0
    assert result.figures().ends["finished"] == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"nodes": 0}, "nodes: must be at least 1, got 0"),
        ({"gpus_per_node": 0}, "gpus_per_node: must be at least 1, got 0"),
        ({"backfill": "magic"}, "backfill: unknown 'magic'; known are none, skip, easy"),
        ({"placement": "magic"}, "placement: unknown 'magic'"),
        ({"policy": "magic"}, "policy: unknown 'magic'; known are fifo"),
        ({"policy": Fair()}, "policy: shares between tenants or ages"),
        ({"policy": Drf()}, "policy: shares between tenants or ages"),
        ({"policy": Srtf()}, "policy: stops running tasks for waiting ones"),
    ],
)
def test_bad_arguments_name_the_field_and_what_is_known(arguments, message) -> None:
    with pytest.raises(WorkloadError, match=message):
        simulate_jobs(make_jobs([0], [1], [1]), **{"nodes": 1, **arguments})


def test_bad_columns_name_the_field_and_the_job() -> None:
    with pytest.raises(WorkloadError, match="gpus: job b has 0, which must be at least 1"):
        make_jobs([0, 1], [1, 1], [1, 0], names=["a", "b"])
    with pytest.raises(WorkloadError, match="run_us: job 0 has -1000000"):
        make_jobs([0], [-1], [1])
    with pytest.raises(WorkloadError, match="gpus: has 1 entries for 2 jobs"):
        make_jobs([0, 1], [1, 1], [1])
    with pytest.raises(WorkloadError, match="entry 1 is not a finite number"):
        make_jobs([0, float("nan")], [1, 1], [1, 1])
    with pytest.raises(WorkloadError, match=r"run_us: job 0 has [0-9]+, which is more than any simulation lasts"):
        make_jobs([0], [1e12], [1])
    columns = [np.asarray(column) for column in ([5, 4], [1, 1], [1, 1], [1, 1], [0, 0], [0, 0])]
    with pytest.raises(WorkloadError, match="submit_us: job 1 has 4, which comes before the one ahead"):
        Jobs(*columns)


def test_tasks_of_the_platform_become_jobs() -> None:
    demand = Demand(gpus=2)
    spec = TaskSpec("r1", "t", "", TaskType.TP, "sleep", demand=demand, members=3, priority=7, declared_us=90)
    jobs = from_workload(Workload("w", (Arrival(5, spec, Truth(work_us=40)),)))
    row = (jobs.submit_us, jobs.run_us, jobs.gpus, jobs.estimate_us, jobs.priority)
    assert [int(column[0]) for column in row] == [5, 40, 6, 90, 7]
    assert (jobs.tenants, jobs.names) == (("t",), ("r1",))
    with pytest.raises(WorkloadError, match="tenant: there is no 'u'; known are t"):
        jobs.of_tenant("u")
    with pytest.raises(WorkloadError, match="task r1 brings no run time"):
        from_workload(Workload("w", (Arrival(5, spec),)))


def test_progress_is_told_and_grows() -> None:
    told: list[float] = []
    count = 6_000
    jobs = make_jobs(range(count), [3] * count, [1] * count)
    result: JobsResult = simulate_jobs(jobs, 2, 8, progress=told.append)
    assert result.events >= 2 * count - 1
    assert told == sorted(told)
    assert 0 < told[-1] <= 1


@settings(max_examples=60, deadline=None)
@given(jobs=workloads(), per_node=st.integers(1, 4), seed=st.integers(0, 3))
def test_gpus_drawn_from_anywhere_are_never_given_twice(jobs, per_node, seed) -> None:
    result, again = (
        simulate_jobs(jobs, 4, per_node, backfill="easy", placement="random", spread=True, seed=seed) for _ in range(2)
    )
    assert [result.pieces_of(job) for job in range(len(jobs))] == [again.pieces_of(job) for job in range(len(jobs))]
    for at in np.unique(result.start_us[result.start_us >= 0]):
        held = [0] * 4
        for job in np.flatnonzero((result.start_us <= at) & (result.end_us > at) & (result.start_us >= 0)):
            assert sum(gpus for _, gpus in result.pieces_of(job)) == jobs.gpus[job]
            for node, gpus in result.pieces_of(job):
                held[node] += gpus
        assert max(held) <= per_node
