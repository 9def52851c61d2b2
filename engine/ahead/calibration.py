"""Keeps promised quantiles honest: each is stretched by a factor learned from whether earlier ones held.

Online conformal prediction in its simplest form: a promise at level q that did not hold raises the logarithm of its factor by
a step times q, one that held lowers it by a step times 1 - q; in the long run the share that holds tends to q, whatever the forward
run gets wrong and however the load changes. A factor is the sum of a common part and one of the promise's own horizon, so that rare
horizons are not left to themselves. A promise counts as broken the moment its time is over, not when the task ends at last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from engine.ahead.draws import Floats
from engine.tasks import SECOND

Ints = npt.NDArray[np.int64]

LEVELS: Final = {"start_p50": 0.5, "start_p90": 0.9, "finish_p50": 0.5, "finish_p90": 0.9}
EDGES: Final = np.array([10, 30, 100, 300, 1_000, 3_000], dtype=np.float64) * SECOND
"""Horizons, in microseconds, that part the strata."""
STRATA: Final = 2 * (len(EDGES) + 1)
"""Horizons of ordinary tasks, then of urgent ones."""
LEAST_US: Final = 0.5 * SECOND
"""A horizon below this is stretched as if it were this long: what starts at once needs a moment all the same."""
_FIRST_STEP: Final = 0.5
_LAST_STEP: Final = 0.04
_WINDOW: Final = 1_000
_MOST: Final = 4.0
"""Most that a factor's logarithm may be, up or down."""


class _Factor:
    """One learned logarithm."""

    __slots__ = ("count", "log")

    def __init__(self) -> None:
        self.log = 0.0
        self.count = 0

    def learn(self, level: float, held: bool) -> None:
        step = max(_LAST_STEP, _FIRST_STEP / (1 + self.count) ** 0.6)
        self.count += 1
        self.log += step * level if not held else -step * (1.0 - level)
        self.log = min(_MOST, max(-_MOST, self.log))


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
    """Factors by quantile and stratum, and the latest outcomes."""

    def __init__(self) -> None:
        self._common = {name: _Factor() for name in LEVELS}
        self._own = {name: [_Factor() for _ in range(STRATA)] for name in LEVELS}
        self._recent: dict[str, deque[bool]] = {name: deque(maxlen=_WINDOW) for name in LEVELS}
        self.scored = 0
        """Promised finishes whose P90 was judged so far."""

    def strata(self, finish_us: Floats, urgent: npt.NDArray[np.bool_]) -> Ints:
        """Return the stratum of each promise by how far its finish lies ahead, in microseconds."""
        found: Ints = np.searchsorted(EDGES, finish_us).astype(np.int64) + urgent * (len(EDGES) + 1)
        return found

    def stretch(self, name: str, ahead_us: Floats, strata: Ints) -> Floats:
        """Return horizons stretched by what was learned."""
        own = self._own[name]
        logs = np.array([self._common[name].log + each.log for each in own])
        stretched: Floats = np.maximum(ahead_us, LEAST_US) * np.exp(logs[strata])
        return stretched

    def learn(self, name: str, stratum: int, held: bool) -> None:
        """Take in whether a promise held."""
        level = LEVELS[name]
        self._common[name].learn(level, held)
        self._own[name][stratum].learn(level, held)
        self._recent[name].append(held)
        if name == "finish_p90":
            self.scored += 1

    def coverage(self, name: str = "finish_p90") -> Coverage:
        """Return how often a quantile held, over the last 1,000 promises at most."""
        recent = self._recent[name]
        return Coverage(LEVELS[name], len(recent), sum(recent))

    def saved(self) -> dict[str, Any]:
        """Return what was learned as plain values, for `restored`."""
        return {
            "common": {name: [each.log, each.count] for name, each in self._common.items()},
            "own": {name: [[each.log, each.count] for each in own] for name, own in self._own.items()},
            "recent": {name: [int(held) for held in recent] for name, recent in self._recent.items()},
            "scored": self.scored,
        }

    @classmethod
    def restored(cls, plain: Mapping[str, Any]) -> Calibration:
        """Return a calibration as it was saved; raises ValueError naming the part that is none."""
        found = cls()
        try:
            for name in LEVELS:
                found._common[name].log, found._common[name].count = _pair(plain["common"][name])
                own = plain["own"][name]
                if len(own) != STRATA:
                    raise ValueError(f"own.{name}: {len(own)} strata, this build has {STRATA}")
                for factor, pair in zip(found._own[name], own, strict=True):
                    factor.log, factor.count = _pair(pair)
                found._recent[name].extend(bool(held) for held in plain["recent"][name])
            found.scored = int(plain["scored"])
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"the saved calibration is not one of this build: {error!r}; delete the file") from None
        return found


def _pair(plain: Any) -> tuple[float, int]:
    log, count = float(plain[0]), int(plain[1])
    if not -_MOST <= log <= _MOST or count < 0:
        raise ValueError(f"the saved calibration has the factor {plain!r}; delete the file")
    return log, count
