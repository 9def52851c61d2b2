"""Training state on disk: safetensors for numbers, JSON for facts, each replaced atomically; nothing is pickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from executors.methods.base import InputRefused

STATE, FACTS = "state.safetensors", "state.json"
_OPTIMIZER = "optimizer/"
_NUMBER = "#number"
"""Ends the name of a value that is a plain number, as some optimizers count their steps."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A training after `step` steps."""

    step: int
    tensors: dict[str, torch.Tensor]
    facts: Mapping[str, Any]

    def named(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors below a prefix, without it."""
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimizer's moments and counts as flat named tensors."""
    slots = optimizer.state_dict()["state"]
    return {
        f"{_OPTIMIZER}{index}/{name}{'' if torch.is_tensor(value) else _NUMBER}": torch.as_tensor(value)
        .detach()
        .cpu()
        .clone()
        for index, values in slots.items()
        for name, value in values.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what `optimizer_tensors` took, into an optimizer of the same parameters."""
    slots: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        if key.startswith(_OPTIMIZER):
            _, index, name = key.split("/")
            # Memory of its own: what a file was read into may lie at any address, and vectorised sums may then differ in a bit.
            kept = value.item() if name.endswith(_NUMBER) else value.clone()
            slots.setdefault(int(index), {})[name.removesuffix(_NUMBER)] = kept
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})


def write(folder: Path, step: int, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Write a checkpoint over the one before; the step travels with the tensors, so the two files cannot disagree."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "partial"
    (folder / FACTS).write_text(json.dumps(dict(facts), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    flat = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_file({**flat, "step": torch.tensor(step)}, str(partial))
    os.replace(partial, folder / STATE)


def read(folder: Path) -> Checkpoint | None:
    """Read a checkpoint; None when the directory holds none, InputRefused when it is damaged."""
    state = folder / STATE
    if not state.exists():
        return None
    try:
        tensors = load_file(str(state))
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise InputRefused("checkpoint", f"{folder} is damaged ({error}); start the training anew") from error
    return Checkpoint(int(tensors.pop("step")), tensors, facts)
