"""Prompts for the network, encoded in batches and remembered: pictures of one job share theirs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from executors.batching.lora import AdapterBank
from executors.batching.requests import PictureRequest
from executors.methods import sampling
from executors.methods.pipelines import LoadedPipeline

REMEMBERED = 64
"""Prompts whose encoding is kept, the least recently used are forgotten first."""
AT_ONCE = 16
"""Prompts that one call encodes at most."""

_Key = tuple[str, str, bool, Any, float]


class PromptEncoder:
    """The text encoders of a loaded model, with the adapters of each prompt's own request."""

    def __init__(self, loaded: LoadedPipeline, bank: AdapterBank) -> None:
        self._loaded = loaded
        self._bank = bank
        self._known: OrderedDict[_Key, sampling.Conditioning] = OrderedDict()
        self._alone_at_it = threading.Lock()

    def encode(self, requests: Sequence[PictureRequest]) -> list[sampling.Conditioning]:
        """Encode the prompts of requests, in their order; one that is alone goes exactly the plain pipeline's way.

        Any thread may call it; one waits for the other.
        """
        with self._alone_at_it:
            return self._encode(requests)

    def _encode(self, requests: Sequence[PictureRequest]) -> list[sampling.Conditioning]:
        keys = [self._key(request) for request in requests]
        found = {key: self._known[key] for key in keys if key in self._known}
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in found}
        alike: dict[tuple[bool, float, bool], list[_Key]] = {}
        for key in missing:
            # SDXL zeroes an absent negative prompt, which a list of prompts cannot say one by one.
            alike.setdefault((key[2], key[4], self._loaded.family == "sdxl" and not key[1]), []).append(key)
        for (guided, scale, _absent), group in alike.items():
            self._loaded.set_adapter_scale(scale)
            for start in range(0, len(group), AT_ONCE):
                part = group[start : start + AT_ONCE]
                found.update(zip(part, self._run([missing[key] for key in part], guided), strict=True))
        for key in keys:
            self._known[key] = found[key]
            self._known.move_to_end(key)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return [found[key] for key in keys]

    def _key(self, request: PictureRequest) -> _Key:
        guided = sampling.is_guided(self._loaded, request.guidance)
        adapters = tuple((name, weight, self._bank.number(name)) for name, weight in sorted(request.adapters))
        return (request.prompt, request.negative_prompt if guided else "", guided, adapters, request.adapter_scale)

    @torch.no_grad()
    def _run(self, requests: list[PictureRequest], guided: bool) -> list[sampling.Conditioning]:
        prompts = [request.prompt for request in requests]
        negatives = [request.negative_prompt for request in requests]
        with self._bank.applied([request.adapters for request in requests], "text"):
            return sampling.encode_each(self._loaded, prompts, negatives, guided)
