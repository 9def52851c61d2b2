"""A directory that one agent at a time works in: locked for as long as the agent, its nurseries or its Pods live."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import IO


class WorkDirectoryInUse(RuntimeError):
    """Another agent works in this directory."""


def lock(directory: Path, wait_s: float) -> IO[bytes]:
    """Make the directory if it is not there and lock it; whoever holds the file open holds the lock. Raises WorkDirectoryInUse."""
    directory.mkdir(parents=True, exist_ok=True)
    held = (directory / "host.lock").open("ab")
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return held
        except BlockingIOError:
            if time.monotonic() >= deadline:
                held.close()
                raise WorkDirectoryInUse(
                    f"work directory {directory}: another agent works here; give each agent its own"
                ) from None
            time.sleep(0.02)
