"""What goes into a running batch, what comes out of it, and what is left of a picture that was set aside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

AdapterWeights = tuple[tuple[str, float], ...]
"""Adapters of one request by name in the bank, each with its weight; order does not matter to the picture."""


@dataclass(frozen=True, slots=True)
class ControlPicture:
    """A picture that a ControlNet of the loaded model follows."""

    name: str
    """The ControlNet's name beside the model."""
    picture: Any
    """PIL, RGB, of the request's size; what this ControlNet was trained on: edges, depth, a pose."""
    scale: float = 1.0
    start: float = 0.0
    """Share of the steps before which it is left out."""
    end: float = 1.0
    """Share of the steps after which it is left out."""


@dataclass(frozen=True, slots=True)
class PictureRequest:
    """One picture to make. Everything that a plain pipeline takes per call is the picture's own here."""

    id: str
    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 20
    guidance: float = 7.5
    """Up to 1 switches guidance off: the picture then costs one row of the batch instead of two."""
    width: int = 64
    height: int = 64
    scheduler: str | None = None
    """A sampler's name as in the parameters of text_to_image; None: the model's own."""
    adapters: AdapterWeights = ()
    adapter_scale: float = 1.0
    """Strength of the adapter that is part of the loaded model; pictures of different strengths never share a call."""
    priority: int = 0
    """Higher first; a picture that waits sets one of lower priority aside when the batch is full."""
    place: int = 0
    """Place within its job: among equal priorities first pictures enter before second ones."""
    preview_every: int = 0
    """Steps between two previews; 0: none."""
    image: Any = None
    """The picture to begin with, PIL, RGB, of the request's size; None: the seed's noise alone."""
    strength: float = 1.0
    """Share of the steps that are taken from `image` on, which is as noisy then; 1 takes all of them."""
    mask: Any = None
    """What of `image` is painted anew, PIL, greyscale, of the request's size: from half white on."""
    controls: tuple[ControlPicture, ...] = ()
    """ControlNets that take part, in the order of their names; pictures of other sets never share a call."""


@dataclass(frozen=True, slots=True)
class KeptPicture:
    """A picture between two steps, in host memory: enough to go on in any batch of the same model, with the same result."""

    request: PictureRequest
    done: int = 0
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """``latents``, ``generator`` and the scheduler's own, on the CPU; empty when the picture had not begun."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The scheduler's numbers and words; can be written as JSON."""

    def renamed(self, id: str) -> KeptPicture:
        """Return the same picture under another id."""
        return replace(self, request=replace(self.request, id=id))


# --- events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entered:
    """The picture takes part from this step on."""

    id: str


@dataclass(frozen=True, slots=True)
class SetAside:
    """A more urgent picture took its place; it goes on by itself when there is room."""

    id: str


@dataclass(frozen=True, slots=True)
class Stepped:
    """`done` of `total` steps are behind the picture."""

    id: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Previewed:
    """A small picture of what it looks like now, one pixel for each place of the latents."""

    id: str
    done: int
    picture: Any


@dataclass(frozen=True, slots=True)
class Finished:
    """The picture is made; it has left the batch. `picture` is a PIL image."""

    id: str
    picture: Any
    working_bytes: int = 0
    """Its share of the largest call it took part in, weights left out; 0 where the device does not tell."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The picture cannot be made, for a reason of its own; it has left the batch and the others go on."""

    id: str
    error: Exception


BatchEvent = Entered | SetAside | Stepped | Previewed | Finished | Failed
