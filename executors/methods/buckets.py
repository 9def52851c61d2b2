"""Sizes for pictures that are no squares: each goes to the shape nearest to its own, all of about the same number of pixels."""

from __future__ import annotations

import math

WIDEST = 2
"""Longest side of a bucket in sides of the square; the shortest is the inverse."""


def shapes(side_px: int) -> tuple[tuple[int, int], ...]:
    """Return (width, height) of the buckets around a square: multiples of 64 px (16 px for small models), no larger in area."""
    grain = 64 if side_px >= 256 else 16
    found = {(side_px, side_px)}
    first = -(-side_px // WIDEST // grain) * grain
    for width in range(max(first, grain), side_px * WIDEST + 1, grain):
        height = min(side_px * side_px // width // grain * grain, side_px * WIDEST)
        if height * WIDEST >= side_px and height >= grain:
            found |= {(width, height), (height, width)}
    return tuple(sorted(found))


def nearest(width: int, height: int, side_px: int) -> tuple[int, int]:
    """Return the bucket whose aspect is nearest to a picture's; of equals the larger."""

    def distance(shape: tuple[int, int]) -> tuple[float, int]:
        return abs(math.log(shape[0] / shape[1]) - math.log(width / height)), -shape[0] * shape[1]

    return min(shapes(side_px), key=distance)
