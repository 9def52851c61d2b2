"""Notices when run times shift: all at once, those of one model, or those of one GPU model; and by how much.

A driver update, a new GPU generation or a slower network shifts every history there is. Decayed means would need days to follow;
one level that all of them are measured from needs some dozens of tasks. A model that was replaced, or one kind of GPU that was
throttled, shifts only its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

_SLACK = 0.5
_ALARM = 7.0
_OWN_SLACK = 0.6
_OWN_ALARM = 11.0
_CLIP = 2.5
_SHARE = 0.9
_PATIENCE = 30
"""A user speaks at most once in so many observations ..."""
_ECHO = 10
"""... and a model that spoke often among the last ten counts less: a shift of one of them is not a shift of all."""


class LevelShift:
    """A two-sided CUSUM test on standardised errors, made broad: neither a busy user nor a busy model can ring it alone."""

    __slots__ = ("_count", "_models", "_spoke", "alarms", "level", "sums")

    def __init__(self) -> None:
        self.level = 0.0
        """Log seconds that every prediction is moved by."""
        self.alarms = 0
        self.sums = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
        """Upwards and downwards: the test statistic, the weighted errors and the weights since it last touched zero."""
        self._count = 0
        self._spoke: dict[str, int] = {}
        self._models: deque[str] = deque(maxlen=_ECHO)

    def hear(self, user: str, model: str, error: float, sigma: float) -> None:
        """Take one error in log seconds, measured in the present frame, with the size that was expected of it."""
        self._count += 1
        spoke = self._spoke.pop(user, None)
        if spoke is not None and self._count - spoke < _PATIENCE:
            self._spoke[user] = spoke
            return
        self._spoke[user] = self._count
        if len(self._spoke) > _PATIENCE:
            del self._spoke[next(iter(self._spoke))]
        weight = (1.0 + self._models.count(model)) ** -0.5
        self._models.append(model)
        size = max(-_CLIP, min(_CLIP, error / sigma))
        for sign, sums in ((1.0, self.sums[0]), (-1.0, self.sums[1])):
            sums[0] += weight * (sign * size - _SLACK)
            sums[1] += weight * error
            sums[2] += weight
            if sums[0] <= 0.0:
                sums[:] = [0.0, 0.0, 0.0]
            elif sums[0] > _ALARM:
                self.level += _SHARE * sums[1] / sums[2]
                self.alarms += 1
                self.sums = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
                return

    def state(self) -> dict[str, object]:
        """Return everything as plain values."""
        return {
            "level": self.level,
            "alarms": self.alarms,
            "sums": self.sums,
            "count": self._count,
            "spoke": list(self._spoke.items()),
            "models": list(self._models),
        }

    def restore(
        self,
        level: float,
        alarms: int,
        sums: list[list[float]],
        count: int,
        spoke: list[tuple[str, int]],
        models: list[str],
    ) -> None:
        """Take over a saved state."""
        self.level, self.alarms, self.sums, self._count = level, alarms, sums, count
        self._spoke = dict(spoke)
        self._models = deque(models, maxlen=_ECHO)


class OwnShifts:
    """The same test for each of many names, made broad by counting a user who spoke lately less."""

    __slots__ = ("_limit", "alarms", "sums")

    def __init__(self, limit: int = 4_000) -> None:
        self._limit = limit
        self.alarms = 0
        self.sums: dict[str, tuple[list[float], list[float], list[str]]] = {}
        """By name: upwards, downwards (as in `LevelShift.sums`), and who spoke last."""

    def hear(self, name: str, user: str, error: float, sigma: float) -> float:
        """Take one error in log seconds with the size expected of it; return the shift when it has become certain, else 0."""
        up, down, spoke = self.sums.pop(name, ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], []))
        weight = (1.0 + spoke.count(user)) ** -0.5
        spoke.append(user)
        del spoke[:-_ECHO]
        self.sums[name] = (up, down, spoke)
        if len(self.sums) > self._limit:
            del self.sums[next(iter(self.sums))]
        size = max(-_CLIP, min(_CLIP, error / sigma))
        for sign, sums in ((1.0, up), (-1.0, down)):
            sums[0] += weight * (sign * size - _OWN_SLACK)
            sums[1] += weight * error
            sums[2] += weight
            if sums[0] <= 0.0:
                sums[:] = [0.0, 0.0, 0.0]
            elif sums[0] > _OWN_ALARM:
                shift = _SHARE * sums[1] / sums[2]
                up[:], down[:] = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
                self.alarms += 1
                return shift
        return 0.0

    def clear(self) -> None:
        """Begin anew: what was heard was measured from a frame that has moved."""
        self.sums.clear()

    def rows(self) -> Iterator[list[object]]:
        """Yield every name with its sums, the longest unheard first."""
        for name, (up, down, spoke) in self.sums.items():
            yield [name, up, down, spoke]
