"""Bounded-memory summaries of unbounded streams: quantiles by logarithmic buckets, and time series whose bins grow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from engine.tasks import SECOND, Micros

_GAMMA = math.log(1.02)
"""Buckets are 2% wide: a quantile is off by at most 1%."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A distribution in short. Durations are in seconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class Sketch:
    """Quantiles of non-negative integers (microseconds) within 1%, in at most about two thousand buckets."""

    __slots__ = ("_buckets", "_zeros", "count", "highest", "total")

    def __init__(self) -> None:
        self._buckets: dict[int, int] = {}
        self._zeros = 0
        self.count = 0
        self.total = 0
        self.highest = 0

    def add(self, value: int) -> None:
        """Add one value; anything below 1 counts as 0."""
        self.count += 1
        if value < 1:
            self._zeros += 1
            return
        self.total += value
        if value > self.highest:
            self.highest = value
        bucket = int(math.log(value) / _GAMMA)
        buckets = self._buckets
        buckets[bucket] = buckets.get(bucket, 0) + 1

    def merge(self, other: Sketch) -> None:
        """Add everything that another one was given."""
        self._zeros += other._zeros
        self.count += other.count
        self.total += other.total
        self.highest = max(self.highest, other.highest)
        buckets = self._buckets
        for bucket, count in other._buckets.items():
            buckets[bucket] = buckets.get(bucket, 0) + count

    def quantile(self, share: float) -> float:
        """Return the value below which this share of the values lies; 0 when there is none."""
        wanted = share * self.count
        seen = float(self._zeros)
        if not self.count or wanted <= seen:
            return 0.0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen >= wanted:
                return min(float(self.highest), math.exp((bucket + 0.5) * _GAMMA))
        return float(self.highest)

    def spread(self) -> Spread:
        """Return the summary in seconds."""
        mean = self.total / self.count / SECOND if self.count else 0.0
        p50, p90, p99 = (self.quantile(share) / SECOND for share in (0.5, 0.9, 0.99))
        return Spread(self.count, mean, p50, p90, p99, self.highest / SECOND)

    def curve(self, points: int = 120) -> list[tuple[float, float]]:
        """Return the cumulative distribution as (seconds, share) pairs, at most about `points` of them."""
        if not self.count:
            return []
        seen = self._zeros
        curve = [(0.0, seen / self.count)]
        last = curve[0][1]
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            share = seen / self.count
            if share - last >= 1.0 / points or seen == self.count:
                curve.append((min(float(self.highest), math.exp((bucket + 0.5) * _GAMMA)) / SECOND, share))
                last = share
        return curve


class Bins:
    """Integrals of a step function over equal bins of time; when time outgrows them, bins are merged in pairs."""

    __slots__ = ("_since", "_sums", "_value", "limit", "width_us")

    def __init__(self, limit: int = 240, width_us: Micros = 60 * SECOND) -> None:
        self.limit = limit
        self.width_us = width_us
        self._sums: list[float] = []
        self._since: Micros = 0
        self._value = 0.0

    @property
    def value(self) -> float:
        """The step function's present value."""
        return self._value

    def set(self, now: Micros, value: float) -> None:
        """Let the step function have this value from now on."""
        self.advance(now)
        self._value = value

    def change(self, now: Micros, by: float) -> None:
        """Raise the value from now on."""
        if now > self._since:
            self.advance(now)
        self._value += by

    def advance(self, now: Micros) -> None:
        """Account for the time since the last call."""
        since, value = self._since, self._value
        if now <= since:
            return
        self._since = now
        while now > self.limit * self.width_us:
            self._merge()
        width, sums = self.width_us, self._sums
        last = (now - 1) // width
        if len(sums) <= last:
            sums.extend([0.0] * (last + 1 - len(sums)))
        if not value:
            return
        first = since // width
        if first == last:
            sums[first] += value * (now - since)
            return
        sums[first] += value * ((first + 1) * width - since)
        for number in range(first + 1, last):
            sums[number] += value * width
        sums[last] += value * (now - last * width)

    def add(self, now: Micros, amount: float) -> None:
        """Add to the bin of this moment directly (for counts)."""
        self.advance(now)
        number = now // self.width_us
        while number >= self.limit:
            self._merge()
            number = now // self.width_us
        if len(self._sums) <= number:
            self._sums.extend([0.0] * (number + 1 - len(self._sums)))
        self._sums[number] += amount

    def _merge(self) -> None:
        sums = self._sums
        if len(sums) % 2:
            sums.append(0.0)
        self._sums = [sums[number] + sums[number + 1] for number in range(0, len(sums), 2)]
        self.width_us *= 2

    @property
    def total(self) -> float:
        """Integral over all time so far, in value x microseconds."""
        return sum(self._sums)

    def means(self) -> list[float]:
        """Return the mean value in each bin; the last bin counts only the time that has passed in it."""
        means = [total / self.width_us for total in self._sums]
        if means:
            passed = self._since - (len(means) - 1) * self.width_us
            if 0 < passed < self.width_us:
                means[-1] = self._sums[-1] / passed
        return means

    def sums(self) -> list[float]:
        """Return the sum in each bin."""
        return list(self._sums)


def jain(shares: Mapping[str, float]) -> float:
    """Return Jain's index: 1 when all are equal, 1/n when one has all; 1 for fewer than two."""
    values = list(shares.values())
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if len(values) > 1 and squares > 0 else 1.0
