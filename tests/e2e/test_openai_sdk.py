"""The unmodified openai SDK against the real platform and the bundled model."""

from __future__ import annotations

import base64
import io
import urllib.request

import openai
import pytest
from PIL import Image

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("platform")]


@pytest.fixture
def client(platform):
    with openai.OpenAI(base_url=f"{platform.client.url}/v1", api_key=platform.client.key, max_retries=0) as made:
        yield made


def test_pictures_come_as_base64(client) -> None:
    answer = client.images.generate(
        model="tiny",
        prompt="a red circle",
        n=2,
        size="64x64",
        response_format="b64_json",
        extra_body={"steps": 4, "seed": 3},
    )
    assert len(answer.data) == 2
    assert all(Image.open(io.BytesIO(base64.b64decode(item.b64_json))).size == (64, 64) for item in answer.data)


def test_pictures_come_as_links_that_need_no_key(client) -> None:
    answer = client.images.generate(
        model="tiny",
        prompt="a green house",
        size="64x64",
        response_format="url",
        extra_body={"steps": 4, "priority": 100, "group": "a"},
    )
    with urllib.request.urlopen(answer.data[0].url) as file:
        assert Image.open(io.BytesIO(file.read())).format == "PNG"


def test_a_stream_sends_partial_images_before_the_pictures(client) -> None:
    stream = client.images.generate(
        model="tiny", prompt="a red circle", n=8, stream=True, partial_images=2, extra_body={"steps": 150, "seed": 3}
    )
    events = list(stream)
    kinds = [event.type for event in events]
    assert kinds[-8:] == ["image_generation.completed"] * 8
    assert 1 <= kinds.count("image_generation.partial_image") <= 2  # A preview may be gone when it is asked for.
    partial = Image.open(io.BytesIO(base64.b64decode(events[0].b64_json)))
    assert (partial.size, events[0].partial_image_index) == ((8, 8), 0)


def test_a_picture_is_edited_where_its_mask_is_transparent(client) -> None:
    def png(mode: str, colour: tuple[int, ...], hole: bool = False) -> bytes:
        picture = Image.new(mode, (64, 64), colour)
        if hole:
            picture.paste((0, 0, 0, 0), (0, 0, 32, 64))
        out = io.BytesIO()
        picture.save(out, "PNG")
        return out.getvalue()

    answer = client.images.edit(
        image=("a.png", png("RGB", (200, 30, 30))),
        mask=("m.png", png("RGBA", (0, 0, 0, 255), hole=True)),
        model="tiny",
        prompt="a green house",
        size="64x64",
        extra_body={"steps": 6, "seed": 3},
    )
    made = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))).convert("RGB")
    assert made.size == (64, 64)
    kept, painted = made.getpixel((56, 8)), made.getpixel((8, 8))
    assert max(abs(one - other) for one, other in zip(kept, (200, 30, 30), strict=True)) < 60
    assert painted != kept
    assert answer.metadata["inputs"].keys() == {"image", "mask"}


def test_a_wrong_parameter_is_a_bad_request_that_names_it(client) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.images.generate(model="tiny", prompt="a", size="63x64")
    assert caught.value.status_code in {400, 422}
    assert "size" in str(caught.value) or "width" in str(caught.value)
