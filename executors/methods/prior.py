"""What the base model already knows, kept as latents while a subject is learned.

Half shows the category, half anything else: a prior of the category alone made the model forget the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from executors.methods import pipelines, sampling

GENERAL_PROMPTS = (
    "a photo of a mountain lake in the morning",
    "a busy street in a city at night",
    "a bowl of fruit on a wooden table",
    "a portrait of an old man with a hat",
    "a red car parked in front of a house",
    "a cat asleep on a sofa",
    "a sailing boat on a calm sea",
    "an oil painting of a forest in autumn",
    "a cup of coffee beside an open book",
    "a child running on a beach",
    "a modern kitchen with large windows",
    "a watercolour of a flower garden",
    "a bird on a branch covered with snow",
    "a steam train crossing a bridge",
    "a plate of pasta with basil",
    "a pencil drawing of a castle on a hill",
    "a bicycle leaning on a brick wall",
    "a woman reading in a library",
    "a horse in a green field",
    "an aerial view of an island",
    "a guitar on a stage under coloured lights",
    "a lighthouse in a storm",
    "a market stall full of vegetables",
    "a robot made of metal parts",
)
PICTURE_STEPS = 20


@dataclass(frozen=True, slots=True)
class Prior:
    """Latents [n, channels, height, width] of the base model's own pictures, with the prompt of each."""

    latents: torch.Tensor
    prompts: tuple[str, ...]


def prompts_for(category: str, general: tuple[str, ...], count: int) -> tuple[str, ...]:
    """The prompts of `count` prior pictures: category and general ones in turn."""
    return tuple(
        f"a photo of {_with_article(category)}" if index % 2 == 0 else general[(index // 2) % len(general)]
        for index in range(count)
    )


def _with_article(noun: str) -> str:
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def batches(count: int, size_px: int) -> list[range]:
    """Rows to make together: sixteen small pictures or four large ones."""
    width = 16 if size_px <= 128 else 4
    return [range(start, min(count, start + width)) for start in range(0, count, width)]


def make(
    loaded: pipelines.LoadedPipeline,
    prompts: tuple[str, ...],
    *,
    seed: int,
    guidance: float,
    size_px: int,
    before_step: Callable[[int], None],
) -> Prior:
    """Let the base model draw every prompt; `before_step` gets the denoising steps done so far and may raise `Cancelled`."""
    made: list[torch.Tensor] = []
    done = 0

    def counted(step: int, _total: int) -> None:
        before_step(done + step)

    for batch in batches(len(prompts), size_px):
        conditionings = [
            sampling.encode_prompt(loaded, prompts[row], "", sampling.is_guided(loaded, guidance)) for row in batch
        ]
        latents = sampling.denoise(
            loaded,
            sampling.stack(conditionings),
            seeds=[seed + row for row in batch],
            steps=PICTURE_STEPS,
            guidance=guidance,
            width=size_px,
            height=size_px,
            scheduler_name="ddim",
            before_step=counted,
        )
        done += PICTURE_STEPS
        made.append(latents.float())
    return Prior(torch.cat(made), prompts)
