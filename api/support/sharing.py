"""Whose Pods a model's tasks run in: a personalised model that is a LoRA shares the Pods of its base, any other has its own.

Pure. What an attempt must bring along besides is said here as well, in the words of `executors.terms`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from api.support.jobs import Model
from executors.terms import AdapterTerms

FindModel = Callable[[str], Model | None]
BASES = frozenset({"builtin", "local"})


class ModelsDoNotFit(ValueError):
    """Models that cannot be used together; the message begins with the parameter that is wrong."""


def pod_model(model: Model, find_model: FindModel) -> tuple[str, tuple[str, ...]]:
    """Return the model that the Pod holds and the adapters that a task adds, by their ids.

    A LoRA whose base nobody offers any more keeps Pods of its own: nodes may still have it.
    """
    if model.kind == "lora" and model.base:
        base = find_model(model.base)
        if base is not None and base.kind in BASES:
            return base.model_id, (model.model_id,)
    return model.model_id, ()


def base_of(model: Model) -> str:
    """Return the base model that a model's weights fit."""
    return model.base or model.model_id


def further(
    model: Model, uses: Sequence[Mapping[str, Any]], tenant: str, find_model: FindModel
) -> list[tuple[Model, float]]:
    """Return the models that a request adds to its own, with their weights; raises ModelsDoNotFit."""
    found: list[tuple[Model, float]] = []
    for number, use in enumerate(uses):
        field, name = f"adapters.{number}.model", str(use.get("model", ""))
        other = find_model(name)
        if other is None or other.tenant not in ("", tenant):
            raise ModelsDoNotFit(f"{field}: there is no model {name!r}; the list of models names those there are")
        if other.kind != "lora":
            raise ModelsDoNotFit(
                f"{field}: {name!r} is {_kind(other)}, only LoRAs can be added to another model; name it as the model"
            )
        if base_of(other) != base_of(model):
            raise ModelsDoNotFit(
                f"{field}: {name!r} was trained on {base_of(other)!r}, this request draws with {base_of(model)!r}; "
                "use models of one base"
            )
        if other.model_id == model.model_id:
            raise ModelsDoNotFit(f"{field}: {name!r} is the request's model already; say adapter_scale for its weight")
        found.append((other, float(use.get("weight", 1.0))))
    return found


def terms_of(model: Model, weight: float) -> AdapterTerms:
    """Return a LoRA as a Pod is told of it."""
    return AdapterTerms(model.model_id, dict(model.files), weight, base_of(model), model.deployed_pods > 0)


def _kind(model: Model) -> str:
    return "a fully trained model" if model.kind == "full" else "a base model"
