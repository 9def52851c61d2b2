"""Orderings by time against their definitions: SJF and SRTF, Gittins, Tiresias' LAS, earliest deadline.

SRTF: Schrage, "A Proof of the Optimality of the Shortest Remaining Processing Time Discipline", Operations Research 16(3), 1968.
Gittins index: Gittins, Glazebrook and Weber, "Multi-armed Bandit Allocation Indices", 2011, section 1.4 (job scheduling).
LAS in discrete queues: Gu et al., "Tiresias: A GPU Cluster Manager for Distributed Deep Learning", NSDI 2019, section 3
(two-dimensional attained service, discretised priorities).
"""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest

from engine import events as ev
from engine import profiles
from engine.levels.orderings.by_time import cost_per_end
from engine.resources import Demand
from engine.tasks import SECOND, Estimate, Quantiles, TaskType

PLAIN = """
[ordering]
policy = "{}"
{}
[binding]
warm_reuse = false
[preemption]
reload_s = 0
min_run_s = 0
most_per_task = 100
"""
CLOSE = {"abs": 0.1}
"""A wakeup comes at most a millisecond late, and every exchange may add one."""


def mean_completion(world: Any, came: dict[str, float]) -> float:
    return sum(world.ended[req_no] - at for req_no, at in came.items()) / len(came)


JOBS = {"P1": (0, 8), "P2": (1, 4), "P3": (2, 9), "P4": (3, 5)}
"""(when it comes, how long it runs), on one server."""


def one_server(world: Any, jobs: dict[str, tuple[float, float]] = JOBS) -> float:
    world.node()
    for req_no, (at, runs) in jobs.items():
        world.job(req_no, at, runs)
    return mean_completion(world.run(), {req_no: at for req_no, (at, _) in jobs.items()})


def test_shortest_remaining_time_stops_a_longer_task_and_takes_it_up_where_it_was(clockwork: Any) -> None:
    world = clockwork(PLAIN.format("srtf", ""))
    assert one_server(world) == pytest.approx((17 + 4 + 24 + 7) / 4, **CLOSE)
    assert world.begun["P1"] == [0, pytest.approx(10, **CLOSE)]
    assert world.stops == [(1, "P1")]


def test_shortest_job_first_stops_nobody(clockwork: Any) -> None:
    world = clockwork(PLAIN.format("sjf", ""))
    assert one_server(world) == pytest.approx((8 + 11 + 24 + 14) / 4, **CLOSE)
    assert world.stops == []


def test_no_order_of_whole_jobs_is_better_than_shortest_remaining_time_on_one_server(clockwork: Any) -> None:
    jobs = {"a": (0, 5), "b": (0, 2), "c": (3, 1), "d": (4, 6), "e": (4, 2)}
    best = one_server(clockwork(PLAIN.format("srtf", "")), jobs)
    for order in permutations(jobs):
        clock = total = 0.0
        for req_no in order:
            at, runs = jobs[req_no]
            clock = max(clock, at) + runs
            total += clock - at
        assert best <= total / len(jobs) + 0.01
    assert best < one_server(clockwork(PLAIN.format("fifo", "")), jobs)


def test_an_exchange_that_costs_more_than_it_saves_is_left(clockwork: Any) -> None:
    costly = PLAIN.format("srtf", "").replace("reload_s = 0", "reload_s = 4")
    world = clockwork(costly)
    world.node()
    world.job("long", 0, 10)
    world.job("short", 1, 5.5)
    world.job("tiny", 2, 1)
    world.run()
    assert [who for _, who in world.stops] == ["long"]  # 8 s left - 1 s > 4 s; for `short` it was 9 - 5.5
    assert world.begun["tiny"] == [2]


def test_a_generation_without_checkpoint_counts_the_work_it_would_lose(clockwork: Any) -> None:
    """A GC task loses its work so far: after 6 of 10 s, stopping it for one of 1 s loses 6 and gains 3."""
    world = clockwork(PLAIN.format("srtf", ""))
    world.node()
    world.job("picture", 0, 10, task_type=TaskType.GC)
    world.job("tiny", 6, 1)
    assert world.run().stops == []
    other = clockwork(PLAIN.format("srtf", ""))
    other.node()
    other.job("training", 0, 10, task_type=TaskType.TP)
    other.job("tiny", 6, 1)
    assert [who for _, who in other.run().stops] == ["training"]


