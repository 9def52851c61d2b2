"""docs/traces.md: its example runs, and its table has every format."""

from __future__ import annotations

import re
from pathlib import Path

from sim.readers.registry import FORMATS

DOC = (Path(__file__).parents[2] / "docs" / "traces.md").read_text()


def test_the_example_runs_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
    exec(compile(code, "docs/traces.md", "exec"), {})
    assert capsys.readouterr().out.startswith("[(2, 6), (1, 4)]")
    assert (tmp_path / "tasks.csv").exists()


def test_every_format_has_its_row():
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|", DOC, re.MULTILINE)
    assert sorted(rows) == sorted(form.name for form in FORMATS)
