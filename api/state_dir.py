"""The state directory: where every durable thing lies, and the secrets that join the parts of one installation."""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from api.settings import ConfigurationError


@dataclass(frozen=True, slots=True)
class StateDir:
    """Paths under one state directory; `docs/operations.md` says what losing each means."""

    root: Path

    @property
    def journal(self) -> Path:
        """Every step of the engine; jobs, outcomes, outbox and models beside it."""
        return self.root / "journal.db"

    @property
    def queue(self) -> Path:
        """The message queue."""
        return self.root / "queue.db"

    @property
    def gateway(self) -> Path:
        """What the gateway keeps: idempotency keys, owners of files."""
        return self.root / "gateway.sqlite"

    @property
    def keys(self) -> Path:
        """Hashes of API keys."""
        return self.root / "keys.db"

    @property
    def curve(self) -> Path:
        """CURVE keys of the scheduler, public keys of the agents."""
        return self.root / "curve"

    @property
    def logs(self) -> Path:
        """Logs of the parts."""
        return self.root / "logs"

    @property
    def operator_key(self) -> Path:
        """The API key for the command line on this machine."""
        return self.root / "operator.key"

    @property
    def url(self) -> Path:
        """The gateway's base URL while it runs."""
        return self.root / "url"

    @property
    def fleet(self) -> Path:
        """How many nodes the scheduler wants, for `aigc up`."""
        return self.root / "fleet.json"

    def lock(self, name: str) -> Path:
        """Return the lock file of one kind of process."""
        return self.root / f"{name}.lock"

    def agent(self, name: str) -> Path:
        """Return the directory of one agent: spool, work, cache."""
        return self.root / "agents" / name

    def create(self) -> None:
        """Make the directory, readable by its owner alone; raises ConfigurationError where it cannot be."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            os.chmod(self.root, 0o700)
            for path in (self.logs, self.root / "secrets", self.curve):
                path.mkdir(exist_ok=True)
        except OSError as error:
            raise _unusable(self.root, error) from error

    def secret(self, name: str) -> str:
        """Return a named 256-bit secret as hex, made on first use; safe when two parts ask at once."""
        path = self.root / "secrets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            fresh = path.with_name(f".{name}.{secrets.token_hex(8)}")
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(fresh, path)
            except FileExistsError:
                pass
            finally:
                fresh.unlink()
        return path.read_text().strip()


class StateDirInUse(RuntimeError):
    """Another process of this kind works on the state directory."""


@contextmanager
def held(path: Path, who: str) -> Iterator[None]:
    """Hold a lock file for as long as the block runs; raises StateDirInUse when another process has it.

    The lock goes with the process, however it ends.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise _unusable(path.parent, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise StateDirInUse(
                f"{who} runs on {path.parent} already (process {holder}); stop it, or give another --state-dir"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _unusable(root: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"state_dir: {root} cannot be written ({error.strerror}); give another by --state-dir or AIGC_STATE_DIR"
    )


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, atomically."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text + "\n")
    fresh.replace(path)


def check_database(path: Path) -> str:
    """Return ``ok``, ``absent`` or what SQLite's quick check finds wrong; opens the file read-only."""
    if not path.is_file():
        return "absent"
    try:
        database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=2)
        try:
            return str(database.execute("PRAGMA quick_check(1)").fetchone()[0])
        finally:
            database.close()
    except sqlite3.Error as error:
        return str(error)
