"""The planner's own fold: by hand where it can be, and beside the simulator's metrics where it cannot."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine.commands import Command, CreatePod, Notify, StartTask
from engine.events import Event, NodeLost, PodStarted, TaskFailed, TaskFinished, TaskStarted, TaskSubmitted
from engine.resources import Demand, GpuGrant
from engine.tasks import SECOND, URGENT_PRIORITY, FailureCause, TaskSpec, TaskState, TaskType
from sim.planner import resampling
from sim.planner.figures import Recorder
from sim.simulate import SimulationConfig, simulate

DEMAND = Demand(gpus=1)
HOUR = 3600 * SECOND


def task(req_no: str, priority: int = 0) -> TaskSpec:
    return TaskSpec(
        req_no, tenant="t", group="", task_type=TaskType.GC, method="m", model="x", priority=priority, demand=DEMAND
    )


def pod(number: int, share: int = 1000) -> CreatePod:
    return CreatePod(number, "node", "m", "x", (GpuGrant("gpu", share, 0),), DEMAND)


def fold(recorder: Recorder, *steps: tuple[int, list[Event], list[Command]]) -> None:
    for at, events, commands in steps:
        recorder(at, events, commands)


def test_waiting_completion_and_slowdown_are_those_of_the_journal() -> None:
    recorder = Recorder(2)
    fold(
        recorder,
        (0, [TaskSubmitted(task("a")), TaskSubmitted(task("b", URGENT_PRIORITY))], [pod(1)]),
        (2 * SECOND, [PodStarted(1)], [StartTask("a", 1, 1, "node")]),
        (3 * SECOND, [TaskStarted("a", 1)], []),
        (13 * SECOND, [TaskFinished("a", 1, run_us=10 * SECOND)], [Notify("a", TaskState.FINISHED)]),
        (13 * SECOND, [], [StartTask("b", 1, 1, "node")]),
        (14 * SECOND, [TaskStarted("b", 1)], []),
        (19 * SECOND, [TaskFinished("b", 1, run_us=5 * SECOND)], [Notify("b", TaskState.FINISHED)]),
    )
    classes = recorder.figures()["classes"]
    assert classes["all"]["wait"]["mean"] == pytest.approx((3 + 14) / 2)
    assert classes["all"]["wait"]["p50"] == 3.0
    assert classes["all"]["wait"]["p99"] == 14.0
    assert classes["urgent"]["completion"]["p50"] == 19.0
    assert classes["urgent"]["slowdown"]["p50"] == pytest.approx(19 / 5)
    assert {name: classes[name]["count"] for name in classes} == {
        "all": 2,
        "urgent": 1,
        "ordinary": 1,
        "type GC": 2,
        "tenant t": 2,
    }


def test_who_is_never_served_has_waited_for_ever_and_who_left_or_failed_by_itself_does_not_count() -> None:
    recorder = Recorder(1)
    submitted: list[Event] = [TaskSubmitted(task(name)) for name in ("done", "refused", "left", "own fault", "crashed")]
    fold(recorder, (0, submitted, [pod(1)]), (0, [PodStarted(1)], []))
    fold(recorder, (1, [], [Notify("refused", TaskState.REJECTED), Notify("left", TaskState.CANCELLED)]))
    for name in ("done", "own fault", "crashed"):
        fold(recorder, (2, [], [StartTask(name, 1, 1, "node")]), (SECOND, [TaskStarted(name, 1)], []))
    fold(
        recorder,
        (2 * SECOND, [TaskFinished("done", 1, run_us=SECOND)], [Notify("done", TaskState.FINISHED)]),
        (2 * SECOND, [TaskFailed("own fault", 1, FailureCause.BAD_INPUT)], [Notify("own fault", TaskState.DEAD)]),
        (2 * SECOND, [TaskFailed("crashed", 1, FailureCause.CRASHED)], [Notify("crashed", TaskState.DEAD)]),
    )
    figures = recorder.figures()
    spread = figures["classes"]["all"]
    assert spread["count"] == 5
    assert spread["wait"]["p50"] == 1.0  # of done, refused, own fault, crashed: three started after a second
    assert math.isinf(spread["wait"]["p99"])
    assert spread["completion"]["p50"] == math.inf  # of done, refused, crashed
    assert figures["lost"] == 2


def test_gpu_time_is_split_into_running_and_loading_by_hour_of_day() -> None:
    recorder = Recorder(2, clock=(22.0, 1.0))
    fold(
        recorder,
        (0, [TaskSubmitted(task("a"))], [pod(1)]),
        (HOUR // 2, [PodStarted(1)], [StartTask("a", 1, 1, "node")]),
        (HOUR // 2, [TaskStarted("a", 1)], []),
        (2 * HOUR, [TaskFinished("a", 1, run_us=HOUR), TaskSubmitted(task("b"))], [Notify("a", TaskState.FINISHED)]),
    )
    figures = recorder.figures()
    by_hour = {row["hour"]: row for row in figures["hours"]}
    assert by_hour[22.0]["loading"] == pytest.approx(0.25)
    assert by_hour[22.0]["busy"] == pytest.approx(0.25)
    assert by_hour[23.0]["busy"] == pytest.approx(0.5)
    assert figures["busy"] == pytest.approx(1.5 / 4)
    assert figures["loading"] == pytest.approx(0.5 / 4)


def test_a_lost_node_ends_the_gpu_time_of_its_pods() -> None:
    recorder = Recorder(1)
    fold(
        recorder,
        (0, [TaskSubmitted(task("a"))], [pod(1), StartTask("a", 1, 1, "node")]),
        (0, [PodStarted(1), TaskStarted("a", 1)], []),
        (HOUR, [NodeLost("node")], []),
        (2 * HOUR, [TaskSubmitted(task("b"))], []),
    )
    assert recorder.figures()["busy"] == pytest.approx(0.5)


def test_the_planners_figures_agree_with_the_simulators_metrics() -> None:
    config = SimulationConfig(synthetic_tasks=400, rate_scale=30, forecaster="none", pools=(("a100", 10), ("h100", 3)))
    recorder = Recorder(13)
    summary = simulate(config, journal=recorder).summary
    classes = recorder.figures()["classes"]
    for mine, theirs in (("all", "all"), ("urgent", "priority urgent"), ("tenant tenant-1", "tenant tenant-1")):
        assert classes[mine]["count"] == summary.waiting[theirs].count
        assert classes[mine]["wait"]["mean"] == pytest.approx(summary.waiting[theirs].mean)
        assert classes[mine]["wait"]["p90"] == pytest.approx(summary.waiting[theirs].p90, rel=0.1, abs=0.01)
        assert classes[mine]["completion"]["mean"] == pytest.approx(summary.completion[theirs].mean)


def test_the_standard_error_of_a_mean_of_independent_values_is_the_textbooks() -> None:
    source = np.random.default_rng(7)
    at, values = np.sort(source.uniform(0, 100 * 3600, 20_000)), source.exponential(10.0, 20_000)
    blocks, count = resampling.blocks_of(at)
    assert count == 100
    order = np.argsort(values)
    errors = resampling.standard_errors(values[order], blocks[order], resampling.draws(count), (0.5, 0.99))
    assert errors is not None
    assert errors[0] == pytest.approx(10.0 / math.sqrt(20_000), rel=0.4)
    assert errors[2] > errors[0]


def test_values_that_share_an_hour_have_a_larger_error_than_values_that_do_not() -> None:
    source = np.random.default_rng(8)
    at = np.sort(source.uniform(0, 100 * 3600, 5_000))
    blocks, count = resampling.blocks_of(at)
    by_hour = source.exponential(10.0, count)[blocks]
    apart = source.permutation(by_hour)
    drawn = resampling.draws(count)
    found = []
    for values in (by_hour, apart):
        order = np.argsort(values)
        errors = resampling.standard_errors(values[order], blocks[order], drawn, ())
        assert errors is not None
        found.append(errors[0])
    assert found[0] > 3 * found[1]


def test_a_value_without_end_has_no_standard_error() -> None:
    blocks, count = resampling.blocks_of(np.array([0.0, 10.0, 20.0]))
    assert resampling.standard_errors(np.array([1.0, 2.0, np.inf]), blocks, resampling.draws(count), (0.5,)) is None