def quantiles(p50: int, p90: int, p99: int) -> Estimate:
    return Estimate((("*", Quantiles(p50 * SECOND, p50 * SECOND, p90 * SECOND, p99 * SECOND)),))


def test_the_gittins_index_is_the_best_chance_of_ending_per_time_spent() -> None:
    """By hand: min over d of E[min(S - a, d)] / P(S - a <= d), with half the mass at P50, 40% at P90, 10% at P99."""
    q = Quantiles(0, 10_000, 100_000, 1_000_000)
    assert cost_per_end(q, 0) == 10_000 * 100 // 50  # d = P50 is best: 10 ms spent in all cases, half of them end
    assert cost_per_end(q, 10_000) == 90_000 * 50 // 40
    assert cost_per_end(q, 100_000) == 900_000
    known = Quantiles(7_000, 7_000, 7_000, 7_000)
    assert [cost_per_end(known, ran) for ran in (0, 3_000, 6_999)] == [7_000, 4_000, 1]


def test_gittins_prefers_a_gamble_that_often_ends_soon_and_drops_it_when_it_did_not(clockwork: Any) -> None:
    world = clockwork(PLAIN.format("gittins", "preemptive = true"))
    world.node()
    world.job("first", 0, 1)
    world.job("sure", 0.1, 50, believed=50)
    world.job("gamble", 0.2, 300)
    world.at(0.3, ev.TaskEstimated("gamble", quantiles(10, 100, 1000)))
    world.run()
    assert world.begun["gamble"][0] == pytest.approx(1, **CLOSE)  # 20 s per end against 50 s
    assert world.begun["sure"] == [pytest.approx(11, **CLOSE)]  # the gamble has outlived its median: 112 s per end
    assert world.begun["gamble"][1] == pytest.approx(61, **CLOSE)


def test_las_gives_every_job_its_first_quantum_before_any_gets_its_second(clockwork: Any) -> None:
    """Two GPUs; attained service is GPUs x time, and the queues end at 2, 4 and 6 GPU seconds; the first to start leads there.

    J1 (2 GPUs, 2 s), J2 (1 GPU, 8 s), J3 (2 GPUs, 6 s) come together: each falls a queue when it has had 2 GPU seconds more.
    """
    world = clockwork(PLAIN.format("las", "queues_gpu_s = [2, 4, 6]"))
    world.node(gpus=2)
    world.job("J1", 0, 2, demand=Demand(gpus=2))
    world.job("J2", 0, 8, demand=Demand(gpus=1))
    world.job("J3", 0, 6, demand=Demand(gpus=2))
    world.run()
    assert world.begun == {
        "J1": [0, pytest.approx(4, **CLOSE)],
        "J2": [pytest.approx(t, **CLOSE) for t in (1, 5, 8, 11)],
        "J3": [pytest.approx(t, **CLOSE) for t in (3, 7, 10, 13)],
    }
    assert world.ended == {
        "J1": pytest.approx(5, **CLOSE),
        "J2": pytest.approx(13, **CLOSE),
        "J3": pytest.approx(16, **CLOSE),
    }


def test_las_lets_a_newcomer_in_at_once_when_the_running_job_has_had_its_queue(clockwork: Any) -> None:
    world = clockwork(PLAIN.format("las", "queues_gpu_s = [10]"))
    world.node()
    world.job("old", 0, 100)
    world.job("new", 20, 5)
    world.job("newer", 21, 5)
    world.run()
    assert world.begun["new"] == [pytest.approx(20, **CLOSE)]
    assert world.begun["newer"] == [pytest.approx(25, **CLOSE)]  # the same queue: first come, first served
    assert world.ended["old"] == pytest.approx(110, **CLOSE)


