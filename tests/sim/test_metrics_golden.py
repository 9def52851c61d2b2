"""The metrics against a short journal worked out by hand."""

from __future__ import annotations

import pytest

from engine.commands import CreatePod, DeletePod, Notify, StartTask
from engine.events import (
    NodeJoined,
    PodStarted,
    PodStopped,
    TaskFailed,
    TaskFinished,
    TaskStarted,
    TaskSubmitted,
    TenantConfigured,
)
from engine.resources import Demand, GpuGrant, GpuSpec, NodeSpec
from engine.tasks import SECOND, Estimate, FailureCause, Quantiles, TaskSpec, TaskState, TaskType
from sim.metrics import Metrics

HALF = Demand(gpus=1, gpu_share=500)
WHOLE = Demand(gpus=1, gpu_share=1000)


def task(req_no: str, tenant: str, priority: int = 0, demand: Demand = WHOLE) -> TaskSpec:
    return TaskSpec(req_no, tenant, "", TaskType.GC, "sleep", "m", priority, demand)


def estimate(p50: int, p90: int, p99: int) -> Estimate:
    return Estimate((("*", Quantiles(p50 * SECOND, p50 * SECOND, p90 * SECOND, p99 * SECOND)),))


@pytest.fixture
def metrics() -> Metrics:
    """One node with two GPUs, two tasks of two tenants, an urgent one that fails once.

    0 s   node joins; `one` (tenant a) and `two` (tenant b, urgent) enter; Pod 1 is created on half of GPU 0
    10 s  Pod 1 is up; `one` is started there
    20 s  Pod 2 is created on the whole of GPU 1
    30 s  Pod 2 is up, `two` starts; 40 s `two` fails, is started again at once
    50 s  `one` finishes (40 s of run time); 60 s `two` finishes; 100 s Pod 1 is gone
    """
    fold = Metrics()
    gpus = (GpuSpec("g0", "a100", 1), GpuSpec("g1", "a100", 1))
    one, two = task("one", "a", demand=HALF), task("two", "b", 100)

    def at(seconds, events, commands=()):
        fold(seconds * SECOND, events, commands)

    at(
        0,
        [
            NodeJoined(NodeSpec("n", gpus)),
            TenantConfigured("a", 2),
            TaskSubmitted(one, estimate(35, 50, 60)),
            TaskSubmitted(two, estimate(19, 20, 21)),
        ],
        [CreatePod(1, "n", "sleep", "m", (GpuGrant("g0", 500, 1),), HALF), Notify("one", TaskState.BOUND)],
    )
    at(10, [PodStarted(1)], [StartTask("one", 1, 1, "n")])
    at(10, [TaskStarted("one", 1)])
    at(20, [], [CreatePod(2, "n", "sleep", "m", (GpuGrant("g1", 1000, 1),), WHOLE)])
    at(30, [PodStarted(2)], [StartTask("two", 1, 2, "n")])
    at(30, [TaskStarted("two", 1)])
    at(40, [TaskFailed("two", 1, FailureCause.CRASHED)], [StartTask("two", 2, 2, "n")])
    at(40, [TaskStarted("two", 2), TaskFailed("two", 1, FailureCause.CRASHED)])
    at(50, [TaskFinished("one", 1, run_us=40 * SECOND)], [Notify("one", TaskState.FINISHED)])
    at(60, [TaskFinished("two", 2, run_us=20 * SECOND)], [Notify("two", TaskState.FINISHED), DeletePod(1, "idle")])
    at(100, [PodStopped(1)])
    return fold


def test_waiting_and_completion_are_the_hand_computed_ones(metrics):
    summary = metrics.summary()
    assert summary.waiting["all"].count == 2
    assert summary.waiting["all"].mean == 20.0
    assert summary.waiting["priority urgent"].max == 30.0
    assert summary.completion["tenant a"].max == 50.0
    assert summary.completion["tenant b"].max == 60.0
    assert summary.makespan_s == 60.0


def test_gpu_use_is_the_hand_computed_one(metrics):
    gpu = metrics.summary().gpu
    assert gpu["capacity_hours"] * 3600 == pytest.approx(200)
    assert gpu["allocated_hours"] * 3600 == pytest.approx(0.5 * 100 + 80)
    assert gpu["busy_hours"] * 3600 == pytest.approx(0.5 * 40 + 30)


def test_half_a_free_gpu_is_lost_to_whole_gpu_tasks_only(metrics):
    # Free: GPU 0 has half of it free while Pod 1 lives (100 s); half of all tasks want a whole GPU, so half of that half is lost.
    gpu = metrics.summary().gpu
    free = 200 - 130
    assert gpu["fragmented"] == pytest.approx(0.5 * 100 / 2 / free)


def test_attempts_failures_and_loads_are_counted(metrics):
    summary = metrics.summary()
    assert summary.counts["attempts"] == 3
    assert summary.counts["restarts"] == 1
    assert summary.counts["warm_starts"] == 1
    assert summary.failures == {"crashed": 1}
    assert summary.stops == {"pod: idle": 1}
    assert summary.loads["first on node"].max == 10.0
    assert summary.loads["again on node"].max == 10.0
    assert summary.ends["finished"] == 2
    assert summary.ends["open"] == 0


def test_fairness_counts_service_by_weight_while_two_tenants_wait(metrics):
    # Both wait from 0 to 10 s only, and nobody is served then.
    fairness = metrics.summary().fairness
    assert fairness["contended_hours"] * 3600 == pytest.approx(10)
    assert fairness["jain"] == 1.0
    hours = metrics.summary().tenant_gpu_hours
    assert hours["a"] * 3600 == pytest.approx(20)
    assert hours["b"] * 3600 == pytest.approx(30)


def test_coverage_counts_run_times_within_their_quantiles(metrics):
    coverage = metrics.summary().coverage
    assert coverage["count"] == 2
    assert coverage["within_p50"] == 0.0
    assert coverage["within_p90"] == 1.0
    assert coverage["mean_error_s"] == pytest.approx((5 + 1) / 2)


def test_the_queue_over_time_is_the_hand_computed_one(metrics):
    series = metrics.summary().series["queue"]
    # two wait for 10 s, one for 20 s: 40 task seconds
    assert sum(series.values[:1]) * 60 == pytest.approx(40)


def test_reports_of_old_attempts_change_nothing(metrics):
    before = metrics.summary()
    metrics(100 * SECOND, [TaskFinished("one", 1, run_us=5), TaskStarted("two", 1), PodStopped(77)], [])
    assert metrics.summary().to_json() == before.to_json()


def test_a_lost_node_takes_its_work_out_of_the_figures():
    from engine.events import NodeLost

    fold = Metrics()
    fold(
        0,
        [NodeJoined(NodeSpec("n", (GpuSpec("g0", "a100", 1),))), TaskSubmitted(task("one", "a"))],
        [CreatePod(1, "n", "sleep", "m", (GpuGrant("g0", 1000, 1),), WHOLE)],
    )
    fold(SECOND, [PodStarted(1)], [StartTask("one", 1, 1, "n")])
    fold(SECOND, [TaskStarted("one", 1)], [])
    fold(3 * SECOND, [NodeLost("n")], [Notify("one", TaskState.BACKOFF)])
    fold(10 * SECOND, [], [])
    summary = fold.summary()
    assert summary.failures == {"node_lost": 1}
    assert summary.gpu["busy_hours"] * 3600 == pytest.approx(2)
    assert summary.gpu["capacity_hours"] * 3600 == pytest.approx(3)
    assert fold.queue.value == 1
