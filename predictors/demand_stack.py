"""The stack of a demand forecast: a Poisson regression learned online, and the convex combination of all experts.

The regression takes Newton steps on the Poisson likelihood with a forgetting factor. The combination weighs the experts by the
regret against each of them (second-order exponential weights), so no expert is ever dropped.
"""

from __future__ import annotations

import numpy as np

from predictors.demand_series import EXPERTS, FEATURES, FIRST_WEIGHT, POISSON, Drawn, Floats

_FORGET = 0.9997
_REGRET_FORGET = 0.999
_FIRST_SPREAD = 20.0
_K = len(EXPERTS)


class Stack:
    """Learns one horizon of many series."""

    def __init__(self, series: int) -> None:
        self.weights: Floats = np.zeros((series, FEATURES))
        self.covariance: Floats = np.zeros((series, FEATURES, FEATURES))
        self.regret: Floats = np.zeros((series, _K))
        self.variance: Floats = np.zeros((series, _K))
        for row in range(series):
            self.begin(row)

    def begin(self, row: int) -> None:
        """Give a row to a new series."""
        self.weights[row] = 0.0
        self.weights[row, FIRST_WEIGHT] = 1.0
        self.covariance[row] = np.eye(FEATURES) * _FIRST_SPREAD
        self.regret[row] = self.variance[row] = 0.0

    def regress(self, drawn: Drawn) -> None:
        """Fill in the regression's column."""
        expected = np.expm1(np.minimum(np.einsum("sf,sf->s", self.weights, drawn.features), np.log1p(drawn.most)))
        drawn.experts[:, POISSON] = np.maximum(0.0, expected)

    def combine(self, drawn: Drawn) -> Floats:
        """Return the combination, [series], per bin."""
        found: Floats = np.einsum("sk,sk->s", self.shares(), drawn.experts)
        return found

    def shares(self) -> Floats:
        """Return how much each expert counts, [series, experts]; every share is above 0 and a row's sum is 1."""
        rate = np.minimum(0.5, np.sqrt(np.log(_K) / (1.0 + self.variance)))
        power = 2.0 * rate * self.regret
        share = rate * np.exp(np.maximum(power - power.max(axis=1, keepdims=True), -500.0))
        found: Floats = share / share.sum(axis=1, keepdims=True)
        return found

    def learn(self, drawn: Drawn, point: Floats, came: Floats, active: Floats) -> None:
        """Learn what came after `drawn`, [series] per bin, from the series that were there then (`active` 1, else 0)."""
        self._learn_regression(drawn, came, active)
        miss = point - came
        gain = np.sign(miss)[:, None] * (point[:, None] - drawn.experts) * active[:, None]
        self.regret = (self.regret + gain) * _REGRET_FORGET
        self.variance = (self.variance + gain * gain) * _REGRET_FORGET

    def _learn_regression(self, drawn: Drawn, came: Floats, active: Floats) -> None:
        x = drawn.features
        mean = np.exp(np.clip(np.einsum("sf,sf->s", self.weights, x), 0.0, 12.0))
        weight = np.minimum(mean, 20.0) / 6.0
        spread = np.einsum("sfg,sg->sf", self.covariance, x)
        gain = spread / (_FORGET / weight + np.einsum("sf,sf->s", x, spread))[:, None] * active[:, None]
        error = np.clip((came + 1.0 - mean) / mean, -1.0, 3.0)
        self.weights += gain * error[:, None]
        forget = np.where(active > 0, _FORGET, 1.0)
        self.covariance -= gain[:, :, None] * spread[:, None, :]
        self.covariance /= forget[:, None, None]
        # What is never seen must not be forgotten without bound.
        trace = np.einsum("sff->s", self.covariance)
        most = 4.0 * FEATURES * _FIRST_SPREAD
        self.covariance *= np.minimum(1.0, most / np.maximum(trace, 1e-9))[:, None, None]
