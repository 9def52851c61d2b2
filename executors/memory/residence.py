"""Puts a pipeline where there is room: on the device, what begins and ends a picture aside in host memory, or layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from executors.memory.footprint import STEPPED
from executors.memory.layers import travel
from executors.memory.plan import GIB, MemoryPlan, Place


@dataclass(slots=True)
class Residence:
    """Where a pipeline lies. Parts and layers that lie aside come to the device by themselves when they are called."""

    place: Place = Place.DEVICE
    hooks: dict[str, Any] = field(default_factory=dict)
    """Part -> the hook that takes it back to host memory."""

    def rest(self) -> None:
        """Take the parts that were called back to host memory; nothing where all lies on the device."""
        for hook in self.hooks.values():
            hook.offload()


def settle(pipe: Any, device: torch.device, plan: MemoryPlan | None, width: int, height: int) -> Residence:
    """Move a pipeline to its place and tell the plan; raises MemoryError when not even its largest layer fits.

    Also when its layers would have to travel here, and not on the whole card.

    `plan` is None where the model's needs or the device's room are not known: then everything goes onto the device.
    """
    place = Place.DEVICE if plan is None else plan.place(width, height)
    if plan is not None and place is Place.NOWHERE:
        aside, layers = (plan.least_bytes(width, height, place=each) / GIB for each in (Place.ASIDE, Place.LAYERS))
        raise MemoryError(
            f"model: it needs at least {aside:.2f} GiB of GPU memory for one picture of {width}x{height}, {layers:.2f} GiB with "
            f"its layers one after the other; {plan.room_bytes / GIB:.2f} GiB are there"
        )
    if plan is not None and plan.wants_the_card(width, height):
        raise MemoryError(
            f"model: it needs at least {plan.least_bytes(width, height) / GIB:.2f} GiB of GPU memory, its share of the card is "
            f"{plan.room_bytes / GIB:.2f} GiB; give it the whole card of {plan.card_bytes / GIB:.2f} GiB"
        )
    if place is Place.DEVICE or plan is None:
        pipe.to(device)
        return Residence()
    plan.settled = place
    return Residence(place, lay_aside(pipe, device, layers=place is Place.LAYERS))


def lay_aside(pipe: Any, device: torch.device, *, layers: bool = False) -> dict[str, Any]:
    """Move the parts that every step needs to the device, and have the others come only while they are called.

    With `layers` everything but the autoencoder stays in host memory, and each layer comes only while it computes.
    """
    from accelerate import cpu_offload_with_hook

    hooks: dict[str, Any] = {}
    for name, part in pipe.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        if layers and name != "vae":
            travel(part, device)
        elif name in STEPPED:
            part.to(device)
        else:
            _, hooks[name] = cpu_offload_with_hook(part, device)
    return hooks


def native_size(pipe: Any) -> tuple[int, int]:
    """Width and height in pixels that a pipeline was made for; 512 where it does not say."""
    network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    size = getattr(getattr(network, "config", None), "sample_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else size
    factor = int(getattr(pipe, "vae_scale_factor", 8))
    return math.ceil(width) * factor, math.ceil(height) * factor
