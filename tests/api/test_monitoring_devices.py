"""What the detector makes of GPUs that misbehave and of attempts that fail by them."""

from __future__ import annotations

from typing import Any

import pytest

from api.monitoring.abnormal import AbnormalityDetector, GpuSeen
from api.monitoring.fold import JobsFold, cause_in
from api.monitoring.metrics import Metrics
from api.monitoring.watch import gpus_seen
from api.ports import JobEvent, JobView
from engine.tasks import FailureCause

SECOND = 1_000_000


def _event(state: str, detail: str, at: float = 100.0, req_no: str = "r") -> JobEvent:
    view = JobView(
        req_no=req_no,
        tenant="acme",
        group="",
        task_type="GC",
        method="draw",
        model="m",
        priority=0,
        state=state,
        submitted_at=1.0,
        parameters={},
        detail=detail,
    )
    return JobEvent(event_id=1, kind="state", at=at, view=view)


def test_a_gpu_that_the_scheduler_gave_up_is_an_alert_with_the_remedy() -> None:
    detector = AbnormalityDetector()
    [alert] = detector.look(5 * SECOND, gpus=[GpuSeen("n1", "gpu-a", cordoned=True), GpuSeen("n1", "gpu-b")])
    assert (alert.kind, alert.subject, alert.severity) == ("gpu_cordoned", "n1/gpu-a", "critical")
    assert "aigc nodes uncordon n1 --gpu gpu-a" in alert.message
    [later] = detector.look(9 * SECOND, gpus=[GpuSeen("n1", "gpu-a", cordoned=True)])
    assert later.since == alert.since
    assert detector.look(10 * SECOND, gpus=[GpuSeen("n1", "gpu-a")]) == ()


def test_an_ill_gpu_is_an_alert_until_it_is_well() -> None:
    detector = AbnormalityDetector()
    [alert] = detector.look(1, gpus=[GpuSeen("n1", "gpu-a", healthy=False)])
    assert (alert.kind, alert.subject) == ("gpu_ill", "n1/gpu-a")
    assert detector.look(2, gpus=[GpuSeen("n1", "gpu-a")]) == ()


@pytest.mark.parametrize(
    "cause", [FailureCause.HUNG, FailureCause.NOT_FINITE, FailureCause.GPU_LOST, FailureCause.OUT_OF_MEMORY]
)
def test_some_failures_of_one_cause_within_minutes_are_an_alert(cause: FailureCause) -> None:
    detector = AbnormalityDetector()
    for second in (10, 20):
        detector.ended(second * SECOND, "draw", failed=True, cause=cause)
    assert detector.look(30 * SECOND) == ()
    detector.ended(40 * SECOND, "train", failed=True, cause=cause)
    [alert] = detector.look(50 * SECOND)
    assert (alert.kind, alert.subject, alert.since, alert.value) == ("device_failures", cause.value, 40 * SECOND, 3.0)
    assert f"3 attempts of draw, train ended {cause.value} in the last 5 min" in alert.message
    assert detector.look(400 * SECOND) == ()


def test_failures_of_other_causes_are_left_to_the_rate() -> None:
    detector = AbnormalityDetector()
    for second in range(5):
        detector.ended(second, "draw", failed=True, cause=FailureCause.BAD_INPUT)
        detector.ended(second, "draw", failed=True)
    assert [alert.kind for alert in detector.look(10)] == ["failure_rate"]


@pytest.mark.parametrize(
    ("detail", "cause"),
    [
        ("hung: no step for 300 s", FailureCause.HUNG),
        ("in the last of 3 attempts: not_finite: the latents hold", FailureCause.NOT_FINITE),
        ("gpu_lost", FailureCause.GPU_LOST),
        ("the picture was crashed: into", None),
        ("", None),
    ],
)
def test_the_cause_is_read_from_what_the_scheduler_says(detail: str, cause: FailureCause | None) -> None:
    assert cause_in(detail) is cause


def test_failed_attempts_are_counted_by_cause() -> None:
    metrics = Metrics()
    detector = AbnormalityDetector()
    fold = JobsFold(metrics, detector, started_at_s=0.0)
    fold.fold(_event("backoff", "hung: no step"))
    fold.fold(_event("backoff", "hung: no step", 101.0))
    fold.fold(_event("dead", "in the last of 3 attempts: hung: no step", 102.0))
    fold.fold(_event("backoff", "", 103.0, "other"))

    def counted(cause: str) -> Any:
        return metrics.registry.get_sample_value("aigc_jobs_failed_attempts_total", {"method": "draw", "cause": cause})

    assert (counted("hung"), counted("unknown")) == (3.0, 1.0)
    assert [alert.subject for alert in detector.look(104 * SECOND) if alert.kind == "device_failures"] == ["hung"]


def test_gpus_are_seen_as_ss_shows_them_but_not_those_of_lost_nodes() -> None:
    gpus = [{"uuid": "a", "healthy": True, "present": False}, {"uuid": "b", "faulty": True}]
    nodes = [{"name": "n1", "state": "up", "gpus": gpus}, {"name": "n2", "state": "down", "gpus": gpus}]
    assert gpus_seen(nodes) == [GpuSeen("n1", "a", healthy=False), GpuSeen("n1", "b", cordoned=True)]
