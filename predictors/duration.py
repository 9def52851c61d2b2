"""How long a task runs: the online stack of one AI method, which predicts one row and learns one row without batch training.

In log space: a ladder of nested decayed means, corrected by short-memory means of its own residuals through recursive least
squares; a second recursion predicts the size of the error, and a pool of standardised residuals gives the quantiles. Boosted
trees on what is still missed serve while they are proven better. All of it is measured from one level, which moves when everything
drifts at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from predictors.challenger import Challenger, ChallengerSettings, Refit, at_once, bounded
from predictors.decay import DecayedMeans
from predictors.drift import LevelShift, OwnShifts
from predictors.errors import SPREAD_COLUMNS, Errors
from predictors.features import COVARIATES, Request
from predictors.ladder import Ladder
from predictors.recursive import RecursiveLeastSquares, Vector
from predictors.residuals import NORMAL_SPREAD, ResidualPool
from predictors.tobit import beyond
from predictors.trees import Trees

MINUTE_S = 60.0
HOUR_S = 3600.0
DAY_S = 86400.0

MEMORIES: tuple[tuple[float, float], ...] = (
    (21 * DAY_S, 1.0),
    (20 * MINUTE_S, 1.0),
    (5 * MINUTE_S, 0.5),
    (21 * DAY_S, 1.0),
    (HOUR_S, 1.0),
    (2 * HOUR_S, 4.0),
    (30 * MINUTE_S, 4.0),
    (6 * MINUTE_S, 1.0),
    (10 * MINUTE_S, 4.0),
)
"""The memory of each table of residuals, keyed by `Request.memories`, and how many observations its zero prior counts for."""
UNRESTS: tuple[tuple[float, float], ...] = ((HOUR_S, 10.0), (DAY_S, 10.0), (21 * DAY_S, 4.0))
"""Memories of how much larger errors were than expected: of all, of the model and of the user."""
_MODEL_LORA, _MODEL_30, _MODEL_6 = 5, 6, 7
_FADED = 0.1
_GROWTH = 0.5
_FLOOR_S = 1e-3
_SAYS_NOTHING = -0.5
"""A task stopped so many deviations from the centre says nothing; where nearly all are stopped, that holds the centre near."""
COLUMNS = 1 + COVARIATES + len(MEMORIES) + 4
SPREAD = slice(COLUMNS, COLUMNS + SPREAD_COLUMNS)
"""Which columns the second recursion sees; the first sees those before."""
_EXTRAS = 1 + COVARIATES + 2
WIDTH = COLUMNS + SPREAD_COLUMNS + _EXTRAS
"""Columns of what the trees see: those of both recursions, the ladder's mean, the sizes themselves and traits."""
_RISING = (*range(1, 1 + COVARIATES), *range(WIDTH - _EXTRAS + 1, WIDTH - _EXTRAS + 1 + COVARIATES))
"""Larger pictures, more steps and more pictures never lower a prediction."""


@dataclass(frozen=True, slots=True)
class DurationSettings:
    """Knobs of the online stack; the defaults are those measured in docs/prediction.md."""

    ladder_memory_s: float = 7 * DAY_S
    strength: float = 8.0
    forgetting: float = 0.9998
    pool: int = 2000
    cells: int = 50_000
    prior_s: float = 10.0
    """Run time assumed for the very first task of a method that declares none and whose work is not known."""
    challenger: ChallengerSettings = field(default_factory=ChallengerSettings)


@dataclass(
    slots=True, eq=False
)  # Frozen, it would take three times as long to make, and one is made for every prediction.
class Outlook:
    """What the stack knew about one request when it was asked: enough to learn from the outcome later."""

    level: float
    """The frame it was made in; the other log seconds but the centres are measured from it."""
    base: float
    """Log seconds by the ladder, and by what was declared."""
    ladder_mean: float
    declared_mean: float
    """NaN when nothing was declared."""
    champion: float
    """Log seconds after the correction, the level added."""
    centre: float
    """The champion's, or the challenger's where it served."""
    scale: float
    row: Vector
    """All `WIDTH` columns."""
    trees: Trees | None
    """The challenger's, as they were."""
    served: bool
    """Whether the challenger served."""
    model_weight: float
    """How many fresh observations of the model stand behind it."""
    blind: bool
    """Neither history nor a declared time stood behind it: its error teaches nothing."""


