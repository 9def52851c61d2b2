"""The optimizers a training may ask for."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

import torch

from executors.methods.base import InputRefused

BETAS = (0.9, 0.99)
WEIGHT_DECAY = 1e-4


def build(name: str, parameters: Iterable[torch.nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """Return an optimizer; raises InputRefused naming the field when a library that it needs is not installed."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, betas=BETAS, weight_decay=WEIGHT_DECAY)
    try:
        library = importlib.import_module("bitsandbytes")
    except ImportError as error:
        told = f"{name} needs bitsandbytes, which is not installed on this node ({error}); install it, or choose adamw"
        raise InputRefused("optimizer", told) from error
    made: torch.optim.Optimizer = library.optim.AdamW8bit(parameters, lr=rate, betas=BETAS, weight_decay=WEIGHT_DECAY)
    return made
