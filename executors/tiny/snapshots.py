"""Training state on disk as safetensors plus JSON, so that a training that was stopped goes on as if it had not been."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from executors.methods import checkpoints


def save(
    path: Path, step: int, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer, **facts: Any
) -> None:
    """Write modules and optimizer state after `step` steps to `path`.safetensors and `path`.json, each atomically."""
    tensors: dict[str, torch.Tensor] = {}
    for name, module in modules.items():
        tensors |= {f"module/{name}/{key}": value.detach().clone() for key, value in module.state_dict().items()}
    tensors |= checkpoints.optimizer_tensors(optimizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, str(partial), metadata={"step": str(step)})
    os.replace(partial, path.with_suffix(".safetensors"))
    partial.write_text(json.dumps({"step": step, **facts}, indent=1) + "\n")
    os.replace(partial, path.with_suffix(".json"))


def restore(path: Path, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer | None = None) -> int:
    """Load what `save` wrote into the modules and return the step count, or 0 when there is nothing."""
    file = path.with_suffix(".safetensors")
    if not file.exists():
        return 0
    tensors = load_file(str(file))
    for name, module in modules.items():
        prefix = f"module/{name}/"
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    if optimizer is not None:
        checkpoints.restore_optimizer(optimizer, tensors)
    return int(json.loads(path.with_suffix(".json").read_text())["step"])
