"""Metrics folded from the scheduler's steps and from SS's job changes; the structured log."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from pathlib import Path

import pytest
import structlog

from api.monitoring.abnormal import AbnormalityDetector
from api.monitoring.fold import JobsFold, MetricsFold
from api.monitoring.logs import FileTail, LogRing, configure_logging
from api.monitoring.metrics import Metrics
from api.monitoring.watch import Watch, flat
from api.ports import JobEvent, JobView, SupportRefused
from engine.commands import Notify, StartTask
from engine.events import TaskFinished, TaskStarted, TaskSubmitted
from engine.tasks import Estimate, Quantiles, TaskSpec, TaskState, TaskType

SECOND = 1_000_000


def value(metrics: Metrics, name: str, /, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def submitted(req_no: str, p90_s: float = 10.0) -> TaskSubmitted:
    quantiles = Quantiles(5 * SECOND, 5 * SECOND, int(p90_s * SECOND), 20 * SECOND)
    spec = TaskSpec(req_no=req_no, tenant="a", group="", task_type=TaskType.GC, method="sleep")
    return TaskSubmitted(spec, Estimate(durations=(("*", quantiles),)))


def test_a_step_is_counted_with_its_events_and_commands_by_kind() -> None:
    metrics = Metrics(process=False)
    fold = MetricsFold(metrics)
    fold.step(
        0, [submitted("r1"), submitted("r2")], [Notify("r1", TaskState.PENDING), StartTask("r1", 1, 1, "n1")], 0.002
    )
    assert value(metrics, "aigc_scheduler_steps_total") == 1
    assert value(metrics, "aigc_scheduler_events_total", kind="TaskSubmitted") == 2
    assert value(metrics, "aigc_scheduler_commands_total", kind="StartTask") == 1
    assert value(metrics, "aigc_scheduler_live_tasks") == 2
    assert value(metrics, "aigc_scheduler_step_duration_seconds_sum") == pytest.approx(0.002)


def test_predictions_are_judged_when_a_run_ends_and_the_task_is_forgotten() -> None:
    metrics, detector = Metrics(process=False), AbnormalityDetector()
    fold = MetricsFold(metrics, detector)
    fold.step(0, [submitted("r1"), submitted("r2")], [])
    fold.step(1, [TaskStarted("r1", 1), TaskFinished("r1", 1, run_us=8 * SECOND)], [Notify("r1", TaskState.FINISHED)])
    fold.step(2, [TaskFinished("r2", 1, run_us=12 * SECOND)], [Notify("r2", TaskState.FINISHED)])
    assert value(metrics, "aigc_predictor_runs_total", method="sleep", held="yes") == 1
    assert value(metrics, "aigc_predictor_runs_total", method="sleep", held="no") == 1
    assert value(metrics, "aigc_predictor_duration_ratio_sum", method="sleep") == pytest.approx(8 / 5 + 12 / 5)
    assert value(metrics, "aigc_scheduler_live_tasks") == 0
    assert fold.summary() == {"sleep": {"held": 1, "exceeded": 1}}
    assert list(detector._runs["sleep"].exceeded) == [False, True]


def test_failed_attempts_and_dead_letters_reach_the_detector() -> None:
    metrics, detector = Metrics(process=False), AbnormalityDetector()
    fold = MetricsFold(metrics, detector)
    fold.step(0, [submitted(f"r{number}") for number in range(8)], [])
    fold.step(1, [], [Notify(f"r{number}", TaskState.BACKOFF, reason="crashed") for number in range(8)])
    assert [alert.kind for alert in detector.look(2)] == ["failure_rate"]
    assert value(metrics, "aigc_scheduler_task_transitions_total", state="backoff", reason="crashed") == 8


def change(number: int, state: str, at: float, **more: object) -> JobEvent:
    fields = {
        "req_no": "r1",
        "tenant": "a",
        "task_type": "GC",
        "method": "sleep",
        "state": state,
        "submitted_at": 100.0,
        **more,
    }
    return JobEvent(event_id=number, kind=state, at=at, view=JobView.model_validate(fields))


def test_the_life_of_a_job_becomes_waiting_and_running_time() -> None:
    metrics = Metrics(process=False)
    fold = JobsFold(metrics, AbnormalityDetector(), started_at_s=50)
    fold.fold(change(1, "pending", 100))
    fold.fold(change(2, "running", 103, started_at=103.0))
    fold.fold(change(3, "running", 104, progress_done=1))
    fold.gauges()
    assert value(metrics, "aigc_jobs_live", state="running") == 1
    fold.fold(change(4, "finished", 110, started_at=103.0, finished_at=110.0))
    fold.gauges()
    assert value(metrics, "aigc_jobs_live", state="running") == 0
    assert value(metrics, "aigc_jobs_wait_seconds_sum", task_type="GC", urgency="ordinary") == 3
    assert value(metrics, "aigc_jobs_wait_seconds_count", task_type="GC", urgency="ordinary") == 1
    assert value(metrics, "aigc_jobs_run_seconds_sum", method="sleep") == 7
    assert value(metrics, "aigc_jobs_ended_total", task_type="GC", method="sleep", state="finished") == 1
    assert fold.live == {}


def test_changes_from_before_this_process_are_not_counted_again() -> None:
    metrics = Metrics(process=False)
    fold = JobsFold(metrics, AbnormalityDetector(), started_at_s=1000)
    fold.fold(change(1, "running", 103))
    assert list(fold.live) == [("a", "r1")]
    fold.fold(change(2, "finished", 110, finished_at=110.0, started_at=103.0))
    assert fold.live == {}
    assert value(metrics, "aigc_jobs_ended_total", task_type="GC", method="sleep", state="finished") is None


class SupportRows:
    """A support service of which only rows are asked."""

    def __init__(self) -> None:
        self.state = "up"
        self.predictions = {"sleep": {"held": 0, "exceeded": 0}}

    async def health(self) -> dict:
        return {"ready": True, "modules": {"scheduler": {"ok": True}}}

    async def nodes(self) -> list[dict]:
        gpu = {
            "uuid": "g0",
            "model": "a100",
            "memory_bytes": 80,
            "memory_free_bytes": 20,
            "share_free": 250,
            "healthy": True,
        }
        return [{"name": "n1", "state": self.state, "gpus": [gpu], "pods": [{"method": "sleep", "state": "idle"}]}]

    async def queue(self) -> dict:
        return {"mq": {"requests": {"ready": 3}}, "predictions": self.predictions}


def test_a_node_that_goes_down_alerts_from_the_time_it_was_last_up() -> None:
    metrics, support, now = Metrics(process=False), SupportRows(), [1000.0]
    watch = Watch(support, metrics, lambda: now[0])
    asyncio.run(watch.refresh())
    assert watch.alerts() == ()
    assert value(metrics, "aigc_gpu_share_free_ratio", node="n1", gpu="g0") == pytest.approx(0.25)
    assert value(metrics, "aigc_pods", method="sleep", state="idle") == 1
    assert value(metrics, "aigc_queue", name="mq.requests.ready") == 3
    support.state = "down"
    now[0] += 10
    asyncio.run(watch.refresh())
    assert watch.alerts() == ()
    now[0] += 10
    asyncio.run(watch.refresh())
    assert [(alert.kind, alert.subject) for alert in watch.alerts()] == [("silent_node", "n1")]
    assert value(metrics, "aigc_alerts", kind="silent_node", severity="critical") == 1
    support.state = "up"
    now[0] += 10
    asyncio.run(watch.refresh())
    assert watch.alerts() == ()
    assert value(metrics, "aigc_alerts", kind="silent_node", severity="critical") is None


def test_the_schedulers_judgement_of_predictions_reaches_the_alerts() -> None:
    support, now = SupportRows(), [1000.0]
    watch = Watch(support, Metrics(process=False), lambda: now[0])
    asyncio.run(watch.refresh())
    support.predictions = {"sleep": {"held": 10, "exceeded": 30}}
    now[0] += 5
    asyncio.run(watch.refresh())
    assert [(alert.kind, alert.subject) for alert in watch.alerts()] == [("prediction_residuals", "sleep")]


def test_a_support_service_that_is_away_is_an_alert_and_not_a_crash() -> None:
    class Away:
        async def health(self):
            raise SupportRefused(503, "support_down", "away")

        nodes = queue = health

    watch = Watch(Away(), Metrics(process=False), lambda: 1000.0)
    asyncio.run(watch.refresh())
    assert [(alert.kind, alert.subject) for alert in watch.alerts()] == [("module_down", "support")]


def test_nested_figures_get_dotted_names() -> None:
    assert flat({"a": {"b": 1, "c": "text"}, "d": True}) == [("a.b", 1.0), ("d", 1.0)]


@pytest.fixture
def restored_logging():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_log_lines_are_json_with_module_and_level_and_hide_credentials(restored_logging: None) -> None:
    out, ring = io.StringIO(), LogRing()
    configure_logging("sm", stream=out, ring=ring, level="info")
    structlog.get_logger().info("task_started", reqNo="r1", authorization="Bearer x", api_key="y")
    structlog.get_logger().debug("not_written")
    logging.getLogger("library").warning("from %s", "a library")
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["task_started", "from a library"]
    assert lines[0]["reqNo"] == "r1"
    assert (lines[0]["module"], lines[0]["level"]) == ("sm", "info")
    assert lines[0]["authorization"] == lines[0]["api_key"] == "[hidden]"
    assert lines[1]["level"] == "warning"
    assert [line.fields["event"] for line in ring.after(0)] == ["task_started", "from a library"]


def test_a_ring_keeps_the_latest_lines_and_knows_where_a_reader_was() -> None:
    ring = LogRing(3)
    for number in range(5):
        ring.add({"event": number})
    assert [line.fields["event"] for line in ring.after(0)] == [2, 3, 4]
    assert [line.fields["event"] for line in ring.after(4)] == [4]
    assert ring.after(5) == []
    assert ring.after(99) == []


def test_other_processes_log_files_are_followed_through_replacement(tmp_path: Path) -> None:
    path = tmp_path / "scheduler.log"
    path.write_text('{"event": "old"}\n')
    ring = LogRing()
    tail = FileTail(tmp_path, ring)
    with path.open("a") as file:
        file.write('{"event": "new", "level": "info", "module": "sm", "token": "x"}\nplain text\n{"event": "cut')
    assert tail.poll() == 2
    with path.open("a") as file:
        file.write(' off"}\n')
    assert tail.poll() == 1
    path.rename(tmp_path / "scheduler.log.1")
    path.write_text('{"event": "after"}\n')
    tail.poll()
    (tmp_path / "agent.log").write_text('{"event": "agent"}\n')
    tail.poll()
    seen = [line.fields for line in ring.after(0)]
    assert [line["event"] for line in seen] == ["new", "plain text", "cut off", "after", "agent"]
    assert seen[0]["token"] == "[hidden]"
    assert seen[1]["module"] == "scheduler"
    assert seen[4]["module"] == "agent"


def test_a_process_does_not_read_its_own_log_file_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "gateway.log"
    own.write_text("")
    monkeypatch.setattr("api.monitoring.logs._own_inode", lambda: own.stat().st_ino)
    ring = LogRing()
    tail = FileTail(tmp_path, ring)
    own.write_text('{"event": "mine"}\n')
    (tmp_path / "agent.log").write_text('{"event": "theirs"}\n')
    tail.poll()
    assert [line.fields["event"] for line in ring.after(0)] == ["theirs"]
