"""Reads a slice of the Philly trace straight into columns; what is odd is left to `sim.readers.philly` and its messages."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from engine.tasks import SECOND
from sim.jobs.workload import Jobs, from_workload
from sim.readers import registry
from sim.readers.philly import COLUMNS
from sim.readers.rows import open_text
from sim.workload import WorkloadError

_TIME = len("2017-10-01 00:00:00")


def read_philly(path: Path) -> Jobs:
    """Read a trace with virtual clusters, which become tenants; raises `WorkloadError`. Slices in plain form are read at once."""
    plain = _plain(path)
    return from_workload(registry.read(path)) if plain is None else plain


def _plain(path: Path) -> Jobs | None:
    try:
        with open_text(path) as file:
            rows = list(csv.reader(file))
        vc, size, at, length = (rows[0].index(name) for name in COLUMNS)
        body = rows[1:]
        moments = [row[at] for row in body]
        submit = np.asarray(moments, "datetime64[s]").astype(np.int64) * SECOND
        gpus = np.asarray([row[size] for row in body]).astype(np.int64)
        seconds = np.asarray([row[length] for row in body]).astype(np.float64)
    except (ValueError, IndexError, OSError, EOFError, csv.Error, WorkloadError):
        return None
    width = len(rows[0])
    odd = any(len(row) != width or not row[vc] or row[vc] != row[vc].strip() for row in body)
    if odd or {len(moment) for moment in moments} != {_TIME} or not np.isfinite(seconds).all() or (seconds < 0).any():
        return None
    if (gpus < 0).any() or not (gpus > 0).any():
        return None
    kept = np.flatnonzero(gpus > 0)
    kept = kept[np.argsort(submit[kept], kind="stable")]
    names = [body[row][vc] for row in kept.tolist()]
    tenants = tuple(dict.fromkeys(names))
    row_of = {name: row for row, name in enumerate(tenants)}
    run_us = np.maximum(1, np.rint(seconds[kept] * SECOND)).astype(np.int64)
    return Jobs(
        submit[kept] - submit[kept[0]],
        run_us,
        gpus[kept],
        run_us,
        np.zeros(len(kept), np.int64),
        np.asarray([row_of[name] for name in names], np.int64),
        tenants,
        tuple(f"line-{row + 2}" for row in kept.tolist()),
    )
