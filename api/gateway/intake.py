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
from api.gateway.relief import refused_for_now
from api.monitoring.metrics import Metrics
from api.mq.port import Outgoing, QueueRefused
from engine.tasks import URGENT_PRIORITY

log = structlog.get_logger("gateway")
QUEUE_FULL_S = 5.0
"""Retry-After of a full queue where nobody can look ahead."""


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
        self._each_s = 0.0
        """How long the queue takes for one message, a moving average."""
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
            raise self._window_full(full.scope) from None
        if pushed_out is not None and not pushed_out.item.done.done():
            self._metrics.refused.labels("window_pushed_out").inc()
            pushed_out.item.done.set_exception(self._window_full("window"))
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
            began = self._clock_us()
            try:
                error = await asyncio.to_thread(self._put, [entry.item for entry in batch])
                self._drained(len(batch), self._clock_us() - began)
            finally:
                self._answer(batch, error)

    def _drained(self, messages: int, took_us: int) -> None:
        each_s = took_us / messages / 1e6
        self._each_s = each_s if self._each_s == 0 else 0.8 * self._each_s + 0.2 * each_s

    def _window_full(self, scope: str) -> Refused:
        """Return the refusal, with the time in which the queue is likely to take what waits now."""
        whose = "this tenant" if scope == "tenant" else "all tenants"
        return refused_for_now(
            429,
            "window_full",
            f"Too many submissions of {whose} wait for the queue",
            len(self._window) * self._each_s,
        )

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


def _queue_refusal(error: BaseException) -> Refused:
    if isinstance(error, QueueRefused):
        return refused_for_now(503, "queue_full", f"The queue refused the message ({error})", QUEUE_FULL_S)
    full = isinstance(error, OSError) and error.errno == 28
    full = full or (isinstance(error, sqlite3.OperationalError) and "full" in str(error))
    if full:
        return Refused(507, "storage_full", "The queue's disk is full; nothing was accepted.")
    return Refused(
        503, "queue_unavailable", "The queue takes no message now; nothing was accepted.", headers={"Retry-After": "1"}
    )
