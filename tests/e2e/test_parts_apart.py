"""Scheduler, gateway and agent run apart, as on several machines: each says in one line of JSON where it is to be found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.demo import wait_until
from api.parts import authorize_agent, open_keys
from api.settings import Settings

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("platform")]


@contextmanager
def _part(state: Path, *arguments: str, **environment: str) -> Iterator[dict[str, Any]]:
    """Run a part; yields what it printed to stdout, and requires that it ends well and has said nothing else there."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AIGC_")}
    with (state.parent / f"{arguments[0]}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "api.cli", *arguments, "--json", "--state-dir", str(state)],
            stdout=subprocess.PIPE, stderr=log, env={**clean, **environment}, cwd=state.parent,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
        process.terminate()
        rest, _ = process.communicate(timeout=60)
        assert (process.returncode, rest) == (0, b"")
    finally:
        process.kill()
        process.communicate()


def _inventory(path: Path, *names: str) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"gpus": [{"uuid": name, "model": "a100", "memory_bytes": 1 << 30} for name in names]}))
    fresh.replace(path)


def test_each_part_says_in_one_line_of_json_where_it_is(tmp_path: Path) -> None:
    state = tmp_path / "state"
    _inventory(tmp_path / "gpus.json", "gpu-a")
    settings = Settings(state_dir=state)
    keys = open_keys(settings)
    key, _ = keys.create("t", "operator")
    keys.close()
    authorize_agent(settings, "n1", tmp_path / "n1.keys")
    with ExitStack() as stack:
        scheduler = stack.enter_context(
            _part(
                state, "scheduler", AIGC_SCHEDULER__BIND="tcp://127.0.0.1:*", AIGC_SCHEDULER__INTERNAL_PORT="0",
                AIGC_SCHEDULER__HEARTBEAT_MS="100",
            )
        )  # fmt: skip
        assert scheduler["part"] == "scheduler"
        assert Path(scheduler["state_dir"]) == state
        port = scheduler["internal_url"].rpartition(":")[2]
        gateway = stack.enter_context(
            _part(state, "gateway", AIGC_SCHEDULER__INTERNAL_PORT=port, AIGC_GATEWAY__PORT="0")
        )
        assert gateway["scheduler_url"] == scheduler["internal_url"]
        arguments = ("--name", "n1", "--keys", "n1.keys", "--connect", scheduler["agents"])
        agent = stack.enter_context(_part(state, "agent", *arguments, "--devices", "file:gpus.json"))
        assert (agent["node"], agent["scheduler"]) == ("n1", scheduler["agents"])
        assert [(gpu["uuid"], gpu["model"], gpu["memory_bytes"]) for gpu in agent["gpus"]] == [
            ("gpu-a", "a100", 1 << 30)
        ]
        headers = {"Authorization": f"Bearer {key}"}

        def gpus() -> list[str]:
            answer = httpx.get(f"{gateway['url']}/v1/nodes", headers=headers).raise_for_status().json()
            return [gpu["uuid"] for node in answer["data"] for gpu in node["gpus"] if gpu["healthy"]]

        wait_until(lambda: gpus() == ["gpu-a"], "the node's GPU is shown", 30)
        _inventory(tmp_path / "gpus.json", "gpu-a", "gpu-b")
        wait_until(lambda: gpus() == ["gpu-a", "gpu-b"], "the added GPU is shown", 30)
        _inventory(tmp_path / "gpus.json", "gpu-b")
        wait_until(lambda: gpus() == ["gpu-b"], "the removed GPU is shown no more", 30)
