"""`aigc demo`, shortened: the promises of the long one hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_the_demo_trains_generates_cancels_and_survives_a_killed_pod(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AIGC_")}
    done = subprocess.run(
        [sys.executable, "-m", "api.cli", "demo", "--output", str(tmp_path), "--steps", "20", "--json"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "demo.json").read_text())
    assert report["finished"] == 9
    assert report["attempts_of_retried"] >= 2
    states = {job["req_no"]: job["state"] for job in report["jobs"]}
    assert states[report["cancelled"]] == "cancelled"
    groups = {job["group"]: set() for job in report["jobs"]}
    for job in report["jobs"]:
        if job["state"] == "finished":
            groups[job["group"]].add(job["node"])
    assert all(len(nodes) == 1 for nodes in groups.values()), "a strict group stays on its node"
    with Image.open(tmp_path / "contact-sheet.png") as sheet:
        assert sheet.size[0] > 800
