"""`aigc up --elastic`: agents come with the work and go without it, whatever happens to the scheduler meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from api.cli.client import GatewayClient
from api.demo import wait_until

pytestmark = pytest.mark.e2e


def _start(state: Path) -> tuple[subprocess.Popen[str], GatewayClient]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AIGC_")}
    environment |= {
        "AIGC_SCHEDULER__BIND": "tcp://127.0.0.1:0",
        "AIGC_SCHEDULER__INTERNAL_PORT": "0",
        "AIGC_FLEET__COOL_DOWN_S": "4",
        "AIGC_FLEET__START_S": "5",
    }
    arguments = ["up", "--state-dir", str(state), "--elastic", "1:3", "--port", "0", "--json"]
    with (state.parent / "up.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "api.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
    assert process.stdout is not None
    text = ""
    while not text.rstrip().endswith("}"):
        line = process.stdout.readline()
        assert line, (state.parent / "up.log").read_text()
        text += line
    found = json.loads(text)
    key = Path(found["operator_key_file"]).read_text().strip()
    return process, GatewayClient(found["url"], key, state)


def _agents(up: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(up.pid).children():
        try:
            if "agent" in child.cmdline():
                found.append(child)
        except psutil.Error:
            continue
    return found


def _scheduler(up: subprocess.Popen[str]) -> psutil.Process:
    return next(child for child in psutil.Process(up.pid).children() if "scheduler" in child.cmdline())


def _up(client: GatewayClient) -> list[str]:
    return [node["name"] for node in _nodes(client) if node["state"] == "up"]


def _nodes(client: GatewayClient) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.request("GET", "/v1/nodes")["data"]
    return found


def test_nodes_come_with_the_work_and_go_without_it_and_the_scheduler_may_fall_meanwhile(tmp_path: Path) -> None:
    state = tmp_path / "state"
    up, client = _start(state)
    children: list[psutil.Process] = []
    try:
        wait_until(lambda: _up(client) == ["elastic-0"], "the first node joins", 90)
        jobs = [
            client.request("POST", "/v1/jobs", json={"method": "sleep", "parameters": {"seconds": 12, "steps": 24}})[
                "req_no"
            ]
            for _ in range(6)
        ]
        wait_until(lambda: len(_up(client)) > 1, "a second node comes for the work that waits", 120)
        agents = {agent.pid for agent in _agents(up)}
        _scheduler(up).send_signal(signal.SIGKILL)
        wait_until(lambda: _answers(client), "the scheduler is back", 60)
        assert agents <= {agent.pid for agent in _agents(up)}, "its fall ends no agent"
        wait_until(
            lambda: all(client.request("GET", f"/v1/jobs/{job}")["state"] == "finished" for job in jobs),
            "every task finishes, drained nodes or not",
            180,
        )
        wait_until(lambda: len(_agents(up)) == 1, "the others leave when there is nothing to do", 120)
        children = psutil.Process(up.pid).children(recursive=True)
    finally:
        up.send_signal(signal.SIGTERM)
        up.wait(60)
        assert up.stdout is not None
        up.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


def _answers(client: GatewayClient) -> bool:
    try:
        return bool(_nodes(client))
    except Exception:
        return False


def test_no_agent_outlives_a_killed_aigc_up(tmp_path: Path) -> None:
    up, client = _start(tmp_path / "state")
    try:
        wait_until(lambda: _up(client) == ["elastic-0"], "the node joins", 90)
        agents = _agents(up)
        rest = [child for child in psutil.Process(up.pid).children() if child not in agents]
        assert agents
    finally:
        up.kill()
        up.wait(30)
        assert up.stdout is not None
        up.stdout.close()
    try:
        _, alive = psutil.wait_procs(agents, timeout=20)
        assert alive == []
    finally:
        for child in rest:
            child.terminate()
        psutil.wait_procs(rest, timeout=30)
