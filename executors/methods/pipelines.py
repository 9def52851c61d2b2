"""Loads a diffusers pipeline from local directories and says which kind of loop it can be driven by."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from executors.memory import residence
from executors.memory.calls import CallMemory
from executors.memory.footprint import FootprintUnknown, read_footprint
from executors.memory.meter import Meter, meter_of
from executors.memory.plan import MemoryPlan
from executors.memory.residence import Residence
from executors.methods import adapters, device
from executors.methods.base import InputRefused, ModelMissing, ModelRef

Family = Literal["sd", "sdxl", "sd3", "flux", "other"]
FLOWS: tuple[Family, ...] = ("sd3", "flux")
"""Families whose network is a transformer that follows straight flows."""
DEFAULTS = "defaults.json"
_MAY_LACK = ("text_encoder_3", "tokenizer_3")


@dataclass(slots=True)
class LoadedPipeline:
    """A pipeline on its device, with the adapter that makes it a personalised model."""

    model: ModelRef
    pipe: Any
    family: Family
    device: torch.device
    dtype: torch.dtype
    adapter: adapters.AppliedAdapter | None = None
    foreign_adapter: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """The model's own settings from ``defaults.json``: ``guidance``, ``prior_prompts``, ``learning_rate``, ``prompt_tokens``."""
    residence: Residence = field(default_factory=Residence)
    """Where its parts lie while they are not used."""
    memory: CallMemory | None = None
    """What its calls may take and took; None for one that was put together by hand."""
    _foreign_scale: float | None = None
    _vae_alone: threading.RLock = field(default_factory=threading.RLock)

    @property
    def parts(self) -> dict[str, torch.nn.Module]:
        """The parts that trainings change and adapters belong to."""
        names = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
        return {name: part for name in names if (part := getattr(self.pipe, name, None)) is not None}

    @property
    def denoiser(self) -> Any:
        """The network that every step calls: a UNet, or the transformer of the newer families."""
        return self.pipe.transformer if self.family in FLOWS else self.pipe.unet

    @property
    def latent_channels(self) -> int:
        """Channels of the latents; an inpainting network takes more than these."""
        return int(self.pipe.vae.config.latent_channels)

    @contextmanager
    def vae_precision(self, wanted: torch.dtype | None) -> Iterator[None]:
        """Use the autoencoder alone, in another precision for a while if one is wanted: some overflow in half."""
        with self._vae_alone:
            other = wanted is not None and wanted != self.dtype
            if other:
                self.pipe.vae.to(wanted)
            try:
                yield
            finally:
                if other:
                    self.pipe.vae.to(self.dtype)

    @property
    def size_grain(self) -> int:
        """Pixels that widths and heights are multiples of."""
        return int(self.pipe.vae_scale_factor) * self.patch

    @property
    def patch(self) -> int:
        """Latent places in a row that the network takes as one: two by two are one token of a transformer."""
        if self.family == "flux":
            return 2  # Packed before the network sees them; its own patches are of one place.
        return int(self.denoiser.config.patch_size) if self.family == "sd3" else 1

    @property
    def native_size(self) -> tuple[int, int]:
        """Width and height in pixels that the model was made for."""
        size = self.denoiser.config.get("sample_size") or self.pipe.default_sample_size
        height, width = (size, size) if isinstance(size, int) else size
        factor = int(self.pipe.vae_scale_factor)
        return width * factor, height * factor

    def set_adapter_scale(self, scale: float) -> None:
        """Apply the adapter with this strength."""
        if self.adapter is not None:
            self.adapter.set_scale(scale)
        elif self.foreign_adapter and scale != self._foreign_scale:
            self.pipe.set_adapters(["subject"], [scale])
            self._foreign_scale = scale

    def release(self) -> None:
        """Drop the pipeline and its memory."""
        self.pipe = None
        self.adapter = None
        device.forget_unused(self.device)


