"""The trace doctor: figures against hand-computed ones, and a finding for every fault it is shown."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from api.cli.main import app
from engine.tasks import SECOND
from sim import likeness
from sim.readers import convert
from sim.readers.registry import ReaderOptions, read
from sim.trace_doctor import Offer, examine, parse_offers
from sim.trace_load import burst, tail, wanted_by_hour
from sim.workload import WorkloadError

HEADER = "job_id,user,vc,gpu_num,cpu_num,node_num,state,submit_time,start_time,end_time,duration,queue\n"
HOUR = 3600


def helios(tmp_path: Path, *rows: tuple[str, int, str, float]) -> Path:
    """Write (job, GPUs, time of day, seconds)."""
    path = tmp_path / "cluster_log.csv"
    lines = [f"{job},u,vc,{gpus},1,1,COMPLETED,2020-06-09 {when},,,{seconds},0\n" for job, gpus, when, seconds in rows]
    path.write_text(HEADER + "".join(lines))
    return path


def topics(report, severity: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for each in report.findings:
        if each.severity == severity:
            found.setdefault(each.topic, []).append(each.message)
    return found


def test_gpus_wanted_by_hour_are_areas_under_the_load():
    at = np.array([0, HOUR // 2, 2 * HOUR]) * SECOND
    work = np.array([HOUR, HOUR, HOUR]) * SECOND
    hours = wanted_by_hour(at, work, np.array([2.0, 4.0, 8.0]))
    assert hours == pytest.approx([2 + 2, 2])
    assert wanted_by_hour(at[:1], work[:1], np.array([2.0])) == pytest.approx([2.0])
    assert len(wanted_by_hour(at[:0], work[:0], np.array([]))) == 0


def test_regular_arrivals_have_no_variation_and_pairs_have_the_variation_worked_out_by_hand():
    even = burst(np.arange(0, 7200, 60) * SECOND)
    assert even.gap_cv == pytest.approx(0)
    assert even.ties == 0
    pairs = burst(np.repeat(np.arange(0, 7200, 60), 2) * SECOND)
    gaps = [0.0, 60.0] * 119 + [0.0]
    assert pairs.gap_cv == pytest.approx(np.std(gaps) / np.mean(gaps))
    assert pairs.ties == pytest.approx(120 / 239)
    assert set(pairs.dispersion) == {"1min", "10min"}, "two hours are too few to speak of hourly dispersion"


def test_the_tail_index_of_a_pareto_sample_is_its_exponent():
    ranks = (np.arange(20_000) + 0.5) / 20_000
    heavy = (1 - ranks) ** (-1 / 1.5)
    assert tail(heavy, heavy).index == pytest.approx(1.5, rel=0.1)
    light = -np.log(1 - ranks)
    assert tail(light, light).squared_cv == pytest.approx(1.0, rel=0.05)


def test_load_is_held_against_the_cluster(tmp_path):
    path = helios(tmp_path, ("1", 8, "00:00:00", HOUR), ("2", 8, "01:00:00", HOUR), ("3", 8, "02:00:00", 2 * HOUR))
    report = examine(path, [Offer("v100", 2, 8)])
    (line,) = report.load
    assert line.gpu_hours == pytest.approx(8 * 4)
    assert line.mean_gpus == pytest.approx(16)
    assert line.load == pytest.approx(1.0)
    assert line.peak_hour_gpus == pytest.approx(8)
    assert "load" in topics(report, "error")
    roomy = examine(path, [Offer("v100", 3, 8)])
    assert roomy.load[0].load == pytest.approx(2 / 3)
    assert "load" not in topics(roomy, "error")
    assert examine(path).load[0].capacity is None


def test_load_is_told_apart_by_gpu_type(tmp_path):
    path = tmp_path / "tasks.csv"
    path.write_text(
        "submitted_s,seconds,gpus,gpu_models\n0,3600,1,t4\n10,3600,2,a100\n20,3600,1,\n3600,3600,4,a100|h100\n7200,3600,1,t4\n"
    )
    report = examine(path, parse_offers("a100:1x8,t4:3x2"))
    lines = {line.gpu_type: line for line in report.load}
    assert {name: line.capacity for name, line in lines.items()} == {
        "all": 14,
        "t4": 6,
        "a100": 8,
        "any": 14,
        "a100|h100": 8,
    }
    assert lines["t4"].tasks == 2
    assert lines["a100"].gpu_hours == pytest.approx(2)
    assert sum(line.gpu_hours for name, line in lines.items() if name != "all") == pytest.approx(lines["all"].gpu_hours)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("0,1,gpus=16", "more GPUs on one node"),
        ("0,1,gpus=8,members=3", "more GPUs than the cluster has"),
        ("0,1,gpu_models=h100", "GPU types the cluster lacks (h100)"),
        ("0,1,gpu_memory_gib=100", "more GPU memory than a card has"),
        ("0,1,cpu_milli=200000", "more CPU cores than a node has (96)"),
        ("0,1,memory_gib=2000", "more memory than a node has (1024 GiB)"),
    ],
)
def test_impossible_tasks_are_named_with_the_reason(tmp_path, row, reason):
    at, seconds, *rest = row.split(",")
    values = {"submitted_s": at, "seconds": seconds, **dict(part.split("=") for part in rest)}
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"submitted_s": 0, "seconds": 1}) + "\n" + json.dumps(values) + "\n")
    (found,) = [each for each in examine(path, [Offer("a100", 2, 8)]).findings if each.topic == "impossible"]
    assert reason in found.message
    assert (found.severity, found.count, found.example) == ("error", 1, "line 2")


def test_records_that_a_reader_refuses_are_counted_with_one_example_each(tmp_path):
    path = helios(
        tmp_path,
        ("1", 1, "00:00:00", 60),
        ("2", 1, "00:01:00", -5),
        ("3", 1, "00:02:00", -6),
        ("4", 1, "soon", 60),
        ("", 1, "00:03:00", 60),
        ("6", 0, "00:04:00", 60),
    )
    report = examine(path)
    errors = topics(report, "error")
    assert "line 3, duration: -5 is out of range" in errors["clock"][0]
    assert "line 5, submit_time" in errors["value"][0]
    assert "line 6, job_id: is missing" in errors["missing"][0]
    assert [each.count for each in report.findings if each.topic == "clock" and each.severity == "error"] == [2]
    assert (report.records, report.kept, report.errors) == (6, 1, 3)
    assert "left out: asks for no GPU" in topics(report, "info")["skipped"][0]


def test_duplicates_disorder_and_holes_are_found(tmp_path):
    path = helios(
        tmp_path,
        ("1", 1, "00:00:00", 60),
        ("2", 1, "00:00:30", 60),
        ("2", 2, "00:00:10", 60),
        ("3", 1, "00:00:30", 60),
        ("4", 1, "20:00:00", 60),
    )
    report = examine(path)
    assert "identity 'job-2' stands in line 3 already" in topics(report, "error")["duplicates"][0]
    warnings = topics(report, "warning")
    assert any("furthest step back is 20 s" in text for text in warnings["clock"])
    assert any("nothing arrives for 20.0 h" in text for text in warnings["clock"])
    assert any("ask for the same at the same moment" in text for text in warnings["duplicates"])


def test_a_clean_even_trace_gives_no_warning(tmp_path):
    rows = [
        (str(number), 1 + number % 2, f"{number // 60:02d}:{number % 60:02d}:00", 50 + number % 7)
        for number in range(600)
    ]
    report = examine(helios(tmp_path, *rows), [Offer("v100", 1, 8)])
    assert [each for each in report.findings if each.severity != "info"] == []


def test_missing_values_are_counted_by_field(tmp_path):
    path = tmp_path / "pai.csv"
    path.write_text("job_id,num_gpu,submit_time,duration\n1,1,5,60\n2,,6,60\n3,,7,60\n")
    report = examine(path, options=ReaderOptions(cpu_tasks=True))
    (found,) = [each for each in report.findings if each.topic == "missing"]
    assert (found.count, found.example, found.severity) == (2, "line 3", "warning")


def test_declared_times_and_tails_are_remarked(tmp_path):
    path = tmp_path / "tasks.csv"
    rows = [f"{60 * number},{(1 - (number + 0.5) / 500) ** -1.5:.6f},1" for number in range(500)]
    path.write_text("submitted_s,seconds,declared_s\n" + "\n".join(rows) + "\n")
    report = examine(path)
    assert "index 0.6" in topics(report, "warning")["heavy tail"][0]
    assert [each.count for each in report.findings if each.message == "ran longer than declared"] == [
        sum(float(row.split(",")[1]) > 1 for row in rows)
    ]


def test_a_file_without_one_good_record_is_an_error_and_no_crash(tmp_path):
    report = examine(helios(tmp_path, ("1", 1, "never", 1)))
    assert report.load == ()
    assert "empty" in topics(report, "error")
    json.dumps(report.to_json())


def test_clusters_are_written_as_models_and_sizes():
    assert parse_offers("A100:16x8, t4:40x2") == (Offer("a100", 16, 8), Offer("t4", 40, 2))
    for wrong in ("a100", "a100:8", "a100:0x8", ":2x2", "a100:twoxtwo"):
        with pytest.raises(WorkloadError, match="is not MODEL:NODESxGPUS"):
            parse_offers(wrong)


def test_gentd26_has_the_published_burstiness(gentd26_path):
    report = examine(gentd26_path)
    published = likeness.GENTD26
    assert report.burst.gap_cv == pytest.approx(published["gap_cv"], rel=0.15)
    for name, value in report.burst.dispersion.items():
        assert value == pytest.approx(published[f"dispersion_{name}"], rel=0.15)
    assert report.burst.peak_to_mean["1h"] == pytest.approx(published["peak_to_mean_1h"], rel=0.15)
    assert "burstiness" in topics(report, "warning")
    measured = likeness.measure(read(gentd26_path))
    assert report.burst.gap_cv == pytest.approx(measured["gap_cv"])
    assert report.burst.dispersion["1h"] == pytest.approx(measured["dispersion_1h"])


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl", "out.csv.gz"])
def test_converted_traces_read_as_the_originals(tmp_path, name):
    source = tmp_path / "pai.csv"
    source.write_text(
        "a,worker,2.0,Terminated,1000.0,1600.5,400.0,29.296875,50.0,V100\nb,ps,3.0,Failed,1003.0,1600.0,600.0,10.0,800,T4\n"
    )
    workload = read(source)
    lost = convert.write(workload, tmp_path / name)
    again = read(tmp_path / name)
    assert lost == {}
    assert again.arrivals == workload.arrivals


def test_converting_gentd26_keeps_everything_a_row_can_hold(tmp_path, gentd26_path):
    workload = read(gentd26_path, ReaderOptions(limit=500))
    assert convert.write(workload, tmp_path / "tasks.csv") == {}
    assert read(tmp_path / "tasks.csv").arrivals == workload.arrivals


def test_the_command_checks_describes_and_converts(tmp_path):
    path = helios(tmp_path, ("1", 8, "00:00:00", HOUR), ("2", 4, "01:00:00", HOUR), ("3", 8, "02:00:00", 2 * HOUR))
    runner = CliRunner()
    checked = runner.invoke(app, ["trace", "check", str(path), "--nodes", "1", "--gpu-model", "v100", "--json"])
    report = json.loads(checked.stdout)
    assert checked.exit_code == 1
    assert report["load"][0]["capacity"] == 8
    assert report["findings"][0]["severity"] == "error"
    fine = runner.invoke(app, ["trace", "check", str(path), "--cluster", "v100:9x8"])
    assert fine.exit_code == 0
    assert "3 tasks of 3 records" in fine.stdout
    described = json.loads(runner.invoke(app, ["trace", "info", str(path), "--json"]).stdout)
    assert (described["tasks"], described["format"]) == (3, "helios")
    out = tmp_path / "out.csv"
    converted = runner.invoke(app, ["trace", "convert", str(path), str(out), "--limit", "2", "--json"])
    assert json.loads(converted.stdout)["tasks"] == 2
    assert len(read(out).arrivals) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["check", "absent.csv"], 3, "does not exist"),
        (["check", "FILE", "--cluster", "x"], 2, "is not MODEL:NODESxGPUS"),
        (["check", "FILE", "--cluster", "a:1x1", "--nodes", "2"], 2, "give one of the two"),
        (["info", "FILE", "--format", "slurm"], 2, "unknown 'slurm'"),
        (["convert", "FILE", "out.parquet"], 2, "ends in neither .csv nor .jsonl"),
    ],
)
def test_the_command_refuses_with_the_remedy(tmp_path, arguments, code, says):
    path = helios(tmp_path, ("1", 8, "00:00:00", HOUR))
    result = CliRunner().invoke(app, ["trace", *[str(path) if part == "FILE" else part for part in arguments]])
    assert result.exit_code == code
    assert says in result.stderr