def test_las_wakes_up_when_the_running_job_leaves_its_queue(clockwork: Any) -> None:
    world = clockwork(PLAIN.format("las", "queues_gpu_s = [10]"))
    world.node()
    world.job("old", 0, 100)
    world.job("new", 4, 5)
    world.run()
    assert world.begun["new"] == [pytest.approx(10, **CLOSE)]


def test_a_gang_stops_as_many_as_it_needs_and_no_more(clockwork: Any) -> None:
    world = clockwork(PLAIN.format("las", "queues_gpu_s = [10]"))
    for name in ("n1", "n2", "n3"):
        world.node(name)
    for i in range(3):
        world.job(f"old{i}", i, 100)
    world.job("gang", 50, 5, members=2)
    world.run()
    assert world.begun["gang"] == [pytest.approx(50, **CLOSE)]
    assert sorted(who for _, who in world.stops) == ["old1", "old2"]


def test_a_gang_can_be_stopped_for_one_that_has_had_less(clockwork: Any) -> None:
    world = clockwork(PLAIN.format("las", "queues_gpu_s = [10]"))
    for name in ("n1", "n2"):
        world.node(name)
    world.job("gang", 0, 100, members=2)
    world.job("new", 50, 5)
    world.run()
    assert world.begun["new"] == [pytest.approx(50, **CLOSE)]
    assert world.ended["gang"] == pytest.approx(105, **CLOSE)


def test_no_attempt_is_stopped_before_it_has_run_for_the_least_time(clockwork: Any) -> None:
    world = clockwork(PLAIN.format("srtf", "").replace("min_run_s = 0", "min_run_s = 5"))
    world.node()
    world.job("long", 0, 100)
    world.job("short", 1, 1)
    world.run()
    assert world.begun["short"] == [pytest.approx(5, **CLOSE)]


def test_a_task_that_must_not_be_stopped_is_not(clockwork: Any) -> None:
    world = clockwork(PLAIN.format("srtf", ""))
    world.node()
    world.job("long", 0, 100, preemptible=False)
    world.job("short", 1, 1)
    assert world.run().stops == []


def test_the_earliest_deadline_goes_first_and_those_without_one_last(clockwork: Any) -> None:
    world = clockwork(PLAIN.format("edf", ""))
    world.node()
    world.job("running", 0, 10)
    world.job("none", 1, 1)
    world.job("late", 2, 1, start_deadline=900 * SECOND)
    world.job("soon", 3, 1, start_deadline=100 * SECOND)
    world.run()
    assert [world.begun[r][0] for r in ("soon", "late", "none")] == [10, 11, 12]


def test_expected_time_ranks_by_the_mean_and_shortest_job_by_the_median(clockwork: Any) -> None:
    """a: usually 5 s, sometimes very long; b: always 8 s."""
    for policy, first in (("sept", "b"), ("sjf", "a")):
        world = clockwork(PLAIN.format(policy, ""))
        world.node()
        world.job("running", 0, 10)
        world.job("a", 1, 5)
        world.job("b", 1, 8)
        skewed = Quantiles(30 * SECOND, 5 * SECOND, 90 * SECOND, 200 * SECOND)
        world.at(2, ev.TaskEstimated("a", Estimate((("*", skewed),))))
        world.at(2, ev.TaskEstimated("b", quantiles(8, 8, 8)))
        world.run()
        assert world.begun[first] == [10]


def test_strict_priority_may_stop_tasks_of_lower_priority(clockwork: Any) -> None:
    world = clockwork(PLAIN.format("priority", "preemptive = true"))
    world.node()
    world.job("low", 0, 10, priority=1)
    world.job("same", 1, 10, priority=1)
    world.job("high", 2, 10, priority=2)
    world.run()
    assert world.begun == {"low": [0, 12], "high": [2], "same": [20]}


def test_the_profiles_of_these_policies_load() -> None:
    assert profiles.load("las").ordering.preemptive
    assert profiles.load("srtf").preemptions_per_task == 100
    assert not profiles.load("gittins").in_order
