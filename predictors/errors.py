"""How far a predictor's centres are off: the size of the error by what is known, and the shape of it from a pool of recent ones."""

from __future__ import annotations

import math

from predictors.recursive import RecursiveLeastSquares, Vector
from predictors.residuals import ResidualPool

SPREAD_COLUMNS = 10
_START = -1.5
_LOSS_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
NEWNESS = 0.45
"""A model's first request errs by e to this more than others: new models differ more from each other than one from itself."""
_CLIP = 12.0
"""Standardised residuals are cut here, six times the usual spread: one freak must not stretch every tail."""


class Errors:
    """What a stack of centres learned about its own errors, in log seconds."""

    __slots__ = ("pool", "spread")

    def __init__(self, pool: int, forgetting: float) -> None:
        self.spread = RecursiveLeastSquares([_START] + [0.0] * (SPREAD_COLUMNS - 1), ridge=4.0, forgetting=forgetting)
        self.pool = ResidualPool(pool)

    def scale(self, row: Vector, model_weight: float) -> float:
        """Return the expected size of the error: the exponential of the mean log of it."""
        return math.exp(min(0.3, max(-6.0, self.spread.predict(row) + NEWNESS / (1.0 + model_weight))))

    def learn(self, error: float, scale: float, row: Vector, drawn: bool = False) -> None:
        """Learn one error and the scale that was expected of it; of one that was drawn, only the shape."""
        self.pool.add(max(-_CLIP, min(_CLIP, error / scale)))
        if not drawn:
            self.spread.learn(row, math.log(min(max(abs(error), 0.002), 3.0)))

    def loss(self, centre: float, scale: float, seconds: float) -> float:
        """Return the mean quantile loss in seconds that a prediction of this centre and scale comes to."""
        total, exp = 0.0, math.exp
        for level, residual in zip(_LOSS_LEVELS, self.pool.quantiles(_LOSS_LEVELS), strict=True):
            over = seconds - exp(min(centre + scale * residual, 20.0))
            total += level * over if over >= 0.0 else (level - 1.0) * over
        return total / len(_LOSS_LEVELS)
