"""What operators see and do, the probes, the metrics and the live log."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families

from api.gateway.fake import GatewayFake
from api.ports import ModelView


@pytest.fixture
def gw(tmp_path: Path) -> Iterator[GatewayFake]:
    yield GatewayFake(tmp_path, keep_log=True)
    structlog.reset_defaults()


def metrics(gw: GatewayFake) -> dict[str, float]:
    answer = gw.client.get("/metrics", headers=gw.ops)
    assert answer.status_code == 200, answer.text
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_a_model_is_taken_off_a_node_by_operators_only(gw: GatewayFake) -> None:
    gw.support.node_rows["node-1"]["models"] = [{"model": "m", "tier": "disk"}, {"model": "k", "tier": "disk"}]
    taken = gw.client.post("/v1/nodes/node-1/unload", json={"model": "m"}, headers=gw.ops)
    assert taken.json() == {"node": "node-1", "model": "m", "order": "unload"}
    assert [each["model"] for each in gw.support.node_rows["node-1"]["models"]] == ["k"]
    assert gw.client.post("/v1/nodes/node-1/unload", json={"model": "m"}, headers=gw.ana).status_code == 403
    assert gw.client.post("/v1/nodes/node-2/unload", json={"model": "m"}, headers=gw.ops).status_code == 404
    for body in ({}, {"model": ""}, {"model": "m", "force": True}):
        assert gw.client.post("/v1/nodes/node-1/unload", json=body, headers=gw.ops).status_code == 422


def test_what_nodes_say_of_their_caches_is_measured(gw: GatewayFake) -> None:
    gw.support.node_rows["node-1"]["caches"] = {"disk": {"hits": 7, "bytes": 5}, "memory": {"models": 2}}
    shown = metrics(gw)
    assert shown["aigc_node_cache{figure=hits,node=node-1,tier=disk}"] == 7
    assert shown["aigc_node_cache{figure=models,node=node-1,tier=memory}"] == 2


def test_nodes_are_listed_drained_and_let_work_again(gw: GatewayFake) -> None:
    assert gw.client.get("/v1/nodes", headers=gw.ops).json()["data"][0]["name"] == "node-1"
    assert gw.client.post("/v1/nodes/node-1/drain", headers=gw.ops).json() == {
        "node": "node-1",
        "gpu": None,
        "order": "drain",
    }
    assert gw.support.node_rows["node-1"]["state"] == "draining"
    answer = gw.client.post("/v1/nodes/node-1/uncordon", json={"gpu": "cpu-0"}, headers=gw.ops)
    assert answer.json()["gpu"] == "cpu-0"
    assert gw.support.node_rows["node-1"]["state"] == "ready"
    assert gw.client.post("/v1/nodes/node-2/drain", headers=gw.ops).status_code == 404


def test_models_are_deployed_undeployed_and_deleted(gw: GatewayFake) -> None:
    gw.support.models_by_id["lora-1"] = ModelView(
        model_id="lora-1", tenant="ana", kind="lora", base="tiny", created_at=12.5
    )
    shown = gw.client.get("/v1/models/lora-1", headers=gw.ana).json()
    assert (shown["id"], shown["object"], shown["created"], shown["owned_by"]) == ("lora-1", "model", 12, "ana")
    assert gw.client.post("/v1/models/lora-1/deploy", json={"pods": 3}, headers=gw.ana).json()["deployed_pods"] == 3
    assert gw.client.post("/v1/models/lora-1/deploy", json={"pods": 5}, headers=gw.ana).status_code == 403
    assert gw.client.post("/v1/models/lora-1/deploy", json={"pods": 5}, headers=gw.ops).json()["deployed_pods"] == 5
    assert gw.client.post("/v1/models/lora-1/undeploy", headers=gw.ana).json()["deployed_pods"] == 0
    assert gw.client.delete("/v1/models/lora-1", headers=gw.ana).json() == {
        "id": "lora-1",
        "object": "model",
        "deleted": True,
    }
    assert gw.client.get("/v1/models/lora-1", headers=gw.ana).status_code == 404
    assert gw.client.delete("/v1/models/tiny", headers=gw.ops).status_code == 409


def test_a_model_id_may_be_a_path(gw: GatewayFake) -> None:
    gw.support.models_by_id["stable/xl"] = ModelView(model_id="stable/xl", kind="local")
    assert gw.client.get("/v1/models/stable/xl", headers=gw.ana).json()["id"] == "stable/xl"
    assert gw.client.post("/v1/models/stable/xl/deploy", headers=gw.ana).json()["deployed_pods"] == 1
    refused = gw.client.get("/v1/models/stable/xl/deploy", headers=gw.ana)
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")


def test_readiness_names_the_module_that_does_not_work_and_no_details(gw: GatewayFake) -> None:
    assert gw.client.get("/healthz").json() == {"status": "ok"}
    assert gw.client.get("/readyz").json() == {"ready": True, "modules": {"gateway": True, "scheduler": True}}
    gw.support.ready = False
    answer = gw.client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["modules"]["scheduler"] is False
    assert "secret" not in answer.text

    async def away():
        raise ConnectionError

    gw.support.health = away
    assert gw.client.get("/readyz").json() == {"ready": False, "modules": {"gateway": True, "support": False}}
    assert gw.client.get("/healthz").status_code == 200


def test_metrics_count_requests_by_route_and_show_nodes_and_queue(gw: GatewayFake) -> None:
    job = gw.submit()
    gw.submit(priority=100)
    gw.client.get(f"/v1/jobs/{job['req_no']}", headers=gw.ana)
    gw.client.get("/v1/jobs", headers={})
    found = metrics(gw)
    assert found["aigc_gateway_requests_total{method=POST,route=/v1/jobs,status=202}"] == 2
    assert found["aigc_gateway_requests_total{method=GET,route=/v1/jobs/{req_no},status=200}"] == 1
    assert found["aigc_gateway_refused_total{reason=invalid_api_key}"] == 1
    assert found["aigc_gateway_submissions_queued_total{urgency=urgent}"] == 1
    assert found["aigc_gateway_window_wait_seconds_count{urgency=ordinary}"] == 1
    assert found["aigc_nodes{state=ready}"] == 1
    assert found["aigc_gpu_busy_ratio{gpu=cpu-0,node=node-1}"] == pytest.approx(0.25)
    assert found["aigc_module_up{module=scheduler}"] == 1
    assert found["aigc_queue{name=pending}"] == 2
    assert not [name for name in found if job["req_no"] in name]


def test_metrics_may_be_opened_where_only_this_machine_listens(tmp_path: Path) -> None:
    assert GatewayFake(tmp_path / "a", metrics_open=True).client.get("/metrics").status_code == 200
    assert GatewayFake(tmp_path / "b").client.get("/metrics").status_code == 401


def test_the_live_log_carries_the_jobs_number_and_can_be_filtered(gw: GatewayFake) -> None:
    job = gw.submit()
    gw.submit()
    gw.logs.add({"level": "error", "module": "sm", "event": "broken"})

    def lines(**wanted: str) -> list[dict]:
        answer = gw.client.get("/v1/logs", params={"follow": "false", **wanted}, headers=gw.ops)
        return [json.loads(line[5:]) for line in answer.text.splitlines() if line.startswith("data:")]

    of_job = lines(req_no=job["req_no"])
    assert "job_accepted" in [line["event"] for line in of_job]
    assert {line["module"] for line in of_job} == {"gateway"}
    assert [line["event"] for line in lines(level="error")] == ["broken"]
    assert [line["event"] for line in lines(module="sm")] == ["broken"]
    key = gw.ana["Authorization"].removeprefix("Bearer ")
    assert key not in json.dumps(lines())


def test_signed_links_are_not_in_the_log(gw: GatewayFake) -> None:
    ref = gw.store.put_bytes(b"x" * 10, "image/png")
    link = gw.app.state.gateway
    from api.gateway.signing import signed_path

    path = signed_path(ref.file_id, link.clock_s(), 60, b"s" * 40)
    assert gw.client.get(path).status_code == 200
    written = json.dumps([dict(line.fields) for line in gw.logs.after(0)])
    assert "/files/signed/{file_id}" in written
    assert path.split("signature=")[1] not in written


def test_alerts_show_what_is_abnormal(gw: GatewayFake) -> None:
    gw.support.ready = False
    metrics(gw)
    [alert] = gw.client.get("/v1/alerts", headers=gw.ops).json()["data"]
    assert (alert["kind"], alert["subject"], alert["severity"]) == ("module_down", "scheduler", "critical")


def test_the_watch_follows_jobs_while_the_gateway_runs(tmp_path: Path) -> None:
    gw = GatewayFake(tmp_path, watch_s=0.02)
    gw.support.read_held()
    before = gw.submit()
    with gw.client:
        job = gw.submit()
        gw.support.move(job["req_no"], "running")
        gw.support.move(job["req_no"], "finished", result={"files": [], "metadata": {}})
        watch = gw.app.state.gateway.watch
        wanted = "aigc_jobs_ended_total{method=sleep,state=finished,task_type=GC}"
        for _ in range(1000):
            found = metrics(gw)
            if found.get(wanted) == 1 and list(watch.jobs.live) == [("ana", before["req_no"])]:
                break
        assert found[wanted] == 1
        assert found["aigc_jobs_run_seconds_count{method=sleep}"] == 1
        assert list(watch.jobs.live) == [("ana", before["req_no"])]


def test_the_console_page_holds_no_data_and_may_load_nothing_from_elsewhere(gw: GatewayFake) -> None:
    answer = gw.client.get("/console")
    assert answer.status_code == 200
    assert "connect-src 'self'" in answer.headers["content-security-policy"]
    assert "http://" not in answer.text
    assert "https://" not in answer.text
