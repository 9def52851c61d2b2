"""The step loop of Stable Diffusion and SDXL, and what every family's loop is made of.

The loop is our own so that a stop between two steps costs nothing more: the pipeline's own interrupt still decodes, this one
raises `Cancelled` before the next step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from executors.methods.base import InputRefused, ModelMissing, NotFinite
from executors.methods.pipelines import FLOWS, LoadedPipeline

_KARRAS = {"use_karras_sigmas": True}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", **_KARRAS}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_2m_sde_karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", **_KARRAS}),
    "dpmpp_3m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}

_MOST_BENT = {"sd3": 1.16, "flux": 1.15}
"""How far a flow is bent for the largest pictures, where its scheduler does not say."""
_PROMPT_TOKENS = 512
"""Tokens that the larger of Flux's text encoders sees, where the model does not say."""

BeforeStep = Callable[[int, int], None]
"""Called with (steps done, steps in all) before every step and once after the last; raises `Cancelled` to stop."""


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Prompts as the UNet takes them, [1 or one a picture, tokens, width] each; the pooled parts are the larger families'."""

    positive: torch.Tensor
    negative: torch.Tensor | None
    pooled_positive: torch.Tensor | None = None
    pooled_negative: torch.Tensor | None = None


def offered(pipe: Any) -> tuple[str, ...]:
    """Samplers by name that a pipeline's model works with; models of straight flows (SD3) have their own only."""
    return () if type(pipe.scheduler).__name__.startswith("FlowMatch") else tuple(SCHEDULERS)


