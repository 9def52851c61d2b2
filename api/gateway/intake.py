"""Brings ranked submissions into the queue: the only writer of the gateway.

A submission waits in the admission window until it ranks first, and its caller is answered only when the queue has made it
durable.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from api.gateway.problems import Refused
from api.gateway.ranking import AdmissionWindow, Waiting, WindowFull
from api.monitoring.metrics import Metrics
from api.mq.port import Outgoing, QueueRefused
from engine.tasks import URGENT_PRIORITY

log = structlog.get_logger("gateway")


class QueuePort(Protocol):
    """What the gateway needs of the message queue. Equal message ids are one message."""

    def put_many(self, queue: str, messages: Sequence[Outgoing]) -> int:
        """Add messages in their order; returns when they are durable. Raises QueueRefused when there is no room."""
        ...


@dataclass(frozen=True, slots=True)
class Submission:
    """A message on its way to the queue."""

    message_id: str
    body: bytes
    priority: int
    done: asyncio.Future[None]


class Intake:
    """Ranks concurrent submissions and puts them on the queue in batches."""

    def __init__(
        self,
        queue: QueuePort,
        queue_name: str,
        window: AdmissionWindow[Submission],
        metrics: Metrics,
        clock_us: Callable[[], int],
        batch: int,
    ) -> None:
        self._queue = queue
        self._queue_name = queue_name
        self._window = window
        self._metrics = metrics
        self._clock_us = clock_us
        self._batch = batch
        self._drain: asyncio.Task[None] | None = None

    async def submit(
        self, message_id: str, body: bytes, *, tenant: str, weight: int, priority: int, max_waiting: int
    ) -> None:
        """Return when the message is durable in the queue; raises Refused: 429 when the window is full, 503 or 507."""
        arrived = self._clock_us()
        entry = Submission(message_id, body, priority, asyncio.get_running_loop().create_future())
        try:
            pushed_out = self._window.push(
                entry, tenant=tenant, weight=weight, priority=priority, now=arrived, max_waiting=max_waiting
            )
        except WindowFull as full:
            self._metrics.refused.labels(f"window_full_{full.scope}").inc()
            raise _window_full(full.scope) from None
        if pushed_out is not None and not pushed_out.item.done.done():
            self._metrics.refused.labels("window_pushed_out").inc()
            pushed_out.item.done.set_exception(_window_full("window"))
        self._metrics.window_waiting.set(len(self._window))
        if self._drain is None or self._drain.done():
            self._drain = asyncio.create_task(self._run())
        await asyncio.shield(entry.done)
        urgency = "urgent" if priority >= URGENT_PRIORITY else "ordinary"
        self._metrics.queued.labels(urgency).inc()
        self._metrics.window_seconds.labels(urgency).observe((self._clock_us() - arrived) / 1e6)

    async def _run(self) -> None:
        """Put the ranked submissions on the queue until none waits."""
        while len(self._window):
            batch: list[Waiting[Submission]] = []
            while len(batch) < self._batch and (first := self._window.pop(self._clock_us())) is not None:
                batch.append(first)
            self._metrics.window_waiting.set(len(self._window))
            error: BaseException | None = RuntimeError("the gateway is ending")
            try:
                error = await asyncio.to_thread(self._put, [entry.item for entry in batch])
            finally:
                self._answer(batch, error)

    def _answer(self, batch: Sequence[Waiting[Submission]], error: BaseException | None) -> None:
        for entry in batch:
            done = entry.item.done
            if done.done():
                continue
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(_queue_refusal(error))
                done.exception()

    def _put(self, batch: Sequence[Submission]) -> Exception | None:
        messages = [Outgoing(entry.message_id, entry.body, entry.priority) for entry in batch]
        try:
            self._queue.put_many(self._queue_name, messages)
        except Exception as error:
            log.error("queue_put_failed", error=repr(error), messages=len(messages))
            return error
        return None


def _window_full(scope: str) -> Refused:
    whose = "this tenant" if scope == "tenant" else "all tenants"
    return Refused(
        429,
        "window_full",
        f"Too many submissions of {whose} wait for the queue; try again in 1 s.",
        headers={"Retry-After": "1"},
    )


def _queue_refusal(error: BaseException) -> Refused:
    if isinstance(error, QueueRefused):
        return Refused(503, "queue_full", f"The queue refused the message: {error}.", headers={"Retry-After": "5"})
    full = isinstance(error, OSError) and error.errno == 28
    full = full or (isinstance(error, sqlite3.OperationalError) and "full" in str(error))
    if full:
        return Refused(507, "storage_full", "The queue's disk is full; nothing was accepted.")
    return Refused(
        503, "queue_unavailable", "The queue takes no message now; nothing was accepted.", headers={"Retry-After": "1"}
    )
