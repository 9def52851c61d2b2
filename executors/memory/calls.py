"""What the calls of one loaded model may take, and what each picture in them took."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from executors.memory.meter import Meter
from executors.memory.plan import MANY, MemoryPlan, Phase, SizePlan


class CallMemory:
    """Says how many pictures go into a call, measures the call, and keeps each picture's share of it."""

    def __init__(self, plan: MemoryPlan | None, meter: Meter) -> None:
        """`plan` is None for a model whose needs are not known: then nothing is limited ahead, and all is measured."""
        self.plan = plan
        self._meter = meter
        self._shares: dict[str, int] = {}
        self.base_bytes = 0
        """What was allocated before the latest call: weights, adapters, latents."""

    def decide(self, width: int, height: int, rows: int) -> SizePlan:
        """Return how many pictures of a size may share a call now: one at least, for whether one fits is for the device to say."""
        free = self._meter.free_bytes()
        if self.plan is None or free is None:
            return SizePlan(width, height, MANY, MANY, tiled=False)
        size = self.plan.size(width, height, rows, free_bytes=free)
        tiled = size.tiled or (not size.decoded_at_once and self.plan.footprint.tiles)
        return SizePlan(width, height, max(1, size.at_once), max(1, size.decoded_at_once), tiled=tiled)

    def free_bytes(self) -> int | None:
        """Return what may still be allocated on the device; None where nobody says."""
        return self._meter.free_bytes()

    @contextmanager
    def call(
        self, phase: Phase, width: int, height: int, rows: int, pictures: Sequence[str], *, tiled: bool = False
    ) -> Iterator[None]:
        """Measure a call that these pictures share; one that fails is not learned from."""
        base = self._meter.begin()
        yield
        working = max(0, self._meter.peak_bytes() - base)
        self.base_bytes = base
        share = math.ceil(working / max(1, len(pictures)))
        for picture in pictures:
            self._shares[picture] = max(self._shares.get(picture, 0), share)
        if self.plan is not None and self._meter.free_bytes() is not None:
            planned = self.plan.planned(phase, width, height, rows, len(pictures), tiled)
            self.plan.learn(phase, planned, working - self.plan.coming_bytes(phase))

    def take_share(self, picture: str) -> int:
        """Return a picture's share of the largest call it took part in, and forget it."""
        return self._shares.pop(picture, 0)
