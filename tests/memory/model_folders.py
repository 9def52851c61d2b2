"""Makes directories in diffusers' format that hold headers only: enough for whoever plans, too little for whoever loads."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 512,
}


def write_safetensors(file: Path, **tensors: tuple[str, tuple[int, ...]]) -> None:
    """Write a file whose header names these tensors; their bytes are not there, nobody reads them."""
    header = json.dumps({n: {"dtype": d, "shape": s, "data_offsets": [0, 0]} for n, (d, s) in tensors.items()}).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(struct.pack("<Q", len(header)) + header)


def model_dir(root: Path, kind: str, network: Mapping[str, Any], numbers: tuple[int, ...] = (10, 10)) -> Path:
    """Make a pipeline's directory whose network has so many numbers."""
    step = "transformer" if "patch_size" in network else "unet"
    index = {
        "_class_name": kind,
        step: ["diffusers", "X"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "X"],
    }
    root.mkdir(parents=True, exist_ok=True)
    (root / "model_index.json").write_text(json.dumps(index))
    write_safetensors(root / step / "diffusion_pytorch_model.safetensors", w=("F16", numbers))
    write_safetensors(root / "vae" / "diffusion_pytorch_model.safetensors", w=("F32", (5,)), ids=("I64", (3,)))
    (root / step / "config.json").write_text(json.dumps(dict(network)))
    (root / "vae" / "config.json").write_text(json.dumps(VAE))
    return root
