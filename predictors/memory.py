"""How much GPU memory a task peaks at: weights are exact, activations counted, both corrected per model, and a margin at P99.

Peaks of one model lie on a line over the pixels of all its rows. Two numbers per model say how far that line is from the counted
one, so more or larger pictures never seem to need less, and one size teaches another.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

from predictors import physics
from predictors.decay import Cell, DecayedMeans
from predictors.features import TRAINING_METHODS, Request
from predictors.residuals import NORMAL_SPREAD, ResidualPool

GIB = physics.GIB
RETRY_FACTOR = 1.2
"""An out-of-memory raises the estimate at least by this."""
_RELAX = 0.98
_MEMORY_S = 14 * 86400.0
_STRENGTH = 3.0
_HOLD = 0.1
"""How many measurements the counted weights, and the counted activations, hold against."""
_SIGMA = 0.06
"""Spread of log(measured / expected) that is assumed before anything was measured: its P99 is a margin of 15%."""
_POOL = 500
_FLOORS = 16
"""Sizes of one model whose lower bounds are kept."""


class GpuMemoryModel:
    """Peak memory per GPU: the line of a model over size, times the P99 of what that gets wrong, at least what was not enough."""

    __slots__ = ("_limit", "families", "floors", "lines", "pool")

    def __init__(self, cells: int = 20_000) -> None:
        self.families = DecayedMeans(_MEMORY_S, cells)
        """Log of measured over counted, by (method, family): where a new model of a family starts."""
        self.lines: dict[Hashable, Cell] = {}
        """By (method, model): weight, sums of x, x^2, y, xy, and seconds; x: counted activations, y: peaks, both over weights."""
        self.pool = ResidualPool(_POOL)
        self.floors: dict[Hashable, list[list[float]]] = {}
        """By (method, model): pairs of size in row pixels and bytes that such a task is known to exceed."""
        self._limit = cells

    def p99_bytes(self, request: Request, now_s: float) -> int:
        """Return the P99 of peak memory per GPU; 0 when neither the model's size nor any measurement is known."""
        floor = self._floor(request) if self.floors else 0.0
        if not self._known(request):
            return int(floor)
        return int(max(floor, self._expected(request, now_s) * self.margin()))

    def expected_bytes(self, request: Request, now_s: float) -> int:
        """Return the expected peak per GPU; 0 when nothing is known."""
        return int(self._expected(request, now_s)) if self._known(request) else 0

    def margin(self) -> float:
        """Return the factor from an expected peak to its P99."""
        return math.exp(_SIGMA / NORMAL_SPREAD * max(0.0, self.pool.quantile(0.99)))

    def learn(self, request: Request, now_s: float, peak_bytes: int) -> None:
        """Learn a measured peak of a task that finished."""
        if peak_bytes <= 0:
            return
        key = (request.method, request.model)
        # A first measurement corrects the counted figure; only those after it show how far predictions err.
        if key in self.lines:
            error = math.log(peak_bytes / self._expected(request, now_s)) * NORMAL_SPREAD / _SIGMA
            self.pool.add(max(-20.0, min(20.0, error)))
        weights, activations, _ = _counted(request)
        self.families.add((request.method, request.family), now_s, math.log(peak_bytes / (weights + activations)))
        x, y = activations / weights, peak_bytes / weights
        cell = self.lines.pop(key, None) or [0.0, 0.0, 0.0, 0.0, 0.0, now_s]
        decay = math.exp(min(0.0, cell[5] - now_s) / _MEMORY_S)
        sums = [kept * decay + seen for kept, seen in zip(cell, (1.0, x, x * x, y, x * y), strict=False)]
        self.lines[key] = [*sums, max(now_s, cell[5])]
        if len(self.lines) > self._limit:
            del self.lines[next(iter(self.lines))]
        for pair in self.floors.get(key, ()):
            if pair[0] <= _size(request) and pair[1] > peak_bytes:
                pair[1] = max(float(peak_bytes), pair[1] * _RELAX)

    def learn_out_of_memory(self, request: Request, now_s: float, allotted_bytes: int, measured_bytes: int) -> int:
        """Learn that ``allotted_bytes`` were not enough; return the raised estimate: max(1.2 x allotted, measured)."""
        held = max(allotted_bytes, self.expected_bytes(request, now_s), int(self._floor(request)))
        raised = max(held * RETRY_FACTOR, float(measured_bytes))
        if raised <= 0.0:
            return 0
        key, size = (request.method, request.model), _size(request)
        pairs = [pair for pair in self.floors.pop(key, ()) if pair[0] != size]
        self.floors[key] = [*pairs[-_FLOORS + 1 :], [size, raised]]
        if len(self.floors) > self._limit:
            del self.floors[next(iter(self.floors))]
        return int(raised)

    def _floor(self, request: Request) -> float:
        size = _size(request)
        pairs = self.floors.get((request.method, request.model), ())
        return max((bytes_ for at, bytes_ in pairs if at <= size), default=0.0)

    def _known(self, request: Request) -> bool:
        if (request.method, request.model) in self.lines:
            return True
        return bool(request.family or request.weights_bytes) and _counted(request)[2]

    def _expected(self, request: Request, now_s: float) -> float:
        """Return where the model's line lies at the request's size: least squares held to the counted line, never falling."""
        weights, activations, known = _counted(request)
        start = (
            math.exp(self.families.shrunk((request.method, request.family), now_s, 0.0, _STRENGTH)) if known else 1.0
        )
        cell = self.lines.get((request.method, request.model))
        if cell is None:
            return (weights + activations) * start
        decay = math.exp(min(0.0, cell[5] - now_s) / _MEMORY_S)
        n, sx, sxx, sy, sxy = (part * decay for part in cell[:5])
        if n < 1e-9:
            return (weights + activations) * start
        if not known:
            start = sy / (n + sx)  # All that is known of such a model is how far its own peaks were from a guess.
        n, sxx, sy, sxy = n + _HOLD, sxx + _HOLD, sy + _HOLD * start, sxy + _HOLD * start
        slope = max(0.0, (n * sxy - sx * sy) / (n * sxx - sx * sx))
        level = max(0.0, (sy - slope * sx) / n)
        return max(1.0, level * weights + slope * activations)


def _counted(request: Request) -> tuple[float, float, bool]:
    """Return the bytes of weights and of activations by arithmetic, and whether the family or the weights are known at all."""
    family = physics.family_of(request.family, request.weights_bytes)
    of = family or physics.SD15
    training = request.method in TRAINING_METHODS
    total = physics.peak_bytes(
        of,
        weights_bytes=request.weights_bytes,
        pixels=request.pixels,
        rows=request.batch,
        training=training,
        trained_parameters=of.unet_parameters + of.text_parameters if request.full else 0,
        frugal=request.frugal,
    )
    weights = float(request.weights_bytes or of.weights_bytes)
    return weights, max(1.0, total - weights), family is not None


def _size(request: Request) -> float:
    return float((request.pixels or 512 * 512) * request.batch)
