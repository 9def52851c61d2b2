"""Short trainings, as the tests of their options and of their results ask for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from executors.methods import adapters
from executors.methods.base import MethodResult, ModelRef
from executors.methods.dreambooth import DreamBooth
from executors.methods.parameters import DreamBoothParameters


def asked(files: dict[str, Path], **changes: Any) -> DreamBoothParameters:
    usual = {"category": "emblem", "steps": 3, "batch": 2, "learning_rate": 1e-2, "size": 64}
    return DreamBoothParameters.model_validate(
        {"pictures": list(files), **usual, "prior_preservation": False, **changes}
    )


def run(ref: ModelRef, parameters: DreamBoothParameters, context: Any) -> MethodResult:
    method = DreamBooth()
    method.load(ref, "cpu")
    return method.run(parameters, context)


def weights(result: MethodResult) -> dict[str, torch.Tensor]:
    return load_file(str(next(file.path for file in result.files if file.name == adapters.WEIGHTS)))
