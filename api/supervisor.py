"""`aigc up`: runs scheduler, gateway and agents as processes of their own on one machine, restarts what falls, stops cleanly.

The parts are the very commands `aigc scheduler|gateway|agent`; the supervisor only starts, watches and stops them. Whatever was
accepted lies in the state directory, so a part that is killed comes back with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

RESTART_DELAYS_S = (0.2, 1.0, 3.0, 10.0)
HEALTHY_AFTER_S = 30.0


@dataclass(slots=True)
class Part:
    """One child process: how it is started and how often it fell."""

    name: str
    command: Sequence[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    ready: Callable[[], bool] = lambda: True
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    restart_at: float = 0.0
    falls: int = 0
    _log_from: int = 0
    """Where the log of this start begins."""

    def start(self) -> None:
        """Start the process; its output goes to the log file."""
        with self.log.open("ab") as log:
            self._log_from = log.tell()
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        self.started_at = time.monotonic()

    def alive(self) -> bool:
        """Tell whether the process runs."""
        return self.process is not None and self.process.poll() is None

    def stop(self, grace_s: float) -> None:
        """Ask the process to end, and kill its group when it does not within the grace."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def log_tail(self, lines: int = 12) -> str:
        """Return the last lines that were logged since the part was started last."""
        try:
            with self.log.open("rb") as log:
                log.seek(self._log_from)
                return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""


class PartFailed(RuntimeError):
    """A part did not come up; the message carries the tail of its log."""


class Fleet(Protocol):
    """Parts that come and go by themselves (`api.elastic`)."""

    def check(self) -> None:
        """Start and stop what is lacking or too much."""
        ...

    def close(self) -> None:
        """Stop everything."""
        ...


class Supervisor:
    """Starts parts in order, restarts those that fall, stops them in the reverse order."""

    def __init__(self, parts: Sequence[Part], say: Callable[[str], None], fleet: Fleet | None = None) -> None:
        self._parts = list(parts)
        self.fleet = fleet
        self._say = say
        self._stopping = threading.Event()

    def part(self, name: str) -> Part:
        """Return a part by name."""
        return next(part for part in self._parts if part.name == name)

    def start(self, timeout_s: float = 60.0) -> None:
        """Start every part and wait until each is ready; raises PartFailed."""
        for part in self._parts:
            part.start()
            deadline = time.monotonic() + timeout_s
            while not part.ready():
                if not part.alive():
                    raise PartFailed(f"{part.name} ended at once; {part.log} says:\n{part.log_tail()}")
                if time.monotonic() > deadline:
                    raise PartFailed(
                        f"{part.name} was not ready within {timeout_s:.0f} s; {part.log} says:\n{part.log_tail()}"
                    )
                time.sleep(0.05)
            self._say(f"{part.name} is up")

    def watch(self) -> None:
        """Restart parts that fall, until `stop` is called."""
        while not self._stopping.wait(0.2):
            self.check()

    def check(self) -> None:
        """Look at every part once and restart those that fell, with growing delays."""
        now = time.monotonic()
        if self.fleet is not None:
            self.fleet.check()
        for part in self._parts:
            if part.alive():
                if part.falls and now - part.started_at > HEALTHY_AFTER_S:
                    part.falls = 0
                continue
            if part.restart_at == 0.0:
                delay = RESTART_DELAYS_S[min(part.falls, len(RESTART_DELAYS_S) - 1)]
                part.falls += 1
                part.restart_at = now + delay
                code = part.process.returncode if part.process else None
                self._say(f"{part.name} fell (exit {code}); starting it again in {delay:g} s")
            elif now >= part.restart_at:
                part.restart_at = 0.0
                part.start()

    def stop(self, grace_s: float = 15.0) -> None:
        """Stop every part, the last started first."""
        self._stopping.set()
        if self.fleet is not None:
            self.fleet.close()
        for part in reversed(self._parts):
            part.stop(grace_s)
            self._say(f"{part.name} stopped")


def command(*arguments: str) -> list[str]:
    """Return the command line of another `aigc` command, run by this very interpreter."""
    return [sys.executable, "-m", "api.cli", *arguments]
