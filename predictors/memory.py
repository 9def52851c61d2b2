"""How much GPU memory a task peaks at: weights are exact, activations counted, both corrected per model, plus a margin.

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
_FAMILY_HOLD = 1.0
"""The same of a family's line."""
_SIGMA = 0.06
"""Spread of log(measured / expected) that is assumed before anything was measured: its P99 is a margin of 15%."""
_UNIT = _SIGMA / NORMAL_SPREAD
"""Log of measured / expected that a residual of one in the pool stands for."""
_PACKED = 0.996
"""Share of peaks that an estimate covers. Grants round it up, which leaves less than a thousandth of the tasks beyond."""
_FIRSTS_MEMORY_S = 60 * 86400.0
_FIRST_MOST = 1.0
"""First errors are cut here, in logs."""
_POOL = 2000
_FLOORS = 16
"""Sizes of one model whose lower bounds are kept."""


class GpuMemoryModel:
    """Peak memory per GPU: the line of a model over size, times what that gets wrong, at least what was not enough."""

    __slots__ = ("_limit", "families", "firsts", "floors", "lines", "pool")

    def __init__(self, cells: int = 20_000) -> None:
        self.lines: dict[Hashable, Cell] = {}
        """By (method, model): weight, sums of x, x^2, y, xy, and seconds; x: counted activations, y: peaks, both over weights."""
        self.families: dict[Hashable, Cell] = {}
        """The same by (method, family), where a new model of it starts: the peaks of a model that has many count little."""
        self.firsts = DecayedMeans(_FIRSTS_MEMORY_S, cells)
        """Squared log of measured over expected where a model was measured first, by (method, family)."""
        self.pool = ResidualPool(_POOL)
        self.floors: dict[Hashable, list[list[float]]] = {}
        """By (method, model): pairs of size in row pixels and bytes that such a task is known to exceed."""
        self._limit = cells

    def packed_bytes(self, request: Request, now_s: float) -> int:
        """Return the peak per GPU that all but four tasks in a thousand stay below; 0 when nothing is known of the model."""
        floor = self._floor(request) if self.floors else 0.0
        if not self._known(request):
            return int(floor)
        expected, spread = self._expected(request, now_s)
        return int(max(floor, expected * math.exp(spread * max(0.0, self.pool.quantile(_PACKED)))))

    def expected_bytes(self, request: Request, now_s: float) -> int:
        """Return the expected peak per GPU; 0 when nothing is known."""
        return int(self._expected(request, now_s)[0]) if self._known(request) else 0

    def learn(self, request: Request, now_s: float, peak_bytes: int) -> None:
        """Learn a measured peak of a task that finished."""
        if peak_bytes <= 0:
            return
        key = (request.method, request.model)
        expected, spread = self._expected(request, now_s)
        error = math.log(peak_bytes / expected)
        # A first measurement corrects the counted figure; only those after it show how far lines err.
        if key in self.lines:
            self.pool.add(max(-20.0, min(20.0, error / spread)))
        elif self._known(request):
            self.firsts.add((request.method, request.family), now_s, min(_FIRST_MOST, abs(error)) ** 2)
        weights, activations, known = _counted(request)
        x, y = activations / weights, peak_bytes / weights
        weight = self._add(self.lines, key, now_s, (1.0, x, x * x, y, x * y))
        if known:
            share = 1.0 / weight
            seen = (share, share * x, share * x * x, share * y, share * x * y)
            self._add(self.families, (request.method, request.family), now_s, seen)
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

    def _add(self, lines: dict[Hashable, Cell], key: Hashable, now_s: float, seen: tuple[float, ...]) -> float:
        """Add one peak to a line and return the weight of all that stand behind it."""
        cell = lines.pop(key, None) or [0.0, 0.0, 0.0, 0.0, 0.0, now_s]
        decay = math.exp(min(0.0, cell[5] - now_s) / _MEMORY_S)
        sums = [kept * decay + new for kept, new in zip(cell, seen, strict=False)]
        lines[key] = [*sums, max(now_s, cell[5])]
        if len(lines) > self._limit:
            del lines[next(iter(lines))]
        return sums[0]

    def _floor(self, request: Request) -> float:
        size = _size(request)
        pairs = self.floors.get((request.method, request.model), ())
        return max((bytes_ for at, bytes_ in pairs if at <= size), default=0.0)

    def _known(self, request: Request) -> bool:
        if (request.method, request.model) in self.lines:
            return True
        return bool(request.family or request.weights_bytes) and _counted(request)[2]

    def _expected(self, request: Request, now_s: float) -> tuple[float, float]:
        """Return where the model's line lies at the request's size, and how much wider errors are there than a pool's unit.

        Least squares held to the counted line, never falling. The fewer peaks support it there, the wider; before any, as wide as
        first peaks of the family's models were.
        """
        weights, activations, known = _counted(request)
        level = slope = 1.0
        if known:
            of_family = _decayed(self.families.get((request.method, request.family)), now_s)
            if of_family is not None:
                level, slope, _ = _line(of_family, level, slope, _FAMILY_HOLD)
        sums = _decayed(self.lines.get((request.method, request.model)), now_s)
        if sums is None:
            return level * weights + slope * activations, self._first_spread(request, now_s)
        n, sx, _, sy, _ = sums
        if not known:
            level = slope = sy / (
                n + sx
            )  # All that is known of such a model is how far its own peaks were from a guess.
        level, slope, apart = _line(sums, level, slope, _HOLD)
        n += _HOLD
        # Below the middle of what was measured doubt stays what it is there: a larger task must not seem to need less.
        ahead = max(0.0, activations / weights - sx / n)
        doubt = 1.0 / n + ahead * ahead * n / apart
        return max(1.0, level * weights + slope * activations), _UNIT * math.sqrt(1.0 + doubt)

    def _first_spread(self, request: Request, now_s: float) -> float:
        """Return by how much first peaks of a family's models were off, in units of the pool."""
        squared = self.firsts.shrunk((request.method, request.family), now_s, _SIGMA**2, _STRENGTH)
        return math.sqrt(squared) / NORMAL_SPREAD


def _decayed(cell: Cell | None, now_s: float) -> Cell | None:
    """Return a line's sums as they count now; None where nothing is left of them."""
    if cell is None:
        return None
    decay = math.exp(min(0.0, cell[5] - now_s) / _MEMORY_S)
    return [part * decay for part in cell[:5]] if cell[0] * decay >= 1e-9 else None


def _line(sums: Cell, level: float, slope: float, hold: float) -> tuple[float, float, float]:
    """Return level and slope by least squares, held to given ones and never below zero, and the sums' determinant."""
    n, sx, sxx, sy, sxy = sums
    n, sxx, sy, sxy = n + hold, sxx + hold, sy + hold * level, sxy + hold * slope
    apart = n * sxx - sx * sx
    slope = max(0.0, (n * sxy - sx * sy) / apart)
    return max(0.0, (sy - slope * sx) / n), slope, apart


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
