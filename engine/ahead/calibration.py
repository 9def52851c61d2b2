"""Keeps promised quantiles honest: each is stretched by what earlier ones were off by.

Conformal prediction, online. A promise remembers what the forward run itself said; when the truth is known, the logarithm of truth
over forecast is its score. The factor of a quantile is that quantile of the latest scores of promises of the same kind (urgent or
not, and how far ahead), so a wrong forecast widens what is promised next, however wrong it was and why. Scores do not depend on
the factor that was in force, so late outcomes cannot drive it past the mark. A second, slow correction moves the level itself until
the share that really held is the share promised (adaptive conformal inference), whatever the load does.

A promise is judged when its time is over, not when the task ends at last: else those that fail would be learned of too late.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from statistics import NormalDist
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from engine.ahead.draws import Floats
from engine.tasks import SECOND

Ints = npt.NDArray[np.int64]

LEVELS: Final = {"start_p50": 0.5, "start_p90": 0.9, "finish_p50": 0.5, "finish_p90": 0.9}
EDGES: Final = np.array([10, 30, 100, 300, 1_000, 3_000], dtype=np.float64) * SECOND
"""Horizons, in microseconds, that part the strata."""
HORIZONS: Final = len(EDGES) + 1
STRATA: Final = 2 * HORIZONS
"""Horizons of ordinary tasks, then of urgent ones."""
LEAST_US: Final = 0.5 * SECOND
"""A horizon below this is stretched as if it were this long: what starts at once needs a moment all the same."""
OVERDUE: Final = 0.2
"""What the score of a broken promise is taken to be above its factor, until the truth is known."""
_WINDOW: Final = 3_000
"""Scores kept per quantile and stratum."""
_ENOUGH: Final = 40
"""With fewer scores of its own a stratum borrows those of its neighbours."""
_LATEST: Final = 1_000
_NORMAL: Final = NormalDist()
_GAIN: Final = 0.002
_LEVELS: Final = {name: (level - 0.01, level + 0.085) for name, level in LEVELS.items()}
"""How far the level itself may be moved: hardly down, because a quiet time says little of the next surge."""
_MOST: Final = 3.0
"""Most that a factor's logarithm may be, up or down."""

PRIOR: Final = 40
"""Made-up scores that every P90 begins with in every stratum; real ones outnumber and then displace them."""
SPREADS: Final = (0.5, 0.8, 1.0, 1.0, 0.8, 0.35, 0.25)
"""By horizon, of ordinary tasks: standard deviation of the made-up scores. What is a minute to a quarter of an hour ahead is the
least certain where the shortest and the newest tenants go first; what is an hour ahead follows the work that waits."""
URGENT_SPREAD: Final = 0.3

