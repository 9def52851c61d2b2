"""`aigc generate` with pictures: what is sent to the gateway, and what is refused before anything is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from api.cli import requests
from api.cli.main import app


class Gateway:
    """Takes uploads and one job, and remembers them."""

    def __init__(self, *_: Any) -> None:
        pass

    uploads: ClassVar[list[str]] = []
    jobs: ClassVar[list[dict[str, Any]]] = []

    def request(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        if path == "/v1/uploads":
            name = options["files"]["file"][0]
            self.uploads.append(name)
            return {"file_id": f"id-of-{name}"}
        self.jobs.append(options["json"])
        return {"req_no": "1"}


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Gateway]:
    monkeypatch.setattr(requests, "GatewayClient", Gateway)
    monkeypatch.setattr(Gateway, "uploads", [])
    monkeypatch.setattr(Gateway, "jobs", [])
    monkeypatch.chdir(tmp_path)
    for name in ("photo.png", "mask.png", "edges.png", "a:b.png"):
        Path(name).write_bytes(b"picture")
    return Gateway


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["generate", "a red star", "--no-wait", *arguments])


def test_pictures_are_uploaded_and_named(gateway: type[Gateway]) -> None:
    said = run("--image", "photo.png", "--strength", "0.6", "--mask", "mask.png", "--control", "canny:edges.png:0.5")
    assert said.exit_code == 0, said.output
    [job] = gateway.jobs
    assert gateway.uploads == ["photo.png", "mask.png", "edges.png"]
    assert job["parameters"]["image"] == "id-of-photo.png"
    assert job["parameters"]["mask"] == "id-of-mask.png"
    assert job["parameters"]["strength"] == 0.6
    assert job["parameters"]["control"] == [{"model": "canny", "image": "id-of-edges.png", "scale": 0.5}]


def test_a_control_s_file_may_have_a_colon_in_its_name(gateway: type[Gateway]) -> None:
    assert run("--control", "canny:a:b.png").exit_code == 0
    assert gateway.jobs[0]["parameters"]["control"] == [{"model": "canny", "image": "id-of-a:b.png", "scale": 1.0}]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--image", "nothing.png"), "no such picture: nothing.png"),
        (("--image", "photo.png", "--mask", "nothing.png"), "no such picture: nothing.png"),
        (("--control", "canny"), "is not NAME:FILE"),
        (("--control", ":edges.png"), "is not NAME:FILE"),
        (("--control", "canny:nothing.png"), "no such picture: nothing.png"),
    ],
)
def test_nothing_is_sent_when_a_picture_is_missing(
    gateway: type[Gateway], arguments: tuple[str, ...], told: str
) -> None:
    said = run(*arguments)
    assert said.exit_code == 2
    assert told in said.output
    assert gateway.uploads == []
    assert gateway.jobs == []
