"""Pictures as files: PNG with the parameters that made it, and users' own pictures as tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from executors.methods.base import InputRefused
from executors.methods.parameters import MAX_INPUT_PIXELS


def save_png(picture: Image.Image, path: Path, facts: Mapping[str, Any]) -> None:
    """Write a PNG whose text says how it was made: ``parameters`` for people and other tools, ``aigc`` as JSON."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", _readable(facts))
    info.add_itxt("aigc", json.dumps(facts, sort_keys=True, ensure_ascii=False))
    picture.save(path, format="PNG", pnginfo=info)


def _readable(facts: Mapping[str, Any]) -> str:
    lines = [str(facts["prompt"])]
    if facts.get("negative_prompt"):
        lines.append(f"Negative prompt: {facts['negative_prompt']}")
    lines.append(
        f"Steps: {facts['steps']}, Sampler: {facts['scheduler']}, CFG scale: {facts['guidance']}, Seed: {facts['seed']}, "
        f"Size: {facts['width']}x{facts['height']}, Model: {facts['model']}"
    )
    return "\n".join(lines)


def read(path: Path, field_name: str) -> Image.Image:
    """Read a picture, turned as its camera meant it, as RGB.

    Raises InputRefused when the file is no picture or larger than fifty million pixels.
    """
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > MAX_INPUT_PIXELS:
                raise InputRefused(
                    field_name, f"is {opened.width}x{opened.height}, more than {MAX_INPUT_PIXELS} pixels; shrink it"
                )
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputRefused(field_name, f"is no picture that can be read ({error}); send PNG, JPEG or WebP") from error


def fitted(picture: Image.Image, width: int, height: int) -> torch.Tensor:
    """Cut the middle of a picture to a shape and scale it: float32 [3, height, width] in [-1, 1]."""
    cut = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(cut, dtype=np.float32).copy())
    return pixels.permute(2, 0, 1) / 127.5 - 1.0


def read_square(path: Path, side_px: int, field_name: str) -> torch.Tensor:
    """Read a picture as a square: float32 [3, side, side] in [-1, 1]; raises InputRefused."""
    return fitted(read(path, field_name), side_px, side_px)
