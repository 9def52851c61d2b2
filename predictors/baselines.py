"""What the online predictor is measured against. scikit-learn is imported here alone, and only when a report is made."""

from __future__ import annotations

import heapq
import statistics
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.tasks import SECOND
from predictors.gentd26 import Row

Series = NDArray[np.float64]
_LAST = 400


def global_mean(train: Sequence[Row], test: Sequence[Row]) -> Series:
    """Return the mean run time of the training part for every row."""
    return np.full(len(test), float(_seconds(train).mean()))


def mean_per_model(train: Sequence[Row], test: Sequence[Row]) -> Series:
    """Return the training mean of each row's model; the global mean for a model that was not there."""
    by_model: dict[str, list[float]] = {}
    for row in train:
        by_model.setdefault(row.model, []).append(row.run_us / SECOND)
    means = {model: statistics.fmean(values) for model, values in by_model.items()}
    everything = float(_seconds(train).mean())
    return np.array([means.get(row.model, everything) for row in test])


def median_of_last(train: Sequence[Row], test: Sequence[Row]) -> Series:
    """Return the median of the last 400 requests with the row's model, steps and images that had finished by then.

    Online, with the delay of labels; the model's own last 400, then everything's, stand in for a combination never seen.
    """
    lasts: dict[tuple[object, ...], deque[float]] = {}
    running: list[tuple[int, int, Row]] = []
    predictions: list[float] = []
    first = len(train)
    for index, row in enumerate([*train, *test]):
        while running and running[0][0] <= row.submitted_us:
            done = heapq.heappop(running)[2]
            for key in _cells(done):
                lasts.setdefault(key, deque(maxlen=_LAST)).append(done.run_us / SECOND)
        if index >= first:
            seen = next((lasts[key] for key in _cells(row) if key in lasts), None)
            predictions.append(statistics.median(seen) if seen else 1.0)
        heapq.heappush(running, (row.submitted_us + row.run_us, index, row))
    return np.array(predictions)


def ridge(train: Sequence[Row], test: Sequence[Row]) -> Series:
    """Return ridge regression on log run time: the parameters, and the model one-hot."""
    from sklearn.linear_model import Ridge

    models = _models(train)
    fitted = Ridge(alpha=1.0).fit(_one_hot(train, models), np.log(_seconds(train)))
    return _exp(fitted.predict(_one_hot(test, models)))


def boosting(train: Sequence[Row], test: Sequence[Row]) -> Series:
    """Return gradient boosting on log run time by the parameters alone, without history."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    models = _models(train)
    fitted = HistGradientBoostingRegressor(max_iter=200, learning_rate=0.08, min_samples_leaf=30, random_state=0)
    fitted.fit(_table(train, models), np.log(_seconds(train)))
    return _exp(fitted.predict(_table(test, models)))


def _cells(row: Row) -> tuple[tuple[object, ...], ...]:
    return (row.model, row.steps, row.images), (row.model,), ()


def _seconds(rows: Sequence[Row]) -> Series:
    return np.array([row.run_us / SECOND for row in rows])


def _models(rows: Sequence[Row]) -> dict[str, int]:
    return {model: number for number, model in enumerate(sorted({row.model for row in rows}))}


def _table(rows: Sequence[Row], models: dict[str, int]) -> Series:
    kinds = {"TXT_2_IMG": 0.0, "IMG_2_IMG": 1.0, "INPAINTING": 2.0}
    return np.array(
        [
            [
                float(models.get(row.model, -1)),
                kinds.get(row.kind, 3.0),
                np.log(max(row.images, 1.0)),
                np.log(max(row.steps, 1.0)),
                float(row.loras),
                np.log1p(row.prompt_length),
            ]
            for row in rows
        ]
    )


def _one_hot(rows: Sequence[Row], models: dict[str, int]) -> Series:
    table = _table(rows, models)
    hot = np.zeros((len(rows), len(models) + 3))
    for index, row in enumerate(table):
        if row[0] >= 0:
            hot[index, int(row[0])] = 1.0
        if row[1] < 3:
            hot[index, len(models) + int(row[1])] = 1.0
    return np.hstack([hot, table[:, 2:]])


def _exp(log_s: object) -> Series:
    return np.asarray(np.exp(np.asarray(log_s, dtype=np.float64)), dtype=np.float64)