def set_times(loaded: LoadedPipeline, scheduler: Any, steps: int, width: int, height: int, where: Any) -> None:
    """Set a scheduler's steps; some flows are bent by the picture's size."""
    bent: dict[str, Any] = {}
    config = scheduler.config
    if config.get("use_dynamic_shifting", None):
        side = loaded.size_grain
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", _MOST_BENT.get(loaded.family, 1.15))
        slope = (high - low) / (many - few)
        bent = {"mu": (height // side) * (width // side) * slope + (low - slope * few)}
    if loaded.family == "flux" and not config.get("use_flow_sigmas", None):
        # Its pipelines divide the way themselves; the scheduler would end it elsewhere.
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=where, **bent)
    else:
        scheduler.set_timesteps(steps, device=where, **bent)


def build_scheduler(pipe: Any, name: str | None) -> Any:
    """A fresh scheduler instance: the model's own, or another kind over the same noise schedule."""
    if name is None:
        return type(pipe.scheduler).from_config(pipe.scheduler.config)
    import diffusers

    if name not in offered(pipe):
        own = type(pipe.scheduler).__name__
        raise InputRefused(
            "scheduler", f"{name!r} samples no flow; this model keeps its own, {own}: leave scheduler out"
        )
    class_name, changes = SCHEDULERS[name]
    return getattr(diffusers, class_name).from_config(pipe.scheduler.config, **changes)


def encode_prompt(loaded: LoadedPipeline, prompt: str, negative_prompt: str, guided: bool) -> Conditioning:
    """Run the text encoders once for a prompt."""
    return encode_each(loaded, [prompt], [negative_prompt], guided)[0]


@torch.no_grad()
def encode_each(loaded: LoadedPipeline, prompts: list[str], negatives: list[str], guided: bool) -> list[Conditioning]:
    """Run the text encoders for prompts with their negative ones; of SDXL's, either all or none may be absent (empty)."""
    pipe, family = loaded.pipe, loaded.family
    common: dict[str, Any] = {"device": loaded.device, "num_images_per_prompt": 1}
    pooled: torch.Tensor | None = None
    negative: torch.Tensor | None = None
    negative_pooled: torch.Tensor | None = None
    if family == "flux":
        positive, pooled, _places = pipe.encode_prompt(
            prompts, None, max_sequence_length=prompt_tokens(loaded), **common
        )
    elif family == "sd":
        positive, negative = pipe.encode_prompt(
            prompts, negative_prompt=negatives, do_classifier_free_guidance=guided, **common
        )
    else:
        # SDXL zeroes an absent negative prompt when the model says so; an empty string would be encoded instead.
        absent = family == "sdxl" and not any(negatives)
        further = (None, None) if family == "sd3" else ()
        positive, negative, pooled, negative_pooled = pipe.encode_prompt(
            prompts,
            *further,
            negative_prompt=None if absent else negatives,
            do_classifier_free_guidance=guided,
            **common,
        )

    def own(part: torch.Tensor | None, place: int, wanted: bool = True) -> torch.Tensor | None:
        return part[place : place + 1] if part is not None and wanted else None

    return [
        Conditioning(
            positive[place : place + 1],
            own(negative, place, guided),
            own(pooled, place),
            own(negative_pooled, place, guided),
        )
        for place in range(len(prompts))
    ]


def prompt_tokens(loaded: LoadedPipeline) -> int:
    """Tokens of a prompt that Flux's larger text encoder sees; a model's own is its ``prompt_tokens``. Raises ModelMissing."""
    own = loaded.defaults.get("prompt_tokens", _PROMPT_TOKENS)
    if not isinstance(own, int) or not 1 <= own <= _PROMPT_TOKENS:
        raise ModelMissing(
            f"model: prompt_tokens of {loaded.model.id}'s defaults.json must be 1 to {_PROMPT_TOKENS}, not {own!r}"
        )
    return own


def encode_prompts(loaded: LoadedPipeline, prompts: list[str]) -> Conditioning:
    """Run the text encoders for several prompts, one row each, letting gradients through."""
    common: dict[str, Any] = {"device": loaded.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    encoded = loaded.pipe.encode_prompt(prompts, **common)
    return Conditioning(encoded[0], None, encoded[2] if loaded.family == "sdxl" else None, None)


def stack(conditionings: Sequence[Conditioning]) -> Conditioning:
    """Several prompts as one batch, a row each."""

    def joined(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
        present = [part for part in parts if part is not None]
        return torch.cat(present) if present else None

    positive = joined([one.positive for one in conditionings])
    assert positive is not None
    return Conditioning(
        positive,
        joined([one.negative for one in conditionings]),
        joined([one.pooled_positive for one in conditionings]),
        joined([one.pooled_negative for one in conditionings]),
    )


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per picture, so that a picture depends on its seed alone, not on the batch or the device."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


@torch.no_grad()
def denoise(
    loaded: LoadedPipeline,
    conditioning: Conditioning,
    *,
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    width: int,
    height: int,
    scheduler_name: str | None,
    before_step: BeforeStep,
) -> torch.Tensor:
    """Make latents of one picture per seed, [n, channels, height / factor, width / factor]."""
    pipe, unet, count = loaded.pipe, loaded.pipe.unet, len(seeds)
    scheduler = build_scheduler(pipe, scheduler_name)
    scheduler.set_timesteps(steps, device=loaded.device)
    random = generators(seeds)
    factor = int(pipe.vae_scale_factor)
    shape = (1, unet.config.in_channels, height // factor, width // factor)
    latents = torch.cat([torch.randn(shape, generator=generator) for generator in random])
    latents = latents.to(loaded.device, loaded.dtype) * scheduler.init_noise_sigma
    guided = conditioning.negative is not None
    states = _rows(conditioning.positive, conditioning.negative, count)
    extra: dict[str, Any] = {}
    if loaded.family == "sdxl":
        extra["added_cond_kwargs"] = sdxl_conditions(loaded, conditioning, count, width, height)
    accepted = inspect.signature(scheduler.step).parameters
    step_options: dict[str, Any] = {"generator": random} if "generator" in accepted else {}
    timestep_condition = guidance_embedding(loaded, guidance, count * (2 if guided else 1))
    times = scheduler.timesteps
    for index, time in enumerate(times):
        before_step(index, len(times))
        rows = scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, time)
        guess = unet(rows, time, encoder_hidden_states=states, timestep_cond=timestep_condition, **extra).sample
        if guided:
            without, following = guess.chunk(2)
            guess = without + guidance * (following - without)
        latents = scheduler.step(guess, time, latents, **step_options).prev_sample.to(loaded.dtype)
    before_step(len(times), len(times))
    made: torch.Tensor = latents
    return made


def _rows(positive: torch.Tensor, negative: torch.Tensor | None, count: int) -> torch.Tensor:
    """Repeat a condition for every picture, the negative ones first."""
    rows = positive.expand(count, *positive.shape[1:])
    return rows if negative is None else torch.cat([negative.expand(count, *negative.shape[1:]), rows])


def sdxl_conditions(
    loaded: LoadedPipeline, conditioning: Conditioning, count: int, width: int, height: int
) -> dict[str, torch.Tensor]:
    """SDXL's further inputs: pooled text states and the picture's size, one row a picture (twice when guided)."""
    assert conditioning.pooled_positive is not None
    text = _rows(conditioning.pooled_positive, conditioning.pooled_negative, count)
    times = torch.tensor([[height, width, 0, 0, height, width]], device=loaded.device, dtype=text.dtype)
    return {"text_embeds": text, "time_ids": times.expand(len(text), -1)}


def guidance_embedding(loaded: LoadedPipeline, guidance: float, count: int) -> torch.Tensor | None:
    """Distilled models (LCM) take the guidance as an input of the UNet."""
    width = getattr(loaded.denoiser.config, "time_cond_proj_dim", None)
    if width is None:
        return None
    scales = torch.full((count,), guidance - 1.0)
    result: torch.Tensor = loaded.pipe.get_guidance_scale_embedding(scales, embedding_dim=width)
    return result.to(loaded.device, loaded.dtype)


def is_guided(loaded: LoadedPipeline, guidance: float) -> bool:
    """Whether a step needs the negative rows too; distilled networks take the guidance as an input instead."""
    return (
        loaded.family != "flux"
        and guidance > 1.0
        and getattr(loaded.denoiser.config, "time_cond_proj_dim", None) is None
    )


@torch.no_grad()
def decode(loaded: LoadedPipeline, latents: torch.Tensor, *, tiled: bool = False) -> list[Any]:
    """Decode latents into PIL pictures, once more in single precision when half overflowed; raises NotFinite.

    Pictures that were decoded in tiles differ slightly where tiles meet.
    """
    if not bool(torch.isfinite(latents).all()):
        raise NotFinite(
            "the latents hold numbers that are not finite: the model, an adapter or the device computes wrongly"
        )
    half = loaded.dtype == torch.float16
    upcast = half and loaded.family == "sdxl" and bool(getattr(loaded.pipe.vae.config, "force_upcast", False))
    pixels = _decoded(loaded, latents, upcast, tiled)
    if half and not upcast and not bool(torch.isfinite(pixels).all()):
        pixels = _decoded(loaded, latents, True, tiled)
    if not bool(torch.isfinite(pixels).all()):
        raise NotFinite(
            f"the picture holds numbers that are not finite, although its latents are: see {loaded.model.id}'s vae"
        )
    pictures: list[Any] = loaded.pipe.image_processor.postprocess(pixels, output_type="pil")
    return pictures


def _decoded(loaded: LoadedPipeline, latents: torch.Tensor, upcast: bool, tiled: bool) -> torch.Tensor:
    vae = loaded.pipe.vae
    config = vae.config
    if upcast:
        latents = latents.float()
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        spread, shift = (
            torch.tensor(v, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1) for v in (std, mean)
        )
        latents = latents * spread / config.scaling_factor + shift
    elif getattr(config, "shift_factor", None) is not None:
        latents = latents / config.scaling_factor + config.shift_factor
    else:
        latents = latents / config.scaling_factor
    with loaded.vae_precision(torch.float32 if upcast else None):
        if tiled:
            vae.enable_tiling()
        try:
            pixels: torch.Tensor = vae.decode(latents).sample
        finally:
            if tiled:
                vae.disable_tiling()
    return pixels


@torch.no_grad()
def encode_image(
    loaded: LoadedPipeline, pixels: torch.Tensor, generator: torch.Generator, painted: bool
) -> torch.Tensor:
    """Latents of one picture [1, 3, height, width] as the family's own pipeline draws them for image-to-image.

    `painted` says that it is for inpainting, where SDXL's pipeline leaves the latents' own mean and spread out.
    """
    vae = loaded.pipe.vae
    config = vae.config
    upcast = loaded.dtype == torch.float16 and loaded.family == "sdxl" and bool(getattr(config, "force_upcast", False))
    precision = torch.float32 if upcast else loaded.dtype
    with loaded.vae_precision(precision):
        encoded = vae.encode(pixels.to(loaded.device, precision))
        latents = encoded.latent_dist.sample(generator) if hasattr(encoded, "latent_dist") else encoded.latents
    latents = latents.to(loaded.dtype)
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    scaled: torch.Tensor
    if loaded.family in FLOWS:
        scaled = (latents - config.shift_factor) * config.scaling_factor
    elif loaded.family == "sdxl" and not painted and mean is not None and std is not None:
        spread, shift = (torch.tensor(v).view(1, -1, 1, 1).to(latents.device, latents.dtype) for v in (std, mean))
        scaled = (latents - shift) * config.scaling_factor / spread
    else:
        scaled = config.scaling_factor * latents
    return scaled


def draws_latents(loaded: LoadedPipeline) -> bool:
    """Whether encoding a picture takes random numbers: a KL autoencoder gives a distribution."""
    return type(loaded.pipe.vae).__name__ != "AutoencoderTiny"


@torch.no_grad()
def encode_pixels(loaded: LoadedPipeline, pixels: torch.Tensor, *, shifted: bool = True) -> torch.Tensor:
    """Scaled latents of [-1, 1] pictures [n, 3, height, width]; a KL autoencoder gives its distribution's mean."""
    vae = loaded.pipe.vae
    with loaded.vae_precision(None):  # Another thread may be decoding in another precision.
        encoded = vae.encode(pixels.to(loaded.device, vae.dtype))
    latents = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents
    shift = (getattr(vae.config, "shift_factor", None) or 0.0) if shifted else 0.0
    result: torch.Tensor = (latents - shift) * vae.config.scaling_factor
    return result
