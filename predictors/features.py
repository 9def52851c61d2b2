"""Reads a task's features once: the keys its history is filed under and the numbers its run time scales with."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from engine.tasks import SECOND, TaskSpec, TaskType
from predictors import physics
from predictors.activations import TRAINING_ROWS

Feature = str | int | float
Key = tuple[Feature, ...]
Covariates = tuple[float, float, float, float]
"""Logarithms the run time scales with: pictures, steps, pixels per picture, and the work that these come to by arithmetic."""

COVARIATES = 4
TRAINING_METHODS = frozenset({"dreambooth"})
_STEPS, _TRAINING_STEPS = 30.0, 400.0
_PIXELS = 512.0 * 512.0
_NUMBERS = (
    "images",
    "steps",
    "width",
    "height",
    "loras",
    "prompt_length",
    "seconds",
    "weights_bytes",
    "declared_us",
    "in_flight",
    "in_flight_model",
)
_USUAL_WORK_S = physics.run_seconds(physics.SD15)


@dataclass(slots=True)  # Frozen, it would take three times as long to make, and one is made for every prediction.
class Request:
    """A task as the predictors see it. Missing features have neutral values."""

    method: str
    model: str
    user: str
    ladder: tuple[Key, ...]
    """Nested keys below the method: from the coarsest to the finest. None holds a size, so that larger never seems quicker."""
    memories: tuple[Hashable, ...]
    """Keys of the residual means: of the user, the user with the shape, the model with or without LoRA, the model, all."""
    covariates: Covariates
    """0 where unknown: one picture, the usual steps, 512 x 512 pixels or what the family was trained for."""
    load: tuple[float, float]
    """log1p of the requests in flight when it was submitted: in all, and for its model."""
    declared_s: float
    """Run time the caller declares; 0 when it declares none."""
    work_s: float
    """What the run would take on a typical GPU by its arithmetic; 0 when the model's family is unknown."""
    traits: tuple[float, float]
    """Number of LoRA adapters, and log1p of the prompt's length."""
    pixels: int
    """Pixels per picture; 0 when unknown."""
    batch: int
    """Pictures of a generation, rows of a training's batch."""
    weights_bytes: int
    """Size of the model's weights in GPU memory; 0 when unknown."""
    family: str
    full: bool = False
    """A training changes all weights, not an adapter."""
    frugal: bool = False
    """A training computes activations twice instead of keeping them."""


def read_request(features: Mapping[str, Feature]) -> Request:
    """Return the request that a feature mapping describes.

    Known names: ``method, task_type, model, user, kind, images, steps, width, height, loras, lora_set, style, prompt_length,
    declared_us, seconds, in_flight, in_flight_model, weights_bytes, family, guidance``, and of a training ``rows`` and ``frugal``;
    others are ignored. Raises ValueError when a number is not finite or not a number.
    """
    get = features.get
    method = str(get("method") or get("task_type") or "")
    model = str(get("model") or "")
    user = str(get("user") or "")
    images, steps, width, height, loras, prompt_length, seconds, weights_bytes, declared_us, in_flight, of_its_model = [
        0.0 if (value := get(name)) is None else _number(name, value) for name in _NUMBERS
    ]
    pixels = width * (height or width)
    with_lora = 1 if loras > 0 or get("lora_set") else 0
    family_name = str(get("family") or "")
    family = physics.family_of(family_name, int(weights_bytes)) if family_name or weights_bytes else None
    of_model: Key = (model, with_lora)
    shape: Key = (model, with_lora, str(get("kind") or ""), seconds)
    style: Key = (*shape, loras, str(get("lora_set") or ""), str(get("style") or ""), prompt_length)
    training = method in TRAINING_METHODS or get("task_type") == TaskType.TP.value
    covariates, work_s = _covariates(features, family, (images, steps, pixels), training)
    of_user = (user, shape)
    return Request(
        method=method,
        model=model,
        user=user,
        ladder=((), (model,), of_model, shape, style),
        memories=(user, user, user, of_user, of_user, of_model, model, model, None),
        covariates=covariates,
        load=(math.log1p(in_flight), math.log1p(of_its_model)),
        declared_s=declared_us / SECOND or seconds,
        work_s=work_s,
        traits=(loras, math.log1p(prompt_length)),
        pixels=int(pixels),
        batch=max(1, int((_number("rows", get("rows")) or TRAINING_ROWS) if method in TRAINING_METHODS else images)),
        weights_bytes=int(weights_bytes),
        family=family_name,
        full=training and get("style") == "full",
        frugal=training and bool(get("frugal")),
    )


def _covariates(
    features: Mapping[str, Feature],
    family: physics.Family | None,
    sizes: tuple[float, float, float],
    training: bool,
) -> tuple[Covariates, float]:
    images, steps, pixels = sizes
    log_images = math.log(images) if images > 1.0 else 0.0
    log_steps = math.log(steps / (_TRAINING_STEPS if training else _STEPS)) if steps > 0.0 else 0.0
    if family is None:
        log_pixels = math.log(pixels / _PIXELS) if pixels > 0.0 else 0.0
        return (log_images, log_steps, log_pixels, 0.0), 0.0
    log_pixels = math.log((pixels or family.native_px**2) / _PIXELS)
    edge = math.sqrt(pixels)
    work_s = physics.run_seconds(
        family,
        width=edge,
        height=edge,
        steps=steps,
        images=images,
        guided=not 0.0 < _number("guidance", features.get("guidance")) <= 1.0,
        training=training,
    )
    return (log_images, log_steps, log_pixels, math.log(work_s / _USUAL_WORK_S)), work_s


def task_features(task: TaskSpec) -> dict[str, Feature]:
    """Return the features of a submitted task: its own, and what its other fields say."""
    features: dict[str, Feature] = {"user": task.tenant, **dict(task.features)}
    # A training's own choice of method (lora, full) is a style of it; the AI method is the task's.
    if features.get("method", task.method) != task.method:
        features.setdefault("style", features["method"])
    features["method"] = task.method
    features["task_type"] = task.task_type.value
    features["model"] = task.model
    if task.declared_us is not None:
        features["declared_us"] = task.declared_us
    return features


def _number(name: str, value: Feature | None) -> float:
    if value is None or value == "":
        return 0.0
    if isinstance(value, float) and 0.0 <= value < math.inf:
        return value
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"features.{name}: expected a finite number, got {value!r}; leave it out when it is unknown")
    return max(0.0, number)
