"""The file behind the embedded queue: its tables, how it is opened, and how a transaction on it ends."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from api.mq.port import QueueBroken

_SCHEMA = """
CREATE TABLE IF NOT EXISTS message(
  seq INTEGER PRIMARY KEY AUTOINCREMENT, queue TEXT NOT NULL, message_id TEXT NOT NULL, priority INTEGER NOT NULL,
  body BLOB NOT NULL, state INTEGER NOT NULL, due_at REAL NOT NULL, deliveries INTEGER NOT NULL DEFAULT 0,
  UNIQUE(queue, message_id));
CREATE INDEX IF NOT EXISTS message_ready ON message(queue, priority DESC, seq) WHERE state = 0;
CREATE INDEX IF NOT EXISTS message_due ON message(queue, state, due_at) WHERE state > 0;
CREATE TABLE IF NOT EXISTS seen(
  n INTEGER PRIMARY KEY AUTOINCREMENT, queue TEXT NOT NULL, message_id TEXT NOT NULL, UNIQUE(queue, message_id));
CREATE TABLE IF NOT EXISTS dead(
  n INTEGER PRIMARY KEY AUTOINCREMENT, queue TEXT NOT NULL, message_id TEXT NOT NULL, priority INTEGER NOT NULL,
  body BLOB NOT NULL, reason TEXT NOT NULL, deliveries INTEGER NOT NULL, died_at REAL NOT NULL, UNIQUE(queue, message_id));
"""


def open_file(path: Path, synchronous: str) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=30.0, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute(f"PRAGMA synchronous = {synchronous}")
    db.execute("PRAGMA journal_size_limit = 67108864")
    db.executescript(_SCHEMA)
    return db


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Run a write transaction; a storage error is final and never retried."""
    try:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        db.execute("COMMIT")
    except sqlite3.Error as error:
        raise QueueBroken(
            f"the message queue's storage failed: {error}; free the disk or repair it, then start again"
        ) from error
