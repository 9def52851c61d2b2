"""Draws without a random source: a number that depends on its key alone, so that the same decision draws the same."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def draw(*key: int) -> int:
    """Return a number in [0, 2**63) for whole numbers as key; close keys give unlike numbers (SplitMix64's finaliser)."""
    state = 0x9E3779B97F4A7C15
    for part in key:
        state = (state + part * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1
