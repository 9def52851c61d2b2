"""Predicts many tasks at once: what `Predictor.predict` says of each, worked out for all of them in arrays.

A queue of ten thousand is predicted in a few microseconds a task: each history is looked up once however many tasks share it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictors.challenger import bounded_rows
from predictors.decay import Cell, DecayedMeans
from predictors.duration import COLUMNS, MEMORIES, SPREAD, UNRESTS, WIDTH, DurationModel
from predictors.errors import NEWNESS
from predictors.features import COVARIATES, Request
from predictors.ladder import GUESS_STRENGTH
from predictors.recursive import Vector

Indices = NDArray[np.int64]
_OF_USER, _OF_SHAPE, _OF_MODEL_LORA, _OF_MODEL = slice(0, 3), slice(3, 5), slice(5, 6), slice(6, 8)
"""Which residual means are keyed by what, as `Request.memories` has it; the last one is of all."""


@dataclass(frozen=True, slots=True, eq=False)
class Outlooks:
    """Centre and scale in log seconds of many requests, and whether the challenger served."""

    centres: Vector
    scales: Vector
    served: bool


def look_many(model: DurationModel, requests: Sequence[Request], now_s: float, frame: float = 0.0) -> Outlooks:
    """Return what `DurationModel.look` returns for each request; none of them may declare a run time."""
    values = np.array([(*r.covariates, *r.load, *r.traits, r.work_s) for r in requests])
    covariates, load, traits, work_s = np.split(values, [COVARIATES, COVARIATES + 2, COVARIATES + 4], axis=1)
    starts = np.log(np.where(work_s[:, 0] > 0.0, work_s[:, 0] * np.exp(frame), model.settings.prior_s))
    first_of_style, of_style = _distinct([r.ladder[-1] for r in requests])
    first_of_user, of_user = _distinct([r.user for r in requests])
    styles, users = ([requests[place] for place in first] for first in (first_of_style, first_of_user))
    _, shape_of_style = _distinct([r.ladder[-2] for r in styles])
    # A user with a shape: as one number, which is quicker to compare than the names.
    first, of_shape = np.unique(
        of_user * len(styles) + shape_of_style[of_style], return_index=True, return_inverse=True
    )[1:]
    shapes = [requests[place] for place in first]
    keep, mean, sums, weights = _climb(model, styles, now_s)
    means, kept = np.empty((len(requests), len(MEMORIES))), np.empty((len(requests), len(MEMORIES)))
    groups = (
        (_OF_USER, users, of_user),
        (_OF_SHAPE, shapes, of_shape),
        (_OF_MODEL_LORA, styles, of_style),
        (_OF_MODEL, styles, of_style),
        (slice(8, 9), requests[:1], np.zeros(len(requests), dtype=np.int64)),
    )
    for places, members, of_member in groups:
        for place in range(places.start, places.stop):
            keys = [r.memories[place] for r in members]
            of_key = _shrunk(model.tables()[place], keys, now_s, MEMORIES[place][1])
            means[:, place], kept[:, place] = of_key[0][of_member], of_key[1][of_member]
    unrests = np.empty((len(requests), len(UNRESTS)))
    tables = model.tables()[len(MEMORIES) :]
    unrests[:, 0] = tables[0].shrunk(None, now_s, 0.0, UNRESTS[0][1])
    unrests[:, 1] = _shrunk(tables[1], [r.model for r in styles], now_s, UNRESTS[1][1])[0][of_style]
    unrests[:, 2] = _shrunk(tables[2], [r.user for r in users], now_s, UNRESTS[2][1])[0][of_user]
    base = keep[of_style] * starts + mean[of_style]
    rows = np.empty((len(requests), WIDTH))
    columns = (
        np.ones(len(requests)),
        covariates - (keep[of_style, None] * covariates + sums[of_style]),
        means,
        np.log1p(kept[:, 6]) - 1.0,
        np.log1p(kept[:, 7]) - 0.5,
        load,
        np.ones(len(requests)),
        np.log1p(kept[:, 0]) - 2.0,
        np.log1p(kept[:, 1]) - 0.5,
        np.log1p(weights[of_style, 3]) - 3.0,
        np.log1p(weights[of_style, 1]) - 5.0,
        np.abs(means[:, 1]),
        load[:, 0] - 1.0,
        unrests,
        base,
        covariates,
        traits,
    )
    place = 0
    for column in columns:
        width = 1 if column.ndim == 1 else column.shape[1]
        rows[:, place : place + width] = column[:, None] if column.ndim == 1 else column
        place += width
    return _outlooks(model, rows, base, weights[of_style, 1])


def _outlooks(model: DurationModel, rows: Vector, base: Vector, model_weights: Vector) -> Outlooks:
    centres = model.level.level + base + rows[:, :COLUMNS] @ model.correction.weights
    trees, errors, served = model.challenger.trees, model.champion, False
    if trees is not None and model.challenger.serving:
        centres = centres + bounded_rows(trees.predict_rows(rows))
        errors, served = model.challenger.errors, True
    spread = rows[:, SPREAD] @ errors.spread.weights + NEWNESS / (1.0 + model_weights)
    return Outlooks(centres, np.exp(np.clip(spread, -6.0, 0.3)), served)


def _distinct(keys: Iterable[Hashable]) -> tuple[Indices, Indices]:
    """Return where each key stands first, and for every place the number of its key."""
    numbers: dict[Hashable, int] = {}
    number = numbers.setdefault
    of_place = np.array([number(key, len(numbers)) for key in keys])
    return np.unique(of_place, return_index=True)[1], of_place


def _climb(model: DurationModel, members: Sequence[Request], now_s: float) -> tuple[Vector, Vector, Vector, Vector]:
    """Climb the ladder of each member from a start of its own.

    Return what is left of the start, what histories add to it, the same of the covariates, and each rung's weight.
    """
    count = len(members)
    keep, mean, sums = np.ones(count), np.zeros(count), np.zeros((count, COVARIATES))
    weights, strength = np.zeros((count, 5)), np.full(count, GUESS_STRENGTH)
    for rung in range(5):
        cells, there = _cells(model.ladder.cells, [r.ladder[rung] for r in members], 3 + COVARIATES)
        decay = np.exp(np.minimum(0.0, cells[:, -1] - now_s) / model.ladder.memory_s)
        weights[:, rung] = cells[:, 0] * decay
        hold = np.where(there, strength / (weights[:, rung] + strength), 1.0)
        share = np.where(there, decay / (weights[:, rung] + strength), 0.0)
        strength = np.where(there, model.ladder.strength, strength)
        keep *= hold
        mean = hold * mean + share * cells[:, 1]
        sums = hold[:, None] * sums + share[:, None] * cells[:, 2 : 2 + COVARIATES]
    return keep, mean, sums, weights


def _shrunk(table: DecayedMeans, keys: Sequence[Hashable], now_s: float, strength: float) -> tuple[Vector, Vector]:
    """Return each key's mean pulled to zero and how many fresh observations it stands on."""
    cells, _ = _cells(table.cells, keys, 3)
    decay = np.exp(np.minimum(0.0, cells[:, 2] - now_s) / table.memory_s)
    weights = cells[:, 0] * decay
    return cells[:, 1] * decay / (weights + strength), weights


def _cells(cells: Mapping[Any, Cell], keys: Sequence[Hashable], width: int) -> tuple[Vector, NDArray[np.bool_]]:
    nothing: Cell = [0.0] * (width - 1) + [-np.inf]
    get = cells.get
    found = np.array([get(key, nothing) for key in keys])
    return found, found[:, -1] > -np.inf
