"""Counts live storage while a network runs on fake tensors: the peak of a call, without its numbers and without a device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class _Live(TorchDispatchMode):
    """Bytes of storages that are alive, apart from those of the weights."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self._known = {t.untyped_storage()._cdata: 0 for t in (*module.parameters(), *module.buffers())}
        self._now = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes()
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self._known.pop(key, 0)


def peak_bytes(
    build: Callable[[], torch.nn.Module], dtype: torch.dtype, call: Callable[[torch.nn.Module], object]
) -> int:
    """Return the most bytes that are alive at once in a call, weights left out."""
    before = torch.get_default_dtype()
    with FakeTensorMode():
        torch.set_default_dtype(dtype)
        try:
            module = build().eval()
            live = _Live(module)
            with torch.no_grad(), live:
                call(module)
        finally:
            torch.set_default_dtype(before)
    return live.peak
