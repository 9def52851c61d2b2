"""Latents as Flux's transformers see them: each two by two places are one token, and every token knows its row and column."""

from __future__ import annotations

import torch


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Return [n, channels, height, width] as tokens, [n, height / 2 * width / 2, 4 * channels]."""
    count, channels, height, width = latents.shape
    squares = latents.view(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(count, height // 2 * (width // 2), 4 * channels)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return tokens as latents of this many places, [n, channels, height, width]."""
    count, _, channels = tokens.shape
    squares = tokens.view(count, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(count, channels // 4, height, width)


def places(height: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """Return what tells tokens apart, [height / 2 * width / 2, 3]: nothing, row, column."""
    rows = torch.arange(height // 2).repeat_interleave(width // 2)
    columns = torch.arange(width // 2).repeat(height // 2)
    found = torch.stack([torch.zeros_like(rows), rows, columns], dim=1)
    return found.to(like.device, like.dtype)
