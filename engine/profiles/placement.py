"""Reads the keys of `[placement]` that are no plain values: the tie rule, and the typical shapes that FGD keeps room for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.fit import TIES
from engine.levels.scoring.fragmentation import Typical

_KINDS: dict[str, type] = {"count": int, "cpu_milli": int, "gpus": int, "gpu_share": int, "gpu_models": list}


def _tie(raw: object) -> str:
    if raw not in TIES or not isinstance(raw, str):
        raise ValueError(f"placement.tie: {raw!r} is unknown; use {', '.join(TIES)}")
    return raw


def _typical(raw: object) -> tuple[Typical, ...]:
    if not isinstance(raw, list) or not raw:
        raise ValueError(
            "placement.typical: use one table per shape, as [[placement.typical]] and count = 10, gpu_share = 500 below it"
        )
    return tuple(_shape(at, row) for at, row in enumerate(raw))


def _shape(at: int, row: object) -> Typical:
    key = f"placement.typical[{at}]"
    if not isinstance(row, dict) or "count" not in row:
        raise ValueError(f"{key}.count: it is missing; say how often this shape comes")
    values: dict[str, Any] = {}
    for name, value in row.items():
        if name not in _KINDS:
            raise ValueError(f"{key}.{name}: there is no such key; use {', '.join(_KINDS)}")
        if name == "gpu_models":
            if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
                raise ValueError(f"{key}.{name}: {value!r} is wrong; use a list of GPU models")
            values[name] = tuple(sorted(value))
        elif isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{key}.{name}: {value!r} is wrong; use a whole number of at least 0")
        else:
            values[name] = value
    try:
        return Typical(**values)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


READERS: dict[str, Callable[[object], Any]] = {"tie": _tie, "typical": _typical}
"""Key of `[placement]`, also the field of `Profile` -> how it is read; raises ValueError naming the key."""
