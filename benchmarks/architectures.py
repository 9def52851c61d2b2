"""Pipelines of the published architectures with random weights: what a step costs depends on the shapes, not on what was learnt.

So a GPU machine measures Stable Diffusion 1.5 and SDXL without a download.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from executors.memory.calls import CallMemory
from executors.memory.meter import meter_of
from executors.methods import device as devices
from executors.methods import pipelines
from executors.methods.base import ModelRef
from executors.methods.pipelines import LoadedPipeline
from executors.tiny import MODEL_DIR

_TEXT_TOKENS = 77


@dataclass(frozen=True, slots=True)
class Architecture:
    """What the published configuration files say, as far as it differs from the classes' defaults."""

    family: pipelines.Family
    unet: dict[str, Any]
    text: dict[str, Any]
    vae: dict[str, Any] = field(default_factory=dict)
    text_2: dict[str, Any] | None = None


_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_CLIP_L = {
    "vocab_size": 49_408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": _TEXT_TOKENS,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
ARCHITECTURES: dict[str, Architecture] = {
    "sd15": Architecture(
        "sd",
        unet={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        text=_CLIP_L,
        vae=_VAE,
    ),
    "sdxl": Architecture(
        "sdxl",
        unet={
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        text=_CLIP_L,
        vae={**_VAE, "scaling_factor": 0.13025},
        text_2={
            **_CLIP_L,
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "hidden_act": "gelu",
            "projection_dim": 1280,
        },
    ),
    # A hundredth of the first, to see anywhere that the script runs.
    "small": Architecture(
        "sd",
        unet={
            "sample_size": 16,
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 4,
        },
        text={**_CLIP_L, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        vae={
            **_VAE,
            "block_out_channels": (32, 32),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
    ),
}


def build(name: str, device: str) -> LoadedPipeline:
    """Return a pipeline of an architecture on a device; equal calls give equal weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    pipelines.quiet()
    wanted, target = ARCHITECTURES[name], devices.resolve(device)
    dtype = devices.generation_dtype(target)
    meter = meter_of(target)
    tokenizer = _tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    generator = torch.Generator(target).manual_seed(0)

    def part(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
        return _filled(make, target, dtype, generator)

    parts: dict[str, Any] = {
        "vae": part(lambda: AutoencoderKL(**wanted.vae)),
        "text_encoder": part(lambda: CLIPTextModel(CLIPTextConfig(**wanted.text, **ends))),
        "unet": part(lambda: UNet2DConditionModel(**wanted.unet)),
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
        ),
    }
    if wanted.text_2 is not None:
        second = CLIPTextConfig(**wanted.text_2, **ends)
        parts |= {"text_encoder_2": part(lambda: CLIPTextModelWithProjection(second)), "tokenizer_2": tokenizer}
    pipe = _pipeline(wanted.family, parts)
    pipe.set_progress_bar_config(disable=True)
    loaded = LoadedPipeline(
        ModelRef(name, Path(name)), pipe, wanted.family, target, dtype, memory=CallMemory(None, meter)
    )
    for module in loaded.parts.values():
        module.requires_grad_(False).eval()
    return loaded


def _pipeline(family: pipelines.Family, parts: dict[str, Any]) -> Any:
    import diffusers

    if family == "sdxl":
        return diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def _filled(
    make: Callable[[], torch.nn.Module], device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> torch.nn.Module:
    """Make a network without numbers, then fill it where it is to be: billions of them on the host would take minutes."""
    with torch.device("meta"):
        module = make()
    module = module.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, 0.5 * weight[0].numel() ** -0.5, generator=generator)
            else:
                weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        for name, buffer in module.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1], device=device).expand_as(buffer))
    return module


def _tokenizer() -> Any:
    """The bundled model's tokenizer, made to give as many tokens as the published models take."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(MODEL_DIR / "tokenizer"), local_files_only=True)
    tokenizer.model_max_length = _TEXT_TOKENS
    return tokenizer


def matrix_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Return the floating-point operations a second of a product of two square matrices, the best of ten."""
    import time

    a, b = (torch.randn((side, side), device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        began = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * side**3 / best


def operations_per_row(loaded: LoadedPipeline, side_px: int) -> float:
    """Return the floating-point operations of one row of a step, counted while one runs."""
    from torch.utils.flop_counter import FlopCounterMode

    unet, factor = loaded.pipe.unet, int(loaded.pipe.vae_scale_factor)
    like: dict[str, Any] = {"device": loaded.device, "dtype": loaded.dtype}
    rows = torch.zeros((1, int(unet.config.in_channels), side_px // factor, side_px // factor), **like)
    states = torch.zeros((1, _TEXT_TOKENS, int(unet.config.cross_attention_dim)), **like)
    extra: dict[str, Any] = {}
    if loaded.family == "sdxl":
        width = int(loaded.pipe.text_encoder_2.config.projection_dim)
        extra["added_cond_kwargs"] = {
            "text_embeds": torch.zeros((1, width), **like),
            "time_ids": torch.zeros((1, 6), **like),
        }
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        unet(rows, torch.tensor([500.0], device=loaded.device), encoder_hidden_states=states, **extra)
    return float(counted.get_total_flops())


def parameters_of(loaded: LoadedPipeline) -> str:
    """Return how many parameters each part has, as JSON."""
    parts = {**loaded.parts, "vae": loaded.pipe.vae}
    return json.dumps({name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()})
