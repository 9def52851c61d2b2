"""Each notebook runs from end to end on its short case, asks its question first and asserts the answer last."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_asks_first_and_asserts_its_answer_last(path, monkeypatch, capsys):
    cells = path.read_text().split("\n# %%")
    assert cells[1].startswith(" [markdown]\n# # ")
    assert "?" in cells[1].split("\n")[1]
    assert "\nassert " in cells[-1]
    monkeypatch.delenv("AIGC_FULL", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with matplotlib.rc_context({"backend": "agg"}):
        runpy.run_path(str(path))
        plt.close("all")
    assert capsys.readouterr().out.strip()


def test_fgd_comes_out_first_without_its_trace_too(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("AIGC_OPENB", str(tmp_path))
    with matplotlib.rc_context({"backend": "agg"}):
        runpy.run_path(str(next(path for path in NOTEBOOKS if path.stem.startswith("does_fgd"))))
        plt.close("all")
    assert "published" not in capsys.readouterr().out


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 8
