"""How much GPU memory a task peaks at: weights are exact, activations analytic, the rest a conformal margin at P99."""

from __future__ import annotations

import math
from collections.abc import Hashable

from predictors.decay import DecayedMeans
from predictors.features import Request
from predictors.residuals import NORMAL_SPREAD, ResidualPool

GIB = 2**30

WEIGHTS_BYTES = {"sd15": int(2.55 * GIB), "sdxl": int(6.46 * GIB)}
"""fp16 weights resident in memory by model family; for SD 1.5 with its safety checker."""
ACTIVATION_BYTES = {"sd15": 1760, "sdxl": 2557}
"""Peak activations per picture and pixel, by model family."""
_DEFAULT_FAMILY = "sd15"
_DEFAULT_PIXELS = 512 * 512

RETRY_FACTOR = 1.2
"""An out-of-memory raises the estimate at least by this."""
_RELAX = 0.98
_MEMORY_S = 14 * 86400.0
_STRENGTH = 3.0
_SIGMA = 0.06
"""Spread of log(measured / analytic) that is assumed before anything was measured: its P99 is a margin of 15%."""
_POOL = 500


class GpuMemoryModel:
    """Peak memory per GPU: the analytic figure, times a learned ratio per model, times the P99 of what that gets wrong."""

    __slots__ = ("_limit", "floors", "pool", "ratios")

    def __init__(self, cells: int = 20_000) -> None:
        self.ratios = DecayedMeans(_MEMORY_S, cells)
        self.pool = ResidualPool(_POOL)
        self.floors: dict[Hashable, float] = {}
        """Lower bounds learned from running out of memory, in bytes."""
        self._limit = cells

    def p99_bytes(self, request: Request, now_s: float) -> int:
        """Return the P99 of peak memory per GPU; 0 when neither the model's size nor any measurement is known."""
        floor = self.floors.get(_cell(request), 0.0)
        if not self._known(request):
            return int(floor)
        centre = _analytic(request) * math.exp(self._ratio(request, now_s))
        return int(max(floor, centre * math.exp(_SIGMA / NORMAL_SPREAD * self.pool.quantile(0.99))))

    def expected_bytes(self, request: Request, now_s: float) -> int:
        """Return the expected peak per GPU; 0 when nothing is known."""
        return int(_analytic(request) * math.exp(self._ratio(request, now_s))) if self._known(request) else 0

    def learn(self, request: Request, now_s: float, peak_bytes: int) -> None:
        """Learn a measured peak of a task that finished."""
        if peak_bytes <= 0:
            return
        seen = math.log(peak_bytes / _analytic(request))
        # A first measurement corrects the analytic figure; only those after it show how far predictions err.
        if self.ratios.weight((request.method, request.model), now_s) > 0.0:
            error = (seen - self._ratio(request, now_s)) * NORMAL_SPREAD / _SIGMA
            self.pool.add(max(-20.0, min(20.0, error)))
        for key in _keys(request):
            self.ratios.add(key, now_s, seen)
        cell = _cell(request)
        if cell in self.floors and peak_bytes < self.floors[cell]:
            self.floors[cell] = max(float(peak_bytes), self.floors[cell] * _RELAX)

    def learn_out_of_memory(self, request: Request, now_s: float, allotted_bytes: int, measured_bytes: int) -> int:
        """Learn that ``allotted_bytes`` were not enough; return the raised estimate: max(1.2 x allotted, measured)."""
        cell = _cell(request)
        held = max(allotted_bytes, self.expected_bytes(request, now_s), int(self.floors.get(cell, 0.0)))
        raised = max(held * RETRY_FACTOR, float(measured_bytes))
        if raised <= 0.0:
            return 0
        self.floors.pop(cell, None)
        self.floors[cell] = raised
        if len(self.floors) > self._limit:
            del self.floors[next(iter(self.floors))]
        return int(raised)

    def _known(self, request: Request) -> bool:
        return (
            request.weights_bytes > 0
            or request.family in WEIGHTS_BYTES
            or (request.method, request.model) in self.ratios.cells
        )

    def _ratio(self, request: Request, now_s: float) -> float:
        ratio = 0.0
        for key, strength in zip(_keys(request), (_STRENGTH, 0.1, 0.1), strict=True):
            ratio = self.ratios.shrunk(key, now_s, ratio, strength)
        return ratio


def _analytic(request: Request) -> float:
    family = request.family if request.family in WEIGHTS_BYTES else _DEFAULT_FAMILY
    weights = request.weights_bytes or WEIGHTS_BYTES[family]
    return weights + ACTIVATION_BYTES[family] * (request.pixels or _DEFAULT_PIXELS) * request.batch


def _cell(request: Request) -> Hashable:
    return (request.method, request.model, request.pixels, request.batch)


def _keys(request: Request) -> tuple[Hashable, Hashable, Hashable]:
    return (request.method, request.family), (request.method, request.model), _cell(request)
