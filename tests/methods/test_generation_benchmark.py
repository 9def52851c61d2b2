"""The benchmark of generation runs unattended: it keeps to its time, tells what it left out, and goes on when a part fails."""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

executors = pytest.importorskip("benchmarks.executors", reason="the benchmarks are not in this tree")
generation = pytest.importorskip("benchmarks.generation", reason="the benchmarks are not in this tree")

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]


def new_run(folder: Path, ends_at: float = math.inf, **options: Any) -> Any:
    given = {"parts": ["step", "mix"], "json": folder / "found.json", "model": None, "device": "cpu", **options}
    return executors.Run(argparse.Namespace(**given), Console(file=io.StringIO(), width=130), ends_at)


def test_a_part_that_fails_is_told_and_the_next_ones_are_measured(tmp_path: Path) -> None:
    run = new_run(tmp_path)

    def failing() -> Any:
        raise ValueError("no pictures")

    run.measure("small", "step", "steps", failing)
    run.measure("small", "mix", "a mix", lambda: {"ms": 1.5})
    run.measure("small", "urgent", "not asked for", failing)
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["small"] == {"mix": [{"ms": 1.5}]}
    assert found["failed"] == ["step of small: ValueError: no pictures"]
    assert "1.50" in run.console.file.getvalue()


def test_no_part_begins_when_the_time_is_over(tmp_path: Path) -> None:
    run = new_run(tmp_path, ends_at=time.monotonic() - 1.0)
    run.measure("small", "step", "steps", lambda: pytest.fail("it was measured"))
    assert run.left_out == ["step of small: no time left"]
    assert run.report == {}


def test_compiling_is_ended_with_the_time_and_what_was_known_stays(tmp_path: Path) -> None:
    run = new_run(tmp_path, ends_at=time.monotonic() - 1.0)
    began = time.monotonic()
    assert executors._compiled_apart(run, "small", 4) == []
    assert run.left_out == ["compiled of small: ended when the time was over"]
    assert time.monotonic() >= began + 1.0


def test_ways_of_one_after_the_other_stop_when_their_time_is_over() -> None:
    assert list(generation._in_time([1, 2, 3], 0.0)) == [1]
    assert list(generation._in_time([1, 2, 3], math.inf)) == [1, 2, 3]


@pytest.mark.slow
def test_every_part_measures_a_small_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    small = ["--architecture", "small", "--device", "cpu", "--requests", "2", "--capacity", "2", "--repeats", "2"]
    parts = ["--parts", "step", "urgent", "switching", "mix", "gaps"]
    arguments = ["executors", *small, "--steps", "2", "--batches", "1", *parts, "--json", str(file)]
    monkeypatch.setattr("sys.argv", arguments)
    assert executors.main() == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    assert set(found["small"]) == {"parameters", "step", "urgent", "switching", "mix", "gaps"}
    assert found["small"]["urgent"][0]["steps_waited"] == 1
    assert [row["way"] for row in found["small"]["mix"]] == ["ours", "one by one", "reloaded", "static"]
    assert max(row["largest_difference"] for row in found["small"]["mix"]) <= 1.0
    alone, between, beside = found["small"]["gaps"]
    assert alone["others_made"] == 0 < between["others_made"]
    assert beside["calls"] >= 12
    assert "failed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "gpu", "steps", "minutes", "architecture", "compiles"),
    [
        ([], True, 30, executors.GPU_MINUTES, ["sd15", "sdxl"], True),
        ([], False, None, None, None, False),
        (["--architecture", "small", "--steps", "4", "--minutes", "2"], True, 4, 2.0, ["small"], True),
        (["--compile"], False, None, None, None, True),
    ],
)
def test_what_is_left_open_suits_the_device(
    monkeypatch: pytest.MonkeyPatch,
    given: list[str],
    gpu: bool,
    steps: int | None,
    minutes: float | None,
    architecture: list[str] | None,
    compiles: bool,
) -> None:
    monkeypatch.setattr("sys.argv", ["executors", *given])
    monkeypatch.setattr(executors.device, "resolve", lambda _: torch.device("cuda" if gpu else "cpu"))
    options = executors._options()
    assert executors._fill_in(options) is gpu
    assert (options.steps, options.minutes, options.architecture) == (steps, minutes, architecture)
    assert ("compiled" in options.parts) is compiles
    assert (options.model is None) is (architecture is not None)
