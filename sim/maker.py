"""Makes frozen records by the hundred thousand, in half or a quarter of the time that their own constructors take.

A frozen dataclass sets each field through `object.__setattr__`; writing through its slots' own descriptors gives an equal record.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Final

_new: Final = object.__new__


class Maker:
    """Makes records of one class: a frozen dataclass with slots and without `__post_init__`."""

    __slots__ = ("_kind", "_setters")

    def __init__(self, kind: type) -> None:
        if hasattr(kind, "__post_init__"):
            raise TypeError(f"{kind.__name__}: it has a __post_init__, which would be passed over; call it by its name")
        self._kind = kind
        self._setters: list[Any] = [kind.__dict__[field.name].__set__ for field in fields(kind)]

    def make(self, values: tuple[Any, ...]) -> Any:
        """Return a record with these values, one for every field in its order."""
        setters = self._setters
        if len(values) != len(setters):
            raise TypeError(f"{self._kind.__name__}: {len(values)} values for {len(setters)} fields; give every one")
        made: Any = _new(self._kind)
        for number in range(len(setters)):
            setters[number](made, values[number])
        return made
