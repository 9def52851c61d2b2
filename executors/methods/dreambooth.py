"""DreamBooth: teach a base model one subject from a few pictures, without losing what it knows.

A step's randomness depends on the seed and the step's number alone, so a resumed training equals an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from executors.methods import adapters, checkpoints, device, pictures, pipelines, prior, sampling
from executors.methods.base import (
    Cancelled,
    InputRefused,
    MethodContext,
    MethodResult,
    ModelMissing,
    ModelRef,
    ResultFile,
)
from executors.methods.parameters import DreamBoothParameters
from executors.methods.text_to_image import USUAL_GUIDANCE

OPENINGS = ("a photo of {}", "a picture of {}", "an image of {}", "{}")
USUAL_RATES = {"lora": 1e-4, "full": 5e-6}
CHECKPOINT = "checkpoint"


@dataclass(slots=True)
class _Training:
    """Everything one run changes or reads at each step."""

    asked: DreamBoothParameters
    loaded: pipelines.LoadedPipeline
    noise: Any
    trainable: Mapping[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    rate: float
    size_px: int
    subject: torch.Tensor
    prior: prior.Prior | None = None
    step: int = 0
    loss: float = math.nan

    _encoded: dict[str, sampling.Conditioning] = field(default_factory=dict)

    @property
    def thing(self) -> str:
        """What prompts call the subject."""
        return f"{self.asked.instance_token} {self.asked.category}"

    @property
    def prior_units(self) -> int:
        """Progress units of making the prior: one for each denoising step."""
        if not self.asked.prior_preservation:
            return 0
        return len(prior.batches(self.asked.prior_pictures, self.size_px)) * prior.PICTURE_STEPS

    @property
    def units(self) -> int:
        """Progress units of the whole run."""
        return self.prior_units + self.asked.steps

    def prior_prompts(self) -> tuple[str, ...]:
        """Prompts of the prior pictures, in their order."""
        general = self.asked.prior_prompts or tuple(self.loaded.defaults.get("prior_prompts", prior.GENERAL_PROMPTS))
        return prior.prompts_for(self.asked.category, general, self.asked.prior_pictures)

    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to fit: all parameters that change the outcome, as JSON reads them."""
        told = self.asked.model_dump(mode="json", exclude={"checkpoint_every"})
        return {**told, "learning_rate": self.rate, "size": self.size_px, "dtype": str(self.loaded.dtype)}

    def precision(self) -> AbstractContextManager[Any]:
        """Full training on a GPU computes in half precision over single precision weights.

        To be entered anew for every forward pass: within one region autocast keeps half copies of weights that have changed since.
        """
        if self.asked.method == "full" and self.loaded.dtype != torch.float32:
            return torch.autocast(self.loaded.device.type, dtype=self.loaded.dtype)
        return nullcontext()

    def save(self, folder: Path) -> None:
        """Write a checkpoint."""
        tensors: dict[str, torch.Tensor] = {f"weight/{key}": value for key, value in self.trainable.items()}
        tensors |= checkpoints.optimizer_tensors(self.optimizer)
        if self.prior is not None:
            tensors["prior"] = self.prior.latents
        checkpoints.write(folder, self.step, tensors, self.identity())

    def conditions(self, prompts: list[str]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Text states of prompts, and what else the UNet takes; encoded once each when the text encoders are frozen."""
        if self.asked.text_encoder:
            conditioning = sampling.encode_prompts(self.loaded, prompts)
        else:
            for prompt in prompts:
                if prompt not in self._encoded:
                    self._encoded[prompt] = sampling.encode_prompt(self.loaded, prompt, "", guided=False)
            conditioning = sampling.stack([self._encoded[prompt] for prompt in prompts])
        if self.loaded.family == "sd":
            return conditioning.positive, {}
        conditions = sampling.sdxl_conditions(self.loaded, conditioning, len(prompts), self.size_px, self.size_px)
        return conditioning.positive, {"added_cond_kwargs": conditions}


class DreamBooth:
    """Holds one base model and trains adapters for it."""

    def __init__(self) -> None:
        self._loaded: pipelines.LoadedPipeline | None = None

    def load(self, model: ModelRef | None, where: str) -> None:
        """Load the base model; raises ModelMissing."""
        if model is None:
            raise ModelMissing("base_model: dreambooth needs a base model; name one")
        self._loaded = pipelines.load(model, where, device.training_dtype(device.resolve(where)))

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
            training = _prepare(parameters, loaded, parts, context)
            if not _resume(training, context):
                _make_prior(training, context)
            _train(training, context)
            return _finish(training, context)
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
    for part in parts.values():
        part.requires_grad_(False)


def _prepare(
    asked: DreamBoothParameters,
    loaded: pipelines.LoadedPipeline,
    parts: Mapping[str, torch.nn.Module],
    context: MethodContext,
) -> _Training:
    from diffusers import DDPMScheduler

    size_px = asked.size or min(loaded.native_size)
    read = [
        pictures.read_square(_fetch(context, file_id), size_px, f"pictures.{i}")
        for i, file_id in enumerate(asked.pictures)
    ]
    with torch.no_grad():
        subject = sampling.encode_pixels(loaded, torch.stack(read)).float()
    trainable: dict[str, torch.nn.Parameter]
    if asked.method == "lora":
        trainable = adapters.attach(parts, asked.rank, asked.seed)
    else:
        for part in parts.values():
            part.to(torch.float32).requires_grad_(True)
        trainable = {
            adapters.weight_key(n, key): value for n, part in parts.items() for key, value in part.named_parameters()
        }
    rates = {**USUAL_RATES, **loaded.defaults.get("learning_rate", {})}
    rate = asked.learning_rate if asked.learning_rate is not None else float(rates[asked.method])
    return _Training(
        asked=asked,
        loaded=loaded,
        noise=DDPMScheduler.from_config(loaded.pipe.scheduler.config),
        trainable=trainable,
        optimizer=torch.optim.AdamW(trainable.values(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4),
        rate=rate,
        size_px=size_px,
        subject=subject,
    )


def _fetch(context: MethodContext, file_id: str) -> Path:
    try:
        return context.fetch(file_id)
    except FileNotFoundError as error:
        raise InputRefused("pictures", f"file {file_id} is not in the file store; upload it first") from error


def _resume(training: _Training, context: MethodContext) -> bool:
    """Go on from a checkpoint of the same training; False when there is none."""
    found = checkpoints.read(context.checkpoint) if context.checkpoint is not None else None
    if found is None:
        return False
    if found.facts != training.identity():
        raise InputRefused("checkpoint", "belongs to a training with other parameters; start the training anew")
    weights = found.named("weight/")
    with torch.no_grad():
        for key, parameter in training.trainable.items():
            parameter.copy_(weights[key])
    checkpoints.restore_optimizer(training.optimizer, found.tensors)
    if "prior" in found.tensors:
        latents = found.tensors["prior"].to(training.loaded.device)
        training.prior = prior.Prior(latents, training.prior_prompts())
    training.step = found.step
    return True


def _make_prior(training: _Training, context: MethodContext) -> None:
    asked = training.asked
    if not asked.prior_preservation:
        return

    def before_step(done: int) -> None:
        context.progress(done, training.units, "prior pictures")
        if context.should_stop():
            raise Cancelled

    with training.precision():
        training.prior = prior.make(
            training.loaded,
            training.prior_prompts(),
            seed=asked.seed,
            guidance=float(training.loaded.defaults.get("guidance", USUAL_GUIDANCE)),
            size_px=training.size_px,
            before_step=before_step,
        )


def _train(training: _Training, context: MethodContext) -> None:
    """Step until done; keeps a checkpoint every so often and when told to stop."""
    asked, folder = training.asked, context.output_dir / CHECKPOINT
    while training.step < asked.steps:
        if context.should_stop():
            training.save(folder)
            raise Cancelled(folder)
        with training.precision():
            loss = _loss(training)
        training.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for group in training.optimizer.param_groups:
            group["lr"] = training.rate * (1.0 - training.step / asked.steps)
        torch.nn.utils.clip_grad_norm_(training.trainable.values(), 1.0)
        training.optimizer.step()
        training.step += 1
        training.loss = float(loss.detach())
        if not math.isfinite(training.loss):
            raise InputRefused("learning_rate", f"the loss is not finite at step {training.step}; lower the rate")
        context.progress(training.prior_units + training.step, training.units, f"loss {training.loss:.4f}")
        if training.step % asked.checkpoint_every == 0 and training.step < asked.steps:
            training.save(folder)
            context.offer_checkpoint(folder)


def _loss(training: _Training) -> torch.Tensor:
    """The denoising loss of subject rows, plus the weighted one of prior rows."""
    asked, loaded, known = training.asked, training.loaded, training.prior
    generator = torch.Generator().manual_seed((asked.seed * 1_000_003 + training.step) % 2**63)
    rows = torch.randint(len(training.subject), (asked.batch,), generator=generator)
    openings = torch.randint(len(OPENINGS), (asked.batch,), generator=generator).tolist()
    prompts = [OPENINGS[opening].format(training.thing) for opening in openings]
    clean = training.subject[rows.to(training.subject.device)]
    if known is not None:
        others = torch.randint(len(known.latents), (asked.batch,), generator=generator)
        prompts += [known.prompts[row] for row in others.tolist()]
        clean = torch.cat([clean, known.latents[others.to(known.latents.device)]])
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    steps = training.noise.config.num_train_timesteps
    times = torch.randint(steps, (len(clean),), generator=generator).to(clean.device)
    states, extra = training.conditions(prompts)
    noisy = training.noise.add_noise(clean, noise, times).to(loaded.dtype)
    guess = loaded.pipe.unet(noisy, times, encoder_hidden_states=states, **extra).sample.float()
    match training.noise.config.prediction_type:
        case "epsilon":
            target = noise
        case "v_prediction":
            target = training.noise.get_velocity(clean, noise, times)
        case _:
            target = clean
    each = (guess - target).square().mean(dim=(1, 2, 3))
    loss: torch.Tensor = each[: asked.batch].mean()
    if known is not None:
        loss = loss + asked.prior_weight * each[asked.batch :].mean()
    return loss


def _finish(training: _Training, context: MethodContext) -> MethodResult:
    asked, loaded = training.asked, training.loaded
    facts = {
        "kind": asked.method,
        "base_model": asked.base_model,
        "instance_token": asked.instance_token,
        "category": asked.category,
        "prompt": f"a photo of {training.thing}",
        "trained": sorted({key.split(".")[0] for key in training.trainable}),
        "rank": asked.rank if asked.method == "lora" else None,
        "steps": asked.steps,
        "batch": asked.batch,
        "learning_rate": training.rate,
        "prior_pictures": len(training.prior.latents) if training.prior is not None else 0,
        "prior_weight": asked.prior_weight if training.prior is not None else 0.0,
        "size": training.size_px,
        "seed": asked.seed,
    }
    # A low-rank adapter is small enough for full precision; full weights are kept as a base model's are.
    kept = torch.float32 if asked.method == "lora" else torch.float16
    weights = {key: value.detach().to(kept) for key, value in training.trainable.items()}
    files = adapters.write(context.output_dir, weights, facts)
    types = ("application/octet-stream", "application/json")
    return MethodResult(
        files=tuple(ResultFile(path, media, "adapter") for path, media in zip(files, types, strict=True)),
        metadata={**facts, "loss": training.loss if math.isfinite(training.loss) else None},
        peak_gpu_memory_bytes=device.peak_bytes(loaded.device),
    )
