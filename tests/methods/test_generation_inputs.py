"""Pictures that a request brings: what is read, into which shape, what is refused, and what is made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from executors.methods import inputs
from executors.methods.base import Cancelled, InputRefused, ModelRef
from executors.methods.parameters import ParameterError, TextToImageParameters, picture_fields, steps_taken, validate
from executors.methods.text_to_image import TextToImage

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]

FILE, OTHER = "a" * 64, "b" * 64


class Store:
    """Files by their digest, in a directory."""

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, Path] = {}
        self._folder = folder

    def put(self, picture: Image.Image, kind: str = "PNG", **options: Any) -> str:
        path = self._folder / f"{len(self.files)}.{kind.lower()}"
        picture.save(path, format=kind, **options)
        return self.keep(path)

    def keep(self, path: Path) -> str:
        name = hashlib.sha256(path.read_bytes()).hexdigest()
        self.files[name] = path
        return name

    def fetch(self, file_id: str) -> Path:
        return self.files[file_id]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    folder = tmp_path / "store"
    folder.mkdir()
    return Store(folder)


def asked(**changes: Any) -> TextToImageParameters:
    fields = {"prompt": "a red star", "steps": 4, "seed": 11, "model": "sd"}
    return TextToImageParameters.model_validate({**fields, **changes})


def read(store: Store, **changes: Any) -> inputs.Inputs:
    return inputs.read(asked(**changes), store.fetch, (512, 512), 8)


def coloured(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def test_the_result_takes_the_shape_of_the_given_picture_in_the_model_s_own_number_of_pixels(store: Store) -> None:
    wide = store.put(coloured(1600, 800))
    found = read(store, image=wide)
    assert (found.width, found.height) == (704, 320)
    assert found.image.size == (704, 320)
    assert found.image.mode == "RGB"
    assert (read(store, image=wide, width=640).width, read(store, image=wide, width=640).height) == (640, 320)
    assert (read(store, image=wide, height=128).width, read(store, image=wide, height=128).height) == (256, 128)
    assert read(store, image=wide, width=64, height=256).image.size == (64, 256)
    assert (read(store).width, read(store).height) == (512, 512)


def test_a_picture_is_cut_and_never_distorted(store: Store) -> None:
    left = Image.new("RGB", (200, 100), "blue")
    left.paste("red", (50, 0, 150, 100))
    found = read(store, image=store.put(left), width=64, height=64)
    assert np.asarray(found.image)[..., 0].min() > 200, "the blue edges are cut off"


def test_photos_are_turned_as_their_camera_meant_them(store: Store) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = store.put(coloured(200, 100), "JPEG", exif=exif)
    found = read(store, image=photo)
    assert found.height > found.width


def test_white_or_transparent_says_where_to_paint(store: Store) -> None:
    image = store.put(coloured(64, 64))
    grey = Image.new("L", (64, 64), 0)
    grey.paste(255, (0, 0, 32, 64))
    white = read(store, image=image, mask=store.put(grey), width=64, height=64).mask
    strokes = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    strokes.paste((255, 255, 255, 255), (0, 0, 32, 64))
    drawn = read(store, image=image, mask=store.put(strokes), width=64, height=64).mask
    holes = Image.new("RGBA", (64, 64), (9, 9, 9, 255))
    holes.paste((0, 0, 0, 0), (0, 0, 32, 64))
    erased = read(store, image=image, mask=store.put(holes), mask_from="transparent", width=64, height=64).mask
    assert white.tobytes() == drawn.tobytes() == erased.tobytes() == grey.tobytes()


def test_strength_is_less_without_a_mask(store: Store) -> None:
    image = store.put(coloured(64, 64))
    mask = store.put(Image.new("L", (64, 64), 255))
    assert read(store, image=image).strength == 0.8
    assert read(store, image=image, mask=mask).strength == 1.0
    assert read(store, image=image, mask=mask, strength=0.5).strength == 0.5
    assert steps_taken({"steps": 20, "image": FILE, "strength": 0.25}) == 5
    assert steps_taken({"steps": 20, "image": FILE}) == 16
    assert steps_taken({"steps": 20, "image": FILE, "mask": FILE}) == 20
    assert steps_taken({"steps": 20}) == 20
    assert steps_taken({}) is None


def test_files_are_named_by_the_field_that_brings_them() -> None:
    given = {"image": FILE, "mask": OTHER, "control": [{"model": "canny", "image": FILE}]}
    assert picture_fields(given) == {"image": FILE, "mask": OTHER, "control.0.image": FILE}
    assert picture_fields({"prompt": "x"}) == {}


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"mask": FILE}, "mask"),
        ({"strength": 0.5}, "strength"),
        ({"image": FILE, "strength": 0.1}, "strength"),
        ({"image": FILE, "strength": 0}, "strength"),
        ({"image": FILE, "strength": 1.1}, "strength"),
        ({"image": FILE, "mask_from": "transparent"}, "mask_from"),
        ({"image": "../secret"}, "image"),
        ({"image": FILE, "mask": "x"}, "mask"),
        ({"control": [{"model": "canny"}]}, "control.0.image"),
        ({"control": [{"model": "../canny", "image": FILE}]}, "control.0.model"),
        ({"control": [{"model": "canny", "image": "1"}]}, "control.0.image"),
        ({"control": [{"model": "canny", "image": FILE, "scale": 9}]}, "control.0.scale"),
        ({"control": [{"model": "canny", "image": FILE}] * 2}, "control"),
        ({"control": [{"model": f"c{n}", "image": FILE} for n in range(5)]}, "control"),
    ],
)
def test_wrong_parameters_are_refused_by_their_names(given: dict[str, Any], field: str) -> None:
    with pytest.raises(ParameterError) as caught:
        validate("text_to_image", {"prompt": "x", "steps": 4, **given})
    assert caught.value.field == field


def test_a_control_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(ParameterError, match="above start"):
        validate("text_to_image", {"prompt": "x", "control": [{"model": "c", "image": FILE, "start": 0.6, "end": 0.5}]})


def test_files_that_are_no_pictures_are_refused_by_their_fields(store: Store, tmp_path: Path) -> None:
    image = store.put(coloured(64, 64))
    text = tmp_path / "text"
    text.write_text("no picture")
    half = tmp_path / "half.png"
    half.write_bytes(store.fetch(image).read_bytes()[:-200])
    gif = store.put(coloured(64, 64), "GIF")
    moving = store.put(
        coloured(64, 64), "WEBP", save_all=True, append_images=[coloured(64, 64).rotate(90)], duration=50
    )
    large = tmp_path / "large.png"
    Image.new("1", (10_000, 6_000)).save(large)
    black = store.put(Image.new("L", (64, 64), 100))
    small = store.put(Image.new("L", (32, 64), 255))
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"image": store.keep(text)}, "image", "no picture"),
        ({"image": store.keep(half)}, "image", "no picture"),
        ({"image": gif}, "image", "no picture"),
        ({"image": moving}, "image", "animated"),
        ({"image": store.keep(large)}, "image", "shrink it"),
        ({"image": image, "mask": small}, "mask", "equal in size"),
        ({"image": image, "mask": black}, "mask", "nothing to paint"),
        ({"image": image, "mask": image, "mask_from": "transparent"}, "mask", "no transparency"),
        ({"control": [{"model": "canny", "image": store.keep(text)}]}, "control.0.image", "no picture"),
        ({"image": image, "width": 2048, "height": 2048, "count": 5}, "count", "in one job"),
    ]
    for given, field, reason in cases:
        with pytest.raises((InputRefused, ParameterError), match=reason) as caught:
            read(store, **given) if field != "count" else validate("text_to_image", {"prompt": "x", **given})
        assert caught.value.field == field, given


def test_pictures_are_made_from_pictures_masks_and_controls(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], store: Store
) -> None:
    method = TextToImage()
    method.load(model_ref("sd"), "cpu")
    image = store.put(coloured(64, 64))
    grey = Image.new("L", (64, 64), 0)
    grey.paste(255, (0, 0, 32, 64))
    size = {"width": 64, "height": 64}
    kinds: list[dict[str, Any]] = [
        {},
        {"image": image, "strength": 0.5},
        {"image": image, "mask": store.put(grey), "count": 2},
        {"control": [{"model": "canny", "image": image, "scale": 0.7}]},
    ]
    made = []
    for kind in kinds:
        result = method.run(asked(**size, **kind), new_context(files=store.files))
        made.append(np.asarray(Image.open(result.files[0].path), dtype=float))
        assert result.metadata.get("inputs", {}) == picture_fields(kind)
        assert len(result.files) == kind.get("count", 1)
    for one in range(len(made)):
        for other in range(one):
            assert np.abs(made[one] - made[other]).max() > 8, (one, other)
    with pytest.raises(InputRefused, match="no ControlNet 'pose'"):
        method.run(asked(**size, control=[{"model": "pose", "image": image}]), new_context(files=store.files))


def test_a_painted_picture_that_was_stopped_goes_on_to_the_same_one(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], store: Store
) -> None:
    method = TextToImage()
    method.load(model_ref("sd"), "cpu")
    grey = Image.new("L", (64, 64), 0)
    grey.paste(255, (0, 0, 32, 64))
    given = {"image": store.put(coloured(64, 64)), "mask": store.put(grey), "width": 64, "height": 64}
    wanted = asked(**given, scheduler="euler_a", steps=6)
    with pytest.raises(Cancelled) as caught:
        method.run(wanted, new_context(files=store.files, stop_at=3))
    again = method.run(wanted, new_context(files=store.files, checkpoint=caught.value.checkpoint))
    whole = method.run(wanted, new_context(files=store.files))
    assert np.array_equal(np.asarray(Image.open(again.files[0].path)), np.asarray(Image.open(whole.files[0].path)))


def test_a_pipeline_without_an_own_loop_takes_text_only(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], store: Store
) -> None:
    method = TextToImage()
    method.load(model_ref("pag"), "cpu")
    with pytest.raises(InputRefused, match=r"^image: "):
        method.run(asked(image=store.put(coloured(64, 64))), new_context(files=store.files))
