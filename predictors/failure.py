"""The chance that a task fails, apart from how long it runs: a decayed beta mean per model."""

from __future__ import annotations

from predictors.decay import DecayedMeans
from predictors.features import Request

_MEMORY_S = 7 * 86400.0
_PRIOR = 0.015
"""Chance of failure before anything is known."""
_STRENGTH = 20.0
"""A model starts with its method's rate, counted as this many tasks."""


class FailureModel:
    """Decayed failure rates: of the method, of the model, of the model with its kind of request."""

    __slots__ = ("rates",)

    def __init__(self, cells: int = 20_000) -> None:
        self.rates = DecayedMeans(_MEMORY_S, cells)

    def chance(self, request: Request, now_s: float) -> float:
        """Return the chance of failure, within (0, 1)."""
        chance = self.rates.shrunk(request.method, now_s, _PRIOR, _STRENGTH)
        return self.rates.shrunk((request.method, request.model), now_s, chance, _STRENGTH)

    def learn(self, request: Request, now_s: float, failed: bool) -> None:
        """Learn one outcome that the task itself is answerable for; a lost node says nothing about a model."""
        value = 1.0 if failed else 0.0
        self.rates.add(request.method, now_s, value)
        self.rates.add((request.method, request.model), now_s, value)
