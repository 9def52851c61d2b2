"""Two personalised models, trained here, share one Pod of their base, and each draws what it would draw in a Pod of its own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

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

PROMPT = "a sks emblem on a white background"
FAST = {"steps": 30, "learning_rate": 0.02, "batch": 1, "prior_preservation": False, "text_encoder": True}


@pytest.fixture(scope="module")
def models(platform: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Two models of different trainings, and where their files lie; deleted at the end."""
    from api.cli.requests import upload

    folder = tmp_path_factory.mktemp("subject")
    pictures = [upload(platform.client, path) for path in draw_subject(folder / "pictures")]
    trained: dict[str, Path] = {}
    jobs = [
        platform.client.request(
            "POST",
            "/v1/jobs",
            json={
                "method": "dreambooth",
                "parameters": {"pictures": pictures, "category": "emblem", "seed": seed, **FAST},
            },
        )["req_no"]
        for seed in (1, 2)
    ]
    for req_no in jobs:
        job = ended(platform, req_no)
        model = job["result"]["model"]
        trained[model] = folder / model
        trained[model].mkdir()
        for file in job["result"]["files"]:
            if file["role"] == "adapter":
                platform.client.download(file["url"], trained[model] / file["name"])
    yield trained
    for model in trained:
        platform.client.request("DELETE", f"/v1/models/{model}")


def ended(platform: Any, req_no: str, state: str = "finished") -> dict[str, Any]:
    def job() -> dict[str, Any]:
        found: dict[str, Any] = platform.client.request("GET", f"/v1/jobs/{req_no}")
        return found

    platform.until(lambda: job()["state"] in {"finished", "dead", "rejected", "cancelled"}, f"{req_no} ends", 240)
    found = job()
    assert found["state"] == state, found
    return found


def ask(platform: Any, **parameters: Any) -> str:
    priority = parameters.pop("priority", 0)
    asked = {"prompt": PROMPT, "seed": 3, "steps": 4, **parameters}
    body = {"method": "text_to_image", "parameters": asked, "priority": priority}
    return str(platform.client.request("POST", "/v1/jobs", json=body)["req_no"])


def drawn(job: dict[str, Any]) -> np.ndarray[Any, Any]:
    content = httpx.get(job["result"]["files"][0]["url"]).raise_for_status().content
    return np.asarray(Image.open(BytesIO(content)), dtype=float)


def alone(folder: Path, output: Path) -> np.ndarray[Any, Any]:
    """The picture of the model fused, as a Pod of its own would draw it."""
    from executors.methods.base import ModelRef
    from executors.methods.parameters import TextToImageParameters
    from executors.methods.text_to_image import TextToImage
    from executors.tiny.evaluate import LocalRun

    output.mkdir()
    method = TextToImage()
    method.load(ModelRef(folder.name, BUILTIN_MODELS["tiny"], folder), "cpu")
    result = method.run(TextToImageParameters(prompt=PROMPT, seed=3, steps=4), LocalRun(output, {}, say=lambda _: None))
    return np.asarray(Image.open(result.files[0].path), dtype=float)


def generating(platform: Any) -> list[dict[str, Any]]:
    """The generation Pods of all nodes that are not going."""
    nodes = platform.client.request("GET", "/v1/nodes")["data"]
    return [
        pod
        for node in nodes
        for pod in node["pods"]
        if pod["method"] == "text_to_image" and pod["state"] not in {"stopping", "gone"}
    ]


