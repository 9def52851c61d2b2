"""A whole platform on free ports, shared by the tests of one worker: scheduler, gateway and two agents as real processes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from api.cli.main import app
from api.demo import running_platform, wait_until
from api.supervisor import Supervisor


class Platform:
    """A running platform and its command line."""

    def __init__(self, state: Path, supervisor: Supervisor, client: Any) -> None:
        self.state = state
        self.supervisor = supervisor
        self.client = client

    def aigc(self, *arguments: str, code: int = 0) -> str:
        """Run a command against the platform and return its stdout."""
        answer = CliRunner().invoke(app, [*arguments, "--state-dir", str(self.state)], catch_exceptions=False)
        assert answer.exit_code == code, (
            f"aigc {' '.join(arguments)}: exit {answer.exit_code}\n{answer.stdout}\n{answer.stderr}"
        )
        return answer.stdout

    def json(self, *arguments: str, code: int = 0) -> Any:
        """Run a command with --json and return what it printed."""
        return json.loads(self.aigc(*arguments, "--json", code=code))

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 90) -> None:
        """Wait until a condition holds."""
        wait_until(condition, what, seconds)


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    for name in [name for name in os.environ if name.startswith("AIGC_")]:
        del os.environ[name]
    state = tmp_path_factory.mktemp("platform") / "state"
    with running_platform(state) as (client, supervisor):
        running = Platform(state, supervisor, client)
        running.until(lambda: len(client.request("GET", "/v1/nodes")["data"]) == 2, "both nodes join")
        yield running
