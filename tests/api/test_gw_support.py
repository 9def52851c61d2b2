"""The gateway over the real support service, queue, journal and engine, with nodes in memory: both sides of the port fit."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.gateway import GatewayConfig, KeyStore, create_app
from api.sm.process import Scheduler, SchedulerConfig
from api.state_dir import StateDir
from api.support.drill import DrillWorld
from api.support.intake import MethodDefaults
from api.support.jobs import Model
from engine import profiles
from engine.limits import Limits
from engine.resources import Demand
from executors.dfs import open_store


class Platform:
    """Everything but agents, in one process."""

    def __init__(self, root: Path) -> None:
        config = SchedulerConfig(
            state=StateDir(root),
            make_world=lambda begin: DrillWorld(begin.payloads, nodes=1, gpus=1, not_before=begin.not_before),
            profile=profiles.load("fifo"),
            methods={"sleep": MethodDefaults(Demand(gpus=1)), "text_to_image": MethodDefaults(Demand(gpus=1))},
            limits=Limits(backoff_us=1_000),
            models=[Model("tiny", "builtin")],
        )
        self.scheduler = Scheduler(config)
        self.scheduler.start()
        keys = KeyStore(root / "keys.sqlite", b"k" * 32)
        gateway = GatewayConfig(state_dir=root, signing_secrets=("s" * 40,), watch_s=0.2, poll_s=0.01)
        app = create_app(gateway, self.scheduler.support, self.scheduler.queue, open_store("memory://"), keys)
        self.client = TestClient(app)
        self.ana = {"Authorization": f"Bearer {keys.create('ana')[0]}"}
        self.bob = {"Authorization": f"Bearer {keys.create('bob')[0]}"}
        self.ops = {"Authorization": f"Bearer {keys.create('ops', 'operator')[0]}"}

    def submit(self, seconds: float = 0.0, **more: Any) -> str:
        parameters = {"seconds": seconds, **more.pop("parameters", {})}
        answer = self.client.post(
            "/v1/jobs", json={"method": "sleep", "parameters": parameters, **more}, headers=self.ana
        )
        assert answer.status_code == 202, answer.text
        return str(answer.json()["req_no"])

    def get(self, path: str, headers: dict[str, str] | None = None) -> Any:
        answer = self.client.get(path, headers=headers or self.ana)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def until(self, path: str, true: Callable[[Any], Any], headers: dict[str, str] | None = None) -> Any:
        end = time.monotonic() + 30
        while not true(found := self.get(path, headers)):
            assert time.monotonic() < end, found
        return found


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    one = Platform(tmp_path_factory.mktemp("platform"))
    with one.client:
        yield one
    one.scheduler.close()


def states(text: str) -> list[str]:
    return [json.loads(line[5:])["view"]["state"] for line in text.splitlines() if line.startswith("data:")]


def test_a_job_goes_from_the_gateway_through_queue_and_engine_to_its_end(platform: Platform) -> None:
    req_no = platform.submit(0.05, priority=7, group="g")
    seen = states(platform.client.get(f"/v1/jobs/{req_no}/events", headers=platform.ana).text)
    assert seen[-1] == "finished"
    assert "running" in seen
    job = platform.get(f"/v1/jobs/{req_no}")
    assert (job["state"], job["priority"], job["group"], job["tenant"]) == ("finished", 7, "g", "ana")
    assert req_no in [one["req_no"] for one in platform.get("/v1/jobs?group=g")["data"]]
    later = platform.client.get(f"/v1/jobs/{req_no}/events", headers={**platform.ana, "Last-Event-ID": "1"})
    assert states(later.text)[-1] == "finished"


def test_running_and_waiting_jobs_are_cancelled_for_certain_by_owner_and_operator(platform: Platform) -> None:
    running, waiting = platform.submit(60), platform.submit(60)
    platform.until(f"/v1/jobs/{running}", lambda job: job["state"] == "running")
    reasons = platform.until(f"/v1/jobs/{waiting}/why", lambda found: found["data"])["data"]
    assert all(one["reason"] for one in reasons)
    assert platform.client.post(f"/v1/jobs/{waiting}/cancel", headers=platform.bob).status_code == 404
    assert platform.client.delete(f"/v1/jobs/{waiting}", headers=platform.ops).json()["state"] == "cancelled"
    assert platform.client.delete(f"/v1/jobs/{running}", headers=platform.ana).json()["state"] == "cancelled"
    assert platform.client.delete(f"/v1/jobs/{running}", headers=platform.ana).json()["state"] == "cancelled"


def test_a_cancel_right_after_the_submission_is_certain_too(platform: Platform) -> None:
    for _ in range(5):
        req_no = platform.submit(60)
        answer = platform.client.post(f"/v1/jobs/{req_no}/cancel", headers=platform.ana)
        assert answer.json()["state"] == "cancelled", answer.text


def test_the_same_req_no_is_one_job_also_when_it_has_ended(platform: Platform) -> None:
    req_no = platform.submit(0.0)
    platform.until(f"/v1/jobs/{req_no}", lambda job: job["state"] == "finished")
    assert platform.submit(0.0, req_no=req_no) == req_no
    answer = platform.client.post(
        "/v1/jobs", json={"method": "sleep", "parameters": {"seconds": 3}, "req_no": req_no}, headers=platform.ana
    )
    assert answer.status_code == 409
    assert platform.client.get(f"/v1/jobs/{req_no}", headers=platform.bob).status_code == 404


def test_a_dead_job_is_run_again_by_a_compensation(platform: Platform) -> None:
    req_no = platform.submit(0.0, parameters={"fail": "crash"})
    dead = platform.until(f"/v1/jobs/{req_no}", lambda job: job["state"] == "dead")
    assert dead["attempt"] > 1
    path = f"/v1/jobs/{req_no}/compensations"
    keyed = {**platform.ana, "Idempotency-Key": "once"}
    first = platform.client.post(path, json={"action": "redeliver_result"}, headers=keyed)
    assert first.status_code == 200, first.text
    assert platform.client.post(path, json={"action": "redeliver_result"}, headers=keyed).json() == first.json()
    assert platform.client.post(path, json={"action": "rerun"}, headers=platform.bob).status_code == 404
    assert platform.client.post(path, json={"action": "rerun"}, headers=platform.ana).status_code == 200
    again = platform.until(
        f"/v1/jobs/{req_no}", lambda job: job["state"] == "dead" and job["finished_at"] > dead["finished_at"]
    )
    assert again["req_no"] == req_no
    finished = platform.submit(0.0)
    platform.until(f"/v1/jobs/{finished}", lambda job: job["state"] == "finished")
    refused = platform.client.post(f"/v1/jobs/{finished}/compensations", json={"action": "rerun"}, headers=platform.ana)
    assert 400 <= refused.status_code < 500
    assert refused.headers["content-type"] == "application/problem+json"


def test_a_drained_node_starts_nothing_until_it_may_again(platform: Platform) -> None:
    [node] = platform.get("/v1/nodes", platform.ops)["data"]
    path = f"/v1/nodes/{node['name']}"
    assert platform.client.post(f"{path}/drain", headers=platform.ops).status_code == 200
    platform.until("/v1/nodes", lambda found: found["data"][0]["draining"], platform.ops)
    req_no = platform.submit(0.0)
    platform.until(f"/v1/jobs/{req_no}/why", lambda found: found["data"] and found["data"][0]["reason"] != "QUEUED")
    assert platform.client.post(f"{path}/uncordon", headers=platform.ops).status_code == 200
    platform.until(f"/v1/jobs/{req_no}", lambda job: job["state"] == "finished")
    assert platform.client.post("/v1/nodes/nowhere/drain", headers=platform.ops).status_code == 404


def test_models_are_those_of_the_support_service(platform: Platform) -> None:
    assert [one["id"] for one in platform.get("/v1/models")["data"]] == ["tiny"]
    assert platform.client.get("/v1/models/nothing", headers=platform.ana).status_code == 404
    assert (
        platform.client.post("/v1/models/tiny/deploy", json={"pods": 1}, headers=platform.ana).json()["deployed_pods"]
        == 1
    )
    assert platform.client.post("/v1/models/tiny/undeploy", headers=platform.ana).json()["deployed_pods"] == 0
    assert platform.client.delete("/v1/models/tiny", headers=platform.ana).status_code in (403, 409)


def test_wrong_cursors_and_states_are_refused_and_not_crashes(platform: Platform) -> None:
    for query in ("cursor=zz", "cursor=-1", "cursor=9.9"):
        answer = platform.client.get(f"/v1/jobs?{query}", headers=platform.ana)
        assert 400 <= answer.status_code < 500, (query, answer.text)
    for state in ("queued", "pending", "dead", "finished"):
        platform.get(f"/v1/jobs?state={state}")
    for _ in range(2):
        platform.submit(0.0)
    platform.until("/v1/jobs?limit=2", lambda page: len(page["data"]) == 2)
    first = platform.get("/v1/jobs?limit=1")
    second = platform.get(f"/v1/jobs?limit=1&cursor={first['next_cursor']}")
    assert first["data"][0]["req_no"] != second["data"][0]["req_no"]


def test_metrics_and_readiness_show_every_module(platform: Platform) -> None:
    assert platform.get("/readyz")["ready"] is True
    req_no = platform.submit(0.0)
    platform.until(f"/v1/jobs/{req_no}", lambda job: job["state"] == "finished")
    end = time.monotonic() + 30
    while True:
        text = platform.client.get("/metrics", headers=platform.ops).text
        if 'aigc_jobs_ended_total{method="sleep",state="finished",task_type="GC"}' in text:
            break
        assert time.monotonic() < end, text
    for name in (
        "aigc_module_up",
        "aigc_nodes",
        "aigc_gpu_share_free_ratio",
        "aigc_queue",
        "aigc_jobs_wait_seconds_count",
    ):
        assert name in text
    assert "engine" in platform.get("/v1/queue", platform.ops)


def test_operators_ask_what_if_of_the_live_journal_and_nobody_else_may(platform: Platform) -> None:
    for _ in range(3):
        req_no = platform.submit()
        platform.until(f"/v1/jobs/{req_no}", lambda found: found["state"] == "finished")
    model = platform.get("/v1/nodes", platform.ops)["data"][0]["gpus"][0]["model"]
    question = {"add_nodes": [f"2x{model}"], "load": 2.0, "seeds": 2}
    answer = platform.client.post("/v1/whatif", json=question, headers=platform.ops)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["change"] == {"add_nodes": [f"2x{model}"], "load": 2.0}
    assert {line["tenant"] for line in found["lines"]} >= {"(all)", "ana"}
    finished = next(line for line in found["lines"] if line["measure"] == "finished")
    assert finished["changed"] > finished["unchanged"] > 0
    assert platform.client.post("/v1/whatif", json=question, headers=platform.ana).status_code == 403
    for wrong, named in (
        ({"add_nodes": ["many"]}, "add_nodes"),
        ({"profile": "no-such"}, "no-such"),
        ({"load": 0}, "load"),
    ):
        refused = platform.client.post("/v1/whatif", json=wrong, headers=platform.ops)
        assert (refused.status_code, named in refused.text) == (422, True), refused.text
    assert platform.submit(), "the platform goes on"
