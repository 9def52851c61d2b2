"""ControlNets beside a model: loaded when a request first names one, outside the step loop, and called for all rows that follow it.

They lie in the model's directory, each as ``controlnets/<name>/``, since one fits the networks of its own base only.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from executors.batching import packing
from executors.batching.requests import ControlPicture
from executors.methods import sampling
from executors.methods.base import InputRefused, ModelMissing
from executors.methods.pipelines import FLOWS, LoadedPipeline

FOLDER = "controlnets"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CLASSES = {
    "sd": "ControlNetModel",
    "sdxl": "ControlNetModel",
    "sd3": "SD3ControlNetModel",
    "flux": "FluxControlNetModel",
}
_MUST_AGREE = ("block_out_channels", "cross_attention_dim", "addition_embed_type")
_FLOWS_MUST_AGREE = ("joint_attention_dim", "pooled_projection_dim")


class ControlNets:
    """The ControlNets of one loaded model. `load` may be called from any thread, `residuals` from the one that steps."""

    def __init__(self, loaded: LoadedPipeline) -> None:
        self._loaded = loaded
        self._folder = loaded.model.base_dir / FOLDER
        self._nets: dict[str, Any] = {}
        self._loading = threading.Lock()

    def __contains__(self, name: str) -> bool:
        return name in self._nets

    def names(self) -> tuple[str, ...]:
        """Return the names of those that lie beside the model, loaded or not."""
        if self._loaded.family not in _CLASSES or not self._folder.is_dir():
            return ()
        return tuple(sorted(each.parent.name for each in self._folder.glob("*/config.json")))

    def load(self, name: str) -> None:
        """Load a ControlNet unless it is; raises InputRefused for an unknown name, ModelMissing for one that does not fit."""
        with self._loading:
            if name not in self._nets:
                self._nets[name] = self._read(name)

    def put(self, name: str, net: Any) -> None:
        """Take a ControlNet that is loaded already."""
        self._check(name, net)
        self._nets[name] = net

    def _read(self, name: str) -> Any:
        known = self.names()
        if not _NAME.fullmatch(name) or name not in known:
            has = ", ".join(known) or "none"
            raise InputRefused("control", f"{self._loaded.model.id} has no ControlNet {name[:64]!r}; it has: {has}")
        import diffusers

        folder: Path = self._folder / name
        wanted = _CLASSES[self._loaded.family]
        try:
            kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name", wanted)
            if kind != wanted:
                raise ModelMissing(
                    f"control: ControlNet {name} is a {kind} and no {wanted}; it belongs to another base"
                )
            net = getattr(diffusers, wanted).from_pretrained(
                str(folder), dtype=self._loaded.dtype, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise ModelMissing(f"control: {folder} cannot be loaded as a ControlNet: {error}") from error
        self._check(name, net)
        net.requires_grad_(False).eval()
        if self._loaded.family == "sd3" and net.config.get("use_pos_embed") is False:
            net.pos_embed = self._loaded.denoiser.pos_embed  # One made without takes its base's.
        return net.to(self._loaded.device)

    def _check(self, name: str, net: Any) -> None:
        base, own = self._loaded.denoiser.config, net.config
        flow = self._loaded.family in FLOWS
        differing = [
            (word, own.get(word), base.get(word))
            for word in (_FLOWS_MUST_AGREE if flow else _MUST_AGREE)
            # One that does not see the prompt has no width for it.
            if _plain(own.get(word)) != _plain(base.get(word)) and not (flow and own.get(word) is None)
        ]
        if flow and _width(own) != _width(base):
            differing.append(("width", _width(own), _width(base)))
        for word, has, wants in differing:
            raise ModelMissing(
                f"control: ControlNet {name} has {word} {has} instead of {wants}; it belongs to another base"
            )
        channels = self._loaded.latent_channels * (4 if self._loaded.family == "flux" else 1)
        if int(own.in_channels) != channels:
            raise ModelMissing(
                f"control: ControlNet {name} takes {own.in_channels} channels of latents, its base {channels}"
            )
        if own.get("extra_conditioning_channels") or own.get("num_mode"):
            what = "a mask" if own.get("extra_conditioning_channels") else "a mode"
            raise ModelMissing(
                f"control: ControlNet {name} takes {what} besides its picture, which cannot be given here"
            )

    def together(self, names: Sequence[str]) -> None:
        """Raise InputRefused for loaded ControlNets whose answers cannot be added up."""
        shapes = {name: _answers(self._nets[name]) for name in names}
        if len(set(shapes.values())) > 1:
            raise InputRefused("control", f"{', '.join(names)} answer to different layers; take one of them")

    @torch.no_grad()
    def followed(self, control: ControlPicture, rows: int, generator: torch.Generator) -> torch.Tensor:
        """Return a picture as its ControlNet takes it: colours, or latents where the family's plain pipeline encodes it.

        `rows` are those that its request has in a call. Only Flux's draws for that, from the picture's own generator.
        """
        loaded, net = self._loaded, self._nets[control.name]
        if loaded.family not in FLOWS:
            return _colours(control.picture).to(loaded.device, loaded.dtype)
        pixels = loaded.pipe.image_processor.preprocess(control.picture.convert("RGB"))
        if loaded.family == "sd3":
            # Its plain pipeline draws as it comes, from no seed: the middle of what could be drawn is the same every time.
            shifted = not net.config.force_zeros_for_pooled_projection
            # It also encodes as many as there are rows, which rounds differently from one.
            return sampling.encode_pixels(loaded, torch.cat([pixels] * rows), shifted=shifted)[:1]
        if net.input_hint_block is not None:
            return torch.as_tensor(pixels, device=loaded.device, dtype=loaded.dtype)
        return packing.pack(sampling.encode_image(loaded, pixels, generator, painted=False))

    def residuals(
        self,
        names: Sequence[str],
        rows: torch.Tensor,
        times: torch.Tensor,
        states: torch.Tensor,
        pictures: Sequence[torch.Tensor],
        scales: Sequence[Sequence[float]],
        further: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return what the network adds to its blocks: the sum of all ControlNets, each with a scale for every row.

        `further` is what else the network is given; each ControlNet takes its part of it.
        """
        answers: list[Sequence[Any]] = []
        axes = 3 if self._loaded.family in FLOWS else 4
        for name, followed, own in zip(names, pictures, scales, strict=True):
            net = self._nets[name]
            given = {"controlnet_cond": followed, "conditioning_scale": _scale(own, rows, axes), "return_dict": False}
            if self._loaded.family == "sd3":
                answers.append(_joint(net, rows, times, states, given, further))
            elif self._loaded.family == "flux":
                answers.append(_packed(net, rows, times, states, given, further))
            else:
                known = {key: further[key] for key in ("added_cond_kwargs",) if key in further}
                answers.append(net(rows, times, encoder_hidden_states=states, **given, **known))
        summed = [_sum(parts) for parts in zip(*answers, strict=True)]
        if self._loaded.family == "sd3":
            return {"block_controlnet_hidden_states": summed[0]}
        if self._loaded.family == "flux":
            return {
                "controlnet_block_samples": summed[0],
                "controlnet_single_block_samples": summed[1],
                "controlnet_blocks_repeat": self._nets[names[0]].input_hint_block is not None,
            }
        return {"down_block_additional_residuals": summed[0], "mid_block_additional_residual": summed[1]}


