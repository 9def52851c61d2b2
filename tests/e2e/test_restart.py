"""`aigc up` stops cleanly on Ctrl-C and comes back with everything it had accepted."""

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


class Up:
    """A running `aigc up`."""

    def __init__(self, state: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AIGC_")}
        environment |= {"AIGC_SCHEDULER__BIND": "tcp://127.0.0.1:0", "AIGC_SCHEDULER__INTERNAL_PORT": "0"}
        arguments = ["up", "--state-dir", str(state), "--devices", "cpu:1", "--port", "0", "--json"]
        with (state.parent / "up.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "api.cli", *arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        assert self.process.stdout is not None
        text = ""
        while not text.rstrip().endswith("}"):
            line = self.process.stdout.readline()
            assert line, (state.parent / "up.log").read_text()
            text += line
        found = json.loads(text)
        self.client = GatewayClient(found["url"], Path(found["operator_key_file"]).read_text().strip(), state)

    def request(self, method: str, path: str, **more: Any) -> Any:
        return self.client.request(method, path, **more)

    def interrupt(self) -> None:
        """Press Ctrl-C and wait for the end; nothing may be left."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(60) == 0
        self.process.stdout.close()
        _, alive = psutil.wait_procs(children, timeout=10)
        assert alive == []


def test_what_was_accepted_before_ctrl_c_is_done_after_the_next_start(tmp_path: Path) -> None:
    state = tmp_path / "state"
    first = Up(state)
    try:
        jobs = [
            first.request("POST", "/v1/jobs", json={"method": "sleep", "parameters": {"seconds": 0.5, "steps": 5}})[
                "req_no"
            ]
            for _ in range(4)
        ]
        long = first.request("POST", "/v1/jobs", json={"method": "sleep", "parameters": {"seconds": 30, "steps": 300}})[
            "req_no"
        ]
        wait_until(
            lambda: first.request("GET", f"/v1/jobs/{jobs[0]}")["state"] == "finished", "the first job finishes", 60
        )
    finally:
        first.interrupt()
    second = Up(state)
    try:
        for req_no in jobs:
            wait_until(
                lambda req_no=req_no: second.request("GET", f"/v1/jobs/{req_no}")["state"] == "finished",
                f"{req_no} finishes",
                60,
            )
        assert second.request("GET", f"/v1/jobs/{long}")["state"] not in {"finished", "dead", "cancelled", "rejected"}
        assert second.request("POST", f"/v1/jobs/{long}/cancel")["state"] == "cancelled"
    finally:
        second.interrupt()
