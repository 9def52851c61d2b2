"""Notices when everything becomes slower or faster at once, and moves the predictor's whole frame by that much.

A driver update, a new GPU generation or a slower network shifts every history there is. Decayed means would need days to follow;
one level that all of them are measured from needs some dozens of tasks.
"""

from __future__ import annotations

from collections import deque

_SLACK = 0.4
_ALARM = 9.0
_CLIP = 2.5
_SHARE = 0.9
_PATIENCE = 60
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
