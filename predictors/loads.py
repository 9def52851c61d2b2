"""How long a model takes to load: bytes over bandwidth by where they lie, corrected per place, per holder and per model.

Load times are bimodal: what lies near is there in seconds, what lies far takes half a minute. Where the bytes lie says which, when
it is known; where it is not, the holder (a Pod or a node) says most, since its cache and its disk stay what they were.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

from engine.tasks import SECOND, Micros
from predictors import physics
from predictors.decay import DecayedMeans
from predictors.residuals import NORMAL_SPREAD, ResidualPool

HOUR_S = 3600.0
_DEFAULT_BYTES = physics.SDXL.weights_bytes
_LONG_S, _SHORT_S = 48 * HOUR_S, 0.5 * HOUR_S
_SIGMA = 0.35
"""Spread of log errors that is assumed before any was seen."""


@dataclass(frozen=True, slots=True)
class LoadTime:
    """What one load is expected to take."""

    p50_us: Micros
    p90_us: Micros
    centre: float
    """Log seconds: what the outcome is compared with."""


class LoadTimes:
    """Learns load times online by kind of load (``base``, ``lora``), place of the bytes, holder and model."""

    __slots__ = ("lasting", "lately", "pool")

    def __init__(self, cells: int = 20_000) -> None:
        self.lasting = DecayedMeans(_LONG_S, cells)
        self.lately = DecayedMeans(_SHORT_S, cells)
        self.pool = ResidualPool(1000)

    def predict(
        self,
        now_us: Micros,
        *,
        kind: str = "base",
        holder: str = "",
        model: str = "",
        source: str = "",
        size_bytes: int = 0,
    ) -> LoadTime:
        """Predict a load; ``source`` is a place of `physics.BANDWIDTHS`, and like all else may be unknown."""
        now_s = now_us / SECOND
        if source == "gpu":
            return LoadTime(0, 0, -math.inf)
        start = _counted(source, size_bytes)
        off, strength = 0.0, 0.5
        for key in _keys(kind, holder, model, source):
            off = self.lasting.shrunk(key, now_s, off, strength)
            strength = 2.0
        off += self.lately.shrunk((kind, source, holder), now_s, 0.0, 6.0)
        centre = start + off
        scale = _SIGMA / NORMAL_SPREAD
        p50, p90 = (math.exp(min(20.0, centre + scale * self.pool.quantile(level))) for level in (0.5, 0.9))
        return LoadTime(round(p50 * SECOND), round(p90 * SECOND), centre)

    def observe(
        self,
        now_us: Micros,
        load_us: Micros,
        *,
        kind: str = "base",
        holder: str = "",
        model: str = "",
        source: str = "",
        size_bytes: int = 0,
    ) -> None:
        """Learn from a load that ended; one of no time, or of a model that was there, says nothing."""
        if load_us <= 0 or source == "gpu":
            return
        now_s = now_us / SECOND
        seen = math.log(load_us / SECOND)
        said = self.predict(now_us, kind=kind, holder=holder, model=model, source=source, size_bytes=size_bytes).centre
        start = _counted(source, size_bytes)
        self.pool.add(max(-20.0, min(20.0, (seen - said) * NORMAL_SPREAD / _SIGMA)))
        for key in _keys(kind, holder, model, source):
            self.lasting.add(key, now_s, seen - start)
        self.lately.add((kind, source, holder), now_s, seen - said)


def _counted(source: str, size_bytes: int) -> float:
    return math.log(physics.load_seconds(size_bytes or _DEFAULT_BYTES, source or "disk"))


def _keys(kind: str, holder: str, model: str, source: str) -> tuple[Hashable, ...]:
    keys: list[Hashable] = [(kind,), (kind, source)]
    if model:
        keys.append((kind, source, "model", model))
    if holder:
        keys.append((kind, source, "holder", holder))
    return tuple(keys)
