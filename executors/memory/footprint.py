"""What a model in a directory needs: its weights exactly, from the headers of its files, and its activations from its architecture.

How many numbers an architecture keeps alive stands in `predictors.activations`, which predictions rest on too. Reads headers only,
imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from predictors.activations import (
    ATTENTION_AT_FULL_SIZE,
    AUTOENCODER,
    CONVOLUTION_AT_FULL_SIZE,
    JOINT_TRANSFORMER,
    PACKED_TRANSFORMER,
    TINY_AUTOENCODER,
    TRAINING,
    Activations,
)

_HEADER_MAX_BYTES = 100 << 20
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})

_FAMILIES = {"StableDiffusionPipeline": "sd15", "StableDiffusionXLPipeline": "sdxl"}
STEPPED = frozenset({"unet", "transformer"})


class FootprintUnknown(ValueError):
    """The directory does not tell what its model needs; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class PartWeights:
    """One part of a pipeline: numbers in its files that take the computing precision, and bytes of all others."""

    numbers: int
    other_bytes: int = 0
    rest_numbers: int = 0
    """Of `numbers` those outside the largest layer; 0 where layers are not told apart."""

    def nbytes(self, item_bytes: int) -> int:
        """Return what the part takes in memory when its numbers have so many bytes each."""
        return self.numbers * item_bytes + self.other_bytes

    def layer_bytes(self, item_bytes: int) -> int:
        """Return the memory of its largest layer."""
        return (self.numbers - self.rest_numbers) * item_bytes + self.other_bytes


@dataclass(frozen=True)
class Footprint:
    """A model's needs. A latent place is `factor` x `factor` pixels; `step_elements` count for a row of the batch and a place."""

    parts: Mapping[str, PartWeights]
    step_elements: float
    decode_elements: float
    """For each pixel of a picture."""
    factor: int
    upcasts: bool = False
    """The autoencoder is computed in single precision where the rest is in half."""
    tiles: bool = True
    """The autoencoder can decode in tiles."""
    family: str = ""
    """As the predictors call it: ``sd15``, ``sdxl``; empty for others."""
    train_elements: float = 0.0
    """Of a training's step, as `step_elements`; 0 where the family is not trained."""
    frugal_elements: float = 0.0
    """The same where activations are computed twice."""
    native_px: int = 512
    """Side of the pictures that the model was made for."""

    @cached_property
    def activations(self) -> Activations:
        """What the model keeps alive, in numbers."""
        return Activations(
            step=self.step_elements,
            decode=self.decode_elements,
            factor=self.factor,
            upcasts=self.upcasts,
            train=self.train_elements,
            frugal=self.frugal_elements,
        )

    @cached_property
    def stepped(self) -> tuple[str, ...]:
        """The parts that every step needs."""
        return tuple(name for name in self.parts if name in STEPPED)

    def weights_bytes(self, item_bytes: int, parts: tuple[str, ...] | None = None) -> int:
        """Return the memory of all weights, or of some parts."""
        names = self.parts if parts is None else parts
        return sum(self.parts[name].nbytes(item_bytes) for name in names if name in self.parts)

    @property
    def layered(self) -> bool:
        """Whether layers are told apart, so that the network may come to a device layer by layer."""
        return all(self.parts[name].rest_numbers for name in self.stepped)

    def layer_bytes(self, item_bytes: int) -> int:
        """Return the memory of the largest layer of all parts but the autoencoder."""
        return max(part.layer_bytes(item_bytes) for name, part in self.parts.items() if name != "vae")

    def encoders_bytes(self, item_bytes: int) -> int:
        """Return the memory of the text encoders, which work one after the other and leave together."""
        return sum(part.nbytes(item_bytes) for name, part in self.parts.items() if name.startswith("text_encoder"))

    def step_bytes(self, width: int, height: int, rows: int, item_bytes: int) -> int:
        """Return the peak of activations in one call of the network; a guided picture has two rows."""
        return self.activations.step_bytes(width, height, rows, item_bytes)

    def train_bytes(self, width: int, height: int, rows: int, item_bytes: int, *, frugal: bool = False) -> int:
        """Return the peak of activations in a training's step; `frugal`: they are computed twice instead of kept."""
        return self.activations.train_bytes(width, height, rows, item_bytes, frugal=frugal)

    def decode_bytes(self, width: int, height: int, pictures: int, item_bytes: int, tiled: bool = False) -> int:
        """Return the peak of activations in decoding so many pictures at once, or one after the other in tiles."""
        return self.activations.decode_bytes(width, height, pictures, item_bytes, tiled)


