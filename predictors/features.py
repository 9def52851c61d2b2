"""Reads a task's features once: the keys its history is filed under and the numbers its run time scales with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from engine.tasks import SECOND, TaskSpec

Feature = str | int | float
Key = tuple[Feature, ...]

COVARIATES = 3
"""Logarithms the run time scales with: pictures, steps, pixels per picture."""


@dataclass(frozen=True, slots=True)
class Request:
    """A task as the predictors see it. Missing features have neutral values."""

    method: str
    model: str
    user: str
    ladder: tuple[Key, ...]
    """Nested keys below the method: from the coarsest to the finest."""
    covariates: tuple[float, float, float]
    load: tuple[float, float]
    """log1p of the requests in flight when it was submitted: in all, and for its model."""
    declared_s: float
    """Run time the caller declares; 0 when it declares none."""
    pixels: int
    """Pixels per picture; 0 when unknown."""
    batch: int
    weights_bytes: int
    """Size of the model's weights in GPU memory; 0 when unknown."""
    family: str


def read_request(features: Mapping[str, Feature]) -> Request:
    """Return the request that a feature mapping describes.

    Known names: ``method, task_type, model, user, kind, images, steps, width, height, loras, lora_set, style, prompt_length,
    declared_us, seconds, in_flight, in_flight_model, weights_bytes, family``; others are ignored. Raises ValueError when a number
    is not finite or not a number.
    """
    get = features.get
    method = str(get("method") or get("task_type") or "")
    model = str(get("model") or "")
    images = _number(features, "images")
    steps = _number(features, "steps")
    width = _number(features, "width")
    pixels = width * (_number(features, "height") or width)
    loras = _number(features, "loras")
    with_lora = 1 if loras > 0 or get("lora_set") else 0
    seconds = _number(features, "seconds")
    shape: Key = (model, with_lora, str(get("kind") or ""), images, steps, pixels, seconds)
    style: Key = (
        *shape,
        loras,
        str(get("lora_set") or ""),
        str(get("style") or ""),
        _number(features, "prompt_length"),
    )
    declared_s = _number(features, "declared_us") / SECOND or seconds
    return Request(
        method=method,
        model=model,
        user=str(get("user") or ""),
        ladder=((), (model,), (model, with_lora), shape, style),
        covariates=(_log(images), _log(steps), _log(pixels)),
        load=(math.log1p(_number(features, "in_flight")), math.log1p(_number(features, "in_flight_model"))),
        declared_s=declared_s,
        pixels=int(pixels),
        batch=max(1, int(images)),
        weights_bytes=int(_number(features, "weights_bytes")),
        family=str(get("family") or ""),
    )


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


def _number(features: Mapping[str, Feature], name: str) -> float:
    value = features.get(name)
    if value is None or value == "":
        return 0.0
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"features.{name}: expected a finite number, got {value!r}; leave it out when it is unknown")
    return max(0.0, number)


def _log(value: float) -> float:
    return math.log(value) if value > 0.0 else 0.0
