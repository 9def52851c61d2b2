"""`aigc plan`: the answer line, its files, workloads from a trace and from a live journal, and its refusals."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from api.cli.main import app
from api.sm.journal import SqliteJournal
from sim.draws import exponential
from sim.simulate import SimulationConfig, simulate

QUICK = [
    "--forecaster",
    "none",
    "--profile",
    "fifo",
    "--policies",
    "",
    "--no-sensitivity",
    "--seeds",
    "2",
    "--jobs",
    "1",
]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


@pytest.fixture
def own_trace(tmp_path: Path) -> Path:
    at, lines = 0.0, ["submitted_s,seconds,method"]
    for number in range(120):
        at += exponential(2.0, 1, "gap", number)
        lines.append(f"{at:.3f},{exponential(10.0, 1, 'run', number):.3f},sleep")
    path = tmp_path / "tasks.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_plan_prints_one_answer_line_and_writes_page_csv_and_json(own_trace: Path, tmp_path: Path) -> None:
    page, table, values = tmp_path / "plan.html", tmp_path / "plan.csv", tmp_path / "plan.json"
    found = invoke(
        *QUICK, "--trace", own_trace, "--slo", "p90_wait<8s", "--slo", "mean_completion[ordinary]<30s", "--gpu", "a100:1.8/h",
        "--html", page, "--csv", table, "--output", values,
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    first = found.stdout.splitlines()[0]
    assert " keep p90_wait<8 s and mean_completion[ordinary]<30 s with fifo: " in first
    assert "95% interval" in first
    assert "on other days like these" in first
    assert "What it costs" in found.stdout
    assert "Erlang C, run times alone" in found.stdout
    assert "<svg" in page.read_text(encoding="utf-8")
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    plan = json.loads(values.read_text(encoding="utf-8"))
    assert [row["config_hash"] for row in rows] == [plan["config_hash"]] * len(rows)
    assert plan["sentence"] == first


def test_json_goes_to_stdout_alone(own_trace: Path) -> None:
    found = invoke(*QUICK, "--trace", own_trace, "--slo", "p90_wait<8s", "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["answer"]["verdict"] == "holds"


def test_a_plan_with_a_store_runs_nothing_twice(own_trace: Path, tmp_path: Path) -> None:
    arguments = [*QUICK, "--trace", own_trace, "--slo", "p90_wait<8s", "--store", tmp_path / "runs.jsonl"]
    first, second = invoke(*arguments), invoke(*arguments)
    assert first.exit_code == second.exit_code == 0
    lines = len((tmp_path / "runs.jsonl").read_text(encoding="utf-8").splitlines())
    assert f"{lines} simulations (0 from the store)" in first.stdout
    assert f"{lines} simulations ({lines} from the store)" in second.stdout
    assert first.stdout.splitlines()[0] == second.stdout.splitlines()[0]


def test_what_a_live_platform_was_asked_for_can_be_planned_for(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "journal.db")
    recorded = SimulationConfig(synthetic_tasks=60, rate_scale=60, forecaster="none", gpu_model="h100", nodes=1)
    simulate(recorded, journal=journal)
    journal.close()
    found = invoke(*QUICK, "--from-live", tmp_path, "--slo", "p50_wait<200s", "--gpu", "h100:3.9/h", "--json")
    assert found.exit_code == 0, found.output
    plan = json.loads(found.stdout)
    assert plan["workload"]["name"].endswith("as recorded")
    assert plan["request"]["base"]["reference_gpu"] == "h100"


def test_a_demand_that_nothing_on_offer_keeps_exits_with_failure_and_names_what_is_in_reach(own_trace: Path) -> None:
    found = invoke(*QUICK, "--trace", own_trace, "--slo", "p99_completion<5s")
    assert found.exit_code == 1
    assert "more GPUs do not help" in found.stdout
    assert "within reach: p99_completion<" in found.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        ([], 2, "--slo: say what is to be kept"),
        (["--slo", "p99_wait<8"], 2, "has no unit"),
        (["--slo", "p99_wait<8s", "--gpu", "a1000:1/h"], 2, "unknown GPU model 'a1000'"),
        (["--slo", "p99_wait<8s", "--gpu", "cpu"], 2, "has no price of 'cpu'"),
        (["--slo", "p99_wait<8s", "--policies", "no-such"], 2, "no-such"),
        (["--slo", "p99_wait<8s", "--synthetic", "--from-live", "."], 2, "give one of the three"),
        (["--slo", "p99_wait<8s", "--trace", "missing.csv"], 3, "missing.csv does not exist"),
        (["--slo", "p99_wait<8s", "--from-live", "missing"], 3, "does not exist; give the state directory"),
        (["--slo", "p99_wait<8s", "--prices", "missing.toml"], 2, "cannot read missing.toml"),
        (["--slo", "p99_wait<8s", "--confidence", "2"], 2, "confidence: must be at least 0.5"),
    ],
)
def test_a_bad_argument_is_named_with_the_remedy(arguments: list[str], code: int, part: str) -> None:
    found = invoke(*arguments)
    assert found.exit_code == code
    assert part in " ".join(found.stderr.split())


def test_the_price_list_is_printed_as_a_file_to_edit_and_copied_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    printed = invoke("prices")
    assert printed.exit_code == 0
    (tmp_path / "mine.toml").write_text(printed.stdout, encoding="utf-8")
    named = invoke("prices", "--prices", tmp_path / "mine.toml", "--json")
    assert json.loads(named.stdout)["per_hour"]["a100"] > 0
    assert invoke("prices", "--copy").exit_code == 0
    assert (tmp_path / "aigc" / "prices.toml").is_file()
    assert json.loads(invoke("prices", "--json").stdout)["source"] == str(tmp_path / "aigc" / "prices.toml")
    again = invoke("prices", "--copy")
    assert again.exit_code == 1
    assert "exists already" in again.stderr
