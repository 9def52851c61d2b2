"""How long a task runs: the online stack of one AI method, which predicts one row and learns one row without batch training.

In log space: a ladder of nested decayed means, corrected by short-memory means of its own residuals through recursive least
squares; a second recursion predicts the size of the error, and a pool of standardised residuals gives the quantiles. All of it is
measured from one level, which moves when everything drifts at once.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from predictors.decay import DecayedMeans
from predictors.drift import LevelShift
from predictors.features import Request
from predictors.ladder import Ladder
from predictors.recursive import RecursiveLeastSquares, Vector
from predictors.residuals import NORMAL_SPREAD, ResidualPool

MINUTE_S = 60.0
HOUR_S = 3600.0
DAY_S = 86400.0

_MEMORIES: tuple[tuple[str, float, float], ...] = (
    ("user", 21 * DAY_S, 1.0),
    ("user", 20 * MINUTE_S, 1.0),
    ("user", 5 * MINUTE_S, 0.5),
    ("user_cell", 21 * DAY_S, 1.0),
    ("user_cell", HOUR_S, 1.0),
    ("model_lora", 2 * HOUR_S, 4.0),
    ("model", 30 * MINUTE_S, 4.0),
    ("model", 6 * MINUTE_S, 1.0),
    ("all", 10 * MINUTE_S, 4.0),
)
"""What each table of residuals is keyed by, its memory, and how many observations its zero prior counts for."""

_ELASTICITY_START = 0.5
"""Before anything is learned, run time grows with the square root of pictures, steps and pixels."""
_FLOOR_S = 1e-3
_NEWNESS = 0.45
"""A model's first request errs by e to this more than others: new models differ more from each other than one from itself."""
_CLIP = 12.0
"""Standardised residuals are cut here, six times the usual spread: one freak must not stretch every tail."""


@dataclass(frozen=True, slots=True)
class DurationSettings:
    """Knobs of the online stack; the defaults are those measured in docs/prediction.md."""

    ladder_memory_s: float = 7 * DAY_S
    strength: float = 8.0
    forgetting: float = 0.9998
    pool: int = 2000
    cells: int = 50_000
    prior_s: float = 10.0
    """Run time assumed for the very first task of a method that declares none."""


@dataclass(frozen=True, slots=True, eq=False)
class Outlook:
    """What the stack knew about one request when it was asked: enough to learn from the outcome later."""

    level: float
    """The frame it was made in; the other log seconds but `centre` are measured from it."""
    base: float
    """Log seconds by the ladder, and by what was declared."""
    ladder_mean: float
    declared_mean: float
    """NaN when nothing was declared."""
    centre: float
    """Log seconds after the correction, the level added."""
    scale: float
    row: Vector
    scale_row: Vector
    model_weight: float
    """How many fresh observations of the model stand behind it."""
    blind: bool
    """Neither history nor a declared time stood behind it: its error teaches nothing."""


