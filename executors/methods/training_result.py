"""What a training leaves: the weights, the recipe that leads to them, a card for people, the loss of every step, and pictures."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch

from executors.methods import adapters, device, provenance
from executors.methods.base import MethodResult, ResultFile
from executors.methods.training import Training

LOSSES = "loss.csv"


def finish(training: Training) -> MethodResult:
    """Write the result's files and describe them."""
    asked, folder = training.asked, training.output_dir
    facts = _facts(training)
    recipe = {**asked.model_dump(mode="json"), "learning_rate": training.rate, "size": training.size_px}
    # A low-rank adapter is small enough for full precision; full weights are kept as a base model's are.
    kept = torch.float32 if asked.method == "lora" else torch.float16
    weights = {key: value.detach().to(kept) for key, value in training.trainable.items()}
    written = adapters.write(folder, weights, {**facts, "recipe": recipe})
    card = folder / provenance.CARD
    curve = provenance.curve(training.losses)
    card.write_text(provenance.card(facts, recipe, provenance.curve(training.losses, 20)), encoding="utf-8")
    losses = _write_losses(training, folder / LOSSES)
    types = ("application/octet-stream", "application/json")
    files = [ResultFile(path, media, "adapter") for path, media in zip(written, types, strict=True)]
    files += [ResultFile(card, "text/markdown", "adapter"), ResultFile(losses, "text/csv", "log")]
    files += [ResultFile(path, "image/png", "validation") for path in training.validation_pictures()]
    return MethodResult(
        files=tuple(files),
        metadata={
            **facts,
            "loss": training.losses[-1] if training.losses else None,
            "loss_curve": [[step, round(loss, 6)] for step, loss in curve],
        },
        peak_gpu_memory_bytes=device.peak_bytes(training.loaded.device),
    )


def _facts(training: Training) -> dict[str, Any]:
    asked = training.asked
    return {
        "kind": asked.method,
        "base_model": asked.base_model,
        "base_model_sha256": training.base_sha256,
        "instance_token": asked.instance_token,
        "category": asked.category,
        "prompt": f"a photo of {training.thing}",
        "pictures": len(asked.pictures),
        "trained": sorted({key.split(".")[0] for key in training.trainable}),
        "rank": asked.rank if asked.method == "lora" else None,
        "steps": asked.steps,
        "batch": asked.batch,
        "learning_rate": training.rate,
        "prior_pictures": len(training.prior.latents) if training.prior is not None else 0,
        "prior_weight": asked.prior_weight if training.prior is not None else 0.0,
        "size": training.size_px,
        "seed": asked.seed,
        "versions": provenance.versions(),
    }


def _write_losses(training: Training, path: Path) -> Path:
    with path.open("w", encoding="utf-8", newline="") as out:
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(("step", "loss", "learning_rate"))
        for index, loss in enumerate(training.losses):
            rate = training.rate * (1.0 - index / training.asked.steps)
            rows.writerow((index + 1, repr(loss), repr(rate)))
    return path