Score = list[float]
"""One score, shared with the promise that may still correct it."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """How often promises of one quantile held lately."""

    level: float
    count: int
    held: int

    @property
    def share(self) -> float:
        """Return the share that held; NaN before the first."""
        return self.held / self.count if self.count else float("nan")


class Calibration:
    """Scores by quantile and stratum, and the latest outcomes."""

    def __init__(self) -> None:
        self._scores: dict[str, list[deque[Score]]] = {
            name: [deque(_prior(stratum) if level > 0.5 else (), maxlen=_WINDOW) for stratum in range(STRATA)]
            for name, level in LEVELS.items()
        }
        self._level = {name: [level] * STRATA for name, level in LEVELS.items()}
        self._recent: dict[str, deque[bool]] = {name: deque(maxlen=_LATEST) for name in LEVELS}
        self._logs: dict[str, Floats] = {name: np.zeros(STRATA) for name in LEVELS}
        self._stale = {name: set(range(STRATA)) for name in LEVELS}
        self.scored = 0
        """Promised finishes whose P90 was judged so far."""

    def strata(self, finish_us: Floats, urgent: npt.NDArray[np.bool_]) -> Ints:
        """Return the stratum of each promise by how far its finish lies ahead, in microseconds."""
        found: Ints = np.searchsorted(EDGES, finish_us).astype(np.int64) + urgent * HORIZONS
        return found

    def stretch(self, name: str, ahead_us: Floats, strata: Ints) -> Floats:
        """Return horizons stretched by what was learned."""
        stretched: Floats = np.maximum(ahead_us, LEAST_US) * np.exp(self._factors(name)[strata])
        return stretched

    def overdue(self, name: str, stratum: int, raw_us: float, passed_us: float) -> Score:
        """Take in that a promise broke: so much has passed of what the forward run took for `raw_us`, and the end is not known."""
        score = [_score(raw_us, passed_us) + OVERDUE]
        self._add(name, stratum, score, False)
        return score

    def came(self, name: str, stratum: int, raw_us: float, real_us: float) -> None:
        """Take in that a promise held, and what it was off by."""
        self._add(name, stratum, [_score(raw_us, real_us)], True)

    def corrected(self, name: str, stratum: int, score: Score, raw_us: float, real_us: float) -> None:
        """Take in the truth about a promise that had broken."""
        score[0] = _score(raw_us, real_us)
        self._stale[name].add(stratum)

    def coverage(self, name: str = "finish_p90") -> Coverage:
        """Return how often a quantile held, over the last 1,000 promises at most."""
        recent = self._recent[name]
        return Coverage(LEVELS[name], len(recent), sum(recent))

    def _add(self, name: str, stratum: int, score: Score, held: bool) -> None:
        level = LEVELS[name]
        self._scores[name][stratum].append(score)
        low, high = _LEVELS[name]
        levels = self._level[name]
        levels[stratum] = min(high, max(low, levels[stratum] + _GAIN * (level - held)))
        self._recent[name].append(held)
        self._stale[name].add(stratum)
        if name == "finish_p90":
            self.scored += 1

    def _factors(self, name: str) -> Floats:
        """Return the logarithm of each stratum's factor."""
        stale = self._stale[name]
        if stale:
            own, logs = self._scores[name], self._logs[name]
            for stratum in range(STRATA):
                if stratum in stale or len(own[stratum]) < _ENOUGH:
                    logs[stratum] = _quantile(_nearest(own, stratum), self._level[name][stratum])
            stale.clear()
        return self._logs[name]

    def saved(self) -> dict[str, Any]:
        """Return what was learned as plain values, for `restored`."""
        return {
            "scores": {
                name: [[round(score[0], 6) for score in part] for part in parts] for name, parts in self._scores.items()
            },
            "level": {name: list(levels) for name, levels in self._level.items()},
            "recent": {name: [int(held) for held in recent] for name, recent in self._recent.items()},
            "scored": self.scored,
        }

    @classmethod
    def restored(cls, plain: Mapping[str, Any]) -> Calibration:
        """Return a calibration as it was saved; raises ValueError naming the remedy."""
        found = cls()
        try:
            for name in LEVELS:
                parts = plain["scores"][name]
                if len(parts) != STRATA:
                    raise ValueError(f"{len(parts)} strata instead of {STRATA}")
                for kept, part in zip(found._scores[name], parts, strict=True):
                    kept.clear()
                    kept.extend([_bounded(float(score))] for score in part)
                low, high = _LEVELS[name]
                found._level[name] = [min(high, max(low, float(level))) for level in plain["level"][name]]
                if len(found._level[name]) != STRATA:
                    raise ValueError(f"{len(found._level[name])} levels instead of {STRATA}")
                found._recent[name].extend(bool(held) for held in plain["recent"][name])
            found.scored = int(plain["scored"])
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(f"the saved calibration is not one of this build: {error!r}; delete the file") from None
        return found


def _prior(stratum: int) -> list[Score]:
    """Return the scores that a stratum begins with, in no order of size."""
    urgent, horizon = divmod(stratum, HORIZONS)
    spread = URGENT_SPREAD if urgent else SPREADS[horizon]
    levels = ((7 * number % PRIOR + 0.5) / PRIOR for number in range(PRIOR))
    return [[spread * _NORMAL.inv_cdf(level)] for level in levels]


def _score(raw_us: float, real_us: float) -> float:
    return _bounded(log(max(LEAST_US, real_us) / max(LEAST_US, raw_us)))


def _bounded(score: float) -> float:
    if score != score:
        raise ValueError("a score is no number")
    return min(_MOST, max(-_MOST, score))


def _nearest(parts: list[deque[Score]], stratum: int) -> list[float]:
    """Return a stratum's scores; where they are few, with those of the next horizons, the same urgency first."""
    found = [score[0] for score in parts[stratum]]
    if len(found) >= _ENOUGH:
        return found
    urgent, horizon = divmod(stratum, HORIZONS)
    others = sorted(
        (each for each in range(STRATA) if each != stratum),
        key=lambda each: (each // HORIZONS != urgent, abs(each % HORIZONS - horizon)),
    )
    for other in others:
        if len(found) >= _ENOUGH:
            break
        found += [score[0] for score in parts[other]]
    return found


def _quantile(scores: list[float], level: float) -> float:
    """Return the conformal quantile: of so many scores that a new one lies below it with the chance `level`."""
    count = len(scores)
    if count < 5:
        return 0.0
    place = min(count - 1, max(0, int(np.ceil(level * (count + 1))) - 1))
    return sorted(scores)[place]
