"""The comparison of real runs with simulated ones, on journals whose truth is known because a simulator wrote them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import simpy

from engine import profiles
from engine.commands import CreatePod, StartTask
from engine.events import NodeJoined, TaskFinished, TaskStarted, TaskSubmitted
from engine.journal import MemoryJournal, Record
from engine.resources import Demand, GpuSpec, NodeSpec
from engine.scheduler import Engine
from engine.tasks import SECOND, TaskSpec, TaskType
from predictors.forecaster import OnlineForecaster
from sim.calibration import CalibrationError, first_runs, learned, measure, nodes_of, run_ratios, shared_as_measured
from sim.fidelity import FidelityError, Run, draw_jobs, judge, observe, render
from sim.fidelity_page import write_html
from sim.hardware import Hardware
from sim.workload import Arrival, Truth, Workload
from sim.world import SimWorld, run

ABOUT = Run("sleep", profiles.load("aigc"), 1, 2, 0.6)
NODES = tuple(NodeSpec(f"n{number}", (GpuSpec("cpu-0", "cpu", 4 << 30),), 4000, 8 << 30) for number in range(2))


class Longer:
    """The first run in a Pod of the stand-in takes so much longer."""

    def __init__(self, span_us: int) -> None:
        self.span_us = span_us

    def draw(self, method: str, model: str, seed: int, pod: int) -> int:
        return self.span_us


def journal_of(
    seed: int, tasks: int = 80, slower: float = 1.0, until_s: float | None = None, first_s: float = 0.0
) -> list[Record]:
    """Let a stand-in for real executors run a drawn workload: 3 ms each way, 0.4 s for a Pod, 2 ms on top of every run."""
    arrivals = []
    for number, job in enumerate(draw_jobs("sleep", tasks, 2, 0.6, seed)):
        declared_us = round(job.expected_s * SECOND)
        task = TaskSpec(
            f"{seed}-{number}",
            "t",
            "",
            TaskType(job.task_type),
            "sleep",
            demand=Demand(),
            declared_us=declared_us,
            features=(("steps", 1),),
        )
        arrivals.append(Arrival(round(job.at_s * SECOND), task, Truth(round(declared_us * slower) + 2_000)))
    hardware = Hardware(NODES, reference_gpu="cpu", dispatch_us=3_000, pod_start_us=400_000, pod_stop_us=5_000)
    if first_s:
        hardware = replace(hardware, first_runs=Longer(round(first_s * SECOND)))
    world = SimWorld(simpy.Environment(), hardware, Workload("stand-in", tuple(arrivals)), seed)
    journal, forecaster = MemoryJournal(), OnlineForecaster()
    until = None if until_s is None else round(until_s * SECOND)
    run(Engine(profiles.load("aigc")), world, forecaster.watching(journal), forecaster, until)
    return journal.records


def test_calibration_finds_the_spans_that_were_put_in() -> None:
    found = measure(journal_of(7))
    assert found.dispatch_us == 3_000
    assert found.start_us("sleep", "") == 403_000, "the order's way and the Pod's start"
    assert set(found.report_us) == {0}, "the stand-in reports by its own clock"
    assert found.attempts == 80


def test_a_simulator_that_is_calibrated_by_one_run_foretells_another() -> None:
    report = judge(ABOUT, journal_of(7), journal_of(8), replications=5)
    errors = {(row.task_type, row.measure): row.error_percent for row in report.rows}
    assert abs(errors["all", "mean completion, s"]) < 3
    assert abs(errors["all", "makespan, s"]) < 1
    assert {row.task_type for row in report.rows} == {"all", "GC", "TP"}
    assert report.met == all(row.met is not False for row in report.rows)


def test_executors_that_became_slower_after_the_calibration_are_noticed() -> None:
    report = judge(ABOUT, journal_of(7), journal_of(8, slower=1.3), replications=5)
    row = next(row for row in report.rows if row.task_type == "all" and row.measure == "mean completion, s")
    assert row.error_percent < -10, "the simulator expects the speed of the calibrating run"
    assert row.met is False
    assert not report.met


def test_slow_first_runs_in_pods_do_not_slow_every_run_of_the_simulation() -> None:
    calibrating = [*journal_of(7, tasks=30, first_s=3.0), *journal_of(9, tasks=30, first_s=3.0)]
    longer = first_runs(calibrating, learned(calibrating), "cpu")
    assert len(longer["sleep", ""]) == 4, "both platforms had two Pods, though their numbers are the same"
    assert all(2_900_000 < span < 3_100_000 for span in longer["sleep", ""])
    report = judge(ABOUT, calibrating, journal_of(8, tasks=300, first_s=3.0), replications=5)
    errors = {(row.task_type, row.measure): row.error_percent for row in report.rows}
    assert abs(errors["all", "mean run, s"]) < 3
    assert abs(errors["all", "mean completion, s"]) < 5


def test_what_company_costs_in_a_pod_is_taken_from_the_journal_and_counted_once() -> None:
    hardware = Hardware(NODES, reference_gpu="cpu")
    commands = (CreatePod(1, "n0", "text_to_image", "tiny", (), Demand(), 4), *(_start(number) for number in range(40)))
    submitted = tuple(TaskSubmitted(_picture(number)) for number in range(40))
    # Each picture takes 0.2 s alone, and a quarter longer for each other in its Pod; every second one has two beside it.
    ends = tuple(
        TaskFinished(
            f"p{number}",
            1,
            run_us=200_000 + number % 2 * 100_000,
            alone_us=200_000,
            company_permille=number % 2 * 2_000,
        )
        for number in range(40)
    )
    records = [
        Record(1, 0, (NodeJoined(NODES[0]), *submitted), commands),
        Record(2, 1_000, tuple(TaskStarted(f"p{number}", 1) for number in range(40)), ()),
        Record(3, 2_000_000, ends, ()),
    ]
    shared = shared_as_measured(hardware, records)
    row, share = shared.batch_row(_picture(0), True)
    assert 1 + share * (shared.stretches("cpu", [row] * 3)[0] - 1) == pytest.approx(1.5, rel=0.01)
    forecaster = learned(records)
    ratios = run_ratios(records, forecaster, "cpu")["text_to_image", TaskType.GC]
    assert max(ratios) == pytest.approx(min(ratios)), "alone all of them take the same"
    assert shared_as_measured(hardware, journal_of(7, tasks=10)) is hardware


def _picture(number: int) -> TaskSpec:
    return TaskSpec(f"p{number}", "t", "", TaskType.GC, "text_to_image", "tiny", features=(("steps", 8),))


def _start(number: int) -> StartTask:
    return StartTask(f"p{number}", 1, 1, "n0")


def test_what_has_hardly_run_but_once_in_a_pod_is_learned_from_all_the_same() -> None:
    records = journal_of(7, tasks=2)
    assert first_runs(records, learned(records), "cpu") == {}
    task = TaskSpec("x", "t", "", TaskType.GC, "sleep", declared_us=200_000, features=(("steps", 1),))
    forecaster = learned(records)
    assert forecaster.predictor.watermark_us > 0
    assert forecaster.predict(task, 10**9, "cpu").p50_us > 0


def test_the_same_journals_give_the_same_report() -> None:
    calibrating, judged = journal_of(7), journal_of(8)
    first = judge(ABOUT, calibrating, judged, replications=3)
    again = judge(ABOUT, calibrating, judged, replications=3)
    assert first.to_json() == again.to_json()
    other = judge(replace(ABOUT, seed=2), calibrating, judged, replications=3)
    assert other.to_json()["rows"] != first.to_json()["rows"], "another seed draws other run times"


def test_observed_times_are_those_of_the_journal() -> None:
    records = journal_of(8, tasks=10)
    seen = observe(records)
    assert seen.submitted == len(seen.tasks) == 10
    assert all(task.submitted < task.started < task.finished for task in seen.tasks)
    assert [node.name for node in nodes_of(records)] == ["n0", "n1"]


def test_the_predictor_that_learned_from_the_journal_knows_the_time_on_top_of_what_is_declared() -> None:
    forecaster = learned(journal_of(7))
    task = TaskSpec("x", "t", "", TaskType.GC, "sleep", declared_us=200_000, features=(("steps", 1),))
    assert forecaster.predict(task, 10**9, "cpu").p50_us == pytest.approx(202_000, rel=0.02)


def test_unfinished_runs_and_empty_journals_are_refused() -> None:
    half = journal_of(8, until_s=3)
    with pytest.raises(FidelityError, match="finished"):
        judge(ABOUT, journal_of(7), half)
    with pytest.raises(CalibrationError, match="no attempt"):
        judge(ABOUT, [], journal_of(8))
    with pytest.raises(FidelityError, match="replications"):
        judge(ABOUT, journal_of(7), journal_of(8), replications=1)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"workload": "nap"}, "workload"), ({"tasks": 1}, "tasks"), ({"nodes": 0}, "nodes"), ({"load": 1.0}, "load")],
)
def test_workloads_that_cannot_be_drawn_name_the_field(change: dict[str, object], named: str) -> None:
    asked: dict[str, object] = {"workload": "sleep", "tasks": 10, "nodes": 2, "load": 0.5, "seed": 0, **change}
    with pytest.raises(FidelityError, match=named):
        draw_jobs(**asked)  # type: ignore[arg-type]


def test_drawn_workloads_keep_their_load_and_their_seed() -> None:
    jobs = draw_jobs("sleep", 2_000, 4, 0.5, 3)
    busy = sum(job.expected_s for job in jobs) / (4 * jobs[-1].at_s)
    assert busy == pytest.approx(0.5, rel=0.05)
    assert jobs == draw_jobs("sleep", 2_000, 4, 0.5, 3)
    assert jobs != draw_jobs("sleep", 2_000, 4, 0.5, 4)
    assert {job.method for job in draw_jobs("tiny", 10, 1, 0.5, 0)} == {"text_to_image"}


def test_the_report_is_a_table_json_and_a_page_that_needs_no_network(tmp_path: Path) -> None:
    report = judge(ABOUT, journal_of(7), journal_of(8), replications=2)
    assert render(report).row_count == len(report.rows)
    assert json.loads(json.dumps(report.to_json()))["tasks"] == 80
    write_html(report, tmp_path / "fidelity.html")
    page = (tmp_path / "fidelity.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "mean completion" in page
    assert "src=" not in page
    assert 'href="http' not in page
