"""What the gateway itself must remember: answers by idempotency key, requests not yet read by SS, and who owns which file.

Everything else is the support service's. A lost file costs replays and ownership of uploads, never an accepted job.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Answer:
    """What is kept under an idempotency key; `status` is 0 while the first request is still under way."""

    fingerprint: str
    req_no: str
    status: int
    body: str


class Records:
    """The gateway's small SQLite file; safe across threads and processes."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        for table in (
            "idempotency (tenant TEXT, key TEXT, fingerprint TEXT NOT NULL, req_no TEXT NOT NULL, status INTEGER NOT NULL, "
            "body TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (tenant, key))",
            "accepted (tenant TEXT, req_no TEXT, fingerprint TEXT NOT NULL, view TEXT NOT NULL, at REAL NOT NULL, "
            "PRIMARY KEY (tenant, req_no))",
            "file_owner (tenant TEXT, file_id TEXT, at REAL NOT NULL, PRIMARY KEY (tenant, file_id))",
        ):
            self._db.execute(f"CREATE TABLE IF NOT EXISTS {table} STRICT, WITHOUT ROWID")

    def begin(self, tenant: str, key: str, fingerprint: str, req_no: str, now_s: float) -> Answer:
        """Keep the first use of an idempotency key, and return what is kept under it."""
        with self._lock:
            self._db.execute(
                "INSERT OR IGNORE INTO idempotency VALUES (?, ?, ?, ?, 0, '', ?)",
                (tenant, key, fingerprint, req_no, now_s),
            )
            row = self._db.execute(
                "SELECT fingerprint, req_no, status, body FROM idempotency WHERE tenant = ? AND key = ?", (tenant, key)
            ).fetchone()
        return Answer(*row)

    def settle(self, tenant: str, key: str, status: int, body: str) -> None:
        """Keep the answer under an idempotency key."""
        with self._lock:
            self._db.execute(
                "UPDATE idempotency SET status = ?, body = ? WHERE tenant = ? AND key = ?", (status, body, tenant, key)
            )

    def accept(self, tenant: str, req_no: str, fingerprint: str, view: str, now_s: float) -> bool:
        """Remember a request put on the queue; False when this reqNo was accepted before."""
        with self._lock:
            cursor = self._db.execute(
                "INSERT OR IGNORE INTO accepted VALUES (?, ?, ?, ?, ?)", (tenant, req_no, fingerprint, view, now_s)
            )
            return cursor.rowcount == 1

    def forget(self, tenant: str, req_no: str) -> None:
        """Forget a request that did not reach the queue."""
        with self._lock:
            self._db.execute("DELETE FROM accepted WHERE tenant = ? AND req_no = ?", (tenant, req_no))

    def accepted(self, tenant: str, req_no: str) -> tuple[str, str] | None:
        """Return (fingerprint, view) of a request put on the queue; tenant ``*`` looks at all."""
        with self._lock:
            row = self._db.execute(
                "SELECT fingerprint, view FROM accepted WHERE req_no = ? AND (tenant = ? OR ? = '*')",
                (req_no, tenant, tenant),
            ).fetchone()
        return None if row is None else (row[0], row[1])

    def own(self, tenant: str, file_ids: Iterable[str], now_s: float) -> None:
        """Note that a tenant may read and use files."""
        with self._lock:
            self._db.execute("BEGIN")
            self._db.executemany(
                "INSERT OR IGNORE INTO file_owner VALUES (?, ?, ?)", [(tenant, one, now_s) for one in file_ids]
            )
            self._db.execute("COMMIT")

    def owns(self, tenant: str, file_id: str) -> bool:
        """Tell whether a tenant may read and use a file; ``*`` asks whether anybody may."""
        with self._lock:
            row = self._db.execute(
                "SELECT 1 FROM file_owner WHERE file_id = ? AND (tenant = ? OR ? = '*') LIMIT 1",
                (file_id, tenant, tenant),
            ).fetchone()
        return row is not None

    def prune(self, before_s: float) -> None:
        """Forget idempotency keys and accepted requests older than this."""
        with self._lock:
            self._db.execute("DELETE FROM idempotency WHERE at < ?", (before_s,))
            self._db.execute("DELETE FROM accepted WHERE at < ?", (before_s,))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()
