"""`aigc up` refuses to start where it would disturb another, and says what to do."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from typer.testing import CliRunner

from api.cli.main import app
from api.state_dir import StateDir, StateDirInUse, held


@pytest.fixture(autouse=True)
def _no_outside_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AIGC_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """The stream that a command configures for its log is closed with its test; others would write to it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize(("command", "lock"), [("up", "up"), ("scheduler", "scheduler")])
def test_a_second_one_on_the_same_state_is_refused(tmp_path: Path, command: str, lock: str) -> None:
    with held(StateDir(tmp_path / "state").lock(lock), "the first"):
        answer = CliRunner().invoke(app, [command, "--state-dir", str(tmp_path / "state")])
    assert answer.exit_code == 2
    assert f"already (process {os.getpid()})" in answer.stderr


def test_a_lock_is_free_again_when_its_block_is_left(tmp_path: Path) -> None:
    for _ in range(2):
        with held(tmp_path / "x.lock", "one"), pytest.raises(StateDirInUse), held(tmp_path / "x.lock", "two"):
            pass


def test_a_port_in_use_is_named_with_its_field(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        answer = CliRunner().invoke(app, ["up", "--state-dir", str(tmp_path / "state"), "--port", port])
    assert answer.exit_code == 2
    assert "gateway.port" in answer.stderr
    assert port in answer.stderr


def test_a_wrong_device_inventory_is_one_clear_line(tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert (
        CliRunner()
        .invoke(app, ["keys", "agent", "n1", "-o", str(tmp_path / "n1.keys"), "--state-dir", str(state)])
        .exit_code
        == 0
    )
    answer = CliRunner().invoke(
        app,
        [
            "agent",
            "--name",
            "n1",
            "--keys",
            str(tmp_path / "n1.keys"),
            "--devices",
            "file:nowhere.json",
            "--state-dir",
            str(state),
        ],
    )
    assert answer.exit_code == 2
    assert "nowhere.json" in answer.stderr
    assert "Traceback" not in answer.output
