"""Saves and restores a demand forecast: an npz without pickle, with a schema version and a checksum, replaced atomically."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from predictors.demand import DemandModel, Promise
from predictors.demand_series import HORIZONS, Drawn, Floats, History

SCHEMA = 1
_HISTORY = ("cumulative", "averages", "level", "season", "age")
_MODEL = ("counts", "run_us", "rates")
_STACK = ("weights", "covariance", "regret", "variance")
_CALIBRATION = ("pool", "seen", "levels", "bias")
_PROMISE = ("point", "arrivals", "work", "active", "arrival_quantiles", "work_quantiles")
_DRAWN = ("experts", "features", "most")


_BROKEN = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    NotImplementedError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)
"""What reading a damaged archive may raise."""


class DemandUnusable(ValueError):
    """A saved forecast is damaged or of another schema; start without it, and it will be written anew."""


def dumps(model: DemandModel) -> bytes:
    """Return everything that a model has learned."""
    head: dict[str, Any] = {
        "schema": SCHEMA,
        "most_series": model.most_series,
        "totals": model.totals,
        "rows": list(model.rows.items()),
        "bin": None if model.history is None else model.history.bin,
        "promises": [[each.bin for each in promises] for promises in model.promises],
    }
    arrays = dict(_arrays(model))
    digest = _digest(arrays)
    text = json.dumps({**head, "sha256": digest}, separators=(",", ":")).encode()
    arrays["head"] = np.frombuffer(text, dtype=np.uint8)
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def loads(data: bytes) -> DemandModel:
    """Return the model; raises DemandUnusable."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        head = json.loads(arrays.pop("head").tobytes())
        schema, digest = head["schema"], head["sha256"]
    except _BROKEN as error:
        raise DemandUnusable("not a saved demand forecast; remove it to start anew") from error
    if schema != SCHEMA:
        raise DemandUnusable(f"schema {schema}, this version reads {SCHEMA}; remove it to start anew")
    if _digest(arrays) != digest:
        raise DemandUnusable("the checksum differs, the file is damaged; remove it to start anew")
    try:
        return _restored(head, arrays)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise DemandUnusable(f"the file lacks something ({error}); remove it to start anew") from error


def save(model: DemandModel, path: Path) -> None:
    """Write a model in place of the file at ``path``; a crash leaves the old file or the new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(dumps(model))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load(path: Path) -> DemandModel:
    """Return the model saved at ``path``; raises FileNotFoundError or DemandUnusable."""
    try:
        return loads(path.read_bytes())
    except DemandUnusable as error:
        raise DemandUnusable(f"{path}: {error}") from error


def _arrays(model: DemandModel) -> Iterator[tuple[str, Floats]]:
    for name in _MODEL:
        yield name, getattr(model, name)
    if model.history is not None:
        for name in _HISTORY:
            yield f"history.{name}", getattr(model.history, name)
    for place in range(len(HORIZONS)):
        for name in _STACK:
            yield f"stack{place}.{name}", getattr(model.stacks[place], name)
        for kind, calibration in (("arrivals", model.arrivals[place]), ("work", model.work[place])):
            for name in _CALIBRATION:
                yield f"{kind}{place}.{name}", getattr(calibration, name)
        promises = model.promises[place]
        if promises:
            for name in _PROMISE:
                yield f"promise{place}.{name}", np.stack([getattr(each, name) for each in promises])
            for name in _DRAWN:
                yield f"promise{place}.{name}", np.stack([getattr(each.drawn, name) for each in promises])


def _restored(head: dict[str, Any], arrays: dict[str, Floats]) -> DemandModel:
    model = DemandModel(int(head["most_series"]), totals=bool(head["totals"]))
    model.rows = {str(key): int(row) for key, row in head["rows"]}
    for name in _MODEL:
        setattr(model, name, arrays[name])
    if head["bin"] is not None:
        history = model.history = History(model.most_series, int(head["bin"]))
        for name in _HISTORY:
            setattr(history, name, arrays[f"history.{name}"])
    for place, bins in enumerate(head["promises"]):
        for name in _STACK:
            setattr(model.stacks[place], name, arrays[f"stack{place}.{name}"])
        for kind, calibration in (("arrivals", model.arrivals[place]), ("work", model.work[place])):
            for name in _CALIBRATION:
                setattr(calibration, name, arrays[f"{kind}{place}.{name}"])
        promises: deque[Promise] = model.promises[place]
        for nth, number in enumerate(bins):
            drawn = Drawn(*(arrays[f"promise{place}.{name}"][nth].copy() for name in _DRAWN))
            point, arrivals, work, active, *quantiles = (
                arrays[f"promise{place}.{name}"][nth].copy() for name in _PROMISE
            )
            promises.append(Promise(int(number), drawn, point, arrivals, work, active, *quantiles))
    return model


def _digest(arrays: dict[str, Floats]) -> str:
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(name.encode())
        found.update(np.ascontiguousarray(arrays[name]).tobytes())
    return found.hexdigest()
