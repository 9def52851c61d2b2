"""Least squares that learns one row at a time and slowly forgets: the linear part of the online predictor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


class RecursiveLeastSquares:
    """Ridge regression updated per observation, with exponential forgetting.

    ``forgetting`` is the factor by which the past loses weight per observation; ``ridge`` the prior precision of every coefficient
    around ``start``. The trace of the covariance is capped, so columns that stay silent for long do not blow it up.
    """

    __slots__ = ("_trace_cap", "covariance", "forgetting", "weights")

    def __init__(self, start: Sequence[float], ridge: float, forgetting: float) -> None:
        self.weights: Vector = np.array(start, dtype=np.float64)
        self.covariance: Vector = np.eye(len(start)) / ridge
        self.forgetting = forgetting
        self._trace_cap = len(start) / ridge

    def predict(self, row: Vector) -> float:
        """Return the estimate for one row of features."""
        return float(row.dot(self.weights))

    def learn(self, row: Vector, target: float, weight: float = 1.0) -> None:
        """Move the coefficients towards one observed target; ``weight`` is its precision relative to an ordinary row."""
        covariance, weights = self.covariance, self.weights
        direction = covariance.dot(row)
        gain = direction / (self.forgetting / weight + float(row.dot(direction)))
        weights += gain * (target - float(row.dot(weights)))
        covariance -= gain[:, None] * direction
        if np.add.reduce(covariance.diagonal()) < self._trace_cap:
            covariance /= self.forgetting

    def keep_positive(self, first: int, end: int) -> None:
        """Bring coefficients of a range that fell below zero back to it; the others move as the squares that remain least ask."""
        weights = self.weights
        if float(weights[first:end].min()) >= 0.0:
            return
        for place in range(first, end):
            if weights[place] < 0.0:
                weights -= self.covariance[:, place] * (weights[place] / self.covariance[place, place])
        np.maximum(weights[first:end], 0.0, out=weights[first:end])
