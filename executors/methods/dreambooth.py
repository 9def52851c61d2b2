"""DreamBooth: teach a base model one subject from a few pictures, without losing what it knows.

A step's randomness depends on the seed and the step's number alone, so a resumed training equals an uninterrupted one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from executors.memory.plan import Place, TrainingNeeds, training_parts
from executors.methods import (
    adapters,
    buckets,
    device,
    optimizers,
    pictures,
    pipelines,
    prior,
    prior_cache,
    provenance,
    sampling,
    training_step,
    validation,
)
from executors.methods.base import (
    Cancelled,
    InputRefused,
    MethodContext,
    MethodResult,
    ModelMissing,
    ModelRef,
)
from executors.methods.parameters import DreamBoothParameters
from executors.methods.text_to_image import USUAL_GUIDANCE
from executors.methods.training import Subject, Training
from executors.methods.training_result import finish

USUAL_RATES = {"lora": 1e-4, "full": 5e-6}
CHECKPOINT = "checkpoint"


class DreamBooth:
    """Holds one base model and trains adapters for it."""

    paced = True

    def __init__(self) -> None:
        self._loaded: pipelines.LoadedPipeline | None = None
        self._base_sha256 = ""

    def load(self, model: ModelRef | None, where: str) -> None:
        """Load the base model; raises ModelMissing."""
        if model is None:
            raise ModelMissing("base_model: dreambooth needs a base model; name one")
        self._loaded = pipelines.load(model, where, device.training_dtype(device.resolve(where)))
        if self._loaded.residence.place is Place.LAYERS:
            # Gradients need the weights of the way there on the way back.
            raise MemoryError(f"base_model: the weights of {model.id} do not fit the device, which a training needs")
        self._base_sha256 = provenance.base_digest(model.base_dir)

    def run(self, parameters: BaseModel, context: MethodContext) -> MethodResult:
        """Train and write the adapter; a stop keeps a checkpoint and raises `Cancelled` with it."""
        assert isinstance(parameters, DreamBoothParameters)
        if self._loaded is None:
            raise RuntimeError("dreambooth runs before load; call load first")
        loaded = self._loaded
        pipelines.require_family(loaded, ("sd", "sdxl"), "dreambooth")
        if loaded.model.adapter_dir is not None:
            raise InputRefused("base_model", f"{loaded.model.id} is itself a trained model; name its base model")
        device.start_peak(loaded.device)
        parts = {name: part for name, part in loaded.parts.items() if parameters.text_encoder or name == "unet"}
        kept = _keep(parameters, parts)
        try:
            training = _prepare(parameters, loaded, parts, self._base_sha256, context)
            if not _resume(training, context):
                _make_prior(training, context)
            training.parts = _planned_parts(training)
            _train(training, context)
            return finish(training)
        finally:
            _put_back(parts, kept, loaded.dtype)

    def close(self) -> None:
        """Give the model's memory back."""
        if self._loaded is not None:
            self._loaded.release()
            self._loaded = None


_Kept = dict[str, dict[str, torch.Tensor]]


def _keep(asked: DreamBoothParameters, parts: Mapping[str, torch.nn.Module]) -> _Kept:
    """Remember the base weights that a full training will change; a LoRA changes none."""
    if asked.method == "lora":
        return {}
    return {name: {key: value.clone() for key, value in part.state_dict().items()} for name, part in parts.items()}


def _put_back(parts: Mapping[str, torch.nn.Module], kept: _Kept, dtype: torch.dtype) -> None:
    """Leave the base model as it was loaded, so that the next run starts from it."""
    adapters.detach(parts)
    for name, weights in kept.items():
        parts[name].to(dtype).load_state_dict(weights)
    for name, part in parts.items():
        part.requires_grad_(False).eval()
        _recompute(name, part, False)


def _recompute(name: str, part: Any, wanted: bool) -> None:
    """Switch gradient checkpointing of a part; text encoders do it in training mode only."""
    if wanted == any(getattr(module, "gradient_checkpointing", False) for module in part.modules()):
        return
    if name == "unet":
        (part.enable_gradient_checkpointing if wanted else part.disable_gradient_checkpointing)()
        return
    # Younger versions of transformers call it activation checkpointing and warn of the old name.
    word = "activation" if hasattr(part, "activation_checkpointing_enable") else "gradient"
    if wanted:
        options = {f"{word}_checkpointing_kwargs": {"use_reentrant": False}}
        getattr(part, f"{word}_checkpointing_enable")(**options)
        part.train()
    else:
        getattr(part, f"{word}_checkpointing_disable")()


