"""Pictures that a generation begins with or follows, read from the file store and brought to the shape of what is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from executors.batching.requests import ControlPicture
from executors.methods import buckets
from executors.methods.base import InputRefused
from executors.methods.parameters import (
    MAX_INPUT_PIXELS,
    MAX_PIXELS_PER_JOB,
    MAX_SIDE_PX,
    TextToImageParameters,
    strength_of,
)

FORMATS = ("PNG", "JPEG", "WEBP")
_SMALLEST_PX = 64


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a job begins with; pictures are PIL, all of `width` x `height`."""

    width: int
    height: int
    image: Any = None
    strength: float = 1.0
    mask: Any = None
    controls: tuple[ControlPicture, ...] = ()


def read(
    asked: TextToImageParameters, fetch: Callable[[str], Path], native_size: tuple[int, int], grain: int
) -> Inputs:
    """Read a job's pictures; raises InputRefused naming the field, and whatever `fetch` raises for a file that is not there."""
    image = _opened(fetch(asked.image), "image") if asked.image else None
    mask = _opened(fetch(asked.mask), "mask") if asked.mask else None
    followed = [(use, _opened(fetch(use.image), f"control.{index}.image")) for index, use in enumerate(asked.control)]
    if image is not None and mask is not None and mask.size != image.size:
        raise InputRefused(
            "mask", f"is {mask.width}x{mask.height}, image is {image.width}x{image.height}; they must be equal in size"
        )
    first = image or (followed[0][1] if followed else None)
    width, height = shape(asked, first.size if first is not None else None, native_size, grain)
    if width * height * asked.count > MAX_PIXELS_PER_JOB:
        raise InputRefused(
            "count", f"{asked.count} pictures of {width}x{height} are more than {MAX_PIXELS_PER_JOB} pixels in one job"
        )
    size = (width, height)
    controls = [
        ControlPicture(use.model, _fitted(picture, size).convert("RGB"), use.scale, use.start, use.end)
        for use, picture in followed
    ]
    return Inputs(
        width,
        height,
        None if image is None else _fitted(image.convert("RGB"), size),
        strength_of(asked.image, asked.mask, asked.strength),
        None if mask is None else _fitted(_painted(mask, asked.mask_from), size),
        tuple(sorted(controls, key=lambda control: control.name)),
    )


def shape(
    asked: TextToImageParameters, given: tuple[int, int] | None, native_size: tuple[int, int], grain: int
) -> tuple[int, int]:
    """Return width and height of what is made: as asked, else after the picture that was given, else the model's own.

    A given picture's shape is taken in about the model's native number of pixels, whatever its own.
    """
    width, height = asked.width, asked.height
    if given is None:
        width, height = width or native_size[0], height or native_size[1]
    elif width is None and height is None:
        width, height = buckets.nearest(*given, isqrt(native_size[0] * native_size[1]))
    elif height is None:
        assert width is not None
        height = _multiple(width * given[1] / given[0], grain)
    elif width is None:
        width = _multiple(height * given[0] / given[1], grain)
    for name, value in (("width", width), ("height", height)):
        if value % grain:
            raise InputRefused(name, f"must be a multiple of {grain} for this model, not {value}")
    return width, height


def _multiple(wanted: float, grain: int) -> int:
    return min(max(round(wanted / grain), -(-_SMALLEST_PX // grain)), MAX_SIDE_PX // grain) * grain


def _opened(path: Path, field_name: str) -> Image.Image:
    """Decode a picture wholly, turned as its camera meant it, its transparency kept."""
    try:
        with Image.open(path, formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_INPUT_PIXELS:
                raise InputRefused(
                    field_name, f"is {opened.width}x{opened.height}, more than {MAX_INPUT_PIXELS} pixels; shrink it"
                )
            if getattr(opened, "n_frames", 1) != 1:
                raise InputRefused(field_name, "is animated; send a single frame")
            turned = ImageOps.exif_transpose(opened)
            return turned.convert("RGBA" if turned.has_transparency_data else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputRefused(field_name, f"is no picture that can be read ({error}); send PNG, JPEG or WebP") from error


def _painted(mask: Image.Image, mask_from: str) -> Image.Image:
    """Return a mask as grey levels, white where the picture is painted anew."""
    if mask_from == "transparent":
        if mask.mode != "RGBA":
            raise InputRefused(
                "mask", "has no transparency; make what is painted anew transparent, or send a white mask"
            )
        painted = ImageOps.invert(mask.getchannel("A"))
    elif mask.mode == "RGBA":
        black = Image.new("RGBA", mask.size, (0, 0, 0, 255))
        painted = Image.alpha_composite(black, mask).convert("L")
    else:
        painted = mask.convert("L")
    if not any(painted.histogram()[128:]):
        wanted = "transparent" if mask_from == "transparent" else "white"
        raise InputRefused("mask", f"leaves nothing to paint anew; make that part {wanted}")
    return painted


def _fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale a picture to a shape, cutting off what sticks out, so that nothing is distorted."""
    return picture if picture.size == size else ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
