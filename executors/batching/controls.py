"""ControlNets beside a model: loaded when a request first names one, outside the step loop, and called for all rows that follow it.

They lie in the model's directory, each as ``controlnets/<name>/``, since one fits the networks of its own base only.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from executors.methods.base import InputRefused, ModelMissing
from executors.methods.pipelines import LoadedPipeline

FOLDER = "controlnets"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MUST_AGREE = ("block_out_channels", "cross_attention_dim", "addition_embed_type")


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
        if self._loaded.family not in ("sd", "sdxl") or not self._folder.is_dir():
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
        from diffusers import ControlNetModel

        folder: Path = self._folder / name
        try:
            net = ControlNetModel.from_pretrained(
                str(folder), dtype=self._loaded.dtype, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise ModelMissing(f"control: {folder} cannot be loaded as a ControlNet: {error}") from error
        self._check(name, net)
        net.requires_grad_(False).eval()
        return net.to(self._loaded.device)

    def _check(self, name: str, net: Any) -> None:
        unet = self._loaded.denoiser.config
        for word in _MUST_AGREE:
            if _plain(net.config.get(word)) != _plain(unet.get(word)):
                raise ModelMissing(
                    f"control: ControlNet {name} has {word} {net.config.get(word)} instead of {unet.get(word)}; it "
                    "belongs to another base"
                )
        if int(net.config.in_channels) != self._loaded.latent_channels:
            raise ModelMissing(f"control: ControlNet {name} takes {net.config.in_channels} channels of latents")

    def residuals(
        self,
        names: Sequence[str],
        rows: torch.Tensor,
        times: torch.Tensor,
        states: torch.Tensor,
        pictures: Sequence[torch.Tensor],
        scales: Sequence[Sequence[float]],
        **extra: Any,
    ) -> dict[str, Any]:
        """Return what the UNet adds to its blocks: the sum of all ControlNets, each with a scale for every row."""
        down: list[torch.Tensor] | None = None
        middle: torch.Tensor | None = None
        for name, followed, own in zip(names, pictures, scales, strict=True):
            blocks, last = self._nets[name](
                rows,
                times,
                encoder_hidden_states=states,
                controlnet_cond=followed,
                conditioning_scale=_scale(own, rows),
                return_dict=False,
                **extra,
            )
            down = list(blocks) if down is None else [a + b for a, b in zip(down, blocks, strict=True)]
            middle = last if middle is None else middle + last
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


def _scale(own: Sequence[float], rows: torch.Tensor) -> Any:
    """One number where all rows agree, as the plain pipeline has it, else one for each."""
    if len(set(own)) == 1:
        return own[0]
    return torch.tensor(list(own), device=rows.device, dtype=rows.dtype).view(-1, 1, 1, 1)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value