class DurationModel:
    """The online stack of one method, in log seconds on the reference GPU model."""

    __slots__ = (
        "_draws",
        "_residual_means",
        "_unrests",
        "challenger",
        "champion",
        "correction",
        "declared",
        "errors",
        "ladder",
        "level",
        "settings",
        "shifts",
    )

    def __init__(self, settings: DurationSettings | None = None, refit: Refit = at_once) -> None:
        self.settings = settings = settings or DurationSettings()
        self.ladder = Ladder(settings.ladder_memory_s, settings.strength, settings.cells)
        self._unrests = [DecayedMeans(memory_s, settings.cells) for memory_s, _ in UNRESTS]
        self._residual_means = [DecayedMeans(memory_s, settings.cells) for memory_s, _ in MEMORIES]
        # Before anything is learned, run time grows with the square root of each size, and of the work where that can be counted.
        start = [0.0, *[_GROWTH] * COVARIATES, *[0.2] * len(MEMORIES), 0.0, 0.0, 0.0, 0.0]
        self.correction = RecursiveLeastSquares(start, ridge=1.0, forgetting=settings.forgetting)
        self.champion = Errors(settings.pool, settings.forgetting)
        self.challenger = Challenger(settings.challenger, Errors(settings.pool, settings.forgetting), _RISING, refit)
        self.declared = DecayedMeans(settings.ladder_memory_s, settings.cells)
        self.errors = DecayedMeans(settings.ladder_memory_s, 8)
        self.level = LevelShift()
        self.shifts = OwnShifts()
        self._draws = 0

    def look(self, request: Request, now_s: float, frame: float = 0.0) -> Outlook:
        """Return the stack's view of a request at a time (seconds).

        ``frame`` is the log of run time on the reference GPU model over that on a typical one: counted work is in the latter's.
        """
        if request.declared_s > 0.0 or request.work_s <= 0.0:
            start = math.log(request.declared_s or self.settings.prior_s)
        else:
            start = math.log(request.work_s) + frame
        ladder_mean, distance, weights = self.ladder.climb(request.ladder, now_s, start, request.covariates)
        base, declared_mean = self._declared(request, now_s, ladder_mean)
        means, kept = self._lately(request, now_s)
        load, log1p = request.load, math.log1p
        row = np.array(
            (
                1.0,
                *distance,
                *means,
                # How recently the model ran: one that went cold is loaded anew.
                log1p(kept[_MODEL_30]) - 1.0,
                log1p(kept[_MODEL_6]) - 0.5,
                *load,
                1.0,
                log1p(kept[0]) - 2.0,
                log1p(kept[1]) - 0.5,
                log1p(weights[3]) - 3.0,
                log1p(weights[1]) - 5.0,
                abs(means[1]),
                load[0] - 1.0,
                *self._unrest(request, now_s),
                ladder_mean,
                *request.covariates,
                *request.traits,
            )
        )
        level, challenger = self.level.level, self.challenger
        champion = centre = level + base + float(row[:COLUMNS].dot(self.correction.weights))
        trees, errors, served = challenger.trees, self.champion, False
        if trees is not None and challenger.serving:
            centre += bounded(trees.predict(row))
            errors, served = challenger.errors, True
        return Outlook(
            level,
            base,
            ladder_mean,
            declared_mean,
            champion,
            centre,
            errors.scale(row[SPREAD], weights[1]),
            row,
            trees,
            served,
            weights[1],
            weights[0] == 0.0 and request.declared_s <= 0.0,
        )

    def _lately(self, request: Request, now_s: float) -> tuple[list[float], list[float]]:
        """Return the mean of every table of residuals, pulled to zero, and how many fresh observations each stands on.

        What `DecayedMeans.shrunk` and `DecayedMeans.weight` say, each cell looked up once.
        """
        means, kept, exp = [], [], math.exp
        for (memory_s, strength), table, key in zip(MEMORIES, self._residual_means, request.memories, strict=True):
            cell = table.cells.get(key)
            if cell is None:
                means.append(0.0)
                kept.append(0.0)
                continue
            weight, total, at_s = cell
            if now_s > at_s:
                decay = exp((at_s - now_s) / memory_s)
                weight *= decay
                total *= decay
            means.append(total / (weight + strength))
            kept.append(weight)
        return means, kept

    def _unrest(self, request: Request, now_s: float) -> list[float]:
        """Return by how much errors were larger than expected: lately, those of the model, and those of the user, in logs."""
        of_all, of_model, of_user = self._unrests
        return [
            of_all.shrunk(None, now_s, 0.0, UNRESTS[0][1]),
            of_model.shrunk(request.model, now_s, 0.0, UNRESTS[1][1]),
            of_user.shrunk(request.user, now_s, 0.0, UNRESTS[2][1]),
        ]

    def _declared(self, request: Request, now_s: float, ladder_mean: float) -> tuple[float, float]:
        """Return the ladder's mean moved towards what was declared, and the latter, corrected; NaN when nothing was."""
        if request.declared_s <= 0.0:
            return ladder_mean, math.nan
        declared_mean = math.log(request.declared_s) + self.declared.shrunk(
            request.model, now_s, self.declared.shrunk(None, now_s, 0.0, 2.0), self.settings.strength
        )
        of_ladder = self.errors.shrunk("ladder", now_s, 1.0, 1.0)
        of_declared = self.errors.shrunk("declared", now_s, 0.25, 1.0)
        share = (of_ladder + 1e-9) / (of_ladder + of_declared + 2e-9)
        return ladder_mean + (declared_mean - ladder_mean) * share, declared_mean

    def pool(self, outlook: Outlook) -> ResidualPool:
        """Return the pool of errors that belongs to the stack which served."""
        return self.challenger.errors.pool if outlook.served else self.champion.pool

    def learn(self, request: Request, outlook: Outlook, now_s: float, seconds: float, trust: float = 1.0) -> None:
        """Learn from a task that ran for so long (seconds on the reference GPU model) and has finished at ``now_s``.

        ``trust`` below 1 says that the conversion to the reference is uncertain: then histories learn less, errors nothing.
        """
        log_s = math.log(max(seconds, _FLOOR_S)) - self.level.level
        if not outlook.blind and trust > 0.5:
            self._learn_errors(request, outlook, log_s)
            self._learn_residual(request, outlook, now_s, log_s - outlook.base, 1.0)
            off = abs(log_s - (outlook.centre - outlook.level))
            unrest = math.log(min(max(off, 0.002), 3.0) / outlook.scale)
            for table, key in zip(self._unrests, (None, request.model, request.user), strict=True):
                table.add(key, now_s, max(-3.0, min(3.0, unrest)))
        self.ladder.add(request.ladder, now_s, log_s, request.covariates, trust)
        if request.declared_s > 0.0:
            self.errors.add("ladder", now_s, (log_s - outlook.ladder_mean) ** 2)
            self.errors.add("declared", now_s, (log_s - outlook.declared_mean) ** 2)
            self._learn_declared(request, now_s, log_s, 1.0)

    def learn_censored(self, request: Request, outlook: Outlook, now_s: float, at_least_s: float) -> None:
        """Learn from a task that was stopped after so long: it would have run longer.

        The histories take the step of Tobit's likelihood, weighed by the information that is left (`tobit.beyond`). The shape of
        the errors takes an end drawn from those that lie beyond, evenly (a van der Corput sequence): what the product-limit
        estimate would spread over them. None is drawn beyond the largest: draws would feed on draws.
        """
        residual = (math.log(max(at_least_s, _FLOOR_S)) - outlook.centre) / outlook.scale
        pool = self.pool(outlook)
        if outlook.blind or residual / NORMAL_SPREAD < _SAYS_NOTHING:
            return
        level = self.level.level
        offset, weight = beyond(residual / NORMAL_SPREAD)
        log_s = outlook.centre - outlook.level + outlook.scale * NORMAL_SPREAD * offset
        self._draws += 1
        drawn = min(pool.beyond(residual, _van_der_corput(self._draws)), max(residual, pool.largest))
        self._learn_errors(request, outlook, outlook.centre + outlook.scale * drawn - level, drawn=True)
        self._learn_residual(request, outlook, now_s, log_s - outlook.base, weight)
        self.ladder.add(request.ladder, now_s, log_s, request.covariates, weight)
        if request.declared_s > 0.0:
            self._learn_declared(request, now_s, log_s, weight)

    def _learn_errors(self, request: Request, outlook: Outlook, log_s: float, drawn: bool = False) -> None:
        """Learn how far both stacks were off a run time in log seconds, measured from the present level.

        A time that was drawn says nothing of the errors' size: it was drawn by that size.
        """
        challenger = self.challenger
        spread_row = outlook.row[SPREAD]
        champion_off = log_s - (outlook.champion - outlook.level)
        centre, scale = outlook.centre, outlook.scale
        if outlook.served:
            champion_scale = self.champion.scale(spread_row, outlook.model_weight)
        else:
            champion_scale = scale
            if outlook.trees is not None:
                centre += bounded(outlook.trees.predict(outlook.row))
                scale = challenger.errors.scale(spread_row, outlook.model_weight)
        off = log_s - (outlook.centre - outlook.level)
        self._hear_drift(request, off, outlook.scale * NORMAL_SPREAD)
        if outlook.trees is not None:
            seconds = math.exp(min(log_s + outlook.level, 20.0))
            challenger.judge(
                self.champion.loss(outlook.champion, champion_scale, seconds),
                challenger.errors.loss(centre, scale, seconds),
            )
            challenger.errors.learn(log_s - (centre - outlook.level), scale, spread_row, drawn)
        self.champion.learn(champion_off, champion_scale, spread_row, drawn)
        challenger.learn(outlook.row, champion_off)

    def _hear_drift(self, request: Request, off: float, sigma: float) -> None:
        alarms = self.level.alarms
        self.level.hear(request.user, request.model, off, sigma)
        if self.level.alarms > alarms:
            self.shifts.clear()
            return
        shift = self.shifts.hear(request.model, request.user, off, sigma)
        if shift:
            self.ladder.move(request.model, shift)
            # The short memories have begun to say the same.
            for table, key in zip(self._residual_means[_MODEL_LORA:], request.memories[_MODEL_LORA:-1], strict=False):
                table.fade(key, _FADED)

    def _learn_residual(self, request: Request, outlook: Outlook, now_s: float, residual: float, weight: float) -> None:
        self.correction.learn(outlook.row[:COLUMNS], residual, weight)
        self.correction.keep_positive(1, 1 + COVARIATES)  # Larger must not seem quicker.
        for table, key in zip(self._residual_means, request.memories, strict=True):
            table.add(key, now_s, residual, weight)

    def _learn_declared(self, request: Request, now_s: float, log_s: float, weight: float) -> None:
        ratio = log_s - math.log(request.declared_s)
        self.declared.add(None, now_s, ratio, weight)
        self.declared.add(request.model, now_s, ratio, weight)

    def tables(self) -> list[DecayedMeans]:
        """Return the tables of residual means and of declared times, in a fixed order: what saving walks over."""
        return [*self._residual_means, *self._unrests, self.declared, self.errors]

    @property
    def draws(self) -> int:
        """Return how many censored ends were drawn."""
        return self._draws

    @draws.setter
    def draws(self, value: int) -> None:
        self._draws = value


def _van_der_corput(index: int) -> float:
    value, step = 0.0, 0.5
    while index:
        value += step * (index & 1)
        index >>= 1
        step /= 2
    return min(max(value, 0.01), 0.99)