def _prepare(
    asked: DreamBoothParameters,
    loaded: pipelines.LoadedPipeline,
    parts: Mapping[str, torch.nn.Module],
    base_sha256: str,
    context: MethodContext,
) -> Training:
    from diffusers import DDPMScheduler

    size_px = asked.size or min(loaded.native_size)
    subject = _read_subject(asked, loaded, size_px, context)
    trainable: dict[str, torch.nn.Parameter]
    if asked.method == "lora":
        trainable = adapters.attach(parts, asked.rank, asked.seed)
    else:
        for part in parts.values():
            part.to(torch.float32).requires_grad_(True)
        trainable = {
            adapters.weight_key(n, key): value for n, part in parts.items() for key, value in part.named_parameters()
        }
    for name, part in parts.items():
        _recompute(name, part, asked.gradient_checkpointing)
    rates = {**USUAL_RATES, **loaded.defaults.get("learning_rate", {})}
    rate = asked.learning_rate if asked.learning_rate is not None else float(rates[asked.method])
    return Training(
        asked=asked,
        loaded=loaded,
        noise=DDPMScheduler.from_config(loaded.pipe.scheduler.config),
        trainable=trainable,
        optimizer=optimizers.build(asked.optimizer, trainable.values(), rate),
        rate=rate,
        size_px=size_px,
        subject=subject,
        base_sha256=base_sha256,
        output_dir=context.output_dir,
    )


@torch.no_grad()
def _read_subject(
    asked: DreamBoothParameters, loaded: pipelines.LoadedPipeline, size_px: int, context: MethodContext
) -> Subject:
    """Encode the subject's pictures, those of one shape together."""
    by_shape: dict[tuple[int, int], list[torch.Tensor]] = {}
    shape_of: list[tuple[int, int]] = []
    for index, file_id in enumerate(asked.pictures):
        picture = pictures.read(_fetch(context, file_id), f"pictures.{index}")
        shape = (size_px, size_px)
        if asked.aspect == "buckets":
            shape = buckets.nearest(*picture.size, size_px)
        by_shape.setdefault(shape, []).append(pictures.fitted(picture, *shape))
        shape_of.append(shape)
    groups = [sampling.encode_pixels(loaded, torch.stack(read)).float() for read in by_shape.values()]
    places = {shape: place for place, shape in enumerate(by_shape)}
    return Subject(groups, [places[shape] for shape in shape_of])


def _fetch(context: MethodContext, file_id: str) -> Path:
    try:
        return context.fetch(file_id)
    except FileNotFoundError as error:
        raise InputRefused("pictures", f"file {file_id} is not in the file store; upload it first") from error


def _resume(training: Training, context: MethodContext) -> bool:
    """Go on from a checkpoint; one that cannot be used costs the work in it, not the task."""
    if context.checkpoint is None:
        return False
    try:
        return training.restore(context.checkpoint)
    except InputRefused as refused:
        print(f"starting from the beginning: {refused}", file=sys.stderr, flush=True)
        return False


def _make_prior(training: Training, context: MethodContext) -> None:
    """Let the base model draw the prior, or take what an earlier training on this node let it draw."""
    asked, loaded = training.asked, training.loaded
    if not asked.prior_preservation:
        return
    prompts = training.prior_prompts()
    guidance = float(loaded.defaults.get("guidance", USUAL_GUIDANCE))
    key = prior_cache.key_of(
        {
            "base": training.base_sha256,
            "prompts": prompts,
            "seed": asked.seed,
            "guidance": guidance,
            "size": training.size_px,
            "steps": prior.PICTURE_STEPS,
            "where": f"{loaded.device.type} {loaded.dtype} {asked.method}",
            "versions": provenance.versions(),
        }
    )
    found = prior_cache.find(context.cache_dir, key)
    if found is not None and len(found) == len(prompts):
        training.prior = prior.Prior(found.to(loaded.device), prompts)
        return

    def before_step(done: int) -> None:
        context.progress(done, training.units, "prior pictures")
        if context.should_stop():
            raise Cancelled

    with validation.evaluating(training), training.precision():
        training.prior = prior.make(
            loaded, prompts, seed=asked.seed, guidance=guidance, size_px=training.size_px, before_step=before_step
        )
    prior_cache.keep(context.cache_dir, key, training.prior.latents)


def _planned_parts(training: Training) -> int:
    """Into how many parts a batch must be cut to fit the device; one where its memory or the model's needs are not known."""
    asked, memory = training.asked, training.loaded.memory
    free = None if memory is None else memory.free_bytes()
    if memory is None or memory.plan is None or free is None:
        return 1
    rows = asked.batch * (2 if training.prior is not None else 1)
    trained = tuple(name for name in training.loaded.parts if asked.text_encoder or name == "unet")
    needs = TrainingNeeds(training.size_px, rows, asked.method == "full", trained, asked.gradient_checkpointing)
    return training_parts(memory.plan.footprint, memory.plan.item_bytes, needs, free)


def _train(training: Training, context: MethodContext) -> None:
    """Step until done; offers a checkpoint every so often, and keeps one when told to stop."""
    asked, folder = training.asked, context.output_dir / CHECKPOINT

    def stop_if_told() -> None:
        if context.should_stop():
            training.save(folder)
            raise Cancelled(folder)

    while True:
        validation.draw_if_due(training, stop_if_told, context.preview)
        if training.step >= asked.steps:
            return
        stop_if_told()
        loss = training_step.take(training)
        if not math.isfinite(loss):
            raise InputRefused("learning_rate", f"the loss is not finite at step {training.step}; lower the rate")
        context.progress(training.prior_units + training.step, training.units, f"loss {loss:.4f}")
        if training.step % asked.checkpoint_every == 0 and training.step < asked.steps:
            training.save(folder)
            context.offer_checkpoint(folder)
