"""The example in docs/simulation.md runs as it stands, and the files it names exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "simulation.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    exec(compile(example, "docs/simulation.md", "exec"), {})
    assert capsys.readouterr().out.strip()
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_every_file_it_names_exists():
    cells = re.findall(r"^\| (`sim/.*?) \|", TEXT, flags=re.MULTILINE)
    names = [name for cell in cells for name in re.findall(r"`(?:sim/)?([\w.]+/?)`", cell)]
    assert len(names) > 15
    assert not [name for name in names if not (ROOT / "sim" / name).exists()]
