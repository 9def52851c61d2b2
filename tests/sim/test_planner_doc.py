"""docs/planning.md: its Python example runs, its grammar's words are the parser's, and its command's options exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from api.cli.main import app
from sim.planner.objectives import MEASURES, STATISTICS, parse

PAGE = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "docs/planning.md", "exec"), {"__name__": "example"})
    assert " keep p90_wait<90 s with fifo: " in capsys.readouterr().out


def test_every_option_that_the_page_names_exists() -> None:
    help_text = CliRunner().invoke(app, ["plan", "--help"], env={"COLUMNS": "200"}).stdout
    help_text += CliRunner().invoke(app, ["plan", "prices", "--help"], env={"COLUMNS": "200"}).stdout
    named = set(re.findall(r"--[a-z]+(?:-[a-z]+)*", PAGE))
    assert len(named) > 12
    assert {option for option in named if option not in help_text} == set()


def test_every_objective_that_the_page_shows_can_be_read() -> None:
    shown = set(re.findall(r'--slo "([^"]+)"', PAGE))
    assert len(shown) >= 2
    for text in shown:
        parse(text)
    for word in (*STATISTICS, *MEASURES):
        assert f"`{word}`" in PAGE
