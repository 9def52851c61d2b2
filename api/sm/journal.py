"""The engine's journal on disk: a step, and all that SS derives from it, becomes durable in one SQLite transaction.

Nothing leaves the process before the step that caused it is committed with synchronous=FULL. Every transaction carries the leader's
epoch: a scheduler that was replaced while it slept finds no row to update and ends. A storage error is final: what an fsync that
failed has lost cannot be known, so it is never tried again.
"""

from __future__ import annotations

import sqlite3
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from api.sm.journal_codec import decode_step, encode_step
from engine.commands import Command
from engine.events import Event
from engine.journal import Record
from engine.tasks import Micros

_SCHEMA = """
CREATE TABLE IF NOT EXISTS leader(one INTEGER PRIMARY KEY CHECK (one = 1), epoch INTEGER NOT NULL, seq INTEGER NOT NULL);
INSERT OR IGNORE INTO leader VALUES(1, 0, 0);
CREATE TABLE IF NOT EXISTS event(
  seq INTEGER PRIMARY KEY, epoch INTEGER NOT NULL, at INTEGER NOT NULL, crc INTEGER NOT NULL, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS snapshot(seq INTEGER PRIMARY KEY, epoch INTEGER NOT NULL, crc INTEGER NOT NULL, body BLOB NOT NULL);
"""

Within = Callable[[sqlite3.Connection, Micros, Sequence[Event], Sequence[Command]], None]
"""Runs inside a step's transaction, before the commit."""


class JournalFenced(RuntimeError):
    """Another scheduler leads now; this one must end without any further effect."""


class JournalBroken(RuntimeError):
    """Storage failed under the journal: stop accepting and end. Never retried."""


class JournalCorrupt(RuntimeError):
    """What lies in the journal cannot be trusted. The message names the first bad record and the remedy."""


class SqliteJournal:
    """`engine.ports.Journal` on one SQLite file; opening it takes the lead (epoch + 1, durable).

    ``within`` runs inside each step's transaction, ``published`` after its commit.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        within: Within | None = None,
        published: Callable[[], None] | None = None,
        retain_records: int = 5_000_000,
    ) -> None:
        self.path = Path(path)
        self.within = within
        self.published = published
        self._retain = retain_records
        self._lock = threading.RLock()
        self._broken: Exception | None = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = _open(self.path)
            self._db.executescript(_SCHEMA)
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("UPDATE leader SET epoch = epoch + 1")
            self.epoch, self.seq = self._db.execute("SELECT epoch, seq FROM leader").fetchone()
            self._db.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            raise _opening_error(self.path, error) from error

    def __call__(self, now: Micros, events: Sequence[Event], commands: Sequence[Command]) -> None:
        """Record one step; returns when it is durable. A step in which nothing happened leaves no record."""
        if not events and not commands:
            return
        body = encode_step(self.seq + 1, now, events, commands)
        with self.transaction() as db:
            seq = self.seq + 1
            db.execute(
                "INSERT INTO event(seq, epoch, at, crc, body) VALUES(?,?,?,?,?)",
                (seq, self.epoch, now, _crc(seq, self.epoch, body), body),
            )
            db.execute("UPDATE leader SET seq = ?", (seq,))
            if self.within is not None:
                self.within(db, now, events, commands)
        self.seq = seq
        if self.published is not None:
            self.published()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run a durable transaction under the leader's epoch; raises JournalFenced, JournalBroken."""
        with self._lock:
            if self._broken is not None:
                raise JournalBroken(f"{self.path}: storage failed before: {self._broken}") from self._broken
            try:
                self._db.execute("BEGIN IMMEDIATE")
                if not self._db.execute("UPDATE leader SET epoch = epoch WHERE epoch = ?", (self.epoch,)).rowcount:
                    self._db.execute("ROLLBACK")
                    raise JournalFenced(
                        f"{self.path}: epoch {self.epoch} is over, another scheduler leads; end this process"
                    )
                try:
                    yield self._db
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
                raise
            except sqlite3.DatabaseError as error:
                self._broken = error
                raise JournalBroken(
                    f"{self.path}: storage failed: {error}; free the disk or repair it, then start the scheduler again"
                ) from error

    def write_snapshot(self, body: bytes) -> None:
        """Store the state after the newest record; the two newest snapshots are kept, and old records beyond the retention go."""
        with self.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO snapshot(seq, epoch, crc, body) VALUES(?,?,?,?)",
                (self.seq, self.epoch, _crc(self.seq, self.epoch, body), body),
            )
            kept = [row[0] for row in db.execute("SELECT seq FROM snapshot ORDER BY seq DESC LIMIT 2")]
            db.execute("DELETE FROM snapshot WHERE seq < ?", (kept[-1],))
            db.execute("DELETE FROM event WHERE seq <= ?", (min(kept[-1], self.seq - self._retain),))

    def load(self) -> tuple[bytes | None, list[Record]]:
        """Return the newest good snapshot and the records after it; raises JournalCorrupt."""
        with self._lock:
            return _load(self._db, self.path)

    def close(self) -> None:
        """Close the file; what was recorded stays."""
        with self._lock:
            self._db.close()


