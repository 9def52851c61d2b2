"""Saves and restores what was learned: JSON with a schema version, a watermark and a checksum, replaced atomically.

JSON keeps every float exactly and can hold nothing that runs when it is read; a pickle could.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Hashable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from engine.tasks import Micros
from predictors.challenger import ChallengerSettings, Refit, at_once
from predictors.decay import DecayedMeans
from predictors.drift import OwnShifts
from predictors.duration import DurationModel, DurationSettings
from predictors.errors import Errors
from predictors.ladder import Ladder
from predictors.predictor import Predictor
from predictors.recursive import RecursiveLeastSquares

SCHEMA = 2


class StateUnusable(ValueError):
    """A saved state is damaged or of another schema; start without it, and it will be written anew."""


def save(predictor: Predictor, path: Path, extra: dict[str, Any] | None = None) -> None:
    """Write a predictor's state, with ``extra`` plain values of the caller's, in place of the file at ``path``.

    A crash at any moment leaves the old file or the new one, never a part.
    """
    state = json.dumps({"predictor": _predictor(predictor), "extra": extra or {}}, separators=(",", ":"))
    head = {
        "schema": SCHEMA,
        "watermark_us": predictor.watermark_us,
        "sha256": hashlib.sha256(state.encode()).hexdigest(),
    }
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(json.dumps(head) + "\n" + state + "\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _sync_directory(path.parent)
    finally:
        part.unlink(missing_ok=True)


def load(path: Path, refit: Refit = at_once) -> tuple[Predictor, dict[str, Any]]:
    """Return the predictor saved at ``path`` and the caller's extra values.

    Raises FileNotFoundError, or StateUnusable when the file is damaged or of another schema.
    """
    head_line, _, state = path.read_text(encoding="utf-8").partition("\n")
    state = state.rstrip("\n")
    try:
        head = json.loads(head_line)
        schema, checksum = head["schema"], head["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise StateUnusable(f"{path}: not a saved predictor; remove it to start anew") from error
    if schema != SCHEMA:
        raise StateUnusable(f"{path}: schema {schema}, this version reads {SCHEMA}; remove it to start anew")
    if hashlib.sha256(state.encode()).hexdigest() != checksum:
        raise StateUnusable(f"{path}: checksum differs, the file is damaged; remove it to start anew")
    document = json.loads(state)
    return _restored(document["predictor"], refit), document["extra"]


def watermark_us(path: Path) -> Micros:
    """Return up to which time the state at ``path`` has learned, without reading it all."""
    with path.open(encoding="utf-8") as file:
        return int(json.loads(file.readline())["watermark_us"])


def _predictor(predictor: Predictor) -> dict[str, Any]:
    return {
        "watermark_us": predictor.watermark_us,
        "observed": list(predictor.observed),
        "settings": asdict(predictor.settings),
        "methods": [[name, _duration(model)] for name, model in predictor.methods.items()],
        "failures": _rows(predictor.failures.rates.rows()),
        "memory": {
            "family_lines": [[key, cell] for key, cell in predictor.memory.families.items()],
            "firsts": _rows(predictor.memory.firsts.rows()),
            "lines": [[key, cell] for key, cell in predictor.memory.lines.items()],
            "pool": predictor.memory.pool.state(),
            "floors": [[key, value] for key, value in predictor.memory.floors.items()],
        },
        "host_memory": {
            "means": _rows(predictor.host_memory.means.rows()),
            "pool": predictor.host_memory.pool.state(),
        },
        "gpu_use": _rows(predictor.gpu_use.means.rows()),
        "speeds": {
            "reference": predictor.speeds.reference,
            "ratios": _rows(predictor.speeds.ratios.rows()),
            "shifts": _shifts(predictor.speeds.shifts),
        },
    }


def _restored(document: dict[str, Any], refit: Refit) -> Predictor:
    predictor = Predictor(_settings(document["settings"]), refit)
    predictor.watermark_us = document["watermark_us"]
    predictor.observed = dict.fromkeys(document["observed"])
    predictor.methods = {name: _restored_duration(model, refit) for name, model in document["methods"]}
    _fill(predictor.failures.rates, document["failures"])
    memory = document["memory"]
    predictor.memory.families = {_key(key): cell for key, cell in memory.get("family_lines", [])}
    _fill(predictor.memory.firsts, memory.get("firsts", []))
    predictor.memory.lines = {_key(key): cell for key, cell in memory["lines"]}
    predictor.memory.pool.restore(**memory["pool"])
    predictor.memory.floors = {_key(key): value for key, value in memory["floors"]}
    if "host_memory" in document:  # States that are older have none.
        _fill(predictor.host_memory.means, document["host_memory"]["means"])
        predictor.host_memory.pool.restore(**document["host_memory"]["pool"])
        _fill(predictor.gpu_use.means, document["gpu_use"])
    predictor.speeds.reference = document["speeds"]["reference"]
    _fill(predictor.speeds.ratios, document["speeds"]["ratios"])
    _fill_shifts(predictor.speeds.shifts, document["speeds"]["shifts"])
    return predictor


def _duration(model: DurationModel) -> dict[str, Any]:
    return {
        "settings": asdict(model.settings),
        "ladder": _rows(model.ladder.rows()),
        "tables": [_rows(table.rows()) for table in model.tables()],
        "correction": _recursion(model.correction),
        "champion": _errors(model.champion),
        "challenger": {"errors": _errors(model.challenger.errors), "standing": model.challenger.state()},
        "level": model.level.state(),
        "shifts": _shifts(model.shifts),
        "draws": model.draws,
    }


def _restored_duration(document: dict[str, Any], refit: Refit) -> DurationModel:
    model = DurationModel(_settings(document["settings"]), refit)
    _fill(model.ladder, document["ladder"])
    for table, rows in zip(model.tables(), document["tables"], strict=True):
        _fill(table, rows)
    _fill_recursion(model.correction, document["correction"])
    _fill_errors(model.champion, document["champion"])
    _fill_errors(model.challenger.errors, document["challenger"]["errors"])
    model.challenger.restore(document["challenger"]["standing"])
    model.level.restore(**document["level"])
    _fill_shifts(model.shifts, document["shifts"])
    model.draws = document["draws"]
    return model


def _rows(rows: Iterable[tuple[Hashable, list[float]]]) -> list[list[Any]]:
    return [[key, cell] for key, cell in rows]


def _fill(table: DecayedMeans | Ladder, rows: list[list[Any]]) -> None:
    table.cells = {_key(key): cell for key, cell in rows}


def _key(key: Any) -> Any:
    return tuple(_key(part) for part in key) if isinstance(key, list) else key


def _recursion(recursion: RecursiveLeastSquares) -> dict[str, Any]:
    return {"weights": recursion.weights.tolist(), "covariance": recursion.covariance.tolist()}


def _fill_recursion(recursion: RecursiveLeastSquares, document: dict[str, Any]) -> None:
    recursion.weights = np.array(document["weights"])
    recursion.covariance = np.array(document["covariance"])


def _errors(errors: Errors) -> dict[str, Any]:
    return {"spread": _recursion(errors.spread), "pool": errors.pool.state()}


def _fill_errors(errors: Errors, document: dict[str, Any]) -> None:
    _fill_recursion(errors.spread, document["spread"])
    errors.pool.restore(**document["pool"])


def _shifts(shifts: OwnShifts) -> dict[str, Any]:
    return {"alarms": shifts.alarms, "sums": list(shifts.rows())}


def _fill_shifts(shifts: OwnShifts, document: dict[str, Any]) -> None:
    shifts.alarms = document["alarms"]
    shifts.sums = {name: (up, down, spoke) for name, up, down, spoke in document["sums"]}


def _settings(document: dict[str, Any]) -> DurationSettings:
    return DurationSettings(**{**document, "challenger": ChallengerSettings(**document["challenger"])})


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
