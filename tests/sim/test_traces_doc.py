"""docs/traces.md and docs/timelines.md: their examples and commands run, and the table of formats is complete."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from api.cli.main import app
from sim.readers.registry import FORMATS

DOCS = Path(__file__).parents[2] / "docs"
DOC = (DOCS / "traces.md").read_text()
TIMELINES = (DOCS / "timelines.md").read_text()


def test_the_example_runs_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
    exec(compile(code, "docs/traces.md", "exec"), {})
    assert capsys.readouterr().out.startswith("[(2, 6), (1, 4)]")
    assert (tmp_path / "tasks.csv").exists()


def test_every_format_has_its_row():
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|", DOC, re.MULTILINE)
    assert sorted(rows) == sorted(form.name for form in FORMATS)


def test_the_example_of_tables_runs_as_written(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra parquet)")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", TIMELINES, re.DOTALL)
    exec(compile(code, "docs/timelines.md", "exec"), {})
    assert "200 tasks" in capsys.readouterr().out


@pytest.mark.parametrize("line", [line for line in TIMELINES.splitlines() if line.startswith("aigc simulate")])
def test_a_command_for_timelines_runs_as_written_on_fewer_tasks(line, tmp_path, monkeypatch):
    if ".parquet" in line:
        pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra parquet)")
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)[1:]
    answer = CliRunner().invoke(app, [*words, "--limit", "40", "--forecaster", "none"])
    assert answer.exit_code == 0, answer.output
    assert (tmp_path / words[-1]).exists()
