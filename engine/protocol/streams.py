"""A reliable, ordered stream over a channel that loses, doubles and reorders: number, resend, apply in order, acknowledge.

Both directions of the protocol use it: orders to a node, reports from it. Going back to the first unacknowledged item is enough:
the channel below is nearly always TCP, and losses are whole connections.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Generic, TypeVar

from engine.tasks import NEVER, Micros

T = TypeVar("T")

RESEND_US: Micros = 500_000
RESEND_CAP_US: Micros = 4_000_000
BATCH_ITEMS = 64


class Sender(Generic[T]):
    """The sending end. Items are numbered from 1 (or from where a stream goes on)."""

    __slots__ = ("_highest_sent", "_items", "_next", "_patience_us", "first", "limit", "resend_at")

    def __init__(self, first: int = 1, limit: int = NEVER) -> None:
        self.first = first
        """Number of the first unacknowledged item."""
        self.limit = limit
        """Highest number that may be sent."""
        self.resend_at: Micros = NEVER
        self._items: deque[T] = deque()
        self._next = first
        self._highest_sent = first - 1
        self._patience_us = RESEND_US

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[T]:
        return iter(self._items)

    def push(self, item: T) -> int:
        """Append an item and return its number."""
        self._items.append(item)
        return self.first + len(self._items) - 1

    def get(self, number: int) -> T | None:
        """Return an unacknowledged item by number."""
        at = number - self.first
        return self._items[at] if 0 <= at < len(self._items) else None

    def acknowledge(self, now: Micros, upto: int) -> list[T]:
        """Forget the items up to a number and return them; a number never sent is ignored."""
        if upto < self.first or upto > self._highest_sent:
            return []
        gone = [self._items.popleft() for _ in range(upto - self.first + 1)]
        self.first = upto + 1
        self._next = max(self._next, self.first)
        self._patience_us = RESEND_US
        self.resend_at = now + RESEND_US if self._next > self.first else NEVER
        return gone

    def grant(self, limit: int) -> None:
        """Raise the highest number that may be sent; it never falls."""
        self.limit = max(self.limit, limit)

    def rewind(self) -> None:
        """Send everything unacknowledged again at the next chance."""
        self._next = self.first
        self.resend_at = NEVER

    def ready(self) -> bool:
        """Tell whether something was never sent since the last rewind, and may be."""
        return self._next <= min(self.first + len(self._items) - 1, self.limit)

    def take(self, now: Micros) -> Iterator[tuple[int, tuple[T, ...]]]:
        """Yield what is to be sent now, in stretches of (first number, items); resends everything that waited too long."""
        if now >= self.resend_at:
            self.rewind()
            self._patience_us = min(2 * self._patience_us, RESEND_CAP_US)
        last = min(self.first + len(self._items) - 1, self.limit)
        while self._next <= last:
            first = self._next
            count = min(BATCH_ITEMS, last - first + 1)
            start = first - self.first
            self._next += count
            self._highest_sent = max(self._highest_sent, self._next - 1)
            if self.resend_at == NEVER:
                self.resend_at = now + self._patience_us
            yield first, tuple(islice(self._items, start, start + count))


class Receiver:
    """The receiving end: tells which items of a stretch are new and next in order."""

    __slots__ = ("applied",)

    def __init__(self, applied: int = 0) -> None:
        self.applied = applied

    def fresh(self, first: int, items: tuple[T, ...]) -> tuple[T, ...]:
        """Return the items to apply now, counting them as applied: none when a gap lies before, the new tail when they overlap."""
        if first > self.applied + 1:
            return ()
        new = items[self.applied + 1 - first :]
        self.applied += len(new)
        return new
