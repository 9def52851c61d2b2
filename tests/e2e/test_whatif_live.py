"""What if, asked of a platform that runs: from the command line and over HTTP."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("platform")]


def test_a_running_platform_is_forked_and_goes_on(platform) -> None:
    body = {"method": "sleep", "parameters": {"seconds": 0.1, "steps": 1}}
    jobs = [platform.client.request("POST", "/v1/jobs", json=body)["req_no"] for _ in range(6)]
    for req_no in jobs:
        platform.until(
            lambda req_no=req_no: platform.json("jobs", "show", req_no)["state"] == "finished", f"{req_no} finishes"
        )
    running = platform.client.request(
        "POST", "/v1/jobs", json={"method": "sleep", "parameters": {"seconds": 60, "steps": 600}}
    )["req_no"]
    platform.until(lambda: platform.json("jobs", "show", running)["state"] == "running", "the long job runs")
    try:
        found = platform.json("whatif", "--add-nodes", "1xcpu", "--load", "2", "--seeds", "2", "--hours", "0.01")
        assert found["running"] >= 1
        assert found["nodes"] == 2
        assert any(line["tenant"] == "local" and line["measure"] == "mean completion, s" for line in found["lines"])
        asked = platform.client.request(
            "POST", "/v1/whatif", json={"add_nodes": ["1xcpu"], "seeds": 2, "hours": 0, "profile": "fifo"}
        )
        assert asked["change"] == {"profile": "fifo", "add_nodes": ["1xcpu"]}
        assert platform.json("jobs", "show", running)["state"] == "running", "the fork touches nothing"
    finally:
        platform.aigc("jobs", "cancel", running)