def read_journal(path: Path | str, *, from_start: bool = False) -> tuple[bytes | None, list[Record]]:
    """Read a journal without taking the lead, for replay and for the simulator.

    `from_start` goes as far back as there are records: to the very beginning, or to the oldest snapshot that is kept.

    Raises FileNotFoundError, JournalCorrupt.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"journal {path} does not exist; give the path of a scheduler's journal file")
    db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)
    try:
        db.execute("BEGIN")  # one view of the file: a scheduler may be writing to it
        return _load(db, path, from_start=from_start)
    finally:
        db.close()


def _load(db: sqlite3.Connection, path: Path, *, from_start: bool = False) -> tuple[bytes | None, list[Record]]:
    try:
        bad: list[int] = []
        base, snapshot = _base(db, bad, from_start=from_start)
        last = db.execute("SELECT seq FROM leader").fetchone()[0]
        records: list[Record] = []
        for seq, epoch, crc, body in db.execute(
            "SELECT seq, epoch, crc, body FROM event WHERE seq > ? ORDER BY seq", (base,)
        ):
            expected = base + len(records) + 1
            if seq != expected:
                raise _corrupt(path, expected, f"it is missing, the next one there is {seq}", bad)
            if crc != _crc(seq, epoch, body):
                raise _corrupt(path, seq, "its checksum does not fit its content", bad)
            records.append(_decoded(path, seq, body))
    except sqlite3.DatabaseError as error:
        raise _opening_error(path, error) from error
    if base + len(records) != last:
        raise _corrupt(path, base + len(records) + 1, f"it is missing, the last one written was {last}", bad)
    return snapshot, records


def _base(db: sqlite3.Connection, bad: list[int], *, from_start: bool) -> tuple[int, bytes | None]:
    """Return the snapshot to begin with, and its number; notes the damaged ones that were passed over."""
    if from_start and (db.execute("SELECT min(seq) FROM event").fetchone()[0] or 1) == 1:
        return 0, None
    order = "ASC" if from_start else "DESC"
    for seq, epoch, crc, body in db.execute(f"SELECT seq, epoch, crc, body FROM snapshot ORDER BY seq {order}"):  # noqa: S608
        if crc == _crc(seq, epoch, body):
            return seq, body
        bad.append(seq)
    return 0, None


def _decoded(path: Path, seq: int, body: bytes) -> Record:
    try:
        return decode_step(body)
    except ValueError as error:
        raise _corrupt(path, seq, f"it cannot be decoded: {error}", []) from error


def _corrupt(path: Path, seq: int, what: str, bad_snapshots: list[int]) -> JournalCorrupt:
    also = f" (snapshots {bad_snapshots} are damaged too)" if bad_snapshots else ""
    return JournalCorrupt(
        f"{path}: record {seq}: {what}{also}; restore the file from a backup, or move it away to start with an empty platform"
    )


def _opening_error(path: Path, error: sqlite3.DatabaseError) -> RuntimeError:
    if isinstance(error, sqlite3.OperationalError) and "malformed" not in str(error):
        return JournalBroken(
            f"{path}: cannot be opened: {error}; check the directory, its permissions and the free space"
        )
    return JournalCorrupt(
        f"{path}: {error}; restore the file from a backup, or move it away to start with an empty platform"
    )


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=10.0, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA journal_size_limit = 268435456")
    return db


def _crc(seq: int, epoch: int, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(b"%d:%d:" % (seq, epoch)))
