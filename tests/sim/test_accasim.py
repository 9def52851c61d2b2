"""Job by job against AccaSim: its measured start times for a log; data/accasim/README.md tells how they were made."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from sim.jobs import Jobs, JobsResult, from_workload, simulate_jobs
from sim.jobs.swf import read_swf
from sim.readers import registry
from sim.workload import WorkloadError

DATA = Path(__file__).parent / "data" / "accasim"
FIRST_S = 420
"""Submission of the log's first job: ours counts from it."""


@pytest.fixture(scope="module")
def log() -> Jobs:
    return read_swf(DATA / "workload.swf")


@pytest.fixture(scope="module")
def measured(log: Jobs) -> dict[str, list[int]]:
    with (DATA / "starts.csv").open() as file:
        rows = {f"job-{row['job']}": row for row in csv.DictReader(file)}
    return {kind: [int(rows[name][kind]) for name in log.names] for kind in ("fifo", "easy", "sjf")}


def _starts(log: Jobs, policy: str, backfill: str, placement: str) -> list[int]:
    result = simulate_jobs(log, 60, 4, policy, backfill=backfill, placement=placement, spread=True)
    return _seconds(result)


def _seconds(result: JobsResult) -> list[int]:
    return (result.start_us // 1_000_000 + FIRST_S).tolist()


def test_fifo_with_first_fit_starts_every_job_when_accasim_does(log, measured) -> None:
    assert _starts(log, "fifo", "none", "first-fit") == measured["fifo"]
    assert max(measured["fifo"][row] - FIRST_S - int(log.submit_us[row] // 1_000_000) for row in range(len(log))) > 3600


def test_shortest_first_with_best_fit_starts_every_job_when_accasim_does(log, measured) -> None:
    assert _starts(log, "shortest-estimate", "none", "best-fit") == measured["sjf"]


def test_easy_in_accasims_reading_starts_every_job_when_accasim_does(log, measured) -> None:
    assert _starts(log, "fifo", "accasim", "first-fit") == measured["easy"]


def test_the_textbooks_easy_differs_from_accasims_by_its_two_rules_alone(log, measured) -> None:
    # AccaSim does not try the first in line before the time that it was promised, even when there is room sooner, and
    # it lets others start without looking at that promise. So some first ones start late, and nobody else must wait for them.
    textbook = _starts(log, "fifo", "easy", "first-fit")
    assert textbook != measured["easy"]
    first_to_differ = next(row for row in range(len(log)) if textbook[row] != measured["easy"][row])
    assert textbook[first_to_differ] < measured["easy"][first_to_differ]
    accasims = simulate_jobs(log, 60, 4, "fifo", backfill="accasim", placement="first-fit", spread=True)
    held = [row for row in range(len(log)) if _had_room_while_waiting(accasims, row)]
    assert held, "AccaSim left no job waiting while there was room for it; then what is its difference?"


def _had_room_while_waiting(result: JobsResult, row: int) -> bool:
    """Tell whether just before a job's start, and after its submission, its processors were free."""
    start, jobs = result.start_us, result.jobs
    moments = np.unique(np.concatenate((result.end_us, jobs.submit_us)))
    moments = moments[(moments >= jobs.submit_us[row]) & (moments < start[row])]
    for at in moments.tolist():
        busy = jobs.gpus[(start <= at) & (result.end_us > at)].sum()
        if 240 - busy >= jobs.gpus[row]:
            return True
    return False


def test_the_column_reader_reads_what_the_trace_reader_reads(log, tmp_path) -> None:
    slow = from_workload(registry.read(DATA / "workload.swf", name="swf"))
    for column in ("submit_us", "run_us", "gpus", "estimate_us"):
        assert getattr(log, column).tolist() == getattr(slow, column).tolist(), column
    assert log.names == slow.names


@pytest.mark.parametrize(
    "line",
    [
        "3 50 -1 -1 4 -1 -1 4 60 -1 0 1 1 -1 -1 -1 -1 -1",
        "3 50 -1 0 4 -1 -1 4 60 -1 5 1 1 -1 -1 -1 -1 -1",
        "3 50 -1 20 8 -1 -1 -1 -1 -1 1 1 1 -1 -1 -1 -1 -1",
        "3 5 -1 20 8 -1 -1 4 90 -1 1 1 1 -1 -1 -1 -1 -1",
        "3 50 -1 20 -1 -1 -1 -1 90 -1 1 1 1 -1 -1 -1 -1 -1",
        "3 50 -1 20 8 -1 -1 4 90 -1 3 1 1 -1 -1 -1 -1 -1",
    ],
)
def test_unknown_values_mean_the_same_to_both_readers(line, tmp_path) -> None:
    log = tmp_path / "odd.swf"
    plain = "{0} {1} -1 9 2 -1 -1 2 30 -1 1 1 1 -1 -1 -1 -1 -1"
    log.write_text("\n".join(["; UnixStartTime: 0", plain.format(1, 10), plain.format(2, 40), line, ""]))
    fast, slow = read_swf(log), from_workload(registry.read(log, name="swf"))
    for column in ("submit_us", "run_us", "gpus", "estimate_us"):
        assert getattr(fast, column).tolist() == getattr(slow, column).tolist(), column
    assert fast.names == slow.names


def test_the_log_is_what_the_benchmark_writes(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    benchmark = runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "jobs.py"))
    benchmark["write_swf"](tmp_path / "again.swf", 600, 0.85, seed=3)
    assert (tmp_path / "again.swf").read_text() == (DATA / "workload.swf").read_text()


def test_a_broken_line_of_a_log_is_named(tmp_path) -> None:
    log = tmp_path / "broken.swf"
    log.write_text("1 10 -1 9 2 -1 -1 2 30 -1 1 1 1 -1 -1 -1 -1 -1\n2 x -1 9 2 -1 -1 2 30 -1 1 1 1 -1 -1 -1 -1 -1\n")
    with pytest.raises(WorkloadError, match="line 2, submit_time"):
        read_swf(log)
