"""Notices when run times shift: all at once, those of one model, or those of one GPU model; and by how much.

A driver update, a new GPU generation or a slower network shifts every history there is. Decayed means would need days to follow;
one level that all of them are measured from needs some dozens of tasks. A model that was replaced, or one kind of GPU that was
throttled, shifts only its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

_SLACK = 0.4
_ALARM = 6.0
_CLIP = 2.0
_OWN_SLACK = 0.6
_OWN_ALARM = 11.0
_OWN_CLIP = 2.5
_SHARE = 0.9
_PATIENCE = 30
"""A user who spoke n times among so many observations counts for 1 / (1 + n) ..."""
_ECHO = 10
"""... and a model that spoke often among the last ten counts less: a shift of one of them is not a shift of all."""


class LevelShift:
    """A two-sided CUSUM test on standardised errors, made broad: neither a busy user nor a busy model can ring it alone."""

    __slots__ = ("_models", "_users", "alarms", "level", "sums")

    def __init__(self) -> None:
        self.level = 0.0
        """Log seconds that every prediction is moved by."""
        self.alarms = 0
        self.sums = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
        """Upwards and downwards: the test statistic, the weighted errors and the weights since it last touched zero."""
        self._users: deque[str] = deque(maxlen=_PATIENCE)
        self._models: deque[str] = deque(maxlen=_ECHO)

    def hear(self, user: str, model: str, error: float, sigma: float) -> None:
        """Take one error in log seconds, measured in the present frame, with the size that was expected of it."""
        weight = (1.0 + self._models.count(model)) ** -0.5 / (1.0 + self._users.count(user))
        self._users.append(user)
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
            "users": list(self._users),
            "models": list(self._models),
        }

    def restore(
        self,
        level: float,
        alarms: int,
        sums: list[list[float]],
        models: list[str],
        users: Sequence[str] = (),
        **_older: object,
    ) -> None:
        """Take over a saved state; one of an older version does not tell the users."""
        self.level, self.alarms, self.sums = level, alarms, sums
        self._users = deque(users, maxlen=_PATIENCE)
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
        size = max(-_OWN_CLIP, min(_OWN_CLIP, error / sigma))
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
