"""Each notebook runs from end to end on its short case, asks its question first and asserts the answer last."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_asks_first_and_asserts_its_answer_last(path, monkeypatch, capsys):
    cells = path.read_text().split("\n# %%")
    assert cells[1].startswith(" [markdown]\n# # ")
    assert "?" in cells[1].split("\n")[1]
    assert "\nassert " in cells[-1]
    monkeypatch.delenv("AIGC_FULL", raising=False)
    runpy.run_path(str(path))
    assert capsys.readouterr().out.strip()


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 2
