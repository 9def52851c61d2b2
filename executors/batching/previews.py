"""A cheap look at latents: a linear map from latent channels to colours, fitted once to the model's own autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from executors.methods import sampling
from executors.methods.pipelines import LoadedPipeline

_SAMPLES = 24
_CELLS = 4
_CELL_PX = 32


class PreviewMap:
    """Turns latents into pictures of one pixel for each place, without a decoder."""

    def __init__(self, loaded: LoadedPipeline) -> None:
        """Fit the map: encode patches of plain colours and find what best gives the colours back."""
        factor = int(loaded.pipe.vae_scale_factor)
        generator = torch.Generator("cpu").manual_seed(0)
        colours = torch.rand((_SAMPLES, 3, _CELLS, _CELLS), generator=generator) * 2.0 - 1.0
        cell_px = max(_CELL_PX, factor) // factor * factor
        pixels = colours.repeat_interleave(cell_px, 2).repeat_interleave(cell_px, 3)
        latents = sampling.encode_pixels(loaded, pixels.to(loaded.device, loaded.dtype)).float().cpu()
        shown = torch.nn.functional.interpolate(pixels, size=latents.shape[-2:], mode="area")
        rows = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
        rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
        self._map = torch.linalg.lstsq(rows, shown.permute(0, 2, 3, 1).reshape(-1, 3)).solution

    @torch.no_grad()
    def show(self, latents: torch.Tensor) -> Any:
        """Return a PIL image of latents [1, channels, height, width]."""
        places = latents[0].float().cpu().permute(1, 2, 0)
        colours = places @ self._map[:-1] + self._map[-1]
        levels = ((colours.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
        return Image.fromarray(levels.numpy())
