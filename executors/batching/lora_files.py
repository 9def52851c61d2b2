"""LoRA files of other tools, read as pairs of matrices by the layer they belong to: diffusers, PEFT and kohya's scripts.

Tools disagree on names, on which of two matrices is which, and on where the scale is written; none of that leaves this file. What
cannot be a sum of low-rank differences is refused with the reason, never left out in silence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from executors.batching import flux_names
from executors.methods import adapters
from executors.methods.base import ModelMissing

Pair = tuple[torch.Tensor, torch.Tensor]
_ROLES = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_mid.weight": "mid",
    "alpha": "alpha",
}
"""How the last words of a key say what its tensor is."""
_OTHER_KINDS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "oft_": "OFT",
    "diff_b": "a full difference of a bias",
    "diff": "a full difference",
    "w_norm": "a full difference of a norm",
    "lora_B.bias": "a difference of a bias",
}
_PEFT_CONFIG = "adapter_config.json"


@dataclass(slots=True)
class _Parts:
    """What a file says of one layer."""

    key: str
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


class LayerNames:
    """Under which names other tools know the layers of a model."""

    def __init__(
        self, keys: Iterable[str], unet_config: Mapping[str, Any] | None, rows: Mapping[str, int] | None = None
    ) -> None:
        """`keys` are the layers as ``<part>.<path>``; `unet_config` is a UNet's, None for another network.

        `rows` are the rows of their weights, for networks whose layers other tools join.
        """
        self._keys = frozenset(keys)
        self._rows = rows or {}
        self._published = flux_names.published(self._keys) if rows else {}
        self._published |= {f"lora_unet_{name.replace('.', '_')}": own for name, own in self._published.items()}
        self._kohya: dict[str, str] = {}
        two = any(key.startswith("text_encoder_2.") for key in self._keys)
        blocks = _original_blocks(unet_config) if unet_config is not None else {}
        for key in self._keys:
            part, _, path = key.partition(".")
            for name in _kohya_names(part, path, two, blocks):
                self._kohya[name] = key
        self._denoiser = "transformer" if any(key.startswith("transformer.") for key in self._keys) else "unet"

    def find(self, name: str) -> str | None:
        """Return the layer that a file's name means, None when the model has none of it."""
        if name in self._kohya:
            return self._kohya[name]
        plain = name.removeprefix("base_model.model.").replace(".processor.", ".")
        for old, new in ((".to_q_lora", ".to_q"), (".to_k_lora", ".to_k"), (".to_v_lora", ".to_v")):
            plain = plain.removesuffix(old) + new if plain.endswith(old) else plain
        plain = plain.removesuffix(".to_out_lora") + ".to_out.0" if plain.endswith(".to_out_lora") else plain
        part, _, path = plain.partition(".")
        for candidate in (adapters.weight_key(part, path), f"{self._denoiser}.{plain}"):
            if candidate in self._keys:
                return candidate
        return None

    def joined(self, name: str) -> tuple[str, ...]:
        """Return the layers that a file's name means where it does not mean one as it is named here."""
        return self._published.get(name.removeprefix("diffusion_model."), ())

    def apart(self, name: str, layers: tuple[str, ...], up: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return each layer's rows of what a file says of them together; raises ModelMissing."""
        if len(layers) == 1:
            return (up,)
        sizes = [self._rows[layer] for layer in layers]
        if len(up) != sum(sizes):
            raise ModelMissing(
                f"adapter {name}: {len(up)} rows for {', '.join(layers)} instead of {sum(sizes)}; it belongs to another base"
            )
        return torch.split(up, sizes)


def _kohya_names(part: str, path: str, two_encoders: bool, blocks: Mapping[str, str]) -> list[str]:
    """Names with underscores for dots; a UNet's blocks may also be numbered as in the model's first publication."""
    if part in ("unet", "transformer"):
        original = _original(path, blocks)
        return [f"lora_unet_{each.replace('.', '_')}" for each in (path, original) if each is not None]
    number = {"text_encoder": "1" if two_encoders else "", "text_encoder_2": "2", "text_encoder_3": "3"}.get(part)
    if number is None:
        return []
    return [f"lora_te{number}_{each}{path.replace('.', '_')}" for each in ("text_model_", "")]


def _original_blocks(config: Mapping[str, Any]) -> dict[str, str]:
    """The blocks of a UNet by their path here, as the first publication numbers them."""
    found = {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}
    down, up, layers = config["down_block_types"], config["up_block_types"], config["layers_per_block"]
    if not isinstance(layers, int):
        return {}
    number = 1
    for block, kind in enumerate(down):
        for layer in range(layers):
            found[f"down_blocks.{block}.resnets.{layer}"] = f"input_blocks.{number}.0"
            if "CrossAttn" in kind:
                found[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        if block < len(down) - 1:
            found[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    found |= {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    number = 0
    for block, kind in enumerate(up):
        crossed = "CrossAttn" in kind
        for layer in range(layers + 1):
            found[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{number}.0"
            if crossed:
                found[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        if block < len(up) - 1:
            found[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{2 if crossed else 1}.conv"
    return found


_IN_RESNETS = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def _original(path: str, blocks: Mapping[str, str]) -> str | None:
    if path in blocks:
        return blocks[path]
    words = path.split(".")
    for length in range(len(words) - 1, 0, -1):
        block = blocks.get(".".join(words[:length]))
        if block is not None:
            rest = ".".join(words[length:])
            inner = _IN_RESNETS.get(rest) if "resnets" in words[:length] else rest
            return None if inner is None else f"{block}.{inner}"
    return None


def read(source: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, Any]]:
    """Read a LoRA file, or the only one of a directory; returns its tensors and what is noted of their scale.

    Nothing but safetensors is opened. Raises ModelMissing.
    """
    file, noted = source, dict[str, Any]()
    if source.is_dir():
        files = sorted(source.glob("*.safetensors"))
        if len(files) != 1:
            raise ModelMissing(
                f"adapter: {source} holds {len(files)} safetensors files instead of one; keep only the LoRA file"
            )
        file = files[0]
        _check_facts(source)
        noted = _json(source / _PEFT_CONFIG) if (source / _PEFT_CONFIG).exists() else {}
    try:
        with safe_open(str(file), framework="pt", device="cpu") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (it is no mapping)
    except (OSError, SafetensorError) as error:
        raise ModelMissing(f"adapter: {file} cannot be read ({error}); train or upload it again") from error
    try:
        noted |= dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))
    except (ValueError, TypeError) as error:
        raise ModelMissing(f"adapter: {file} has metadata that cannot be read ({error})") from error
    return tensors, noted


def _check_facts(folder: Path) -> None:
    facts = folder / adapters.FACTS
    if facts.exists() and _json(facts).get("format") != adapters.FORMAT:
        raise ModelMissing(f"adapter: {facts} has a format that is unknown, this version reads {adapters.FORMAT}")


def _json(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelMissing(f"adapter: {path} cannot be read ({error}); train or upload it again") from error
    return known if isinstance(known, dict) else {}


def pairs(
    name: str, tensors: Mapping[str, torch.Tensor], noted: Mapping[str, Any], names: LayerNames
) -> dict[str, Pair]:
    """Return an adapter's down and up matrices by layer, their scale multiplied in; raises ModelMissing with the reason."""
    if not tensors:
        raise ModelMissing(f"adapter {name}: it holds no weights; train or upload it again")
    found: dict[tuple[str, ...], _Parts] = {}
    for key, tensor in tensors.items():
        written, role = _split(name, key)
        layer = names.find(written)
        layers = names.joined(written) if layer is None else (layer,)
        if not layers:
            raise ModelMissing(
                f"adapter {name}: its layer {written} is not in the base model; it belongs to another base"
            )
        parts = found.setdefault(layers, _Parts(key))
        if role in parts.tensors:
            raise ModelMissing(
                f"adapter {name}: {key} and {parts.key} are of the same layer; one tool's names at a time"
            )
        parts.tensors[role] = tensor
    made: dict[str, Pair] = {}
    for layers, parts in found.items():
        down, up = _pair(name, layers[0], parts, noted)
        for layer, own in zip(layers, names.apart(name, layers, up), strict=True):
            if layer in made:
                raise ModelMissing(f"adapter {name}: {layer} is there by itself and joined; one tool's names at a time")
            made[layer] = (down, own)
    return made


def _split(name: str, key: str) -> tuple[str, str]:
    """Tell the layer's name and the tensor's role in a key."""
    for ending, role in _ROLES.items():
        if key.endswith(f".{ending}"):
            return key.removesuffix(f".{ending}"), role
    # The oldest files of diffusers write the layer and the role as one word: to_q_lora.down.weight.
    for ending, role in (("_lora.down.weight", "down"), ("_lora.up.weight", "up")):
        if key.endswith(ending):
            return key.removesuffix(ending.removeprefix("_lora")), role
    last = key.partition(".")[2] if key.startswith("lora_") else key
    for sign, kind in _OTHER_KINDS.items():
        if f".{sign}" in f".{last}":
            raise ModelMissing(
                f"adapter {name}: {key} is {kind}, which cannot share a batch; it needs a Pod of its own"
            )
    raise ModelMissing(
        f"adapter {name}: {key} is no low-rank difference; a model trained in full, or a file of an unknown tool, cannot "
        "share a batch and needs a Pod of its own"
    )


def _pair(name: str, layer: str, parts: _Parts, noted: Mapping[str, Any]) -> Pair:
    down, up = parts.tensors.get("down"), parts.tensors.get("up")
    if down is None or up is None:
        lacks = "lora_A (down)" if down is None else "lora_B (up)"
        raise ModelMissing(f"adapter {name}: {parts.key} is there without its {lacks}; train or upload it again")
    if down.ndim not in (2, 4) or up.ndim not in (2, 4) or not down.numel() or not up.numel():
        raise ModelMissing(
            f"adapter {name}: {parts.key} is {tuple(up.shape)} x {tuple(down.shape)}, which is no product"
        )
    middle = parts.tensors.get("mid")
    rank = len(down)
    if middle is not None:
        if middle.ndim != 4 or tuple(middle.shape[:2]) != (up.shape[1], rank) or down[0, 0].numel() != 1:
            raise ModelMissing(
                f"adapter {name}: {parts.key} has a middle of {tuple(middle.shape)}, which is no product"
            )
        down = torch.einsum("pqhw,qi->pihw", middle.float(), down.flatten(1).float())
    scale = _scale(name, layer, parts, rank, noted)
    return down, (up.float() * scale if scale != 1.0 else up)


def _scale(name: str, layer: str, parts: _Parts, rank: int, noted: Mapping[str, Any]) -> float:
    """Alpha over rank, where a file says alpha: beside the weights, in its metadata, or in PEFT's configuration."""
    own = parts.tensors.get("alpha")
    if own is not None:
        if own.numel() != 1:
            raise ModelMissing(f"adapter {name}: the alpha of {layer} is {tuple(own.shape)} instead of one number")
        scale = float(own) / rank
    else:
        scale = _noted_scale(name, layer.partition(".")[0], rank, noted)
    if not math.isfinite(scale):
        raise ModelMissing(f"adapter {name}: the alpha of {layer} is not finite; train it again")
    return scale


def _noted_scale(name: str, part: str, rank: int, noted: Mapping[str, Any]) -> float:
    own = {key.removeprefix(f"{part}."): value for key, value in noted.items() if key.startswith(f"{part}.")} or noted
    alpha = own.get("lora_alpha")
    if alpha is None:
        return 1.0
    if own.get("use_dora"):
        raise ModelMissing(f"adapter {name}: it is DoRA, which cannot share a batch; it needs a Pod of its own")
    if own.get("alpha_pattern") or own.get("rank_pattern"):
        raise ModelMissing(f"adapter {name}: its scale differs by pattern; fold it into the weights first")
    try:
        return float(alpha) / (math.sqrt(rank) if own.get("use_rslora") else rank)
    except (TypeError, ValueError):
        raise ModelMissing(f"adapter {name}: its noted lora_alpha {alpha!r} is no number") from None
