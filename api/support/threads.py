"""The two threads of SS that face the queue: one takes requests in, one sends results out and acknowledges what is journaled."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

import structlog

from api.mq.port import REQUESTS, RESULTS, Delivery, Outgoing, Queue
from api.support.store import Store
from executors.ports import FileStore

_log = structlog.get_logger("ss")


class IntakeThread:
    """Takes request messages and hands them over; pauses while too much is under way already."""

    def __init__(
        self,
        queue: Queue,
        take_in: Callable[[Delivery], None],
        busy: Callable[[], bool],
        failed: Callable[[BaseException], None],
        *,
        batch: int = 256,
        lease_s: float = 60.0,
    ) -> None:
        self._queue, self._take_in, self._busy, self._failed = queue, take_in, busy, failed
        self._batch, self._lease_s = batch, lease_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ss-intake", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; what was taken and not journaled is delivered again when its lease runs out or the process starts anew."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                if self._busy():
                    self._stopping.wait(0.01)
                    continue
                for delivery in self._queue.take(REQUESTS, self._batch, self._lease_s, wait_s=0.2):
                    self._take_in(delivery)
        except BaseException as error:
            _log.exception("intake_failed")
            self._failed(error)


class MailThread:
    """Publishes the outbox to the result queue, always with the same id and bytes, and acknowledges journaled requests.

    A result is marked sent by a later transaction; when the process dies in between, the queue knows the id and drops the repeat.
    """

    def __init__(
        self,
        queue: Queue,
        store: Store,
        files: FileStore | None,
        manifests: Callable[[Sequence[int]], Sequence[bytes]],
        failed: Callable[[BaseException], None],
        *,
        batch: int = 256,
    ) -> None:
        self._queue, self._store, self._files, self._manifests, self._failed = queue, store, files, manifests, failed
        self._batch = batch
        self._condition = threading.Condition()
        self._acks: deque[Delivery] = deque()
        self._unwanted: deque[str] = deque()
        self._work = True
        """The outbox may hold something; true at the start, for what an earlier life left."""
        self._stopping = False
        self._position = 0
        self.sent: deque[int] = deque()
        """Numbers of published rows that are not marked in the store yet."""
        self._thread = threading.Thread(target=self._run, name="ss-mail", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Send what is left and end."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def journaled(self, deliveries: Sequence[Delivery], *, results: bool, unwanted: Sequence[str] = ()) -> None:
        """Note that requests are durable, whether the outbox grew, and which files nobody needs any more."""
        with self._condition:
            self._unwanted.extend(unwanted)
            self._acks.extend(deliveries)
            self._work = self._work or results
            self._condition.notify_all()

    def _run(self) -> None:
        try:
            while True:
                with self._condition:
                    while not (self._acks or self._work or self._stopping):
                        self._condition.wait()
                    if self._stopping and not (self._acks or self._work):
                        return
                    acks = [self._acks.popleft() for _ in range(len(self._acks))]
                    work, self._work = self._work, False
                self._queue.ack(acks)
                if work:
                    self._publish()
                self._remove_unwanted()
        except BaseException as error:
            _log.exception("mail_failed")
            self._failed(error)

    def _remove_unwanted(self) -> None:
        """Remove files that nobody needs; a store that does not answer keeps them."""
        while self._unwanted:
            file_id = self._unwanted.popleft()
            try:
                if self._files is not None:
                    self._files.delete(file_id)
            except Exception as error:  # Every store has errors of its own.
                _log.warning(
                    "checkpoint_not_removed", file_id=file_id[:80], error=f"{type(error).__name__}: {error}"[:300]
                )

    def _publish(self) -> None:
        while True:
            rows = self._store.unsent(self._position, self._batch)
            if not rows:
                return
            if self._files is not None:
                for manifest in self._manifests([row[0] for row in rows]):
                    self._files.put_bytes(manifest, "application/json")
            self._queue.put_many(
                RESULTS, [Outgoing(message_id, body, priority) for _, message_id, priority, body in rows]
            )
            self._position = rows[-1][0]
            self.sent.extend(row[0] for row in rows)