def load(model: ModelRef, where: str, dtype: torch.dtype | None = None) -> LoadedPipeline:
    """Load a model onto a device; raises ModelMissing naming the directory."""
    target = device.resolve(where)
    precision = dtype or _precision(model.base_dir, target)
    meter = meter_of(target)
    pipe = _read_pipeline(model.base_dir, precision)
    pipe.set_progress_bar_config(disable=True)
    plan = _plan(model.base_dir, precision, meter)
    placed = residence.settle(pipe, target, plan, *residence.native_size(pipe))
    loaded = LoadedPipeline(
        model,
        pipe,
        _family(pipe),
        target,
        precision,
        defaults=_read_defaults(model.base_dir),
        residence=placed,
        memory=CallMemory(plan, meter),
    )
    for part in loaded.parts.values():
        part.requires_grad_(False).eval()
    if model.adapter_dir is not None:
        _apply_adapter(loaded, model.adapter_dir)
    return loaded


def _precision(folder: Path, target: torch.device) -> torch.dtype:
    """Half precision on a GPU; of the kind with the wider range where the family's numbers do not fit the other."""
    usual = device.generation_dtype(target)
    if usual == torch.float16 and str(_read_index(folder).get("_class_name", "")).startswith("Flux"):
        return torch.bfloat16
    return usual


def _plan(folder: Path, precision: torch.dtype, meter: Meter) -> MemoryPlan | None:
    """What the model needs beside what the device has; None where either is not known."""
    room = meter.room_bytes()
    if room is None:
        return None
    try:
        return MemoryPlan(read_footprint(folder), precision.itemsize, room, card_bytes=meter.card_bytes() or 0)
    except FootprintUnknown:
        return None


def quiet() -> None:
    """Keep the libraries' progress bars and advice out of logs; errors are told by exceptions."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for log in (diffusers_logging, transformers_logging):
        log.set_verbosity_error()
        log.disable_progress_bar()


def _read_pipeline(folder: Path, precision: torch.dtype) -> Any:
    from diffusers import DiffusionPipeline

    quiet()
    parts = _read_index(folder)
    options: dict[str, Any] = {}
    if "safety_checker" in parts and not (folder / "safety_checker").is_dir():
        options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    # Many run SD3 without its third and largest text encoder; the index then names none, or its directory is left out.
    options |= {name: None for name in _MAY_LACK if name in parts and not (folder / name).is_dir()}
    try:
        return DiffusionPipeline.from_pretrained(
            str(folder), dtype=precision, local_files_only=True, use_safetensors=True, **options
        )
    except (OSError, ValueError) as error:
        raise ModelMissing(
            f"model: {folder} cannot be loaded as a pipeline with safetensors weights: {error}"
        ) from error


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "model_index.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelMissing(
            f"model: {folder} holds no readable model_index.json ({error}); give a diffusers directory"
        ) from error


def _read_defaults(folder: Path) -> Mapping[str, Any]:
    file = folder / DEFAULTS
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def _family(pipe: Any) -> Family:
    """Which step loop fits; decided by the pipeline's class, since its parts alone do not say what they expect."""
    match type(pipe).__name__:
        case "StableDiffusionPipeline" | "StableDiffusionImg2ImgPipeline" | "StableDiffusionInpaintPipeline":
            return "sd"
        case "StableDiffusionXLPipeline" | "StableDiffusionXLImg2ImgPipeline" | "StableDiffusionXLInpaintPipeline":
            return "sdxl"
        case "StableDiffusion3Pipeline" | "StableDiffusion3Img2ImgPipeline" | "StableDiffusion3InpaintPipeline":
            return "sd3"
        case "FluxPipeline" | "FluxImg2ImgPipeline" | "FluxInpaintPipeline":
            return "flux"
        case _:
            return "other"


def _apply_adapter(loaded: LoadedPipeline, folder: Path) -> None:
    if (folder / adapters.FACTS).exists():
        loaded.adapter = adapters.apply(folder, loaded.parts)
        return
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise ModelMissing(
            f"adapter: {folder} holds {len(files)} safetensors files instead of one; keep only the LoRA file"
        )
    try:
        loaded.pipe.load_lora_weights(str(folder), weight_name=files[0].name, adapter_name="subject")
    except (AttributeError, ValueError, KeyError, OSError) as error:
        raise ModelMissing(f"adapter: {files[0].name} is no LoRA that this base model takes: {error}") from error
    loaded.foreign_adapter = True


def require_family(loaded: LoadedPipeline, allowed: tuple[Family, ...], purpose: str) -> None:
    """Refuse a model whose family a method cannot work with."""
    if loaded.family not in allowed:
        kind = type(loaded.pipe).__name__
        raise InputRefused("model", f"{loaded.model.id} is a {kind}, which {purpose} does not work with yet")
