"""The forecasters before the journal: what they stamp, what they learn from, what they forget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from engine.commands import Command, CreatePod, Notify, StartTask
from engine.events import (
    Event,
    NodeJoined,
    TaskCancelRequested,
    TaskEstimated,
    TaskFailed,
    TaskFinished,
    TaskStarted,
    TaskStopped,
    TaskSubmitted,
)
from engine.resources import Demand, GpuGrant, GpuSpec, NodeSpec
from engine.tasks import SECOND, Estimate, FailureCause, Micros, Quantiles, TaskSpec, TaskState, TaskType
from predictors import DeclaredForecaster, NoisyForecaster, OnlineForecaster, OracleForecaster


def task(req_no: str, **fields: object) -> TaskSpec:
    spec = TaskSpec(req_no=req_no, tenant="t", group="", task_type=TaskType.GC, method="text_to_image", model="sd")
    return replace(spec, **fields)


def node(name: str, model: str) -> NodeJoined:
    return NodeJoined(NodeSpec(name, gpus=(GpuSpec(f"{name}-0", model, 2**34),)))


def submitted(forecaster: object, now: Micros, spec: TaskSpec) -> Estimate:
    event, *_ = forecaster.stamp(now, [TaskSubmitted(spec)])  # type: ignore[attr-defined]
    assert isinstance(event, TaskSubmitted)
    assert event.estimate is not None
    return event.estimate


def run(forecaster: OnlineForecaster, now: Micros, spec: TaskSpec, run_us: Micros, peak: int = 0) -> None:
    forecaster.stamp(now, [TaskSubmitted(spec)])
    forecaster.stamp(now + SECOND, [TaskStarted(spec.req_no, 1)])
    forecaster.stamp(now + SECOND + run_us, [TaskFinished(spec.req_no, 1, run_us=run_us, peak_gpu_memory_bytes=peak)])


def estimates(events: Sequence[Event]) -> list[TaskEstimated]:
    return [event for event in events if isinstance(event, TaskEstimated)]


def test_a_submitted_task_is_stamped_for_every_gpu_model_of_the_cluster() -> None:
    forecaster = OnlineForecaster()
    forecaster.stamp(0, [node("a", "t4"), node("b", "a100")])
    estimate = submitted(forecaster, 0, task("1"))
    assert [model for model, _ in estimate.durations] == ["*", "a100", "t4"]
    assert estimate.failure_ppm > 0


def test_it_learns_when_a_task_has_finished_and_not_before() -> None:
    forecaster = OnlineForecaster()
    first = submitted(forecaster, 0, task("1"))
    forecaster.stamp(SECOND, [TaskStarted("1", 1)])
    assert submitted(forecaster, 2 * SECOND, task("2")).durations == first.durations
    forecaster.stamp(91 * SECOND, [TaskFinished("1", 1)])
    assert submitted(forecaster, 92 * SECOND, task("3")).duration().p50 > 5 * first.duration().p50


def test_the_executor_s_own_run_time_goes_before_the_time_between_reports() -> None:
    told, timed = OnlineForecaster(), OnlineForecaster()
    for forecaster, run_us in ((told, 2 * SECOND), (timed, 0)):
        forecaster.stamp(0, [TaskSubmitted(task("1"))])
        forecaster.stamp(0, [TaskStarted("1", 1)])
        forecaster.stamp(50 * SECOND, [TaskFinished("1", 1, run_us=run_us)])
    at = 60 * SECOND
    assert submitted(told, at, task("2")).duration().p50 < 5 * SECOND < submitted(timed, at, task("2")).duration().p50


def test_an_estimate_that_is_there_already_stays() -> None:
    given = Estimate((("*", Quantiles(1, 2, 3, 4)),))
    (event,) = OnlineForecaster().stamp(0, [TaskSubmitted(task("1"), given)])
    assert event == TaskSubmitted(task("1"), given)


def test_reports_of_old_attempts_and_unknown_tasks_teach_nothing() -> None:
    forecaster, untouched = OnlineForecaster(), OnlineForecaster()
    for one in (forecaster, untouched):
        one.stamp(0, [TaskSubmitted(task("1"))])
        one.stamp(0, [TaskStarted("1", 2)])
    forecaster.stamp(
        90 * SECOND, [TaskFinished("1", 1), TaskFinished("nobody", 1), TaskFailed("1", 1, FailureCause.CRASHED)]
    )
    at = 100 * SECOND
    assert submitted(forecaster, at, task("2")) == submitted(untouched, at, task("2"))


def test_the_same_events_give_the_same_stamps() -> None:
    def all_stamps() -> list[Event]:
        forecaster, stamps = OnlineForecaster(), list[Event]()
        for i in range(60):
            spec = task(str(i), model=f"m{i % 3}", features=(("steps", 20 + i % 5), ("user", f"u{i % 7}")))
            stamps += forecaster.stamp(i * 30 * SECOND, [TaskSubmitted(spec)])
            stamps += forecaster.stamp(i * 30 * SECOND, [TaskStarted(spec.req_no, 1)])
            stamps += forecaster.stamp((i * 30 + 5 + i % 4) * SECOND, [TaskFinished(spec.req_no, 1)])
        return stamps

    assert all_stamps() == all_stamps()


def test_a_task_that_outlives_its_p90_is_estimated_again_but_not_for_ever() -> None:
    forecaster = OnlineForecaster()
    for i in range(80):
        run(forecaster, i * 20 * SECOND, task(f"done-{i}"), 10 * SECOND + i % 7 * SECOND // 5)
    now = 2000 * SECOND
    first = submitted(forecaster, now, task("long")).duration()
    forecaster.stamp(now, [TaskStarted("long", 1)])
    assert estimates(forecaster.stamp(now + first.p90 - 1, [])) == []
    (again,) = estimates(forecaster.stamp(now + first.p90 + 1, []))
    assert again.req_no == "long"
    assert again.estimate.duration().p50 > first.p90
    later = [one for i in range(1, 200) for one in estimates(forecaster.stamp(now + first.p90 + i * 60 * SECOND, []))]
    assert 1 <= len(later) <= 3
    medians = [one.estimate.duration().p50 for one in (again, *later)]
    assert medians == sorted(medians)


def test_running_out_of_memory_is_answered_with_a_larger_estimate() -> None:
    forecaster = OnlineForecaster()
    forecaster.stamp(0, [TaskSubmitted(task("1", demand=Demand(gpu_memory_bytes=4 * 2**30)))])
    forecaster.stamp(0, [TaskStarted("1", 1)])
    events = forecaster.stamp(SECOND, [TaskFailed("1", 1, FailureCause.OUT_OF_MEMORY)])
    (again,) = estimates(events)
    assert again.estimate.gpu_memory_bytes == pytest.approx(4.8 * 2**30, rel=0.001)
    forecaster.stamp(SECOND, [TaskStarted("1", 2)])
    (again,) = estimates(forecaster.stamp(SECOND, [TaskFailed("1", 2, FailureCause.OUT_OF_MEMORY)]))
    assert again.estimate.gpu_memory_bytes == pytest.approx(1.2 * 4.8 * 2**30, rel=0.001)


def test_a_measured_peak_becomes_the_estimate_of_the_next() -> None:
    forecaster = OnlineForecaster()
    assert submitted(forecaster, 0, task("0")).gpu_memory_bytes == 0
    run(forecaster, 0, task("1"), SECOND, peak=3 * 2**30)
    assert 3 * 2**30 <= submitted(forecaster, 10 * SECOND, task("2")).gpu_memory_bytes < 4 * 2**30


def test_a_preempted_task_that_keeps_its_checkpoint_counts_as_one_run() -> None:
    kept, lost = OnlineForecaster(), OnlineForecaster()
    for forecaster, checkpoint in ((kept, "c"), (lost, "")):
        forecaster.stamp(0, [TaskSubmitted(task("1"))])
        forecaster.stamp(0, [TaskStarted("1", 1)])
        forecaster.stamp(60 * SECOND, [TaskStopped("1", 1, checkpoint=checkpoint)])
        forecaster.stamp(70 * SECOND, [TaskStarted("1", 2)])
        forecaster.stamp(80 * SECOND, [TaskFinished("1", 2, run_us=10 * SECOND)])
    at = 90 * SECOND
    ratio = submitted(kept, at, task("2")).duration().p50 / submitted(lost, at, task("2")).duration().p50
    assert ratio == pytest.approx(7 ** (1 / 1.25), rel=0.25)


def test_commands_tell_on_which_gpu_model_a_task_ran() -> None:
    forecaster, journaled = OnlineForecaster(), []
    journal = forecaster.watching(lambda now, events, commands: journaled.append(now))
    forecaster.stamp(0, [node("slow", "t4"), node("fast", "h100")])
    pods: list[Command] = [
        CreatePod(1, "slow", "text_to_image", "sd", (GpuGrant("slow-0", 1000, 0),), Demand()),
        CreatePod(2, "fast", "text_to_image", "sd", (GpuGrant("fast-0", 1000, 0),), Demand()),
    ]
    journal(0, [], pods)
    for i in range(200):
        now, pod = i * 20 * SECOND, 1 + i % 2
        forecaster.stamp(now, [TaskSubmitted(task(str(i)))])
        journal(now, [], [StartTask(str(i), 1, pod, "slow" if pod == 1 else "fast")])
        forecaster.stamp(now, [TaskStarted(str(i), 1)])
        forecaster.stamp(now + SECOND, [TaskFinished(str(i), 1, run_us=8 * SECOND if pod == 1 else 2 * SECOND)])
    estimate = submitted(forecaster, 5000 * SECOND, task("next"))
    assert estimate.duration("t4").p50 / estimate.duration("h100").p50 == pytest.approx(4.0, rel=0.1)
    assert len(journaled) == 201


def test_it_forgets_tasks_that_are_over_however_they_ended() -> None:
    forecaster = OnlineForecaster()
    forecaster.stamp(0, [TaskSubmitted(task(str(i), max_attempts=1)) for i in range(5)])
    forecaster.stamp(0, [TaskStarted(str(i), 1) for i in range(3)])
    forecaster.stamp(SECOND, [TaskFinished("0", 1), TaskFailed("1", 1, FailureCause.CRASHED), TaskCancelRequested("2")])
    forecaster.stamp(SECOND, [TaskStopped("2", 1), TaskCancelRequested("3")])
    forecaster.note([Notify("4", TaskState.REJECTED)])
    assert forecaster.tracked == 0


def test_what_it_tracks_is_bounded() -> None:
    forecaster = OnlineForecaster(max_tracked=10)
    for i in range(100):
        forecaster.stamp(i, [TaskSubmitted(task(str(i)))])
        forecaster.stamp(i, [TaskStarted(str(i), 1)])
    assert forecaster.tracked == 10


def test_a_gang_is_learned_once_when_all_its_members_have_finished() -> None:
    forecaster = OnlineForecaster()
    forecaster.stamp(0, [TaskSubmitted(task("1", members=2))])
    forecaster.stamp(0, [TaskStarted("1", 1, rank=0), TaskStarted("1", 1, rank=1)])
    forecaster.stamp(5 * SECOND, [TaskFinished("1", 1, rank=0)])
    assert forecaster.tracked == 1
    forecaster.stamp(60 * SECOND, [TaskFinished("1", 1, rank=1)])
    assert forecaster.tracked == 0
    assert submitted(forecaster, 61 * SECOND, task("2")).duration().p50 > 30 * SECOND


def test_nonsense_in_the_features_does_not_stop_the_scheduler() -> None:
    estimate = submitted(OnlineForecaster(), 0, task("1", features=(("steps", "many"),)))
    assert estimate.duration().p50 > 0


def test_declared_run_times_are_taken_for_the_truth() -> None:
    estimate = submitted(DeclaredForecaster(default_us=7), 0, task("1", declared_us=5))
    assert estimate.duration("any") == Quantiles(5, 5, 5, 5)
    assert submitted(DeclaredForecaster(default_us=7), 0, task("2")).duration().p90 == 7


def test_the_oracle_knows_the_truth_on_every_gpu_model_and_names_the_task_it_does_not_know() -> None:
    oracle = OracleForecaster({"1": 100}, {"h100": 0.5})
    estimate = submitted(oracle, 0, task("1"))
    assert (estimate.duration("h100").p50, estimate.duration("t4").p99) == (50, 100)
    with pytest.raises(KeyError, match="'2'"):
        oracle.stamp(0, [TaskSubmitted(task("2"))])


def test_noise_has_the_size_it_is_given_and_depends_on_seed_and_task_alone() -> None:
    truth = {str(i): 10 * SECOND for i in range(2000)}
    noisy = NoisyForecaster(OracleForecaster(truth), sigma=0.3, seed=1)
    stamped = [submitted(noisy, 0, task(req_no)).duration() for req_no in truth]
    errors = [math.log(quantiles.p50 / (10 * SECOND)) for quantiles in stamped]
    assert math.sqrt(sum(e * e for e in errors) / len(errors)) == pytest.approx(0.3, rel=0.06)
    assert sum(q.p90 >= 10 * SECOND for q in stamped) / len(stamped) == pytest.approx(0.9, abs=0.02)
    again = NoisyForecaster(OracleForecaster(truth), sigma=0.3, seed=1)
    assert [submitted(again, 0, task(req_no)).duration() for req_no in reversed(truth)] == stamped[::-1]
    other = NoisyForecaster(OracleForecaster(truth), sigma=0.3, seed=2)
    assert submitted(other, 0, task("7")).duration() != stamped[7]
