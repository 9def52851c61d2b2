"""Random numbers keyed by what they are for, so that two policies that are compared meet the same luck.

A stream of random numbers would tie every draw to the order of all draws before it, and a policy changes the order. Here a draw is
a pure function of a seed and an identity such as ``("noise", req_no, attempt)``: common random numbers, without bookkeeping.
"""

from __future__ import annotations

import math
from hashlib import blake2b
from statistics import NormalDist

_inv_cdf = NormalDist().inv_cdf
_SCALE = 1.0 / (1 << 53)


def unit(seed: int, *identity: str | int) -> float:
    """Draw uniformly from the open interval (0, 1)."""
    return _unit(_text(seed, identity))


def _text(seed: int, identity: tuple[str | int, ...]) -> str:
    return f"{seed}|" + "|".join([str(part) for part in identity])


def _unit(text: str) -> float:
    raw = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 11
    return (raw + 0.5) * _SCALE


def normal(seed: int, *identity: str | int) -> float:
    """Draw from the standard normal distribution."""
    return _inv_cdf(_unit(_text(seed, identity)))


def lognormal(sigma: float, seed: int, *identity: str | int) -> float:
    """Draw a factor with median 1; `sigma` is the standard deviation of its logarithm. Exactly 1 when sigma is 0."""
    if sigma <= 0:
        return 1.0
    return math.exp(sigma * _inv_cdf(_unit(_text(seed, identity))))


def exponential(mean: float, seed: int, *identity: str | int) -> float:
    """Draw from the exponential distribution with this mean, in the mean's own unit."""
    return -mean * math.log(unit(seed, *identity))


def choice(count: int, seed: int, *identity: str | int) -> int:
    """Draw an index below `count`."""
    return min(count - 1, int(unit(seed, *identity) * count))
