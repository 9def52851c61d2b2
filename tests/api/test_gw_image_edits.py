"""The edits route with the unmodified openai SDK: what becomes of a picture and its mask, and what is refused."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from PIL import Image

from api.gateway.fake import GatewayFake


class Served:
    """A gateway on a port of its own, in a thread."""

    def __init__(self, directory: Path) -> None:
        self.gw = GatewayFake(directory, auto=True, sync_timeout_s=20)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.server = uvicorn.Server(uvicorn.Config(self.gw.app, log_level="error", access_log=False))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        end = time.monotonic() + 10
        while not self.server.started:
            assert time.monotonic() < end, "the gateway did not start in time"
            time.sleep(0.005)

    def sdk(self) -> openai.OpenAI:
        key = self.gw.ana["Authorization"].removeprefix("Bearer ")
        url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        return openai.OpenAI(api_key=key, base_url=url, max_retries=0)

    def close(self) -> None:
        self.server.should_exit = True
        self.server.force_exit = True
        self.thread.join(10)
        self.socket.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    one = Served(tmp_path)
    yield one
    one.close()


def png(mode: str = "RGB", colour: Any = "red", hole: bool = False, size: int = 64) -> bytes:
    picture = Image.new(mode, (size, size), colour)
    if hole:
        picture.paste((0, 0, 0, 0), (0, 0, size // 2, size))
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def parameters(served: Served, answer: Any) -> dict[str, Any]:
    return dict(served.gw.support.known[("ana", answer.req_no)].parameters)


def test_a_picture_alone_may_change_wholly(served: Served) -> None:
    answer = served.sdk().images.edit(
        image=("a.png", png()), prompt="a blue star", n=2, extra_body={"steps": 9, "strength": 0.6, "priority": 100}
    )
    assert [base64.b64decode(one.b64_json)[:4] for one in answer.data] == [b"\x89PNG"] * 2
    given = parameters(served, answer)
    file_id = given.pop("image")
    assert b"".join(served.gw.store.read(file_id)) == png()
    assert given == {"prompt": "a blue star", "count": 2, "steps": 9, "strength": 0.6, "model": "tiny"}
    assert served.gw.support.known[("ana", answer.req_no)].priority == 100


def test_the_transparent_part_of_a_mask_is_painted(served: Served) -> None:
    answer = served.sdk().images.edit(
        image=[("a.png", png())],
        mask=("m.png", png("RGBA", (1, 2, 3, 255), hole=True)),
        prompt="a star",
        size="64x64",
        response_format="url",
        input_fidelity="high",
    )
    given = parameters(served, answer)
    assert given["mask"] != given["image"]
    assert given["mask_from"] == "transparent"
    assert "strength" not in given
    assert (given["width"], given["height"]) == (64, 64)
    assert answer.data[0].url


def test_a_mask_without_transparency_paints_its_white(served: Served) -> None:
    answer = served.sdk().images.edit(image=("a.png", png()), mask=("m.png", png("L", 255)), prompt="a star")
    assert "mask" in parameters(served, answer)
    assert "mask_from" not in parameters(served, answer)


def test_a_picture_with_a_hole_is_its_own_mask(served: Served) -> None:
    answer = served.sdk().images.edit(image=("a.png", png("RGBA", (9, 9, 9, 255), hole=True)), prompt="a star")
    given = parameters(served, answer)
    assert given["mask"] == given["image"]
    assert given["mask_from"] == "transparent"


def test_high_fidelity_changes_less(served: Served) -> None:
    answer = served.sdk().images.edit(image=("a.png", png()), prompt="a star", input_fidelity="high")
    assert parameters(served, answer)["strength"] == 0.4


def test_the_sdk_reads_the_stream(served: Served) -> None:
    events = list(served.sdk().images.edit(image=("a.png", png()), prompt="x", stream=True))
    assert [one.type for one in events] == ["image_edit.completed"]
    assert base64.b64decode(events[0].b64_json).startswith(b"\x89PNG")


def test_what_cannot_be_edited_is_refused_by_its_field(served: Served) -> None:
    client = served.sdk()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"image": ("a.png", b"no picture")}, "image"),
        ({"image": [("a.png", png()), ("b.png", png())]}, "image"),
        ({"image": ("a.png", png()), "mask": ("m.png", b"")}, "mask"),
        ({"image": ("a.png", png()), "size": "huge"}, "size"),
        ({"image": ("a.png", png()), "extra_body": {"steps": 2, "strength": 0.1}}, "parameters.strength"),
        ({"image": ("a.png", png()), "extra_body": {"strength": 7}}, "strength"),
        ({"image": ("a.png", png()), "extra_body": {"nonsense": 7}}, "nonsense"),
        ({"image": ("a.png", png()), "n": 11}, "n"),
    ]
    for given, field in cases:
        with pytest.raises(openai.APIStatusError) as caught:
            client.images.edit(prompt="a star", **given)
        assert caught.value.status_code == 422, (given, caught.value)
        assert field in str(caught.value.body["param"]), (given, caught.value.body)
    assert served.gw.support.known == {}


def test_a_body_that_is_no_form_is_refused(served: Served) -> None:
    answer = served.gw.client.post("/v1/images/edits", json={"prompt": "x"}, headers=served.gw.ana)
    assert answer.status_code == 415


def test_a_control_picture_of_somebody_else_is_as_if_it_were_not_there(served: Served) -> None:
    upload = served.gw.client.post("/v1/uploads", files={"file": ("a.png", png())}, headers=served.gw.ana).json()
    body = {
        "method": "text_to_image",
        "parameters": {"prompt": "x", "control": [{"model": "canny", "image": upload["file_id"]}]},
    }
    assert served.gw.client.post("/v1/jobs", json=body, headers=served.gw.ana).status_code < 300
    refused = served.gw.client.post("/v1/jobs", json=body, headers=served.gw.bob)
    assert refused.status_code == 422
    assert refused.json()["error"]["param"] == "parameters.control.0.image"
