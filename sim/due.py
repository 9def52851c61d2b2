"""A call that is due at a moment, as an event of SimPy: a timeout with no more in it than the simulator needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _fire(due: Due) -> None:
    due.call(*due.arguments)


_CALLBACKS = (_fire,)


class Due:
    """What `simpy.Environment.schedule` takes: it has callbacks, and it is well."""

    __slots__ = ("_ok", "arguments", "call", "callbacks")

    def __init__(self, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self.call = call
        self.arguments = arguments
        self.callbacks: tuple[Callable[[Due], None], ...] | None = _CALLBACKS
        self._ok = True
