"""What a sweep says: means with intervals, differences from a baseline, CSV and JSON, and the command that prints them."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest
from typer.testing import CliRunner

from api.cli.main import app
from sim.configuration import ConfigError, SimulationConfig
from sim.sweep import grid, run_sweep
from sim.sweep_table import MEASURES, csv_text, interval, json_values, model_loads, rows_of, varying

CONFIG = SimulationConfig(synthetic_tasks=60, nodes=1, gpus_per_node=2, rate_scale=40, forecaster="declared")
QUICK = ["--set", "synthetic_tasks=40", "--set", "nodes=1", "--set", "forecaster=none", "--jobs", "1"]


@pytest.fixture(scope="module")
def records():
    return run_sweep(grid(CONFIG, {"profile": ["fifo", "aigc"], "nodes": [1, 2], "seed": [0, 1, 2]}), jobs=1)


def test_an_interval_is_students_own():
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(4.30 / math.sqrt(3))
    assert interval([5.0]).half_width == math.inf


def test_rows_stand_for_all_seeds_of_a_point(records):
    rows = rows_of(records)
    assert varying(records) == ["nodes", "profile"]
    assert [dict(row.point) for row in rows] == [
        {"nodes": nodes, "profile": profile} for profile in ("fifo", "aigc") for nodes in ("1", "2")
    ]
    first = rows[0].figures["mean completion, s"]
    own = [each.summary["completion"]["all"]["mean"] for each in records[:3]]
    assert first.count == 3
    assert first.mean == pytest.approx(sum(own) / 3)


def test_each_point_is_compared_with_the_baseline_beside_it(records):
    rows = rows_of(records, {"profile": "fifo"})
    assert [bool(row.differences) for row in rows] == [False, False, True, True]
    found = next(each for each in rows[3].differences if each.measure == "mean waiting, s")
    pairs = zip(records[3:6], records[9:12], strict=True)
    gaps = [b.summary["waiting"]["all"]["mean"] - a.summary["waiting"]["all"]["mean"] for a, b in pairs]
    assert found.mean == pytest.approx(sum(gaps) / 3)


def test_a_baseline_that_was_not_run_is_named(records):
    with pytest.raises(ConfigError, match="no run of nodes=1, profile=nowhere"):
        rows_of(records, {"profile": "nowhere"})
    with pytest.raises(ConfigError, match="'seed' does not vary"):
        rows_of(records, {"seed": "0"})


def test_every_model_load_counts_wherever_it_came_from():
    assert model_loads({"loads_disk": 2, "loads_remote": 3, "pods_created": 9}) == 5


def test_the_csv_has_a_line_per_run_with_every_measure(records):
    lines = list(csv.DictReader(io.StringIO(csv_text(records))))
    assert len(lines) == len(records)
    assert set(MEASURES) < set(lines[0])
    assert lines[-1]["profile"] == "aigc"
    assert float(lines[0]["mean waiting, s"]) == records[0].summary["waiting"]["all"]["mean"]


def test_the_json_holds_points_runs_and_no_infinity(records):
    values = json.loads(json.dumps(json_values(records[:1], rows_of(records[:1])), allow_nan=False))
    assert values["points"][0]["figures"]["mean waiting, s"]["half_width"] is None
    assert values["runs"][0]["hash"] == records[0].hash


def test_the_command_prints_points_and_differences_as_json(tmp_path):
    arguments = ["sweep", *QUICK, "--set", "profile=fifo,aigc", "--seeds", "2", "--baseline", "profile=fifo", "--json"]
    store, csv_file = tmp_path / "runs.jsonl", tmp_path / "runs.csv"
    done = CliRunner().invoke(app, [*arguments, "--store", str(store), "--csv", str(csv_file)])
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert [point["point"]["profile"] for point in values["points"]] == ["fifo", "aigc"]
    assert values["points"][1]["differences"]
    assert len(csv_file.read_text().splitlines()) == 5
    again = CliRunner().invoke(app, [*arguments, "--store", str(store)])
    assert all(run["reused"] for run in json.loads(again.stdout)["runs"])


def test_the_command_prints_tables(tmp_path):
    done = CliRunner().invoke(
        app, ["sweep", *QUICK, "--set", "profile=fifo,aigc", "--seeds", "2", "--baseline", "profile=fifo"]
    )
    assert done.exit_code == 0, done.output
    assert "Means over seeds" in done.stdout
    assert "Differences from the baseline" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--set", "nodez=1"], "'nodez' is no field"),
        (["--set", "nodes"], "not FIELD=VALUE"),
        (["--set", "nodes=two"], "nodes='two' cannot be read; use int"),
        (["--set", "nodes=1", "--set", "nodes=2"], "given twice"),
        (["--set", "seed=1"], "use --seeds"),
        (["--set", "nodes=0"], "nodes: must be at least 1"),
    ],
)
def test_the_command_names_a_wrong_setting(arguments, named):
    done = CliRunner().invoke(app, ["sweep", *arguments, "--jobs", "1"])
    assert done.exit_code == 2
    assert named in done.stderr
