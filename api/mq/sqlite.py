"""The embedded message queue: one SQLite file, shared by processes, durable at every put.

Puts run with synchronous=FULL and are committed in groups: callers that arrive while a commit is on its way share the next one.
Takes and acknowledgements run with synchronous=NORMAL: losing one in a power failure only means a second delivery, which every
reader of an at-least-once queue must bear anyway.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from api.mq.port import RESULTS, DeadLetter, Delivery, Outgoing, QueueBroken, QueueRefused
from api.mq.sqlite_file import open_file, transaction

_READY, _LEASED, _DELAYED = 0, 1, 2
KEEP_NEWEST: Mapping[str, int] = {RESULTS: 100_000}
_COLUMNS = "queue, message_id, body, priority, seq, deliveries"
T = TypeVar("T")


@dataclass(slots=True)
class _Put:
    """Messages of one caller on their way into a commit."""

    queue: str
    messages: Sequence[Outgoing]
    again: bool
    done: bool = False
    new: int = 0
    error: Exception | None = None


class SqliteQueue:
    """Named queues in one SQLite file; see `api.mq.port.Queue` for what each call promises.

    A queue in ``keep_newest`` never refuses: its oldest unread messages go when there are more than that (about; it is looked at in
    passing). By default the result queue is one, since an installation in which nobody reads it must not fill up.

    Safe across threads and processes. A waiting reader in the same process wakes at once; one in another process notices a
    commit within `poll_s`.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        max_deliveries: int = 5,
        max_messages: int = 1_000_000,
        max_body_bytes: int = 1 << 20,
        remember: int = 1_000_000,
        max_dead: int = 100_000,
        keep_newest: Mapping[str, int] = KEEP_NEWEST,
        poll_s: float = 0.02,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = Path(path)
        self._max_deliveries = max_deliveries
        self._max_messages = max_messages
        self._max_body_bytes = max_body_bytes
        self._remember = remember
        self._max_dead = max_dead
        self._keep_newest = dict(keep_newest)
        self._trim_after = dict.fromkeys(keep_newest, 0)
        self._poll_s = poll_s
        self._clock = clock
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._durable = open_file(self.path, "FULL")
        self._durable_lock = threading.Lock()
        self._light = open_file(self.path, "NORMAL")
        self._light_lock = threading.RLock()
        self._pending: list[_Put] = []
        self._pending_lock = threading.Lock()
        self._bell = threading.Condition()
        self._puts = 0
        self._closed = False

    # --- writing ----------------------------------------------------------------------------------------------------

    def put(self, queue: str, message_id: str, body: bytes, priority: int = 0, delay_s: float = 0.0) -> bool:
        """Store a message; returns when it is durable. False: the id was known and nothing changed."""
        return self.put_many(queue, (Outgoing(message_id, body, priority, delay_s),)) == 1

    def put_many(self, queue: str, messages: Sequence[Outgoing], *, again: bool = False) -> int:
        """Store messages in one commit and return how many were new; raises QueueRefused, QueueBroken."""
        if not messages:
            return 0
        for message in messages:
            if len(message.body) > self._max_body_bytes:
                raise QueueRefused(
                    f"message {message.message_id}: {len(message.body)} bytes are more than the {self._max_body_bytes} a message "
                    "may have; put large content into the file store and send its id"
                )
        entry = _Put(queue, messages, again)
        with self._pending_lock:
            self._pending.append(entry)
        with self._durable_lock:
            if not entry.done:
                with self._pending_lock:
                    batch, self._pending = self._pending, []
                self._commit(batch)
        if entry.error is not None:
            raise entry.error
        return entry.new

    def _commit(self, batch: list[_Put]) -> None:
        now = self._clock()
        broken: Exception | None = None
        try:
            with transaction(self._durable):
                held = self._held()
                for entry in batch:
                    bounded = entry.queue not in self._keep_newest
                    if bounded and held + len(entry.messages) > self._max_messages:
                        entry.error = QueueRefused(
                            f"the queue holds {held} of {self._max_messages} messages; try again when it has been worked off"
                        )
                        continue
                    entry.new = self._insert(entry, now)
                    held += entry.new
                    if not bounded:
                        self._trim(entry.queue, entry.new)
        except QueueBroken as error:
            broken = error
        for entry in batch:
            entry.error = entry.error or broken
            entry.done = True
        self._ring()

    def _ring(self) -> None:
        with self._bell:
            self._puts += 1
            self._bell.notify_all()

    def _held(self) -> int:
        """Return how many messages are stored; the span of numbers bounds it without counting."""
        low, high = self._durable.execute(
            "SELECT (SELECT min(seq) FROM message), (SELECT max(seq) FROM message)"
        ).fetchone()
        span = 0 if low is None else high - low + 1
        if span < self._max_messages // 2:
            return int(span)
        return int(self._durable.execute("SELECT count(*) FROM message").fetchone()[0])

    def _trim(self, queue: str, new: int) -> None:
        """Drop the oldest messages of a queue that keeps its newest only; looked at once in a while."""
        self._trim_after[queue] -= new
        if self._trim_after[queue] > 0:
            return
        keep = self._keep_newest[queue]
        self._trim_after[queue] = max(1, keep // 100)
        db = self._durable
        oldest = db.execute(
            "SELECT seq FROM message WHERE queue = ? ORDER BY seq DESC LIMIT 1 OFFSET ?", (queue, keep - 1)
        ).fetchone()
        if oldest is not None:
            gone = (queue, *oldest)
            db.execute(
                "INSERT OR IGNORE INTO seen(queue, message_id)"
                " SELECT queue, message_id FROM message WHERE queue = ? AND state = 0 AND seq < ?",
                gone,
            )
            db.execute("DELETE FROM message WHERE queue = ? AND state = 0 AND seq < ?", gone)

    def _insert(self, entry: _Put, now: float) -> int:
        new = 0
        db = self._durable
        for message in entry.messages:
            key = (entry.queue, message.message_id)
            if entry.again:
                db.execute("DELETE FROM seen WHERE queue = ? AND message_id = ?", key)
            known = db.execute(
                "SELECT 1 FROM seen WHERE queue = ?1 AND message_id = ?2"
                " UNION ALL SELECT 1 FROM dead WHERE queue = ?1 AND message_id = ?2",
                key,
            ).fetchone()
            if known:
                continue
            state = _DELAYED if message.delay_s > 0 else _READY
            row = (*key, message.priority, message.body, state, now + message.delay_s)
            new += db.execute(
                "INSERT OR IGNORE INTO message(queue, message_id, priority, body, state, due_at) VALUES(?,?,?,?,?,?)",
                row,
            ).rowcount
        return new

    # --- reading ----------------------------------------------------------------------------------------------------

    def take(self, queue: str, n: int = 1, lease_s: float = 30.0, wait_s: float = 0.0) -> list[Delivery]:
        """Lease up to `n` messages, waiting up to `wait_s` for the first; an expired lease delivers again."""
        return self._wait(lambda: self._take_now(queue, n, lease_s), wait_s) or []

    def _wait(self, look: Callable[[], T | None], wait_s: float) -> T | None:
        """Return what `look` finds, looking again whenever something may have changed, until the time is over."""
        until = time.monotonic() + wait_s
        pause = 0.001
        while True:
            if self._closed:
                return None
            with self._bell:
                puts = self._puts
            version = self._version()
            found = look()
            if found or wait_s <= 0:
                return found
            # Nothing there: sleep until somebody in this process puts, another process commits, or a lease may have expired.
            checks = 0
            while self._version() == version and checks < 10:
                left = until - time.monotonic()
                if left <= 0:
                    return None
                with self._bell:
                    if self._puts != puts or self._bell.wait(min(left, pause)):
                        break
                pause = min(pause * 2, self._poll_s)
                checks += 1

    def _version(self) -> int:
        with self._light_lock:
            return -1 if self._closed else int(self._light.execute("PRAGMA data_version").fetchone()[0])

    def _take_now(self, queue: str, n: int, lease_s: float) -> list[Delivery]:
        now = self._clock()
        with self._light_lock:
            db = self._light
            if self._closed:
                return []
            # Looking first without the write lock keeps idle readers from disturbing writers.
            idle = db.execute(
                "SELECT NOT EXISTS(SELECT 1 FROM message WHERE queue = ?1 AND state = 0) AND NOT EXISTS("
                "SELECT 1 FROM message WHERE queue = ?1 AND state IN (1, 2) AND due_at <= ?2)",
                (queue, now),
            ).fetchone()[0]
            if idle:
                return []
            with transaction(db):
                db.execute(
                    "UPDATE message SET state = 0 WHERE queue = ? AND state IN (1, 2) AND due_at <= ?", (queue, now)
                )
                taken: list[Delivery] = []
                while len(taken) < n:
                    rows = db.execute(
                        f"SELECT {_COLUMNS} FROM message WHERE queue = ? AND state = 0 ORDER BY priority DESC, seq LIMIT ?",  # noqa: S608
                        (queue, n - len(taken)),
                    ).fetchall()
                    if not rows:
                        break
                    for row in rows:
                        delivery = self._lease(db, row, now + lease_s)
                        if delivery is not None:
                            taken.append(delivery)
                return taken

    def _lease(
        self, db: sqlite3.Connection, row: tuple[str, str, bytes, int, int, int], until: float
    ) -> Delivery | None:
        """Lease a row, or bury it when it was delivered too often."""
        queue, message_id, body, priority, seq, deliveries = row
        if deliveries >= self._max_deliveries:
            reason = f"delivered {deliveries} times and never acknowledged"
            self._bury(db, Delivery(queue, message_id, body, priority, seq, deliveries), reason)
            return None
        db.execute("UPDATE message SET state = 1, due_at = ?, deliveries = deliveries + 1 WHERE seq = ?", (until, seq))
        return Delivery(queue, message_id, body, priority, seq, deliveries + 1)

    def claim(self, queue: str, message_id: str, lease_s: float = 30.0, wait_s: float = 0.0) -> Delivery | None:
        """Lease one message by its id, out of turn; None when it is absent, or leased by somebody, for `wait_s`."""
        return self._wait(lambda: self._claim_now(queue, message_id, lease_s), wait_s)

    def _claim_now(self, queue: str, message_id: str, lease_s: float) -> Delivery | None:
        if self._closed or self.peek(queue, message_id) is None:
            return None
        now = self._clock()
        with self._light_lock, transaction(self._light) as db:
            row = db.execute(
                f"SELECT {_COLUMNS} FROM message WHERE queue = ? AND message_id = ? AND (state != 1 OR due_at <= ?)",  # noqa: S608
                (queue, message_id, now),
            ).fetchone()
            return self._lease(db, row, now + lease_s) if row else None

    def peek(self, queue: str, message_id: str) -> Delivery | None:
        """Return a stored message without leasing it; its receipt is good for nothing."""
        with self._light_lock:
            row = self._light.execute(
                f"SELECT {_COLUMNS} FROM message WHERE queue = ? AND message_id = ?",  # noqa: S608
                (queue, message_id),
            ).fetchone()
        return Delivery(row[0], row[1], row[2], row[3], row[4], 0) if row else None

    # --- ending a delivery ------------------------------------------------------------------------------------------

    def ack(self, deliveries: Sequence[Delivery]) -> int:
        """Forget messages that are dealt with; returns how many of the leases were still held."""
        if not deliveries:
            return 0
        with self._light_lock, transaction(self._light) as db:
            acked = 0
            for item in deliveries:
                held = db.execute(
                    "DELETE FROM message WHERE seq = ? AND deliveries = ? AND state = 1", (item.seq, item.deliveries)
                ).rowcount
                if held:
                    db.execute(
                        "INSERT OR IGNORE INTO seen(queue, message_id) VALUES(?, ?)", (item.queue, item.message_id)
                    )
                    acked += 1
            db.execute("DELETE FROM seen WHERE n <= (SELECT max(n) FROM seen) - ?", (self._remember,))
            return acked

    def nack(self, deliveries: Sequence[Delivery], delay_s: float = 0.0) -> int:
        """Give messages back, to be delivered again after the delay."""
        state = _DELAYED if delay_s > 0 else _READY
        with self._light_lock, transaction(self._light) as db:
            given = sum(
                db.execute(
                    "UPDATE message SET state = ?, due_at = ? WHERE seq = ? AND deliveries = ? AND state = 1",
                    (state, self._clock() + delay_s, item.seq, item.deliveries),
                ).rowcount
                for item in deliveries
            )
        self._ring()
        return given

    def extend(self, deliveries: Sequence[Delivery], lease_s: float) -> int:
        """Lengthen leases to `lease_s` from now; returns how many were still held."""
        with self._light_lock, transaction(self._light) as db:
            return sum(
                db.execute(
                    "UPDATE message SET due_at = ? WHERE seq = ? AND deliveries = ? AND state = 1",
                    (self._clock() + lease_s, item.seq, item.deliveries),
                ).rowcount
                for item in deliveries
            )

    def release(self, queue: str) -> int:
        """Give every leased message of a queue back; for its only reader, when it begins a new life."""
        with self._light_lock, transaction(self._light) as db:
            given = db.execute("UPDATE message SET state = 0 WHERE queue = ? AND state = 1", (queue,)).rowcount
        self._ring()
        return given

    # --- dead letters -----------------------------------------------------------------------------------------------

    def bury(self, deliveries: Sequence[Delivery], reason: str) -> int:
        """Move messages to the dead letters, by order."""
        with self._light_lock, transaction(self._light) as db:
            return sum(self._bury(db, item, reason, held=True) for item in deliveries)

    def _bury(self, db: sqlite3.Connection, item: Delivery, reason: str, *, held: bool = False) -> int:
        guard = " AND deliveries = ? AND state = 1" if held else ""
        key = (item.seq, item.deliveries) if held else (item.seq,)
        if not db.execute(f"DELETE FROM message WHERE seq = ?{guard}", key).rowcount:  # noqa: S608
            return 0
        row = (item.queue, item.message_id, item.priority, item.body, reason, item.deliveries, self._clock())
        db.execute(
            "INSERT OR REPLACE INTO dead(queue, message_id, priority, body, reason, deliveries, died_at) VALUES(?,?,?,?,?,?,?)",
            row,
        )
        db.execute("DELETE FROM dead WHERE n <= (SELECT max(n) FROM dead) - ?", (self._max_dead,))
        return 1

    def list_dead(self, queue: str, limit: int = 100) -> list[DeadLetter]:
        """Return dead letters, the newest first."""
        with self._light_lock:
            rows = self._light.execute(
                "SELECT queue, message_id, body, priority, reason, deliveries, died_at FROM dead WHERE queue = ?"
                " ORDER BY n DESC LIMIT ?",
                (queue, limit),
            ).fetchall()
        return [DeadLetter(*row) for row in rows]

    def requeue_dead(self, queue: str, message_id: str) -> bool:
        """Put a dead letter back in its queue with its deliveries forgotten; False when there is none."""
        with self._durable_lock, transaction(self._durable) as db:
            key = (queue, message_id)
            moved = db.execute(
                "INSERT OR IGNORE INTO message(queue, message_id, priority, body, state, due_at)"
                " SELECT queue, message_id, priority, body, 0, 0 FROM dead WHERE queue = ? AND message_id = ?",
                key,
            ).rowcount
            db.execute("DELETE FROM dead WHERE queue = ? AND message_id = ?", key)
        self._ring()
        return moved > 0

    def counts(self) -> Mapping[str, Mapping[str, int]]:
        """Return ``{queue: {"ready", "leased", "delayed", "dead"}}``."""
        names = {_READY: "ready", _LEASED: "leased", _DELAYED: "delayed"}
        counts: dict[str, dict[str, int]] = {}
        with self._light_lock:
            rows = self._light.execute("SELECT queue, state, count(*) FROM message GROUP BY queue, state").fetchall()
            dead = self._light.execute("SELECT queue, count(*) FROM dead GROUP BY queue").fetchall()
        for queue in sorted({row[0] for row in rows} | {row[0] for row in dead}):
            counts[queue] = {"ready": 0, "leased": 0, "delayed": 0, "dead": 0}
        for queue, state, number in rows:
            counts[queue][names[state]] = number
        for queue, number in dead:
            counts[queue]["dead"] = number
        return counts

    def close(self) -> None:
        """Close the storage and wake waiting readers."""
        with self._durable_lock, self._light_lock:
            self._closed = True
            with self._bell:
                self._bell.notify_all()
            self._durable.close()
            self._light.close()
