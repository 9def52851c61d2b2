"""Layers that travel: a network larger than its card lies in host memory, and each layer comes only while it computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

Bring = Callable[[torch.Tensor], torch.Tensor]
"""Returns a tensor's copy on the device."""


def travel(module: torch.nn.Module, device: torch.device, bring: Bring | None = None) -> None:
    """Keep a module's weights in host memory from now on; each layer's are on the device only while it computes.

    Parameters stay the same objects, and between calls their data are those in host memory: an adapter may be written into them.
    Only for use without gradients. `bring` stands in for the copy to the device.
    """
    for layer in module.modules():
        if any(True for _ in _own(layer)):
            _Traveller(layer, device, bring or partial(_copied, device))


class _Traveller:
    """One layer on its way."""

    def __init__(self, layer: torch.nn.Module, device: torch.device, bring: Bring) -> None:
        self._device = device
        self._bring = bring
        self._home = {name: _pinned(tensor.data, device) for name, tensor in _own(layer)}
        self._go(layer, self._home)
        layer.register_forward_pre_hook(self._come, with_kwargs=True)
        # Also after an error: what stayed behind would be counted as free.
        layer.register_forward_hook(self._leave, always_call=True)

    def _come(
        self, layer: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._go(layer, {name: self._bring(tensor) for name, tensor in self._home.items()})
        # Some parts make their inputs where they see their weights: in host memory.
        return tuple(self._here(value) for value in arguments), {name: self._here(v) for name, v in named.items()}

    def _leave(self, layer: torch.nn.Module, _arguments: Any, _result: Any) -> None:
        self._go(layer, self._home)

    def _here(self, value: Any) -> Any:
        return value.to(self._device) if isinstance(value, torch.Tensor) else value

    @staticmethod
    def _go(layer: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in _own(layer):
            tensor.data = tensors[name]


def _own(layer: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """A layer's own weights, those of layers inside it left out."""
    return [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]


def _copied(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    # Waited for: a later change of the weights in host memory must not meet a copy that is still under way.
    return tensor.to(device)


def _pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Memory that the device reads by itself, twice as fast; as it is where there is none left of it."""
    home = tensor.cpu()
    if device.type != "cuda":
        return home
    try:
        return home.pin_memory()
    except RuntimeError:
        return home
