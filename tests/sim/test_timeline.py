"""Timelines: the fold, the trace-event format by a checker of our own, Parquet tables against the metrics, and the Gantt chart."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from api.cli.main import app
from api.sm.journal import SqliteJournal
from engine.commands import CreatePod, DeletePod, Notify, StartTask, StopTask
from engine.events import (
    NodeJoined,
    NodeLost,
    PodStarted,
    PodStopped,
    TaskFinished,
    TaskStarted,
    TaskStopped,
    TaskSubmitted,
)
from engine.journal import MemoryJournal, Record
from engine.replay import refold
from engine.resources import Demand, GpuGrant, GpuSpec, NodeSpec
from engine.tasks import FailureCause, TaskSpec, TaskState, TaskType
from sim.gantt import GanttSink
from sim.plot_gantt import gantt_svg
from sim.report import write_html
from sim.simulate import SimulationConfig, SimulationResult, simulate
from sim.timeline import Follower, TimelineError
from sim.timeline_files import Recorder
from sim.timeline_perfetto import Perfetto

BUSY = SimulationConfig(
    synthetic_tasks=400, nodes=3, gpus_per_node=4, rate_scale=150, forecaster="none", mtbf_hours=0.5, mttr_minutes=3
)
GPU = GpuSpec("n0-gpu-0", "a100", 80 << 30)
NODE = NodeSpec("n0", (GPU,), 1000, 1 << 30)


class Kept:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.nodes, self.runs, self.pods, self.tasks, self.level = [], [], [], [], []

    def node(self, now, name, gpus, up):
        self.nodes.append((now, name, up))

    def run(self, record):
        self.runs.append(record)

    def pod(self, record):
        self.pods.append(record)

    def task(self, record):
        self.tasks.append(record)

    def levels(self, now, waiting, running, pods):
        self.level.append((now, waiting, running, pods))


def spec(req_no: str, model: str = "m") -> TaskSpec:
    return TaskSpec(req_no, "t", "", TaskType.GC, "text_to_image", model, demand=Demand(gpu_share=500))


def create(pod: int, share: int = 500) -> CreatePod:
    return CreatePod(pod, "n0", "text_to_image", "m", (GpuGrant(GPU.uuid, share, 1),), Demand(gpu_share=share))


def check_trace_events(data: dict) -> Counter[str]:
    """Hold a file to the trace-event format; return its events by phase."""
    named, kinds = {"process_name": set(), "thread_name": set()}, Counter()
    latest: dict[tuple[int, int], int] = {}
    ends: dict[tuple[int, int], list[int]] = {}
    flows: dict[int, list[tuple[int, str]]] = {}
    slices: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for event in data["traceEvents"]:
        kinds[event["ph"]] += 1
        place = (event["pid"], event["tid"])
        assert isinstance(event["ts"], int)
        assert event["ts"] >= 0
        assert isinstance(event["name"], str)
        if event["ph"] == "M":
            if event["name"] in named:
                key = event["pid"] if event["name"] == "process_name" else place
                assert key not in named[event["name"]], f"{key} is named twice"
                assert event["args"]["name"]
                named[event["name"]].add(key)
            continue
        assert event["ph"] in {"X", "C", "i", "s", "t", "f"}, (
            "a slice that begins must end: only complete ones are written"
        )
        assert event["pid"] in named["process_name"]
        assert place in named["thread_name"]
        counter = (*place, event["name"]) if event["ph"] == "C" else place
        assert event["ts"] >= latest.get(counter, 0), f"{event} steps back"
        latest[counter] = event["ts"]
        if event["ph"] == "X":
            assert event["dur"] >= 0
            stack = ends.setdefault(place, [])
            while stack and stack[-1] <= event["ts"]:
                stack.pop()
            end = event["ts"] + event["dur"]
            assert not stack or end <= stack[-1], f"{event} reaches beyond the slice it began in"
            stack.append(end)
            slices.setdefault(place, []).append((event["ts"], end))
        elif event["ph"] == "C":
            assert all(isinstance(value, int) and value >= 0 for value in event["args"].values())
        elif event["ph"] == "i":
            assert event["s"] in {"g", "p", "t"}
        else:
            assert any(begin <= event["ts"] <= end for begin, end in slices[place]), (
                "an arrow needs a slice to be bound to"
            )
            flows.setdefault(event["id"], []).append((event["ts"], event["ph"]))
    for steps in flows.values():
        shape = "".join(phase for _, phase in sorted(steps, key=lambda step: (step[0], "stf".index(step[1]))))
        assert shape.startswith("s"), shape
        assert shape.endswith("f"), shape
        assert shape.count("s") == shape.count("f") == 1
    return kinds


@pytest.fixture(scope="module")
def played() -> tuple[SimulationResult, MemoryJournal, Kept]:
    """A run with node failures, its journal, and what a follower made of it."""
    journal, kept = MemoryJournal(), Kept()
    follower = Follower([kept])

    def both(now, events, commands):
        journal(now, events, commands)
        follower(now, events, commands)

    result = simulate(BUSY, journal=both)
    follower.close()
    return result, journal, kept


def test_a_run_is_told_from_its_order_to_its_end():
    kept = Kept()
    follower = Follower([kept])
    follower(0, [NodeJoined(NODE), TaskSubmitted(spec("a"))], [create(1)])
    follower(10, [PodStarted(1)], [StartTask("a", 1, 1, "n0")])
    follower(12, [TaskStarted("a", 1)], [])
    follower(20, [], [StopTask("a", 1, 1, "n0", reason="preempted")])
    follower(22, [TaskStopped("a", 1)], [StartTask("a", 2, 1, "n0")])
    follower(25, [TaskStarted("a", 2)], [])
    follower(40, [TaskFinished("a", 2)], [Notify("a", TaskState.FINISHED, 2), DeletePod(1, "idle")])
    follower(45, [PodStopped(1, FailureCause.POD_LOST)], [])
    follower.close()
    first, second = kept.runs
    assert (first.ordered_at, first.started_at, first.ended_at) == (10, 12, 22)
    assert (first.outcome, first.reason) == ("stopped", "preempted")
    assert (second.attempt, second.started_at, second.ended_at, second.outcome) == (2, 25, 40, "finished")
    (pod,) = kept.pods
    assert (pod.created_at, pod.ready_at, pod.ended_at, pod.runs, pod.why) == (0, 10, 45, 2, "idle")
    (task,) = kept.tasks
    assert (task.submitted_at, task.first_started_at, task.ended_at, task.state, task.attempts) == (
        0,
        12,
        40,
        "finished",
        2,
    )
    assert kept.level == [(0, 1, 0, 1), (12, 0, 1, 1), (22, 1, 0, 1), (25, 0, 1, 1), (40, 0, 0, 1), (45, 0, 0, 0)]


def test_a_lost_node_takes_its_pods_and_runs_along():
    kept = Kept()
    follower = Follower([kept])
    follower(0, [NodeJoined(NODE), TaskSubmitted(spec("a"))], [create(1)])
    follower(5, [PodStarted(1)], [StartTask("a", 1, 1, "n0")])
    follower(6, [TaskStarted("a", 1)], [])
    follower(9, [NodeLost("n0")], [])
    follower.close()
    assert [(run.ended_at, run.outcome) for run in kept.runs] == [(9, "node_lost")]
    assert [(pod.ended_at, pod.why) for pod in kept.pods] == [(9, "node_lost")]
    assert [(task.ended_at, task.state) for task in kept.tasks] == [(9, "open")]
    assert kept.nodes == [(0, "n0", True), (9, "n0", False)]


def test_a_run_that_was_cancelled_before_it_began_keeps_its_task():
    kept = Kept()
    follower = Follower([kept])
    follower(0, [NodeJoined(NODE), TaskSubmitted(spec("a"))], [create(1)])
    follower(5, [PodStarted(1)], [StartTask("a", 1, 1, "n0")])
    follower(6, [], [StopTask("a", 1, 1, "n0"), Notify("a", TaskState.CANCELLED)])
    follower(7, [TaskStopped("a", 1)], [])
    follower.close()
    (run,) = kept.runs
    assert run.spec is not None
    assert run.started_at is None
    assert kept.level[-1] == (6, 0, 0, 1)


def test_the_fold_counts_what_the_metrics_count(played):
    result, _, kept = played
    summary = result.summary
    assert Counter(task.state for task in kept.tasks) == Counter({k: v for k, v in summary.ends.items() if v})
    assert len(kept.pods) == summary.counts["pods_created"]
    assert sum(run.rank == 0 for run in kept.runs) == summary.counts["attempts"]
    assert sum(not up for _, _, up in kept.nodes) == summary.counts["nodes_lost"] > 0
    assert all(run.ordered_at <= (run.started_at or run.ordered_at) <= run.ended_at for run in kept.runs)
    assert kept.level[-1][:3][1:] == (0, 0)


def test_the_picture_keeps_the_rules_of_its_format(played, tmp_path):
    result, journal, kept = played
    path = tmp_path / "run.json"
    recorder = Recorder(path, {"profile": "aigc"})
    for record in journal.records:
        recorder(record.now, record.events, record.commands)
    (line,) = recorder.finish()
    data = json.loads(path.read_text())
    kinds = check_trace_events(data)
    assert "ui.perfetto.dev" in line
    assert data["otherData"]["profile"] == "aigc"
    assert data["otherData"]["left_out"] == 0
    tasks = [event for event in data["traceEvents"] if event.get("cat") == "task" and event["ph"] == "X"]
    assert len(tasks) == sum(run.started_at is not None for run in kept.runs)
    assert Counter(event["args"]["outcome"] for event in tasks)["finished"] == result.summary.ends["finished"]
    assert kinds["s"] == kinds["f"] == len({run.req_no for run in kept.runs if run.started_at is not None})
    processes = {event["args"]["name"] for event in data["traceEvents"] if event["name"] == "process_name"}
    assert processes == {"cluster", "customers", "node-0", "node-1", "node-2"}
    assert kinds["i"] == sum(not up for _, _, up in kept.nodes) + _returns(kept)


def _returns(kept: Kept) -> int:
    down, returns = set(), 0
    for _, name, up in kept.nodes:
        returns += up and name in down
        (down.discard if up else down.add)(name)
    return returns


def test_tasks_that_share_a_pod_or_a_gpu_have_tracks_of_their_own():
    picture = Perfetto()
    follower = Follower([picture])
    wide = replace(create(1), slots=2)
    follower(0, [NodeJoined(NODE), *(TaskSubmitted(spec(name)) for name in "abc")], [wide, create(2)])
    starts = [StartTask("a", 1, 1, "n0"), StartTask("b", 1, 1, "n0"), StartTask("c", 1, 2, "n0")]
    follower(1, [PodStarted(1), PodStarted(2)], starts)
    follower(2, [TaskStarted("a", 1)], [])
    follower(3, [TaskStarted("b", 1), TaskStarted("c", 1)], [])
    follower(7, [TaskFinished("a", 1)], [Notify("a", TaskState.FINISHED)])
    follower(
        9,
        [TaskFinished("b", 1), TaskFinished("c", 1)],
        [Notify("b", TaskState.FINISHED), Notify("c", TaskState.FINISHED)],
    )
    follower.close()
    data = {"traceEvents": list(picture.trace_events())}
    check_trace_events(data)
    tracks = [
        event["args"]["name"] for event in data["traceEvents"] if event["name"] == "thread_name" and event["pid"] == 3
    ]
    assert tracks == ["n0-gpu-0 (a100)", "n0-gpu-0 (a100) slot 2", "n0-gpu-0 (a100) lane 2"]


def test_big_runs_are_shown_by_whole_nodes_and_say_what_they_leave_out(played, tmp_path):
    _, journal, kept = played
    path = tmp_path / "run.json.gz"
    recorder = Recorder(path, max_slices=300)
    for record in journal.records:
        recorder(record.now, record.events, record.commands)
    told = recorder.finish()
    data = json.loads(gzip.decompress(path.read_bytes()))
    check_trace_events(data)
    about = data["otherData"]
    slices = [event for event in data["traceEvents"] if event.get("cat") in {"task", "pod"} and event["ph"] == "X"]
    assert 0 < len(slices) <= 300
    assert about["nodes"] == 3
    assert about["nodes_shown"] < 3
    assert about["left_out"] + len(slices) >= len(kept.runs) + len(kept.pods) - sum(
        r.started_at is None for r in kept.runs
    )
    assert "of 3 nodes" in told[1]
    assert "leaves" in told[1]


def test_a_single_node_that_is_too_much_is_shown_from_the_beginning():
    picture = Perfetto(max_slices=10)
    follower = Follower([picture])
    follower(0, [NodeJoined(NODE)], [])
    for number in range(50):
        at = 10 * number
        follower(at, [TaskSubmitted(spec(f"t{number}"))], [create(number + 1)])
        follower(at + 1, [PodStarted(number + 1)], [StartTask(f"t{number}", 1, number + 1, "n0")])
        follower(at + 2, [TaskStarted(f"t{number}", 1)], [])
        follower(at + 8, [TaskFinished(f"t{number}", 1)], [Notify(f"t{number}", TaskState.FINISHED)])
        follower(at + 9, [PodStopped(number + 1)], [])
    follower.close()
    assert 0 < len(picture.runs) + len(picture.pods) <= 10
    assert picture.cut_at is not None
    assert min(pod.created_at for pod in picture.pods) == 0
    assert len(picture.points) > 100, "the counters still cover the whole run"
    check_trace_events({"traceEvents": list(picture.trace_events())})


def test_counters_stay_bounded_and_keep_their_last_value():
    picture = Perfetto()
    for number in range(100_000):
        picture.levels(number * 1_000, number % 7, 1, 2)
    assert len(picture.points) <= 20_000
    moments = [point[0] for point in picture.points]
    assert moments == sorted(moments)
    assert picture.points[-1][1] == 99_999 % 7


def test_tables_read_back_with_the_metrics_counts(played, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (extra parquet)")
    result, journal, kept = played
    folder = tmp_path / "run.parquet"
    recorder = Recorder(folder, {"seed": 0})
    for record in journal.records:
        recorder(record.now, record.events, record.commands)
    recorder.finish()
    tables = {path.stem: pq.read_table(path).to_pylist() for path in sorted(folder.iterdir())}
    assert Counter(row["state"] for row in tables["tasks"]) == Counter(
        {k: v for k, v in result.summary.ends.items() if v}
    )
    assert len(tables["pods"]) == result.summary.counts["pods_created"]
    assert sum(row["rank"] == 0 for row in tables["runs"]) == result.summary.counts["attempts"]
    assert len(tables["events"]) == sum(len(each.events) + len(each.commands) for each in journal.records)
    assert sum(row["name"] == "StartTask" for row in tables["events"]) == len(tables["runs"])
    assert len(tables["levels"]) == len(kept.level)
    started = [row for row in tables["tasks"] if row["first_started_us"] is not None]
    mean = sum(row["first_started_us"] - row["submitted_us"] for row in started) / len(started) / 1e6
    assert mean == pytest.approx(result.summary.waiting["all"].mean, rel=1e-6)
    assert pq.read_schema(folder / "tasks.parquet").metadata[b"seed"] == b"0"


def test_wrong_names_are_refused_before_the_run(tmp_path):
    with pytest.raises(TimelineError, match=r"ends in none of .json, .json.gz"):
        Recorder(tmp_path / "run.csv")
    with pytest.raises(TimelineError, match="is no directory"):
        Recorder(tmp_path / "absent" / "run.json")
    with pytest.raises(TimelineError, match="max_slices: must be at least 1"):
        Recorder(tmp_path / "run.json", max_slices=0)
    (tmp_path / "file.parquet").write_text("")
    with pytest.raises(TimelineError, match="is a file"):
        Recorder(tmp_path / "file.parquet")


def test_a_journal_without_its_beginning_is_told_from_its_snapshot(played):
    _, journal, _ = played
    records = journal.records
    middle = len(records) // 2
    state = refold(None, records[:middle])
    kept = Kept()
    follower = Follower([kept])
    follower.begin_from(state)
    for record in records[middle:]:
        follower(record.now, record.events, record.commands)
    follower.close()
    whole = Kept()
    complete = Follower([whole])
    for record in records:
        complete(record.now, record.events, record.commands)
    complete.close()
    later = [task for task in whole.tasks if task.ended_at > state.now]
    assert {(task.spec.req_no, task.state, task.ended_at) for task in later} <= {
        (task.spec.req_no, task.state, task.ended_at) for task in kept.tasks
    }
    assert kept.level[-1] == whole.level[-1]
    assert len(kept.pods) < len(whole.pods)


def test_the_chart_shows_the_longest_queue_on_the_first_gpus(played):
    _, journal, kept = played
    sink = GanttSink(gpus=5, bars=60)
    follower = Follower([sink])
    for record in journal.records:
        follower(record.now, record.events, record.commands)
    follower.close()
    chart = sink.chart()
    longest = max(waiting for _, waiting, _, _ in kept.level)
    assert chart.gpus == ("node-0-gpu-0", "node-0-gpu-1", "node-0-gpu-2", "node-0-gpu-3", "node-1-gpu-0")
    assert chart.all_gpus == 12
    assert max(waiting for _, waiting in chart.queue) == longest
    assert all(chart.begin_s <= bar.start_s <= bar.end_s <= chart.end_s for bar in chart.bars)
    assert {bar.kind for bar in chart.bars} >= {"pod", "load", "run"}
    assert {bar.row for bar in chart.bars} <= set(range(5))


def test_pods_on_one_gpu_lie_beside_each_other_in_the_chart():
    sink = GanttSink()
    follower = Follower([sink])
    follower(0, [NodeJoined(NODE)], [create(1, 400), create(2, 600)])
    follower(5_000_000, [PodStopped(1)], [create(3, 300)])
    follower(9_000_000, [], [])
    follower.close()
    spots = {(round(bar.low, 3), round(bar.height, 3), bar.start_s) for bar in sink.chart().bars if bar.kind == "pod"}
    assert spots == {(0.0, 0.4, 0.0), (0.4, 0.6, 0.0), (0.0, 0.3, 5.0)}


def test_the_page_has_a_chart_per_run_and_is_the_same_twice(tmp_path):
    config = replace(BUSY, synthetic_tasks=60)
    result = simulate(config, gantt=True)
    write_html(result, tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert "Schedule around the longest queue: aigc" in page
    assert page.count("Below: tasks waiting.") == 1
    assert gantt_svg(result.gantt) == gantt_svg(simulate(config, gantt=True).gantt)
    assert simulate(config).gantt is None


def test_the_commands_write_timelines_of_simulations_and_journals(played, tmp_path):
    runner = CliRunner()
    picture = tmp_path / "run.json"
    small = ["simulate", "--tasks", "50", "--nodes", "2", "--forecaster", "none"]
    shown = runner.invoke(app, [*small, "--timeline", str(picture)])
    assert shown.exit_code == 0, shown.output
    assert check_trace_events(json.loads(picture.read_text()))["X"] > 100
    refused = runner.invoke(app, [*small, "--compare", "fifo,aigc", "--timeline", str(picture)])
    assert refused.exit_code == 2
    assert "shows one run" in refused.stderr
    _, journal, _ = played
    path = tmp_path / "journal.db"
    records = journal.records[:150]
    _write_journal(path, records)
    table = tmp_path / "live.json"
    replayed = runner.invoke(app, ["replay", str(path), "--timeline", str(table), "--json"])
    assert replayed.exit_code in {0, 1}, replayed.output
    data = json.loads(table.read_text())
    check_trace_events(data)
    tasks = [event for event in data["traceEvents"] if event.get("cat") == "task" and event["ph"] == "X"]
    assert len(tasks) == sum(isinstance(event, TaskStarted) for record in records for event in record.events) > 10


def _write_journal(path: Path, records: Sequence[Record]) -> None:
    durable = SqliteJournal(path)
    try:
        for record in records:
            durable(record.now, record.events, record.commands)
    finally:
        durable.close()
