"""`aigc fidelity` on a small case: real platforms, and a report that adds up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from api.cli.main import app

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_fidelity_runs_for_real_and_reports_every_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "fidelity.html"
    arguments = ["--tasks", "16", "--calibration-tasks", "12", "--replications", "3", "--html", str(page), "--json"]
    answer = CliRunner().invoke(app, ["fidelity", *arguments], catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    report = json.loads(answer.stdout)
    assert report["finished"] == {"real": 16, "simulated": 16}
    assert report["calibration"]["attempts"] == 12
    assert report["calibration"]["pod_starts"] == 4, "two runs on two nodes"
    assert report["cores"] >= 1
    for row in report["rows"]:
        assert row["real"] > 0
        assert row["lowest"] <= row["simulated"] <= row["highest"]
        assert row["error_percent"] == pytest.approx(100 * (row["simulated"] / row["real"] - 1))
    run = next(row for row in report["rows"] if row["task_type"] == "all" and row["measure"] == "mean run, s")
    assert run["real"] >= 0.05, "no task sleeps for less than 50 ms"
    assert "<svg" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--workload", "nap"], "workload"), (["--load", "2"], "load"), (["--profile", "x"], "profile")],
)
def test_a_wrong_option_is_named_before_anything_is_started(arguments: list[str], named: str) -> None:
    answer = CliRunner().invoke(app, ["fidelity", *arguments], catch_exceptions=False)
    assert answer.exit_code == 2
    assert named in answer.stderr