def test_models_of_one_base_share_a_pod_and_draw_what_they_draw_alone(
    platform: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    before = {pod["pod"] for pod in generating(platform)}
    long = ask(platform, steps=150, count=2)
    platform.until(
        lambda: platform.client.request("GET", f"/v1/jobs/{long}")["state"] == "running", "the long one runs"
    )
    [pod] = [each for each in generating(platform) if each["tasks"]]
    jobs = {model: ask(platform, model=model) for model in models}
    done = {model: ended(platform, req_no) for model, req_no in jobs.items()}
    assert {each["pod"] for each in generating(platform)} - before <= {pod["pod"]}
    assert {each["model"] for each in generating(platform)} == {"tiny"}
    for model, job in done.items():
        assert (job["model"], job["result"]["metadata"]["model"]) == (model, model)
        assert job["result"]["metadata"]["base_model"] == "tiny"
        assert np.abs(drawn(job) - alone(models[model], tmp_path / model)).max() <= 1.0
    first, second = (drawn(job) for job in done.values())
    assert np.abs(first - second).max() > 2.0
    ended(platform, long)


def test_deployments_of_one_base_share_its_warm_pod_and_undeploying_gives_it_back(
    platform: Any, models: dict[str, Path]
) -> None:
    for model in models:
        assert platform.client.request("POST", f"/v1/models/{model}/deploy", json={"pods": 1})["deployed_pods"] == 1
    platform.until(lambda: bool(generating(platform)), "a Pod is warm")
    assert {pod["model"] for pod in generating(platform)} == {"tiny"}
    for model in models:
        ended(platform, ask(platform, model=model))
        assert platform.client.request("POST", f"/v1/models/{model}/undeploy")["deployed_pods"] == 0
    assert {pod["model"] for pod in generating(platform)} <= {"tiny"}


def test_the_command_line_mixes_models_by_weight(platform: Any, models: dict[str, Path], tmp_path: Path) -> None:
    first, second = models
    pictures = {}
    for weight in ("0", "0.8"):
        line = platform.aigc(
            "generate", PROMPT, "--seed", "3", "--steps", "4", "--model", first, "--adapter", f"{second}:{weight}",
            "-o", str(tmp_path / weight),
        )  # fmt: skip
        with Image.open(line.strip()) as picture:
            pictures[weight] = np.asarray(picture, dtype=float)
            told = json.loads(picture.info["aigc"])
            assert told["adapters"] == [{"model": first, "weight": 1.0}, {"model": second, "weight": float(weight)}]
    assert np.abs(pictures["0"] - alone(models[first], tmp_path / "alone")).max() <= 1.0
    assert np.abs(pictures["0.8"] - pictures["0"]).max() > 2.0


@pytest.mark.parametrize(
    ("adapters", "said"),
    [
        ([{"model": "tiny"}], "only LoRAs can be added"),
        ([{"model": "lora-absent"}], "lora-absent"),
        ([{"model": "tiny", "weight": 99}], "parameters.adapters.0.weight"),
    ],
)
def test_models_that_cannot_be_mixed_are_refused(platform: Any, adapters: list[dict[str, Any]], said: str) -> None:
    answer = httpx.post(
        f"{platform.client.url}/v1/jobs",
        headers={"Authorization": f"Bearer {platform.client.key}"},
        json={"method": "text_to_image", "parameters": {"prompt": PROMPT, "adapters": adapters}},
    )
    if answer.status_code == 202:  # SS knows more of models than the gateway does.
        assert said in ended(platform, answer.json()["req_no"], "rejected")["detail"]
    else:
        assert (answer.status_code, said in answer.text) == (422, True), answer.text


def test_a_model_that_a_job_mixes_in_is_not_deleted_under_it(platform: Any, models: dict[str, Path]) -> None:
    first, second = models
    req_no = ask(platform, model=first, steps=150, count=16, adapters=[{"model": second}])
    platform.until(lambda: platform.client.request("GET", f"/v1/jobs/{req_no}")["state"] != "queued", "it is taken in")
    try:
        platform.aigc("models", "delete", second, code=4)
    finally:
        platform.client.request("DELETE", f"/v1/jobs/{req_no}")


def test_previews_come_with_the_jobs_events(platform: Any) -> None:
    req_no = ask(platform, steps=150, count=4, preview_every=5)
    seen: list[Any] = []

    def follow() -> None:
        for event in platform.client.stream(f"/v1/jobs/{req_no}/events"):
            url = event.get("view", {}).get("preview_url")
            if url and not seen:
                answer = httpx.get(url)
                if answer.status_code == 200:  # An older one may be gone already.
                    seen.append(Image.open(BytesIO(answer.content)))
            if event.get("view", {}).get("state") in {"finished", "cancelled", "dead"}:
                return

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    platform.until(lambda: bool(seen) or not follower.is_alive(), "a preview", 240)
    assert seen
    assert seen[0].size == (8, 8)
    platform.client.request("DELETE", f"/v1/jobs/{req_no}")
    follower.join(60)
    assert not follower.is_alive()
