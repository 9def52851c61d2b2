"""The detector of abnormal states."""

from __future__ import annotations

import pytest

from api.monitoring.abnormal import AbnormalityDetector, NodeSeen, TaskSeen, Thresholds, lower_bound

SECOND = 1_000_000
MINUTE = 60 * SECOND


def kinds(alerts) -> list[tuple[str, str]]:
    return [(alert.kind, alert.subject) for alert in alerts]


@pytest.mark.parametrize(
    ("state", "patience_s"),
    [
        ("pending", 1800),
        ("backoff", 1800),
        ("queued", 1800),
        ("bound", 300),
        ("starting", 300),
        ("stopping", 300),
        ("running", 600),
    ],
)
def test_a_task_that_stands_still_longer_than_its_state_allows_is_stuck(state: str, patience_s: int) -> None:
    detector = AbnormalityDetector()
    task = [TaskSeen("r1", state, since=0, method="sleep")]
    assert detector.look(patience_s * SECOND, task) == ()
    [alert] = detector.look(patience_s * SECOND + 1, task)
    assert (alert.kind, alert.subject, alert.severity) == ("stuck_task", "r1", "warning")
    assert alert.since == patience_s * SECOND
    assert "r1" in alert.message


def test_a_task_that_is_predicted_to_run_long_is_given_the_time() -> None:
    detector = AbnormalityDetector()
    task = [TaskSeen("r1", "running", since=0, predicted_p99_us=20 * MINUTE)]
    assert detector.look(80 * MINUTE, task) == ()
    assert kinds(detector.look(80 * MINUTE + 1, task)) == [("stuck_task", "r1")]


def test_only_so_many_stuck_tasks_are_listed_the_longest_first() -> None:
    detector = AbnormalityDetector(Thresholds(max_stuck=2))
    tasks = [TaskSeen(f"r{number}", "pending", since=number * MINUTE) for number in range(5)]
    assert {alert.subject for alert in detector.look(300 * MINUTE, tasks)} == {"r0", "r1"}


def test_a_silent_node_alerts_until_it_is_heard_again() -> None:
    detector = AbnormalityDetector()
    assert detector.look(15 * SECOND, nodes=[NodeSeen("n1", 0)]) == ()
    [first] = detector.look(20 * SECOND, nodes=[NodeSeen("n1", 0)])
    [later] = detector.look(60 * SECOND, nodes=[NodeSeen("n1", 0)])
    assert first.since == later.since == 15 * SECOND
    assert later.value == 60
    assert detector.look(60 * SECOND, nodes=[NodeSeen("n1", 60 * SECOND)]) == ()
    assert detector.look(99 * SECOND, nodes=[NodeSeen("n1", 0, expected=False)]) == ()


def test_a_jump_of_the_failure_rate_is_seen_against_what_came_before() -> None:
    detector = AbnormalityDetector()
    for minute in range(60):
        detector.ended(minute * MINUTE, "draw", failed=minute % 20 == 0)
    assert detector.look(60 * MINUTE) == ()
    for number in range(20):
        detector.ended(61 * MINUTE + number * SECOND, "draw", failed=number % 2 == 0)
    [alert] = detector.look(62 * MINUTE)
    assert (alert.kind, alert.subject) == ("failure_rate", "draw")
    assert alert.value == pytest.approx(0.5, abs=0.1)
    assert detector.look(80 * MINUTE) == ()


def test_a_method_that_always_fails_often_does_not_alert_for_ever() -> None:
    detector = AbnormalityDetector()
    for number in range(200):
        detector.ended(number * 10 * SECOND, "flaky", failed=number % 2 == 0)
    assert detector.look(2000 * SECOND) == ()


def test_few_failures_prove_nothing() -> None:
    detector = AbnormalityDetector()
    for number in range(7):
        detector.ended(number, "draw", failed=True)
    assert detector.look(SECOND) == ()
    detector.ended(8, "draw", failed=True)
    assert kinds(detector.look(SECOND)) == [("failure_rate", "draw")]


def test_predictions_that_no_longer_hold_are_noticed_and_forgotten() -> None:
    detector = AbnormalityDetector()
    for number in range(100):
        detector.predicted("draw", exceeded=number % 10 == 0)
    assert detector.look(0) == ()
    for number in range(100):
        detector.predicted("draw", exceeded=number % 2 == 0)
    assert kinds(detector.look(0)) == [("prediction_residuals", "draw")]
    for _ in range(200):
        detector.predicted("draw", exceeded=False)
    assert detector.look(0) == ()


def test_the_worst_comes_first_and_modules_that_are_down_are_named() -> None:
    detector = AbnormalityDetector()
    alerts = detector.look(
        3600 * SECOND, [TaskSeen("r1", "pending", 0)], [NodeSeen("n1", 0)], {"scheduler": False, "disk": True}
    )
    assert kinds(alerts) == [("module_down", "scheduler"), ("silent_node", "n1"), ("stuck_task", "r1")]


def test_memory_is_bounded() -> None:
    detector = AbnormalityDetector(Thresholds(max_tracked=50))
    for number in range(1000):
        detector.ended(number, "draw", failed=False)
    assert len(detector._runs["draw"].ends) == 50


@pytest.mark.parametrize(
    ("hits", "count", "bound"), [(0, 0, 0.0), (0, 10, 0.0), (5, 10, 0.2366), (10, 10, 0.7225), (50, 100, 0.4038)]
)
def test_the_lower_bound_is_wilsons(hits: int, count: int, bound: float) -> None:
    assert lower_bound(hits, count) == pytest.approx(bound, abs=5e-4)
