"""A deployed personalised model is brought to the node ahead of any request, kept there, and given back: over real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from api.demo import draw_subject
from executors.pod_models import BUILTIN_MODELS

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.torch,
    pytest.mark.xdist_group("platform"),
    pytest.mark.skipif(
        not (BUILTIN_MODELS["tiny"] / "model_index.json").is_file(), reason="the bundled model is not in this tree"
    ),
]


def trained(platform: Any, folder: Path) -> str:
    """A model of ten training steps."""
    from api.cli.requests import upload

    pictures = [upload(platform.client, path) for path in draw_subject(folder / "pictures")]
    parameters = {"pictures": pictures, "category": "emblem", "steps": 10, "batch": 1, "prior_preservation": False}
    body = {"method": "dreambooth", "parameters": parameters}
    req_no = platform.client.request("POST", "/v1/jobs", json=body)["req_no"]

    def job() -> dict[str, Any]:
        found: dict[str, Any] = platform.client.request("GET", f"/v1/jobs/{req_no}")
        return found

    platform.until(lambda: job()["state"] in {"finished", "dead", "rejected"}, "the training ends", 240)
    return str(job()["result"]["model"])


def seen(platform: Any, model: str) -> list[dict[str, Any]]:
    """What the nodes say of a model."""
    nodes = platform.json("nodes", "list")
    return [each for node in nodes for each in node.get("models", ()) if each["model"] == model]


def test_every_node_tells_of_the_base_models_it_has(platform: Any) -> None:
    platform.until(lambda: len(seen(platform, "tiny")) == 2, "both nodes tell of the bundled model")
    assert {each["tier"] for each in seen(platform, "tiny")} <= {"disk", "memory"}
    assert all(each["size_bytes"] > 1 << 20 for each in seen(platform, "tiny"))


def test_a_deployed_model_is_pinned_before_anybody_asks_for_it_and_released_after(
    platform: Any, tmp_path: Path
) -> None:
    model = trained(platform, tmp_path)
    platform.client.request("POST", f"/v1/models/{model}/deploy", json={"pods": 1})
    platform.until(lambda: any(each["pinned"] for each in seen(platform, model)), "the model is pinned on a node", 180)
    [node] = [
        node["name"]
        for node in platform.json("nodes", "list")
        if any(each["model"] == model and each["pinned"] for each in node.get("models", ()))
    ]
    shown = platform.json("nodes", "show", node)
    assert model in [each["model"] for each in shown["models"]]
    assert shown["caches"]["disk"]["bytes_in"] > 0
    assert model in platform.aigc("nodes", "show", node).replace("\n", "")
    platform.client.request("POST", f"/v1/models/{model}/undeploy")
    platform.until(lambda: not any(each["pinned"] for each in seen(platform, model)), "the model is released", 180)
    platform.client.request("DELETE", f"/v1/models/{model}")


def test_a_node_that_is_not_there_is_named_with_those_that_are(platform: Any) -> None:
    from typer.testing import CliRunner

    from api.cli.main import app

    answer = CliRunner().invoke(app, ["nodes", "show", "nowhere", "--state-dir", str(platform.state)])
    assert answer.exit_code != 0
    assert "is no node" in " ".join((answer.stdout + answer.stderr).split())
