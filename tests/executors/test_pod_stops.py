"""Stopping what runs in real Pods: between two steps, with or without a checkpoint, by force when the grace is over."""

from __future__ import annotations

import pytest
from pod_bench import SECOND_US, Bench, kinds

from engine.tasks import FailureCause
from executors.ports import (
    AttemptFinished,
    AttemptProgressed,
    AttemptStarted,
    AttemptStopped,
    PodDown,
    PodOrder,
    PodUp,
)


def test_an_attempt_stops_between_two_steps(bench: Bench) -> None:
    bench.up("Stepper")
    bench.host.start(1, "r", 1, {"steps": 100_000, "step_s": 0.005})
    bench.expect(AttemptProgressed)
    bench.host.stop("r", 1, 30 * SECOND_US)
    stopped = bench.expect(AttemptStopped)
    assert (stopped.req_no, stopped.attempt, stopped.checkpoint) == ("r", 1, "")
    assert not any(isinstance(report, AttemptFinished | PodDown) for report in bench.seen)
    assert list(bench.store.files()) == [], "nothing was to be kept"
    bench.host.start(1, "r3", 1, {"steps": 1, "step_s": 0})
    bench.expect(AttemptFinished)


def test_a_kept_checkpoint_is_where_the_next_attempt_goes_on_even_in_another_pod(bench: Bench) -> None:
    bench.up("Stepper")
    bench.host.start(1, "r", 1, {"steps": 100_000, "step_s": 0.005})
    progressed = bench.expect(AttemptProgressed)
    bench.host.stop("r", 1, 30 * SECOND_US, keep_checkpoint=True)
    stopped = bench.expect(AttemptStopped)
    assert bench.store.stat(stopped.checkpoint) is not None
    bench.up("Stepper", pod=2)
    bench.host.start(2, "r", 2, {"steps": progressed.done, "step_s": 0}, checkpoint=stopped.checkpoint)
    assert bench.expect(AttemptFinished).result["metadata"]["began"] >= progressed.done


def test_a_lost_checkpoint_costs_the_work_not_the_task(bench: Bench) -> None:
    bench.up("Stepper")
    bench.host.start(1, "r", 2, {"steps": 1, "step_s": 0}, checkpoint="0" * 64)
    assert bench.expect(AttemptFinished).result["metadata"] == {"began": 0}


def test_an_attempt_that_does_not_stop_is_killed_with_its_pod_after_the_grace(bench: Bench) -> None:
    bench.up("Stubborn")
    bench.host.start(1, "r", 1, {})
    bench.expect(AttemptProgressed)
    bench.host.stop("r", 1, SECOND_US // 10)
    deadline = bench.host.next_deadline_us()
    assert deadline is not None
    assert deadline <= SECOND_US // 10
    down = bench.expect(PodDown)
    assert down.ordered
    assert "did not stop within its grace" in down.detail
    assert kinds(bench.seen)[-2:] == ["AttemptStopped", "PodDown"]


def test_attempts_beyond_the_first_queue_inside_the_pod_and_can_be_stopped_there(bench: Bench) -> None:
    bench.up("Stepper", slots=3)
    bench.host.start(1, "first", 1, {"steps": 100_000, "step_s": 0.005})
    bench.expect(AttemptStarted)
    bench.host.start(1, "second", 1, {"steps": 1, "step_s": 0})
    bench.host.start(1, "third", 1, {"steps": 1, "step_s": 0})
    bench.host.stop("second", 1, 30 * SECOND_US)
    assert bench.expect(AttemptStopped).req_no == "second"
    assert [report.req_no for report in bench.seen if isinstance(report, AttemptStarted)] == ["first"]
    bench.host.stop("first", 1, 30 * SECOND_US)
    assert bench.expect(AttemptFinished).req_no == "third"


def test_a_deleted_pod_stops_its_attempt_and_ends_within_the_grace(bench: Bench) -> None:
    bench.up("Stepper")
    bench.host.start(1, "r", 1, {"steps": 100_000, "step_s": 0.005})
    bench.expect(AttemptProgressed)
    bench.host.delete(1, 30 * SECOND_US)
    down = bench.expect(PodDown)
    assert (down.ordered, down.cause) == (True, FailureCause.POD_LOST)
    assert kinds(bench.seen)[-2:] == ["AttemptStopped", "PodDown"]


@pytest.mark.parametrize("grace_us", [0, SECOND_US // 10])
def test_a_deleted_pod_is_killed_when_the_grace_is_over(bench: Bench, grace_us: int) -> None:
    bench.up("Stubborn")
    bench.host.start(1, "r", 1, {})
    bench.expect(AttemptProgressed)
    bench.host.delete(1, grace_us)
    assert bench.expect(PodDown).ordered


def test_a_pod_can_be_deleted_while_it_loads(bench: Bench) -> None:
    bench.host.create(PodOrder(1, "SlowToLoad"))
    bench.host.delete(1, 0)
    assert bench.expect(PodDown).ordered
    assert not any(isinstance(report, PodUp) for report in bench.seen)
