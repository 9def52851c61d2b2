"""Every route times every caller times every owner: what another tenant has answers as if it were not there."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from fastapi.routing import APIRoute
from PIL import Image

from api.gateway import files, image_edits, images, jobs, models, operators, quotes
from api.gateway.fake import GatewayFake
from api.ports import ModelView

OPEN = {"/healthz", "/readyz", "/console", "/files/signed/{file_id}", "/openapi.json"}
OPERATORS = {
    ("GET", "/v1/nodes"),
    ("POST", "/v1/nodes/{node}/drain"),
    ("POST", "/v1/nodes/{node}/uncordon"),
    ("POST", "/v1/nodes/{node}/unload"),
    ("GET", "/v1/queue"),
    ("POST", "/v1/whatif"),
    ("GET", "/v1/alerts"),
    ("GET", "/v1/keys"),
    ("POST", "/v1/keys"),
    ("DELETE", "/v1/keys/{key_id}"),
    ("GET", "/v1/logs"),
    ("GET", "/metrics"),
}
BODIES = {
    "/v1/jobs": {"method": "sleep", "parameters": {}},
    "/v1/quotes": {"method": "sleep", "parameters": {}},
    "/v1/jobs/{req_no}/compensations": {"action": "release_quota"},
    "/v1/images/generations": {"prompt": "x", "timeout_s": 0.02},
    "/v1/models/{model_id}/deploy": {"pods": 1},
    "/v1/keys": {"tenant": "eve"},
    "/v1/nodes/{node}/unload": {"model": "lora-1"},
}


def routes(gw: GatewayFake) -> list[tuple[str, str]]:
    found = []
    for path, item in gw.app.openapi()["paths"].items():
        found += [(method.upper(), path) for method in item]
    assert len(found) > 25
    return sorted(found)


class World:
    """One object of every kind that belongs to ana."""

    def __init__(self, directory: Path) -> None:
        self.gw = gw = GatewayFake(directory, failed_auth={"per_minute": 10_000, "burst": 10_000})
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "PNG")
        self.file_id = gw.client.post(
            "/v1/uploads", files={"file": ("a.png", buffer.getvalue())}, headers=gw.ana
        ).json()["file_id"]
        self.req_no = gw.submit()["req_no"]
        gw.support.move(self.req_no, "finished", result={"files": [], "metadata": {}})
        gw.support.models_by_id["lora-1"] = ModelView(model_id="lora-1", tenant="ana", kind="lora", base="tiny")
        self.key_id = gw.keys.create("spare")[1].key_id

    def call(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        url = path.format(
            req_no=self.req_no, file_id=self.file_id, model_id="lora-1", node="node-1", key_id=self.key_id
        )
        more: dict = {}
        if path == "/v1/uploads":
            more["files"] = {"file": ("a.png", b"no picture")}
        elif method == "POST":
            more["json"] = BODIES.get(path, {})
        if path == "/v1/logs":
            more["params"] = {"follow": "false"}
        answer = self.gw.client.request(method, url, headers=headers, follow_redirects=False, **more)
        return answer.status_code, answer.text


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_every_route_but_the_open_ones_needs_a_key(world: World) -> None:
    for method, path in routes(world.gw):
        status, _ = world.call(method, path, {})
        if path in OPEN:
            assert status != 401, path
        else:
            assert status == 401, (method, path)


def test_users_may_not_do_what_operators_do(world: World) -> None:
    assert set(routes(world.gw)) >= OPERATORS
    for method, path in sorted(OPERATORS):
        assert world.call(method, path, world.gw.ana)[0] == 403, (method, path)
        assert world.call(method, path, world.gw.ops)[0] < 400, (method, path)
    assert world.gw.keys.authenticate(world.gw.ana["Authorization"][7:]).tenant == "ana"


def test_what_another_tenant_owns_answers_exactly_as_what_is_not_there(world: World) -> None:
    seen = 0
    for method, path in routes(world.gw):
        if (method, path) in OPERATORS or "{" not in path or path in OPEN:
            continue
        theirs = world.call(method, path, world.gw.bob)
        absent = World.__new__(World)
        absent.gw, absent.key_id = world.gw, world.key_id
        absent.req_no, absent.file_id = "00000000-0000-0000-0000-000000000000", "0" * 64
        url_model = "lora-2"
        missing = world.gw.client.request(
            method,
            path.format(req_no=absent.req_no, file_id=absent.file_id, model_id=url_model),
            headers=world.gw.bob,
            follow_redirects=False,
            **({"json": BODIES.get(path, {})} if method == "POST" else {}),
        )
        assert theirs[0] == missing.status_code == 404, (method, path)
        for text in (theirs[1], missing.text):
            assert "ana" not in text
        seen += 1
    assert seen >= 10
    assert world.gw.support.models_by_id["lora-1"].deployed_pods == 0
    assert world.gw.support.known[("ana", world.req_no)].state == "finished"


def test_the_owner_and_the_operator_reach_the_same_objects(world: World) -> None:
    for method, path in routes(world.gw):
        if (method, path) in OPERATORS or "{" not in path or path in OPEN or method == "DELETE":
            continue
        for headers in (world.gw.ana, world.gw.ops):
            assert world.call(method, path, headers)[0] < 400, (method, path)


def test_lists_and_streams_hold_only_the_callers_own(world: World) -> None:
    assert world.gw.client.get("/v1/jobs", headers=world.gw.bob).json()["data"] == []
    assert len(world.gw.client.get("/v1/jobs", headers=world.gw.ops).json()["data"]) == 1
    models = {one["id"] for one in world.gw.client.get("/v1/models", headers=world.gw.bob).json()["data"]}
    assert models == {"tiny"}
    used = world.gw.client.post(
        "/v1/jobs",
        json={"method": "text_to_image", "parameters": {"prompt": "x"}, "model": "lora-1"},
        headers=world.gw.bob,
    )
    assert used.status_code == 422


def test_the_document_lists_every_route_there_is(world: World) -> None:
    modules = (jobs, quotes, images, image_edits, files, models, operators)
    routers = [module.router for module in modules] + [operators.probes]
    served = {
        (method, route.path.replace(":path}", "}"))
        for router in routers
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    assert served == set(routes(world.gw))
