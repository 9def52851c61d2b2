"""The state of a diffusers scheduler as named tensors and plain values, so that a picture can stop between two steps.

Nothing is pickled: what comes back from a file is data. State is what differs from a fresh scheduler that was built the same way
and was given the same number of steps; restoring lays it over such a one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_CONFIG = "_internal_dict"
_PLAIN = bool | int | float | str | None


def export(scheduler: Any, fresh: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return copies of the state's tensors, on the CPU, and its plain values. The entries of a list are named ``name/index``."""
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for name, value in vars(scheduler).items():
        if name == _CONFIG:
            continue
        before = getattr(fresh, name, None)
        if isinstance(value, torch.Tensor):
            if not (isinstance(before, torch.Tensor) and torch.equal(before.cpu(), value.cpu())):
                tensors[name] = _copied(value)
        elif isinstance(value, _PLAIN):
            if value != before or type(value) is not type(before):
                values[name] = value
        elif isinstance(value, list) and all(isinstance(entry, torch.Tensor | None) for entry in value):
            values[name] = [entry is not None for entry in value]
            tensors.update({f"{name}/{i}": _copied(entry) for i, entry in enumerate(value) if entry is not None})
    return tensors, values


def restore(fresh: Any, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any], device: torch.device) -> None:
    """Lay exported state over a fresh scheduler; pictures go to `device`. Raises ValueError when the state is another kind's."""
    for name in [*values, *(name for name in tensors if "/" not in name)]:
        # Some state comes into being only with the first steps; nothing may take the place of a method.
        if name == _CONFIG or not name.isidentifier() or name.startswith("__") or hasattr(type(fresh), name):
            raise ValueError(f"scheduler state: {type(fresh).__name__} cannot take {name!r}; start the picture anew")
    for name, value in values.items():
        if isinstance(value, list):
            try:
                entries = [_placed(tensors[f"{name}/{i}"], device) if here else None for i, here in enumerate(value)]
            except KeyError as error:
                raise ValueError(f"scheduler state: {error} is missing; the kept picture is not whole") from None
            setattr(fresh, name, entries)
        else:
            setattr(fresh, name, value)
    for name, tensor in tensors.items():
        if "/" not in name:
            setattr(fresh, name, _placed(tensor, device))


def _placed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Single numbers stay on the CPU, where the schedulers keep their tables: reading one there waits for no GPU."""
    return tensor.clone() if tensor.ndim == 0 else tensor.to(device, copy=True)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().clone()
