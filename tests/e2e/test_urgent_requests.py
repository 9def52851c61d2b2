"""An urgent request in front of a full Pod, and no other in reach: it is drawn at once, and the others lose nothing."""

from __future__ import annotations

from typing import Any

import pytest

from executors.pod_models import BUILTIN_MODELS

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.torch,
    pytest.mark.xdist_group("platform"),
    pytest.mark.skipif(
        not (BUILTIN_MODELS["tiny"] / "model_index.json").is_file(), reason="the bundled model is not in this tree"
    ),
]

OVER = {"finished", "cancelled", "dead", "rejected"}
SLOTS = 4


def job(platform: Any, req_no: str) -> dict[str, Any]:
    found: dict[str, Any] = platform.client.request("GET", f"/v1/jobs/{req_no}")
    return found


def ask(platform: Any, priority: int, **parameters: Any) -> str:
    body = {"method": "text_to_image", "parameters": {"prompt": "a red star", **parameters}, "priority": priority}
    return str(platform.client.request("POST", "/v1/jobs", json=body)["req_no"])


def pods_of(platform: Any, name: str) -> list[dict[str, Any]]:
    [node] = [each for each in platform.client.request("GET", "/v1/nodes")["data"] if each["name"] == name]
    return [pod for pod in node["pods"] if pod["state"] not in {"stopping", "gone"}]


def test_an_urgent_request_enters_a_pod_whose_slots_are_all_taken(platform: Any) -> None:
    names = [node["name"] for node in platform.client.request("GET", "/v1/nodes")["data"]]
    for name in names[1:]:
        platform.aigc("nodes", "drain", name)
    long: list[str] = []
    try:
        long += [ask(platform, 0, steps=150, count=16, seed=seed) for seed in range(SLOTS)]

        def full() -> bool:
            return any(len(pod["tasks"]) == SLOTS for pod in pods_of(platform, names[0]))

        platform.until(full, "a Pod is full", 120)
        # What is left of the node is taken as well, so that a Pod of its own is no way out.
        gpus = len(next(node for node in platform.json("nodes", "list") if node["name"] == names[0])["gpus"])
        for _ in range(gpus - 1):
            body = {"method": "sleep", "parameters": {"seconds": 120, "steps": 1200}}
            long.append(str(platform.client.request("POST", "/v1/jobs", json=body)["req_no"]))
        for req_no in long:
            platform.until(lambda req_no=req_no: job(platform, req_no)["state"] == "running", f"{req_no} runs", 120)
        urgent = ask(platform, 100, steps=4, seed=1)
        platform.until(lambda: job(platform, urgent)["state"] in OVER, "the urgent one ends", 120)
        assert job(platform, urgent)["state"] == "finished"
        states = [job(platform, req_no) for req_no in long]
        assert [(each["state"], each["attempt"]) for each in states] == [("running", 1)] * len(long)
    finally:
        for req_no in long:
            platform.client.request("DELETE", f"/v1/jobs/{req_no}")
        for name in names[1:]:
            platform.aigc("nodes", "uncordon", name)
