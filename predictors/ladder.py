"""The nested means at the heart of the predictor: a fine key borrows strength from the coarser ones above it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from predictors.decay import Cell
from predictors.features import Covariates, Key

GUESS_STRENGTH = 0.25


class Ladder:
    """Decayed empirical-Bayes means of a target along nested keys, with the mean covariates they stand for.

    Each rung with n observations is pulled to its parent by n / (n + strength). The covariates' means travel along, so that a
    caller can correct for the distance between a request's own covariates and those of the history it borrows.
    Cells are ``[weight, sum of targets, sums of covariates ..., time in seconds]``.
    """

    __slots__ = ("cells", "limit", "memory_s", "strength")

    def __init__(self, memory_s: float, strength: float, limit: int) -> None:
        self.memory_s = memory_s
        self.strength = strength
        self.limit = limit
        self.cells: dict[Key, Cell] = {}

    def __len__(self) -> int:
        return len(self.cells)

    def climb(
        self, keys: Sequence[Key], now_s: float, start: float, covariates: Covariates
    ) -> tuple[float, Covariates, list[float]]:
        """Return the shrunk mean, the covariates' distance from the history's own, and each rung's weight.

        Without any history the mean is ``start`` and the distance is zero. The start is a guess, so the first rung hardly holds on
        to it.
        """
        mean = start
        pictures, steps, pixels, work = own_pictures, own_steps, own_pixels, own_work = covariates
        weights: list[float] = []
        strength, memory_s, exp = GUESS_STRENGTH, self.memory_s, math.exp
        for key in keys:
            cell = self.cells.get(key)
            if cell is None:
                weights.append(0.0)
                continue
            weight, target, of_pictures, of_steps, of_pixels, of_work, at_s = cell
            decay = exp((at_s - now_s) / memory_s) if at_s < now_s else 1.0
            weight *= decay
            weights.append(weight)
            keep = strength / (weight + strength)
            share = decay / (weight + strength)
            strength = self.strength
            mean = keep * mean + share * target
            pictures = keep * pictures + share * of_pictures
            steps = keep * steps + share * of_steps
            pixels = keep * pixels + share * of_pixels
            work = keep * work + share * of_work
        return mean, (own_pictures - pictures, own_steps - steps, own_pixels - pixels, own_work - work), weights

    def add(
        self,
        keys: Sequence[Key],
        now_s: float,
        target: float,
        covariates: Covariates,
        weight: float = 1.0,
    ) -> None:
        """Add one observation to every rung."""
        cells = self.cells
        # Looked up as a local and kept whole: this runs five times for every finished task.
        added = (weight, weight * target, *[weight * covariate for covariate in covariates])
        for key in keys:
            cell = cells.pop(key, None)
            if cell is None:
                cells[key] = [*added, now_s]
                continue
            at_s = cell[6]
            decay = 1.0
            if at_s < now_s:
                decay = math.exp((at_s - now_s) / self.memory_s)
                at_s = now_s
            of_all, of_target, of_pictures, of_steps, of_pixels, of_work = added
            cells[key] = [
                cell[0] * decay + of_all,
                cell[1] * decay + of_target,
                cell[2] * decay + of_pictures,
                cell[3] * decay + of_steps,
                cell[4] * decay + of_pixels,
                cell[5] * decay + of_work,
                at_s,
            ]
        while len(cells) > self.limit:
            del cells[next(iter(cells))]

    def move(self, model: str, shift: float) -> None:
        """Move all that is known of a model by so many log seconds."""
        for key, cell in self.cells.items():
            if key and key[0] == model:
                cell[1] += shift * cell[0]

    def rows(self) -> Iterator[tuple[Key, Cell]]:
        """Yield every key with its cell, the longest untouched first."""
        yield from self.cells.items()
