"""Calls that are due at a moment: on SimPy's clock, as events with no more in them than the simulator needs.

On an environment that is SimPy's own class they go straight onto its heap and are called straight from there, in the order in which
`Environment.schedule` and `Environment.step` would do it: there are several per task. On a derived one they take the usual way.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Final

import simpy
from simpy.events import NORMAL

from engine.tasks import Micros

_NEVER: Final = float("inf")


def _fire(due: Due) -> None:
    due.call(*due.arguments)


_CALLBACKS: Final = (_fire,)


class Due:
    """What `simpy.Environment.schedule` takes: it has callbacks, and it is well."""

    __slots__ = ("_ok", "arguments", "call", "callbacks")

    def __init__(self, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self.call = call
        self.arguments = arguments
        self.callbacks: tuple[Callable[[Due], None], ...] | None = _CALLBACKS
        self._ok = True


class Clock:
    """A SimPy environment's clock, in whole microseconds."""

    __slots__ = ("_direct", "_env", "_numbers", "_queue")

    def __init__(self, env: Any) -> None:
        self._env: Any = env
        self._direct = type(env) is simpy.Environment and hasattr(env, "_queue") and hasattr(env, "_eid")
        self._queue: list[Any] = env._queue if self._direct else []
        self._numbers: Any = env._eid if self._direct else None

    def now(self) -> Micros:
        """Return the time."""
        return int(self._env._now) if self._direct else int(self._env.now)

    def after(self, delay_us: Micros, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        """Call something later."""
        due = Due(call, arguments)
        if self._direct:
            heappush(self._queue, (self._env._now + delay_us, NORMAL, next(self._numbers), due))
        else:
            self._env.schedule(due, delay=delay_us)

    def next_at(self) -> float:
        """Return when the next event is due, infinity when none is."""
        if self._direct:
            queue = self._queue
            return queue[0][0] if queue else _NEVER
        at: float = self._env.peek()
        return at

    def step(self) -> None:
        """Let the next event happen; the clock goes on to its time."""
        queue = self._queue
        if self._direct and type(queue[0][3]) is Due:
            entry = heappop(queue)
            due: Due = entry[3]
            self._env._now = entry[0]
            due.callbacks = None
            due.call(*due.arguments)
        else:
            self._env.step()
