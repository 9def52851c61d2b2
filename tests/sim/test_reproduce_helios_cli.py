"""`aigc reproduce helios` on a trace small enough for paper."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from api.cli.main import app

TRACE = """vc,gpu_num,submit_time,duration_s
a,8,2017-10-01 00:00:00,100
a,8,2017-10-01 00:00:10,50
a,4,2017-10-01 00:00:20,10
b,1,2017-10-01 00:00:30,7
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "philly_2017-10_2017-11.csv.gz").write_text(TRACE)
    (tmp_path / "philly_vc.csv").write_text("vc,node num\na,1\nb,2\n")
    monkeypatch.delenv("AIGC_TRACES", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "policy, waiting",
    [("fifo", (0 + 90 + 130) / 3), ("sjf", (0 + 100 + 80) / 3)],
)
def test_means_of_each_virtual_cluster_as_json(policy, waiting, folder) -> None:
    shown = CliRunner().invoke(app, ["reproduce", "helios", "--policy", policy, "--json"])
    assert shown.exit_code == 0, shown.output
    rows = {row["vc"]: row for row in json.loads(shown.stdout)["clusters"]}
    assert list(rows) == ["a", "b", "all"]
    assert rows["a"]["mean_waiting_s"] == pytest.approx(waiting)
    assert rows["a"]["mean_completion_s"] == pytest.approx(waiting + 160 / 3)
    assert rows["all"]["jobs"] == 4


def test_the_table_shows_the_same(folder) -> None:
    shown = CliRunner().invoke(app, ["reproduce", "helios"])
    assert shown.exit_code == 0, shown.output
    assert "73.3" in shown.stdout
    assert "126.7" in shown.stdout


def test_the_folder_of_traces_is_looked_into(folder, monkeypatch, tmp_path_factory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("AIGC_TRACES", str(folder))
    shown = CliRunner().invoke(app, ["reproduce", "helios", "--json"])
    assert json.loads(shown.stdout)["clusters"][-1]["jobs"] == 4


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--policy", "lifo"], 2, "--policy: unknown 'lifo'; known are fifo, sjf"),
        (["--trace", "absent.csv"], 3, "--trace: absent.csv does not exist"),
        (["--clusters", "absent.csv"], 3, "--clusters: absent.csv does not exist"),
        (["--clusters", "philly_2017-10_2017-11.csv.gz"], 2, "line 2, node num: '' is no whole number"),
    ],
)
def test_bad_input_names_the_option_and_the_remedy(arguments, code, message, folder) -> None:
    shown = CliRunner().invoke(app, ["reproduce", "helios", *arguments])
    assert shown.exit_code == code
    assert message in " ".join(shown.stderr.split())
