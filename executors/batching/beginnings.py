"""What a picture begins with: noise alone, another picture under noise, or a picture of which only a part is painted anew.

Every number is drawn in the order in which diffusers' own pipelines draw it, so that a seed means the same picture here and there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from executors.batching.requests import PictureRequest
from executors.methods import sampling
from executors.methods.base import InputRefused
from executors.methods.pipelines import FLOWS, LoadedPipeline

_OWN, _NOISE, _MASK, _SEEN = "begin/own", "begin/noise", "begin/mask", "begin/seen"


@dataclass(frozen=True, slots=True)
class Painting:
    """What painting a part of a picture needs at every step, [1, channels, height / factor, width / factor] each."""

    mask: torch.Tensor
    """1 where the picture is painted anew."""
    own: torch.Tensor | None = None
    """Latents of the given picture, which the rest is put back to after every step; a network made for inpainting needs none."""
    noise: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    """For a network made for inpainting: latents of the picture without the part, a further input of the network."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what is to be kept of it, by name."""
        named = {_MASK: self.mask, _OWN: self.own, _NOISE: self.noise, _SEEN: self.seen}
        return {name: tensor.detach().cpu().clone() for name, tensor in named.items() if tensor is not None}

    @classmethod
    def restored(cls, tensors: Mapping[str, torch.Tensor], loaded: LoadedPipeline) -> Painting | None:
        """Return what was kept of one; None when there was none."""
        if _MASK not in tensors:
            return None

        def placed(name: str) -> torch.Tensor | None:
            tensor = tensors.get(name)
            return None if tensor is None else tensor.to(loaded.device, loaded.dtype, copy=True)

        mask = placed(_MASK)
        assert mask is not None
        return cls(mask, placed(_OWN), placed(_NOISE), placed(_SEEN))

    def put_back(self, latents: torch.Tensor, scheduler: Any, following: torch.Tensor | None) -> torch.Tensor:
        """Return latents in which everything but the part is the given picture's, as noisy as the following step expects."""
        if self.own is None:
            return latents
        kept = self.own
        if following is not None:
            assert self.noise is not None
            kept = noised(scheduler, kept, self.noise, following.reshape(1))
        return (1 - self.mask) * kept + self.mask * latents


def noised(scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """Return latents under as much noise as there is at a time, [1]."""
    if hasattr(scheduler, "scale_noise"):
        flowed: torch.Tensor = scheduler.scale_noise(latents, time, noise)
        return flowed
    result: torch.Tensor = scheduler.add_noise(latents, noise, time)
    return result


def first_step(loaded: LoadedPipeline, request: PictureRequest) -> int:
    """Return how many steps are left out because the given picture stands for them."""
    if request.image is None:
        return 0
    taken = min(request.steps * request.strength, request.steps)
    return int(request.steps - taken) if loaded.family in FLOWS else request.steps - int(taken)


def takes_parts(loaded: LoadedPipeline) -> bool:
    """Whether the network was made for inpainting: it sees the mask and the rest of the picture."""
    return int(loaded.denoiser.config.in_channels) > loaded.latent_channels * (4 if loaded.family == "flux" else 1)


def check(loaded: LoadedPipeline, request: PictureRequest) -> None:
    """Raise InputRefused when a picture cannot be begun as it is asked for."""
    size = (request.width, request.height)
    for name, given in (("image", request.image), ("mask", request.mask)):
        if given is not None and given.size != size:
            raise InputRefused(name, f"is {given.width}x{given.height}, the picture to make is {size[0]}x{size[1]}")
    if request.mask is not None and request.image is None:
        raise InputRefused("mask", "says which part of image is painted anew; send image too")
    if takes_parts(loaded):
        if int(loaded.denoiser.config.in_channels) != 2 * loaded.latent_channels + 1:
            raise InputRefused("model", f"{loaded.model.id} takes inputs that are not known here; use another model")
        if request.mask is None:
            raise InputRefused("mask", f"{loaded.model.id} paints parts of pictures only; send image and mask")
    if request.image is None:
        return
    if not 0.0 < request.strength <= 1.0:
        raise InputRefused("strength", f"must be above 0 and at most 1, not {request.strength}")
    if first_step(loaded, request) >= request.steps:
        raise InputRefused(
            "strength", f"{request.strength} of {request.steps} steps is less than one; raise strength or steps"
        )


class Beginning:
    """Makes the latents of one picture's first step; all its random numbers come from the picture's own generator."""

    def __init__(
        self, loaded: LoadedPipeline, request: PictureRequest, scheduler: Any, generator: torch.Generator
    ) -> None:
        self._loaded = loaded
        self._request = request
        self._scheduler = scheduler
        self._generator = generator
        factor = int(loaded.pipe.vae_scale_factor)
        self.shape = (1, loaded.latent_channels, request.height // factor, request.width // factor)

    @torch.no_grad()
    def make(self, first_time: torch.Tensor) -> tuple[torch.Tensor, Painting | None]:
        """Return the latents and, where only a part is painted, what that needs."""
        image, mask = self._request.image, self._request.mask
        if image is None:
            return self._noise() * self._sigma(), None
        pixels = self._loaded.pipe.image_processor.preprocess(image)
        if mask is None:
            own = sampling.encode_image(self._loaded, pixels, self._generator, painted=False)
            return noised(self._scheduler, own, self._noise(), first_time.reshape(1)), None
        return self._paint(pixels, first_time)

    def _paint(self, pixels: torch.Tensor, first_time: torch.Tensor) -> tuple[torch.Tensor, Painting]:
        loaded, all_steps = self._loaded, self._request.strength == 1.0
        blended = not takes_parts(loaded)
        own = None
        if blended or not all_steps:
            # The plain pipeline repeats them, which lays them out anew: a convolution rounds differently in another layout.
            own = sampling.encode_image(loaded, pixels, self._generator, painted=True).contiguous()
        noise = self._noise()
        if own is None or all_steps:
            latents = noise * self._sigma()
        else:
            latents = noised(self._scheduler, own, noise, first_time.reshape(1))
        levels = _levels(self._request.mask)
        small = torch.nn.functional.interpolate(levels, size=self.shape[2:]).to(loaded.device, loaded.dtype)
        if blended:
            if sampling.draws_latents(loaded):
                self._noise()  # The plain pipeline encodes the rest of the picture all the same, and uses nothing but these.
            return latents, Painting(small, own, noise)
        seen = sampling.encode_image(loaded, pixels * (levels < 0.5), self._generator, painted=True)
        return latents, Painting(small, seen=seen)

    def _noise(self) -> torch.Tensor:
        noise = torch.randn(self.shape, generator=self._generator)
        return noise.to(self._loaded.device, self._loaded.dtype)

    def _sigma(self) -> Any:
        # A flow's noise is of strength 1 always, and its scheduler does not say so.
        return getattr(self._scheduler, "init_noise_sigma", 1.0)


def _levels(mask: Any) -> torch.Tensor:
    """A PIL mask as 0 and 1, [1, 1, height, width]."""
    pixels = torch.frombuffer(bytearray(mask.convert("L").tobytes()), dtype=torch.uint8)
    levels = pixels.view(1, 1, mask.height, mask.width).float() / 255.0
    return (levels >= 0.5).float()
