"""Planning and research need no torch and no web framework: what is missing is named with its extra."""

from __future__ import annotations

import subprocess
import sys

import pytest

WEB = ("fastapi", "uvicorn", "httpx", "structlog", "jwt", "prometheus_client")
OPTIONAL = (*WEB, "torch", "diffusers", "zmq", "msgspec", "obstore")
BLOCK = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
sys.argv = ["aigc", *sys.argv[1:]]
from api.cli.main import main
main()
"""


def _aigc(*arguments: str, cwd) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCK, *arguments], capture_output=True, text=True, cwd=cwd, check=False
    )


def test_the_simulator_runs_on_the_base_install(tmp_path) -> None:
    done = _aigc("simulate", "--tasks", "50", "--nodes", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "waiting" in done.stdout


@pytest.mark.parametrize(
    "command", [("gateway",), ("scheduler",), ("jobs", "list", "--key", "k"), ("keys", "list"), ("up",)]
)
def test_a_command_that_needs_more_names_the_extra(command: tuple[str, ...], tmp_path) -> None:
    done = _aigc(*command, cwd=tmp_path)
    assert done.returncode == 2
    assert "aigc-platform[api]" in done.stderr
    assert "Traceback" not in done.stderr
