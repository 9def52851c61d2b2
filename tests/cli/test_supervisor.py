"""The supervisor starts parts, restarts what falls, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from api.supervisor import Part, PartFailed, Supervisor


def _until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def _sleeper(name: str, directory: Path) -> Part:
    return Part(name, [sys.executable, "-c", "import time; time.sleep(60)"], directory / f"{name}.log")


def test_a_part_that_is_killed_is_started_again(tmp_path: Path) -> None:
    said: list[str] = []
    supervisor = Supervisor([_sleeper("one", tmp_path)], said.append)
    supervisor.start()
    part = supervisor.part("one")
    try:
        first = part.process.pid
        os.kill(first, signal.SIGKILL)

        def restarted() -> bool:
            supervisor.check()
            return part.alive() and part.process.pid != first

        _until(restarted)
    finally:
        supervisor.stop(grace_s=5)
    assert not part.alive()
    assert any("one fell (exit -9)" in line for line in said)


def test_a_part_that_ends_at_once_is_reported_with_its_log(tmp_path: Path) -> None:
    part = Part(
        "bad", [sys.executable, "-c", "raise SystemExit('no such port')"], tmp_path / "bad.log", ready=lambda: False
    )
    with pytest.raises(PartFailed, match="no such port"):
        Supervisor([part], lambda line: None).start(timeout_s=20)


def test_a_part_that_ignores_the_request_to_end_is_killed(tmp_path: Path) -> None:
    flag = tmp_path / "ready"
    ignore = "import signal, time, pathlib; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    code = f"{ignore}; pathlib.Path({str(flag)!r}).touch(); time.sleep(60)"
    part = Part("stubborn", [sys.executable, "-c", code], tmp_path / "log", ready=flag.exists)
    supervisor = Supervisor([part], lambda line: None)
    supervisor.start()
    supervisor.stop(grace_s=0.2)
    assert part.process.returncode == -signal.SIGKILL


def test_parts_stop_in_the_reverse_order(tmp_path: Path) -> None:
    said: list[str] = []
    supervisor = Supervisor([_sleeper("one", tmp_path), _sleeper("two", tmp_path)], said.append)
    supervisor.start()
    supervisor.stop(grace_s=5)
    assert said[-2:] == ["two stopped", "one stopped"]
