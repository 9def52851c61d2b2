"""Locks on the models of a node's disk, one file each: who uses a model shares its lock, who fetches or removes it has it alone.

The kernel gives locks back however a process ends. A lock file goes with its model, so whoever waited for it looks whether it is
still the model's own.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

DAMAGED_WAIT_S: Final = 10.0
SUFFIX: Final = ".lock"


class NoRoom(OSError):
    """The disk has no room for a model, or a damaged one in its place; another node may have it."""


@dataclass(slots=True)
class _Lease:
    """A model that this process uses: the open lock, and how many times it was taken."""

    lock: IO[bytes]
    count: int = 1


_LEASES: dict[tuple[str, str], _Lease] = {}
"""Of this process, by directory and key."""
_LEASING: Final = threading.Lock()


class Holds:
    """The locks below one directory; any thread may use them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._quick_uses: dict[str, int] = {}

    # --- what this process holds ------------------------------------------------------------------------------------------

    def again(self, key: str) -> bool:
        """Hold a model once more; False when this process does not hold it yet."""
        with _LEASING:
            lease = _LEASES.get((str(self._root), key))
            if lease is None:
                return False
            lease.count += 1
            self._quick_uses[key] = self._quick_uses.get(key, 0) + 1
            return True

    def keep(self, key: str, lock: IO[bytes]) -> None:
        """Hold a model by a lock that is shared, until `release` or until this process ends."""
        with _LEASING:
            lease = _LEASES.get((str(self._root), key))
            if lease is None:
                _LEASES[str(self._root), key] = _Lease(lock)
            else:
                lease.count += 1
                lock.close()

    def release(self, key: str) -> None:
        """Let go of a model once; raises ValueError when this process does not hold it."""
        name = (str(self._root), key)
        with _LEASING:
            lease = _LEASES.get(name)
            if lease is None:
                raise ValueError(f"the model in {self._root}/{key} is released more often than it was held")
            lease.count -= 1
            if lease.count == 0:
                del _LEASES[name]
                lease.lock.close()

    def take_quick_uses(self) -> dict[str, int]:
        """Return how often models were held again since the last call, by key."""
        with _LEASING:
            quick, self._quick_uses = self._quick_uses, {}
        return quick

    # --- one model's lock ---------------------------------------------------------------------------------------------------

    def open(self, key: str) -> IO[bytes]:
        """Open a model's lock, without taking it."""
        return (self._root / f"{key}{SUFFIX}").open("ab")

    def share(self, lock: IO[bytes]) -> None:
        """Wait until nobody has a lock alone, and share it."""
        fcntl.flock(lock, fcntl.LOCK_SH)

    def alone(self, key: str, lock: IO[bytes], arrived: Callable[[], bool]) -> bool:
        """Wait for a lock alone; False when the model arrived first, which those who use it may keep for ever.

        Whoever fetches is waited for as long as it takes, users of a damaged model are not.
        """
        deadline = time.monotonic() + DAMAGED_WAIT_S
        while not _try(lock):
            if arrived():
                return False
            if (self._root / key).is_dir() and time.monotonic() > deadline:
                raise NoRoom(
                    f"the model in {self._root}/{key} is damaged and in use by another Pod; another node may have it"
                )
            time.sleep(0.02)
        return True

    def is_current(self, key: str, lock: IO[bytes]) -> bool:
        """Tell whether a lock is still the model's own: it may have been removed with it while it was waited for."""
        try:
            return os.path.samestat(os.fstat(lock.fileno()), (self._root / f"{key}{SUFFIX}").stat())
        except FileNotFoundError:
            return False

    def is_free(self, key: str) -> bool:
        """Tell whether nobody uses or fetches a model."""
        with self.open(key) as lock:
            return _try(lock)

    def remove(self, key: str) -> bool:
        """Remove a model's files and its lock unless somebody uses or fetches it."""
        with self.open(key) as lock:
            if not _try(lock):
                return False
            shutil.rmtree(self._root / key, ignore_errors=True)
            (self._root / f"{key}{SUFFIX}").unlink(missing_ok=True)
            return True


def _try(lock: IO[bytes]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