class DurationModel:
    """The online stack of one method, in log seconds on the reference GPU model."""

    __slots__ = (
        "_draws",
        "_residual_means",
        "correction",
        "declared",
        "errors",
        "ladder",
        "level",
        "pool",
        "settings",
        "spread",
    )

    def __init__(self, settings: DurationSettings | None = None) -> None:
        self.settings = settings = settings or DurationSettings()
        self.ladder = Ladder(settings.ladder_memory_s, settings.strength, settings.cells)
        self._residual_means = [DecayedMeans(memory_s, settings.cells) for _, memory_s, _ in _MEMORIES]
        start = [0.0, *[_ELASTICITY_START] * 3, *[0.2] * len(_MEMORIES), 0.0, 0.0, 0.0, 0.0]
        self.correction = RecursiveLeastSquares(start, ridge=1.0, forgetting=settings.forgetting)
        self.spread = RecursiveLeastSquares([-1.5, 0, 0, 0, 0, 0, 0], ridge=4.0, forgetting=settings.forgetting)
        self.pool = ResidualPool(settings.pool)
        self.declared = DecayedMeans(settings.ladder_memory_s, settings.cells)
        self.errors = DecayedMeans(settings.ladder_memory_s, 8)
        self.level = LevelShift()
        self._draws = 0

    def look(self, request: Request, now_s: float) -> Outlook:
        """Return the stack's view of a request at a time (seconds)."""
        ladder_mean, distance, weights = self.ladder.climb(
            request.ladder, now_s, math.log(request.declared_s or self.settings.prior_s), request.covariates
        )
        base, declared_mean = ladder_mean, math.nan
        if request.declared_s > 0.0:
            declared_mean = math.log(request.declared_s)
            declared_mean += self.declared.shrunk(
                request.model, now_s, self.declared.shrunk(None, now_s, 0.0, 2.0), self.settings.strength
            )
            of_ladder = self.errors.shrunk("ladder", now_s, 1.0, 1.0)
            of_declared = self.errors.shrunk("declared", now_s, 0.25, 1.0)
            base += (declared_mean - base) * (of_ladder + 1e-9) / (of_ladder + of_declared + 2e-9)
        keys = _keys(request)
        values = [1.0, *distance]
        for (name, _, strength), table in zip(_MEMORIES, self._residual_means, strict=True):
            values.append(table.shrunk(keys[name], now_s, 0.0, strength))
        # How recently the model ran: one that went cold is loaded anew.
        values.append(math.log1p(self._residual_means[6].weight(request.model, now_s)) - 1.0)
        values.append(math.log1p(self._residual_means[7].weight(request.model, now_s)) - 0.5)
        values += request.load
        row = np.array(values)
        user = keys["user"]
        scale_row = np.array(
            [
                1.0,
                math.log1p(self._residual_means[0].weight(user, now_s)) - 2.0,
                math.log1p(self._residual_means[1].weight(user, now_s)) - 0.5,
                math.log1p(weights[3]) - 3.0,
                math.log1p(weights[1]) - 5.0,
                abs(values[5]),
                request.load[0] - 1.0,
            ]
        )
        return Outlook(
            level=self.level.level,
            base=base,
            ladder_mean=ladder_mean,
            declared_mean=declared_mean,
            centre=self.level.level + base + self.correction.predict(row),
            scale=math.exp(min(0.3, max(-6.0, self.spread.predict(scale_row) + _NEWNESS / (1.0 + weights[1])))),
            row=row,
            scale_row=scale_row,
            model_weight=weights[1],
            blind=weights[0] == 0.0 and request.declared_s <= 0.0,
        )

    def learn(self, request: Request, outlook: Outlook, now_s: float, seconds: float, trust: float = 1.0) -> None:
        """Learn from a task that ran for so long (seconds on the reference GPU model) and has finished at ``now_s``.

        ``trust`` below 1 says that the conversion to the reference is uncertain: then histories learn less, errors nothing.
        """
        log_s = math.log(max(seconds, _FLOOR_S)) - self.level.level
        if not outlook.blind and trust > 0.5:
            self._learn_error(request, outlook, now_s, log_s)
        self.ladder.add(request.ladder, now_s, log_s, request.covariates, trust)
        if request.declared_s > 0.0:
            self.errors.add("ladder", now_s, (log_s - outlook.ladder_mean) ** 2)
            self.errors.add("declared", now_s, (log_s - outlook.declared_mean) ** 2)
            ratio = log_s - math.log(request.declared_s)
            self.declared.add(None, now_s, ratio)
            self.declared.add(request.model, now_s, ratio)

    def _learn_error(self, request: Request, outlook: Outlook, now_s: float, log_s: float) -> None:
        error = log_s - (outlook.centre - outlook.level)
        self.level.hear(request.user, request.model, error, outlook.scale * NORMAL_SPREAD)
        self.pool.add(max(-_CLIP, min(_CLIP, error / outlook.scale)))
        self.spread.learn(outlook.scale_row, math.log(min(max(abs(error), 0.002), 3.0)))
        residual = log_s - outlook.base
        self.correction.learn(outlook.row, residual)
        keys = _keys(request)
        for (name, _, _), table in zip(_MEMORIES, self._residual_means, strict=True):
            table.add(keys[name], now_s, residual)

    def learn_censored(self, request: Request, outlook: Outlook, now_s: float, at_least_s: float) -> None:
        """Learn from a task that was stopped after so long: it would have run longer.

        Below the predicted median that says next to nothing and is skipped. Above it, the missing end is drawn from the residuals
        that lie beyond, evenly (a van der Corput sequence), so that both the centre and the tail stay unbiased.
        """
        residual = (math.log(max(at_least_s, _FLOOR_S)) - outlook.centre) / outlook.scale
        if residual < self.pool.quantile(0.5):
            return
        self._draws += 1
        drawn = self.pool.beyond(residual, _van_der_corput(self._draws))
        self.learn(request, outlook, now_s, math.exp(outlook.centre + outlook.scale * drawn))

    def tables(self) -> list[DecayedMeans]:
        """Return the tables of residual means and of declared times, in a fixed order: what saving walks over."""
        return [*self._residual_means, self.declared, self.errors]

    @property
    def draws(self) -> int:
        """Return how many censored ends were drawn."""
        return self._draws

    @draws.setter
    def draws(self, value: int) -> None:
        self._draws = value


def _keys(request: Request) -> dict[str, Hashable]:
    return {
        "user": request.user,
        "user_cell": (request.user, request.ladder[3]),
        "model_lora": request.ladder[2],
        "model": request.model,
        "all": None,
    }


def _van_der_corput(index: int) -> float:
    value, step = 0.0, 0.5
    while index:
        value += step * (index & 1)
        index >>= 1
        step /= 2
    return min(max(value, 0.01), 0.99)
