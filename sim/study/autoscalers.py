"""Ways to size a fleet as others have them: fixed, by a target of utilisation, by the length of the queue."""

from __future__ import annotations

import math

from engine.protocol.fleet import NodeOffer
from engine.tasks import SECOND, Micros
from sim.configuration import ConfigError
from sim.fleet import Scaler, View

FIXED, REACTIVE, QUEUE = "fixed", "utilisation", "queue"
_TOLERANCE = 0.1
_USE_US = 60 * SECOND
"""The horizontal autoscaler looks every 15 s at figures that are averages."""
_POLL_US = 30 * SECOND
"""KEDA's default."""


def make_scaler(way: str, dial: float, offer: NodeOffer, mean_nodes: int) -> Scaler:
    """Return an autoscaler as others have it."""
    if way == FIXED:
        fixed = max(1, math.ceil(dial * mean_nodes))
        return lambda view: fixed
    if way == REACTIVE:
        return _Stabilised(_ByUse(dial), offer.cool_down_us)
    if way == QUEUE:
        return _Stabilised(_ByQueue(dial), offer.cool_down_us)
    raise ConfigError(f"ways: unknown {way!r}; known are {FIXED}, {REACTIVE}, {QUEUE}")


class _ByUse:
    """Returns ceil(nodes x use / target) by the use of the last minute, unless that is within a tenth of what there is."""

    def __init__(self, target: float) -> None:
        self._target = target
        self._seen: list[tuple[Micros, float]] = []

    def __call__(self, view: View) -> int:
        if not view.ready:
            return view.nodes
        self._seen.append((view.now, view.busy / (view.ready * view.gpus)))
        while self._seen[0][0] + _USE_US <= view.now:
            del self._seen[0]
        ratio = sum(use for _, use in self._seen) / len(self._seen) / self._target
        return view.nodes if abs(ratio - 1) <= _TOLERANCE else math.ceil(view.ready * ratio)


class _ByQueue:
    """Returns the nodes for so many open tasks per GPU, as of the last poll."""

    def __init__(self, per_gpu: float) -> None:
        self._per_gpu = per_gpu
        self._polled_at: Micros = -_POLL_US
        self._nodes = 1

    def __call__(self, view: View) -> int:
        if view.now >= self._polled_at + _POLL_US:
            self._polled_at = view.now
            self._nodes = math.ceil(view.open / (self._per_gpu * view.gpus))
        return self._nodes


class _Stabilised:
    """Grows at once; shrinks only to the most that was recommended during the cool-down."""

    def __init__(self, wanted: Scaler, cool_down_us: Micros) -> None:
        self._wanted = wanted
        self._cool_down_us = cool_down_us
        self._told: list[tuple[Micros, int]] = []

    def __call__(self, view: View) -> int:
        wanted = max(1, self._wanted(view))
        if not self._told:
            self._told.append((view.now, view.nodes))  # what there is at first was wanted by somebody
        while self._told and self._told[-1][1] <= wanted:
            self._told.pop()
        self._told.append((view.now, wanted))
        while self._told[0][0] + self._cool_down_us < view.now:
            del self._told[0]
        return wanted if wanted >= view.nodes else min(view.nodes, self._told[0][1])
