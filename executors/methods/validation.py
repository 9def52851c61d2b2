"""Pictures drawn while a model is still being trained, so that people see what it has learnt and when it had learnt enough."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from executors.methods import pictures, sampling
from executors.methods.base import NotFinite
from executors.methods.text_to_image import USUAL_GUIDANCE
from executors.methods.training import Training

PICTURE_STEPS = 20


def draw_if_due(training: Training, before_step: Callable[[], None], show: Callable[[Any], None]) -> None:
    """Draw the validation prompts with the weights as they are now, if this step asks for it and they are not drawn yet.

    `before_step` is called before every denoising step and may raise to stop; what was drawn of this step is then forgotten. `show`
    gets each picture as soon as it is made.
    A picture that cannot be decoded is left out: it costs nobody the training.
    """
    asked, step = training.asked, training.step
    due = step == asked.steps or (step > 0 and step % asked.validation_every == 0)
    if not asked.validation_prompts or not due or step in training.validated:
        return
    made = [_draw(training, prompt, index, before_step) for index, prompt in enumerate(asked.validation_prompts)]
    for index, (prompt, latents) in enumerate(zip(asked.validation_prompts, made, strict=True)):
        try:
            (picture,) = sampling.decode(training.loaded, latents)
        except NotFinite as refused:
            print(f"validation after step {step}: no picture of {prompt!r}: {refused}", file=sys.stderr, flush=True)
            continue
        height, width = picture.height, picture.width
        facts = {
            "prompt": prompt,
            "steps": PICTURE_STEPS,
            "scheduler": "ddim",
            "guidance": _guidance(training),
            "seed": asked.seed + index,
            "width": width,
            "height": height,
            "model": f"{asked.base_model} after {step} training steps",
        }
        pictures.save_png(picture, training.validation_path(index), facts)
        show(picture)
    training.validated.add(step)


@torch.no_grad()
def _draw(training: Training, prompt: str, index: int, before_step: Callable[[], None]) -> torch.Tensor:
    loaded, guidance = training.loaded, _guidance(training)
    with evaluating(training), training.precision():
        conditioning = sampling.encode_prompt(loaded, prompt, "", sampling.is_guided(loaded, guidance))
        latents = sampling.denoise(
            loaded,
            conditioning,
            seeds=[training.asked.seed + index],
            steps=PICTURE_STEPS,
            guidance=guidance,
            width=training.size_px,
            height=training.size_px,
            scheduler_name="ddim",
            before_step=lambda _done, _total: before_step(),
        )
    return latents.to(loaded.pipe.vae.dtype)


@contextmanager
def evaluating(training: Training) -> Iterator[None]:
    """Take the parts out of training mode for a while: pictures are drawn without dropout."""
    parts = [part for part in training.loaded.parts.values() if part.training]
    for part in parts:
        part.eval()
    try:
        yield
    finally:
        for part in parts:
            part.train()


def _guidance(training: Training) -> float:
    return float(training.loaded.defaults.get("guidance", USUAL_GUIDANCE))