def read_footprint(folder: Path) -> Footprint:
    """Return what the pipeline in a diffusers directory needs; raises FootprintUnknown."""
    index = _json(folder / "model_index.json")
    kind_of_pipeline = str(index.get("_class_name", ""))
    parts: dict[str, PartWeights] = {}
    for name, kind in index.items():
        if name.startswith("_") or not isinstance(kind, list) or kind[0] is None:
            continue
        files = weight_files(folder / name)
        if files:
            parts[name] = _summed([read_header(file) for file in files])
    step = next((name for name in ("unet", "transformer") if name in parts), None)
    if step is None or "vae" not in parts:
        raise FootprintUnknown(f"{folder}: no weights of a unet or transformer and a vae as safetensors; add them")
    vae = _json(folder / "vae" / "config.json")
    tiny = "num_decoder_blocks" in vae
    network = _json(folder / step / "config.json")
    factor = 2 ** (len(vae["num_decoder_blocks"] if tiny else vae["block_out_channels"]) - 1)
    places = network.get("sample_size")
    return Footprint(
        parts=parts,
        step_elements=_step_elements(network),
        train_elements=_train_elements(network)[0],
        frugal_elements=_train_elements(network)[1],
        decode_elements=_decode_elements(vae, tiny),
        factor=factor,
        upcasts=bool(vae.get("force_upcast", not tiny)) and "XL" in kind_of_pipeline,
        family=_FAMILIES.get(kind_of_pipeline, ""),
        native_px=places * factor if isinstance(places, int) and places > 0 else 512,
    )


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that a loader reads: those of the plain names, else those of the one variant there is."""
    found = sorted(folder.glob("*.safetensors"))
    plain = [file for file in found if len(file.name.split(".")) == 2]
    if plain:
        return plain
    variants = {file.name.split(".")[1] for file in found}
    return found if len(variants) <= 1 else [file for file in found if ".fp16." in file.name]


def read_header(file: Path) -> PartWeights:
    """Count what a safetensors file holds, from its header; raises FootprintUnknown."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 0 < length <= min(_HEADER_MAX_BYTES, file.stat().st_size - 8):
                raise FootprintUnknown(
                    f"{file}: its header says it has {length} bytes; the file is cut off or no safetensors"
                )
            header = json.loads(opened.read(length))
        other = 0
        layers: dict[str, int] = {}
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            count = math.prod(tensor["shape"])
            if tensor["dtype"] in _FLOATS:
                layer = name.rpartition(".")[0]
                layers[layer] = layers.get(layer, 0) + count
            else:
                other += count * _ITEM_BYTES[tensor["dtype"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, FootprintUnknown):
            raise
        raise FootprintUnknown(f"{file}: its header cannot be read ({error!r})") from None
    numbers = sum(layers.values())
    return PartWeights(numbers, other, numbers - max(layers.values(), default=0))


def _summed(found: list[PartWeights]) -> PartWeights:
    numbers = sum(each.numbers for each in found)
    largest = max(each.numbers - each.rest_numbers for each in found)
    return PartWeights(numbers, sum(each.other_bytes for each in found), numbers - largest)


def _step_elements(config: Mapping[str, Any]) -> float:
    if "block_out_channels" in config:
        attends = "CrossAttn" in str(config["down_block_types"][0])
        factor = ATTENTION_AT_FULL_SIZE if attends else CONVOLUTION_AT_FULL_SIZE
        return factor * float(config["block_out_channels"][0])
    try:
        width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    except (KeyError, TypeError):
        raise FootprintUnknown(
            f"the network {config.get('_class_name', '')!r} is of no kind that is known here"
        ) from None
    if "num_single_layers" in config:
        return PACKED_TRANSFORMER * width / 4  # Two by two latent places are one token.
    return JOINT_TRANSFORMER * width / int(config.get("patch_size", 1)) ** 2


def _train_elements(config: Mapping[str, Any]) -> tuple[float, float]:
    if "block_out_channels" not in config:
        return 0.0, 0.0
    width = float(config["block_out_channels"][0])
    kept, twice = TRAINING["CrossAttn" in str(config["down_block_types"][0])]
    return kept * width, twice * width


def _decode_elements(vae: Mapping[str, Any], tiny: bool) -> float:
    if tiny:
        return TINY_AUTOENCODER * float(vae["decoder_block_out_channels"][-1])
    return AUTOENCODER * float(vae["block_out_channels"][0])


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FootprintUnknown(f"{file}: cannot be read ({error}); give a directory in diffusers' format") from None
    if not isinstance(found, dict):
        raise FootprintUnknown(f"{file}: holds no JSON object; give a directory in diffusers' format")
    return found
