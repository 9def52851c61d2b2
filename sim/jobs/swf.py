"""Reads a batch log in the Standard Workload Format straight into columns, for logs of a million jobs.

It takes what `sim.readers.swf` takes, from files whose every line is whole; what is odd is left to that reader and its messages.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import IO

import numpy as np

from engine.tasks import SECOND
from sim.jobs.workload import Jobs, from_workload
from sim.readers import registry

_COLUMNS = (0, 1, 3, 4, 7, 8, 10)
"""Job number, submission, run time, processors allocated and asked for, time asked for, status."""


def read_swf(path: Path) -> Jobs:
    """Read a log, packed with gzip or not; raises `WorkloadError`. Time counts from the first submission; tenants are not kept."""
    try:
        with _open(path) as file:
            table = np.loadtxt(file, comments=";", usecols=_COLUMNS, ndmin=2)
    except (OSError, ValueError, EOFError):
        return from_workload(registry.read(path, name="swf"))
    number, submit, run, allocated, asked, limit, status = table.T
    size = np.where(asked > 0, asked, allocated)
    odd = (
        (number < 0).any() or (np.unique(number).size < len(number)) or (size % 1).any() or not np.isfinite(table).all()
    )
    whole = (run >= 0) & (size > 0) & ~np.isin(status, (2, 3, 4)) & ~((status == 5) & (run == 0))
    if odd or not whole.any():
        return from_workload(registry.read(path, name="swf"))
    table = table[whole]
    table = table[np.argsort(table[:, 1], kind="stable")]
    number, submit, run, allocated, asked, limit, status = table.T
    run_us = np.maximum(1, np.rint(run * SECOND)).astype(np.int64)
    nothing = np.zeros(len(table), np.int64)
    return Jobs(
        np.rint(submit * SECOND).astype(np.int64) - round(float(submit[0]) * SECOND),
        run_us,
        np.where(asked > 0, asked, allocated).astype(np.int64),
        np.where(limit > 0, np.rint(limit * SECOND), run_us).astype(np.int64),
        nothing,
        nothing,
        names=tuple(f"job-{value}" for value in number.astype(np.int64).tolist()),
    )


def _open(path: Path) -> IO[str]:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rt", encoding="utf-8") if packed else path.open(encoding="utf-8")
