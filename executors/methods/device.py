"""Where tensors live and in which precision: one place decides, and nothing is fetched from the network.

Import this before transformers or diffusers: it sets the environment that they read once.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch


def resolve(device: str) -> torch.device:
    """Return the device to use: ``auto`` is cuda when there, else cpu; on a CPU torch gets one thread.

    More threads on busy cores made training several times slower, and the scheduler counts one core per slot.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {device!r} was asked for, but torch sees no GPU; use cpu or fix the driver")
    if chosen.type == "cpu":
        torch.set_num_threads(1)
    return chosen


def generation_dtype(device: torch.device) -> torch.dtype:
    """Half precision on a GPU, single on a CPU (where half is no gain)."""
    return torch.float16 if device.type == "cuda" else torch.float32


def training_dtype(device: torch.device) -> torch.dtype:
    """Precision of the frozen parts while training; what is trained stays in single precision."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device or the host ran out of memory."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def forget_unused(device: torch.device) -> None:
    """Give cached GPU memory back, after an out-of-memory error or an unload."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def start_peak(device: torch.device) -> None:
    """Begin to measure the peak of GPU memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Peak of GPU memory since `start_peak`; 0 on a CPU."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0
