"""What a training leaves behind, and how generation applies it: low-rank (LoRA) or full differences to a base model.

An adapter is two files: ``adapter.safetensors`` and ``adapter.json``. LoRA keys are those that diffusers reads
(``unet.<module>.lora_A.weight`` and ``lora_B.weight``, scale 1), so the file also works outside this platform.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from executors.methods.base import ModelMissing

WEIGHTS, FACTS = "adapter.safetensors", "adapter.json"
FORMAT = 1


class LowRankLinear(torch.nn.Module):
    """A frozen linear layer plus a trained difference of low rank."""

    def __init__(self, base: torch.nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        rank = min(rank, base.in_features, base.out_features)
        # A starts like a fresh linear layer and B at zero, so that training starts from the base model exactly.
        bound = base.in_features**-0.5
        start = (torch.rand((rank, base.in_features), generator=generator) * 2.0 - 1.0) * bound
        self.lora_a = torch.nn.Parameter(start.to(base.weight.device))
        self.lora_b = torch.nn.Parameter(torch.zeros((base.out_features, rank), device=base.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base(x)
        return result + (x @ self.lora_a.T.to(x.dtype)) @ self.lora_b.T.to(x.dtype)


def attach(parts: Mapping[str, torch.nn.Module], rank: int, seed: int) -> dict[str, torch.nn.Parameter]:
    """Freeze the parts and put low-rank differences beside all their linear layers; returns the trainable tensors by key."""
    generator = torch.Generator().manual_seed(seed)
    trainable: dict[str, torch.nn.Parameter] = {}
    for part, module in parts.items():
        module.requires_grad_(False)
        for name, linear in list(_linears(module)):
            wrapped = LowRankLinear(linear, rank, generator)
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, wrapped)
            trainable[f"{weight_key(part, name)}.lora_A.weight"] = wrapped.lora_a
            trainable[f"{weight_key(part, name)}.lora_B.weight"] = wrapped.lora_b
    return trainable


def detach(parts: Mapping[str, torch.nn.Module]) -> None:
    """Take the differences off again; the base weights were never touched."""
    for module in parts.values():
        for name, child in list(module.named_modules()):
            if isinstance(child, LowRankLinear):
                owner, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(owner), leaf, child.base)


def weight_key(part: str, name: str) -> str:
    """An adapter's name for a weight; some versions of transformers nest CLIP's text model one level deeper."""
    return f"{part}.{name.removeprefix('text_model.')}"


def _linears(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Linear]]:
    for name, child in module.named_modules():
        if isinstance(child, torch.nn.Linear):
            yield name, child


def write(folder: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write an adapter's two files into a directory."""
    weights, about = folder / WEIGHTS, folder / FACTS
    save_file({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}, str(weights))
    about.write_text(json.dumps({"format": FORMAT, **facts}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return weights, about


@dataclass(slots=True)
class AppliedAdapter:
    """An adapter on loaded parts. The base weights are kept, so any scale gives the same weights as a fresh load would."""

    facts: Mapping[str, Any]
    _originals: dict[str, torch.Tensor] = field(default_factory=dict)
    _differences: dict[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _targets: dict[str, torch.Tensor] = field(default_factory=dict)
    _scale: float | None = None

    @torch.no_grad()
    def set_scale(self, scale: float) -> None:
        """Make every touched weight base + scale x difference."""
        if scale == self._scale:
            return
        for key, target in self._targets.items():
            original, difference = self._originals[key], self._differences[key]
            if isinstance(difference, tuple):
                down, up = (part.to(target.device, torch.float32) for part in difference)
                changed = (up @ down).reshape(original.shape)
            else:
                changed = difference.to(target.device, torch.float32)
            target.copy_(original.to(target.device, torch.float32) + scale * changed)
        self._scale = scale


def apply(folder: Path, parts: Mapping[str, torch.nn.Module], scale: float = 1.0) -> AppliedAdapter:
    """Read an adapter written by `write` and apply it to loaded parts (``unet``, ``text_encoder``); raises ModelMissing."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        tensors = load_file(str(folder / WEIGHTS))
    except (OSError, ValueError) as error:
        raise ModelMissing(f"adapter: {folder} cannot be read ({error}); train or upload it again") from error
    if facts.get("format") != FORMAT:
        raise ModelMissing(f"adapter: format {facts.get('format')!r} is unknown, this version reads {FORMAT}")
    applied = AppliedAdapter(facts=facts)
    # The parameters themselves: a part that lies aside takes them from one memory to another.
    weights = {
        weight_key(part, name): value
        for part, module in parts.items()
        for name, value in module.state_dict(keep_vars=True).items()
    }
    for key in sorted(tensors):
        if key.endswith(".lora_B.weight"):
            continue
        lora = key.endswith(".lora_A.weight")
        target_key = key.removesuffix(".lora_A.weight") + ".weight" if lora else key
        target = weights.get(target_key)
        if target is None:
            raise ModelMissing(f"adapter: its weight {target_key} is not in the base model; it belongs to another base")
        applied._targets[key] = target
        applied._originals[key] = target.detach().clone()
        if lora:
            up = tensors[key.replace(".lora_A.", ".lora_B.")]
            fits = up.shape[0] * tensors[key].shape[1] == target.numel()
            applied._differences[key] = (tensors[key], up)
        else:
            fits = tensors[key].shape == target.shape
            if fits:
                applied._differences[key] = tensors[key].to(target.device, torch.float32) - target.detach().float()
        if not fits:
            raise ModelMissing(f"adapter: its weight {target_key} has another shape than the base model's; wrong base")
    applied.set_scale(scale)
    return applied