def _joint(
    net: Any, rows: torch.Tensor, times: torch.Tensor, states: torch.Tensor, given: Any, further: Mapping[str, Any]
) -> Sequence[Any]:
    """SD3's: some see no prompt at all, or not what the text encoders say of it as a whole."""
    pooled = further["pooled_projections"]
    answer: Sequence[Any] = net(
        hidden_states=rows,
        timestep=times,
        encoder_hidden_states=None if net.config.joint_attention_dim is None else states,
        pooled_projections=torch.zeros_like(pooled) if net.config.force_zeros_for_pooled_projection else pooled,
        **given,
    )
    return answer


def _packed(
    net: Any, rows: torch.Tensor, times: torch.Tensor, states: torch.Tensor, given: Any, further: Mapping[str, Any]
) -> Sequence[Any]:
    """Flux's: everything as its network has it, the guidance where it was made for it."""
    known = {key: further[key] for key in ("pooled_projections", "txt_ids", "img_ids")}
    guidance = further["guidance"] if net.config.guidance_embeds else None
    answer: Sequence[Any] = net(
        hidden_states=rows, timestep=times, encoder_hidden_states=states, guidance=guidance, **known, **given
    )
    return answer


def _sum(parts: Sequence[Any]) -> Any:
    """Add answers of several ControlNets: tensors, or as many of them in a row; None where none of them answers."""
    first = parts[0]
    if first is None or isinstance(first, torch.Tensor):
        total = first
        for part in parts[1:]:
            total = total + part
        return total
    return [_sum(each) for each in zip(*parts, strict=True)]


def _answers(net: Any) -> tuple[Any, ...]:
    """What tells ControlNets of one base apart in the number and places of their answers."""
    config = net.config
    layers = tuple(_plain(config.get(word)) for word in ("num_layers", "num_single_layers", "layers_per_block"))
    return (*layers, getattr(net, "input_hint_block", None) is None)


def _scale(own: Sequence[float], rows: torch.Tensor, axes: int) -> Any:
    """One number where all rows agree, as the plain pipeline has it, else one for each."""
    if len(set(own)) == 1:
        return own[0]
    return torch.tensor(list(own), device=rows.device, dtype=rows.dtype).view(-1, *[1] * (axes - 1))


def _colours(picture: Any) -> torch.Tensor:
    """A PIL picture as [1, 3, height, width] in [0, 1]."""
    pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    levels = pixels.view(1, picture.height, picture.width, 3).permute(0, 3, 1, 2).float() / 255.0
    return levels.contiguous()


def _width(config: Mapping[str, Any]) -> int:
    return int(config["num_attention_heads"]) * int(config["attention_head_dim"])


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value
