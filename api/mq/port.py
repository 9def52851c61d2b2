"""The message queue as the platform sees it: a small port that the embedded SQLite queue and a real broker both fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

REQUESTS = "requests"
"""TP and GC messages wait here for SS."""
RESULTS = "results"
"""Result messages wait here for whoever asked."""


class QueueRefused(Exception):
    """The queue does not take a message: it is full, or the message is too large. The text names the remedy."""


class QueueBroken(Exception):
    """The queue's storage failed (disk full, input/output error): nothing more is promised, the process should end."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message to put."""

    message_id: str
    body: bytes
    priority: int = 0
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message taken under a lease. `deliveries` is 1 the first time; with `seq` it makes the receipt of this delivery."""

    queue: str
    message_id: str
    body: bytes
    priority: int
    seq: int
    deliveries: int


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message nobody could use, and why."""

    queue: str
    message_id: str
    body: bytes
    priority: int
    reason: str
    deliveries: int
    died_at: float
    """Unix seconds."""


class Queue(Protocol):
    """At-least-once queues by name: higher priority first, first in first out inside a priority.

    A message id is accepted once per queue, also after its message was acknowledged. All calls may come from any thread.
    """

    def put(self, queue: str, message_id: str, body: bytes, priority: int = 0, delay_s: float = 0.0) -> bool:
        """Store a message; returns when it is durable. False: the id was known and nothing changed."""
        ...

    def put_many(self, queue: str, messages: Sequence[Outgoing], *, again: bool = False) -> int:
        """Store messages in one commit and return how many were new; `again` forgets that an id was acknowledged before."""
        ...

    def take(self, queue: str, n: int = 1, lease_s: float = 30.0, wait_s: float = 0.0) -> list[Delivery]:
        """Lease up to `n` messages, waiting up to `wait_s` for the first; an expired lease delivers again."""
        ...

    def claim(self, queue: str, message_id: str, lease_s: float = 30.0, wait_s: float = 0.0) -> Delivery | None:
        """Lease one message by its id, out of turn; None when it is absent, or leased by somebody, for `wait_s`."""
        ...

    def peek(self, queue: str, message_id: str) -> Delivery | None:
        """Return a stored message without leasing it; its receipt is good for nothing."""
        ...

    def ack(self, deliveries: Sequence[Delivery]) -> int:
        """Forget messages that are dealt with; returns how many of the leases were still held."""
        ...

    def nack(self, deliveries: Sequence[Delivery], delay_s: float = 0.0) -> int:
        """Give messages back, to be delivered again after the delay."""
        ...

    def extend(self, deliveries: Sequence[Delivery], lease_s: float) -> int:
        """Lengthen leases to `lease_s` from now; returns how many were still held."""
        ...

    def release(self, queue: str) -> int:
        """Give every leased message of a queue back; for its only reader, when it begins a new life."""
        ...

    def bury(self, deliveries: Sequence[Delivery], reason: str) -> int:
        """Move messages to the dead letters, by order."""
        ...

    def list_dead(self, queue: str, limit: int = 100) -> list[DeadLetter]:
        """Return dead letters, the newest first."""
        ...

    def requeue_dead(self, queue: str, message_id: str) -> bool:
        """Put a dead letter back in its queue with its deliveries forgotten; False when there is none."""
        ...

    def counts(self) -> Mapping[str, Mapping[str, int]]:
        """Return ``{queue: {"ready", "leased", "delayed", "dead"}}``."""
        ...

    def close(self) -> None:
        """Close the storage."""
        ...
