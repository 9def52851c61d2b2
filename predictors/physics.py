"""What diffusion must cost, worked out before anything was measured: operations, memory, load times, and what GPUs sustain.

A new model, size or GPU model has no history. Counted arithmetic stands in for it, and learned ratios correct it from the first run
on. Operations are counted, not fitted: a polynomial of the latent pixels per UNet forward. What a GPU sustains comes from
published timings.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache

from predictors import step_times
from predictors.activations import (
    ATTENTION_AT_FULL_SIZE,
    AUTOENCODER,
    CONVOLUTION_AT_FULL_SIZE,
    HALF_BYTES,
    TRAINED_BYTES,
    TRAINING,
    Activations,
)

GIB = 2**30
MIB = 2**20
TERA = 1e12


@dataclass(frozen=True, slots=True)
class Family:
    """A family of diffusion models; a UNet forward of n latent pixels costs ``quadratic n^2 + linear n + constant`` operations."""

    name: str
    quadratic: float
    linear: float
    constant: float
    decode_per_pixel: float
    """Operations of the image decoder per picture pixel."""
    weights_bytes: int
    """Half-precision weights that a Pod holds; for SD 1.5 with its safety checker."""
    unet_parameters: int
    activations: Activations
    """What its networks keep alive while they compute."""
    adapter_per_rank: float
    """Bytes of a half-precision adapter on the attention layers, per rank."""
    native_px: int
    """Edge of the square picture the family was trained for, in pixels."""
    text_parameters: int
    """Of its text encoders, which trainings change too."""

    @property
    def activation_per_pixel(self) -> float:
        """Peak bytes of activations per pixel of a guided picture in half precision."""
        side = self.native_px
        return self.activations.picture_bytes(side, side) / side**2

    def forward_flops(self, width: float, height: float) -> float:
        """Return the operations of one UNet forward for one row of a picture of that size in pixels."""
        latent = (width / 8.0) * (height / 8.0)
        return (self.quadratic * latent + self.linear) * latent + self.constant


SD15 = Family(
    "sd15",
    quadratic=7.30e3,
    linear=1.655e8,
    constant=3.0e9,
    decode_per_pixel=2.5e12 / 512**2,
    weights_bytes=int(2.55 * GIB),
    unet_parameters=859_520_964,
    activations=Activations(
        step=ATTENTION_AT_FULL_SIZE * 320,
        decode=AUTOENCODER * 128,
        train=TRAINING[True][0] * 320,
        frugal=TRAINING[True][1] * 320,
    ),
    adapter_per_rank=7 * MIB / 16,
    native_px=512,
    text_parameters=123_060_480,
)
SDXL = Family(
    "sdxl",
    quadratic=2.80e3,
    linear=3.636e8,
    constant=5.25e10,
    decode_per_pixel=10.5e12 / 1024**2,
    weights_bytes=int(6.46 * GIB),
    unet_parameters=2_567_463_684,
    activations=Activations(
        step=CONVOLUTION_AT_FULL_SIZE * 320,
        decode=AUTOENCODER * 128,
        upcasts=True,
        train=TRAINING[False][0] * 320,
        frugal=TRAINING[False][1] * 320,
    ),
    adapter_per_rank=49 * MIB / 16,
    native_px=1024,
    text_parameters=817_720_320,
)
FAMILIES = {family.name: family for family in (SD15, SDXL)}
_ALIASES = {
    "sd": "sd15",
    "sd1": "sd15",
    "sd14": "sd15",
    "sd-1.5": "sd15",
    "sd1.5": "sd15",
    "sd-xl": "sdxl",
    "xl": "sdxl",
}


@dataclass(frozen=True, slots=True)
class GpuPeak:
    """What a GPU product can do. Sources: data sheets (memory, dense half-precision peak), published timings (the rest)."""

    name: str
    memory_bytes: int
    peak_flops: float
    mfu: float
    """Share of the peak that a diffusion UNet sustains."""
    overhead_s: float
    """Time of one step that no arithmetic explains: launches, the sampler, Python."""

    @property
    def sustained_flops(self) -> float:
        """Operations per second that a UNet gets."""
        return self.peak_flops * self.mfu


GPUS = {
    gpu.name: gpu
    for gpu in (
        GpuPeak("h200", 141 * GIB, 989 * TERA, 0.30, 0.015),
        GpuPeak("h100", 80 * GIB, 989 * TERA, 0.30, 0.015),
        GpuPeak("a100", 80 * GIB, 312 * TERA, 0.45, 0.018),
        GpuPeak("l40s", 48 * GIB, 362 * TERA, 0.35, 0.016),
        GpuPeak("l40", 48 * GIB, 181 * TERA, 0.45, 0.016),
        GpuPeak("a40", 48 * GIB, 150 * TERA, 0.42, 0.018),
        GpuPeak("a6000", 48 * GIB, 155 * TERA, 0.42, 0.018),
        GpuPeak("4090", 24 * GIB, 165 * TERA, 0.55, 0.012),
        GpuPeak("3090", 24 * GIB, 71 * TERA, 0.55, 0.015),
        GpuPeak("a10", 24 * GIB, 125 * TERA, 0.40, 0.018),
        GpuPeak("l4", 24 * GIB, 121 * TERA, 0.30, 0.018),
        GpuPeak("v100", 16 * GIB, 125 * TERA, 0.35, 0.0164),
        GpuPeak("t4", 16 * GIB, 65 * TERA, 0.30, 0.020),
        GpuPeak("p100", 16 * GIB, 18.7 * TERA, 0.50, 0.020),
        GpuPeak("cpu", 4 * GIB, 0.1 * TERA, 0.50, 0.001),
    )
}
TYPICAL_GPU = GPUS["a100"]
"""Stands in for a GPU model that is not in the table."""

BANDWIDTHS = {"gpu": float("inf"), "memory": 10e9, "disk": 2e9, "remote": 0.27e9}
"""Bytes per second out of each place where a model's bytes may lie."""
LOAD_OVERHEAD_S = 1.5
"""Process, imports and GPU context before the first byte is read."""


def family_of(name: str, weights_bytes: int = 0) -> Family | None:
    """Return the family of that name, else the one whose weights are nearest in size; None when neither is known."""
    key = name.lower()
    found = FAMILIES.get(_ALIASES.get(key, key))
    if found is not None or weights_bytes <= 0:
        return found
    return SDXL if weights_bytes > (SD15.weights_bytes * SDXL.weights_bytes) ** 0.5 else SD15


@lru_cache(maxsize=256)
def gpu_of(name: str) -> GpuPeak | None:
    """Return what is known of a GPU model by the name that drivers or operators give it (``NVIDIA A100-SXM4-80GB``)."""
    for token in re.split(r"[^a-z0-9]+", name.lower()):
        if token in GPUS:
            return GPUS[token]
    return None


def run_seconds(
    family: Family,
    *,
    width: float = 0.0,
    height: float = 0.0,
    steps: float = 0.0,
    images: float = 1.0,
    guided: bool = True,
    training: bool = False,
    gpu: GpuPeak = TYPICAL_GPU,
) -> float:
    """Return the run time of a generation, or of a training, once its model is loaded; a size of 0 is the family's own.

    Guidance goes through the UNet twice a step. A training goes forward and back (three forwards) with a subject row and a prior
    row. Where batches of the family were measured on the GPU model (`step_times`), a step grows with its rows as it did there; at
    every size alike, so that more pixels never seem quicker.
    """
    width = width or family.native_px
    height = height or width
    forward_s = family.forward_flops(width, height) / gpu.sustained_flops
    if training:
        return (steps or 400.0) * (2.0 * gpu.overhead_s + 2.0 * 3.0 * forward_s)
    rows = max(1.0, images)
    passes = 2.0 if guided else 1.0
    growth = _batch_growth(gpu.name, family.name)
    step_s = gpu.overhead_s + passes * forward_s
    step_s = step_s * growth.step(rows) if growth is not None else step_s + (rows - 1.0) * passes * forward_s
    return (steps or 30.0) * step_s + rows * family.decode_per_pixel * width * height / gpu.sustained_flops


@lru_cache(maxsize=256)
def _batch_growth(gpu: str, family: str) -> step_times.StepTimes | None:
    return next((entry for entry in step_times.read() if (entry.gpu, entry.family) == (gpu, family)), None)


def peak_bytes(
    family: Family,
    *,
    weights_bytes: int = 0,
    pixels: float = 0.0,
    rows: float = 1.0,
    training: bool = False,
    trained_parameters: int = 0,
    frugal: bool = False,
) -> int:
    """Return the peak of GPU memory: weights, exact where they are given, plus activations by pixels of all rows.

    The rows of a generation are its pictures, those of a training all that go through the network at once, prior rows included;
    `frugal`: it computes activations twice instead of keeping them. A training keeps 16 bytes per trained parameter (Adam, with
    gradients and full-precision weights); without ``trained_parameters`` it trains an adapter of rank 16.
    """
    weights = weights_bytes or family.weights_bytes
    side = math.sqrt(pixels or family.native_px**2)
    rows = max(1.0, rows)
    if training:
        trained = trained_parameters or int(family.adapter_per_rank * 16 / 2)
        working = family.activations.train_bytes(side, side, rows, HALF_BYTES, frugal=frugal)
        return int(weights + TRAINED_BYTES * trained + working)
    return int(weights + family.activations.picture_bytes(side, side) * rows)


@lru_cache(maxsize=1024)
def relative_time(gpu_model: str, reference: str) -> float:
    """Return the log of run time on a GPU model over that on another ("": a typical one) by arithmetic; 0 where one is unknown."""
    gpu = gpu_of(gpu_model)
    other = TYPICAL_GPU if not reference else gpu_of(reference)
    if gpu is None or other is None:
        return 0.0
    return math.log(run_seconds(SDXL, gpu=gpu) / run_seconds(SDXL, gpu=other))


def adapter_bytes(family: Family, rank: int) -> int:
    """Return the size of a half-precision adapter on the attention layers."""
    return int(family.adapter_per_rank * rank)


def load_seconds(size_bytes: float, source: str = "remote", overhead_s: float = LOAD_OVERHEAD_S) -> float:
    """Return the time to bring a model from where its bytes lie to the GPU: they pass every nearer place on their way.

    ``source`` is one of ``gpu`` (it is there: 0), ``memory``, ``disk``, ``remote``; raises ValueError for another.
    """
    if source not in BANDWIDTHS:
        raise ValueError(f"source: unknown place {source!r}; known are {', '.join(BANDWIDTHS)}")
    if source == "gpu":
        return 0.0
    passed = list(BANDWIDTHS)[1 : list(BANDWIDTHS).index(source) + 1]
    return overhead_s + sum(size_bytes / BANDWIDTHS[place] for place in passed)
