"""Many adapters (LoRA) in one call of a network: each request's rows get the low-rank differences of its own adapters.

For every adapted layer the call adds ``up[request] (down[request] x)``, two batched matrix products, to what the base layer gives.
The base weights are never touched, so nothing is swapped, fused or undone, and requests without adapters get the base's numbers.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from executors.batching import lora_files
from executors.batching.requests import AdapterWeights
from executors.methods import adapters
from executors.methods.base import ModelMissing
from executors.methods.pipelines import LoadedPipeline

SLOTS = 64
"""Different sets of adapters that stay written; more are made when one call needs more."""
MAX_RANK = 512
Place = Literal["text", "steps"]
_Pairs = dict[str, dict[str, lora_files.Pair]]


@dataclass(frozen=True, slots=True)
class PreparedAdapter:
    """An adapter that fits a bank's model, on its device."""

    name: str
    pairs: Mapping[str, lora_files.Pair]

    @property
    def size_bytes(self) -> int:
        """The memory that its weights take."""
        return sum(t.numel() * t.element_size() for pair in self.pairs.values() for t in pair)


class AdapterBank:
    """Adapters by name on the parts of one loaded model. Calls are for one thread; adapters may come and go from others."""

    def __init__(self, loaded: LoadedPipeline) -> None:
        self._layers = {
            adapters.weight_key(part, name): _Layer(module, loaded.device)
            for part, whole in loaded.parts.items()
            for name, module in whole.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        }
        # Prompts are encoded by another thread than the one that steps: neither may touch what the other one uses.
        self._places = {
            where: _Slots({key: layer for key, layer in self._layers.items() if _place_of(key) == where})
            for where in ("text", "steps")
        }
        unet = getattr(loaded.pipe, "unet", None)
        rows = {key: layer.rows for key, layer in self._layers.items()}
        self._names = lora_files.LayerNames(self._layers, None if unet is None else unet.config, rows)
        self._guard = threading.Lock()
        """Held while adapters come and go: other threads add them while calls are under way."""
        self._pairs: _Pairs = {}
        self._inserted = 0
        self._numbers: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._pairs

    def names(self) -> tuple[str, ...]:
        """Return the adapters that requests may name."""
        return tuple(self._pairs)

    def number(self, name: str) -> int:
        """Return a number that an adapter has since it was added: another one under its name has another. 0 for none."""
        return self._numbers.get(name, 0)

    def size_bytes(self, name: str) -> int:
        """Return the memory that an adapter's weights take."""
        return sum(t.numel() * t.element_size() for pair in self._pairs[name].values() for t in pair)

    def add(self, name: str, source: Path) -> None:
        """Read an adapter, a directory that a training left or another tool's safetensors file; raises ModelMissing."""
        self.insert(self.prepared(name, source))

    def prepared(self, name: str, source: Path) -> PreparedAdapter:
        """Read an adapter and bring it to the device without adding it; unlike all else here, any thread may call it.

        Raises ModelMissing like `add`.
        """
        return PreparedAdapter(name, self._fitting(name, *lora_files.read(source)))

    def insert(self, prepared: PreparedAdapter) -> None:
        """Add what `prepared` returned, in place of an adapter of its name; any thread may call it."""
        with self._guard:
            self._remove(prepared.name)
            self._pairs[prepared.name] = dict(prepared.pairs)
            self._inserted += 1
            self._numbers[prepared.name] = self._inserted

    def put(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take an adapter's tensors, ``<part>.<layer>.lora_A.weight`` and ``lora_B.weight`` or as other tools name them.

        Raises ModelMissing with the reason when they do not fit the base model.
        """
        self.insert(PreparedAdapter(name, self._fitting(name, tensors, {})))

    def _fitting(
        self, name: str, tensors: Mapping[str, torch.Tensor], noted: Mapping[str, Any]
    ) -> dict[str, lora_files.Pair]:
        """Return an adapter's pairs on the device; raises ModelMissing when they do not fit the base model."""
        found: dict[str, lora_files.Pair] = {}
        for key, given in lora_files.pairs(name, tensors, noted, self._names).items():
            layer = self._layers[key]
            pair = layer.shaped(given)
            layer.check(name, key, *pair)
            found[key] = layer.placed(pair)
        return found

    def remove(self, name: str) -> None:
        """Forget an adapter; nothing when there is none of this name. Any thread may call it."""
        with self._guard:
            self._remove(name)

    def _remove(self, name: str) -> None:
        if self._pairs.pop(name, None) is not None:
            for slots in self._places.values():
                slots.forget(name)

    @contextmanager
    def applied(self, sets: Sequence[AdapterWeights], where: Place | None = None) -> Iterator[None]:
        """Within this, the rows of a call belong to as many requests, in order and equally many each; raises KeyError.

        `where` says whose calls: the text encoders', the stepped network's, or both. One thread at a time for each.
        """
        wanted = [tuple(sorted(each)) for each in sets]
        if not any(wanted):
            yield
            return
        places = [slots for name, slots in self._places.items() if where in (None, name)]
        with self._guard:
            indices = [slots.index(wanted, self._pairs) for slots in places]
        for slots, index in zip(places, indices, strict=True):
            slots.begin(index)
        try:
            yield
        finally:
            for slots in places:
                slots.end()


def _place_of(key: str) -> Place:
    return "text" if key.startswith("text_encoder") else "steps"


class _Slots:
    """Sets of adapters written into the layers of one place."""

    def __init__(self, layers: dict[str, _Layer]) -> None:
        self._layers = layers
        self._written: OrderedDict[AdapterWeights, int] = OrderedDict()
        self._rank = 0
        self._applied: tuple[int, ...] = ()

    def forget(self, name: str) -> None:
        """Forget the sets that an adapter is part of."""
        for written in [written for written in self._written if any(each == name for each, _ in written)]:
            del self._written[written]

    def begin(self, index: tuple[int, ...]) -> None:
        """Have the layers add the sets of these slots from now on."""
        touched = [layer for layer in self._layers.values() if layer.down is not None]
        if index != self._applied:
            for layer in touched:
                layer.select(index)
            self._applied = index
        for layer in touched:
            layer.active = True

    def end(self) -> None:
        """Have the layers add nothing."""
        for layer in self._layers.values():
            layer.active = False

    def index(self, wanted: list[AdapterWeights], pairs: _Pairs) -> tuple[int, ...]:
        """Return the slot of each set, after writing those that are not written yet; raises KeyError."""
        different = list(dict.fromkeys([(), *wanted]))
        for each in different:
            for name, _ in each:
                if name not in pairs:
                    raise KeyError(f"adapter {name!r} is not loaded here; it has {', '.join(pairs) or 'none'}")
        missing = [each for each in different if each not in self._written]
        if missing:
            self._make_room(different, missing, pairs)
            for each in missing:
                self._write(each, pairs)
        for each in different:
            self._written.move_to_end(each)
        return tuple(self._written[each] for each in wanted)

    def _make_room(self, different: list[AdapterWeights], missing: list[AdapterWeights], pairs: _Pairs) -> None:
        rank = max(self._rank_of(each, pairs) for each in missing)
        keys = {key for each in missing for name, _ in each for key in pairs[name] if key in self._layers}
        grows = rank > self._rank or any(self._layers[key].down is None for key in keys)
        slots = max(SLOTS, len(different))
        if grows or len(different) > self._slots():
            keys |= {key for key, layer in self._layers.items() if layer.down is not None}
            self._rank = max(rank, self._rank)
            for key in keys:
                self._layers[key].allocate(slots, self._rank)
            self._written.clear()
            missing[:] = different
            return
        needed = len(self._written) + len(missing) - self._slots()
        for each in [each for each in self._written if each not in different][: max(0, needed)]:
            del self._written[each]

    def _slots(self) -> int:
        sizes = [len(layer.down) for layer in self._layers.values() if layer.down is not None]
        return max(sizes, default=len(self._written) + SLOTS)

    def _rank_of(self, adapted: AdapterWeights, pairs: _Pairs) -> int:
        ranks: dict[str, int] = {}
        for name, _ in adapted:
            for key, (down, _up) in pairs[name].items():
                if key not in self._layers:
                    continue
                ranks[key] = ranks.get(key, 0) + len(down)
        return max(ranks.values(), default=0)

    def _write(self, adapted: AdapterWeights, pairs: _Pairs) -> None:
        used = set(self._written.values())
        slot = next(slot for slot in range(self._slots()) if slot not in used)
        for key, layer in self._layers.items():
            if layer.down is not None:
                parts = [(*pairs[name][key], weight) for name, weight in adapted if key in pairs[name]]
                layer.write(slot, parts)
        self._written[adapted] = slot
        self._applied = ()


class _Layer:
    """A base layer with room for the differences of several sets of adapters, [slots, rank, in] and [slots, out, rank]."""

    def __init__(self, module: torch.nn.Linear | torch.nn.Conv2d, device: torch.device) -> None:
        self._module = module
        self._device = device
        """Where it computes; between calls its weights may lie elsewhere."""
        self._hooked = False
        self.active = False
        self.down: torch.Tensor | None = None
        self._up: torch.Tensor | None = None
        self._selected: lora_files.Pair | None = None

    @property
    def rows(self) -> int:
        """The rows of the layer's weight: what it gives."""
        return len(self._module.weight)

    def check(self, name: str, key: str, down: torch.Tensor, up: torch.Tensor) -> None:
        """Raise ModelMissing when a pair does not fit this layer."""
        weight = self._module.weight
        wide = (len(down), *weight.shape[1:])
        if tuple(down.shape) != wide or up.shape[:2] != (weight.shape[0], len(down)) or up[0, 0].numel() != 1:
            raise ModelMissing(
                f"adapter {name}: its layer {key} is {tuple(up.shape)} x {tuple(down.shape)}, the base model's weight is "
                f"{tuple(weight.shape)}; it belongs to another base"
            )
        if isinstance(self._module, torch.nn.Conv2d) and self._module.groups != 1:
            raise ModelMissing(f"adapter {name}: its layer {key} is a grouped convolution, which cannot be adapted")
        if not 1 <= len(down) <= MAX_RANK:
            raise ModelMissing(f"adapter {name}: its layer {key} has rank {len(down)}; from 1 to {MAX_RANK} are taken")
        if not bool(torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise ModelMissing(f"adapter {name}: its layer {key} holds numbers that are not finite; train it again")

    def shaped(self, pair: lora_files.Pair) -> lora_files.Pair:
        """Give a pair this layer's number of axes: a matrix and a convolution of one place are the same."""
        down, up = pair
        if isinstance(self._module, torch.nn.Linear) and down.ndim == 4 and down[0, 0].numel() == 1:
            return down.flatten(1), up.flatten(1)
        if isinstance(self._module, torch.nn.Conv2d) and down.ndim == 2:
            return down[:, :, None, None], up
        return pair

    def placed(self, pair: lora_files.Pair) -> lora_files.Pair:
        """Bring a pair to where the layer computes, ``up`` as [out, rank]."""
        down, up = (each.detach().to(self._device, self._module.weight.dtype) for each in pair)
        return down, up.reshape(up.shape[0], up.shape[1])

    def allocate(self, slots: int, rank: int) -> None:
        """Make empty room; what was written is gone."""
        weight = self._module.weight
        self.down = weight.new_zeros((slots, rank, *weight.shape[1:]), device=self._device)
        self._up = weight.new_zeros((slots, weight.shape[0], rank), device=self._device)
        self._selected = None
        if not self._hooked:
            self._module.register_forward_hook(self._after)
            self._hooked = True

    @torch.no_grad()
    def write(self, slot: int, parts: list[tuple[torch.Tensor, torch.Tensor, float]]) -> None:
        """Put pairs with their weights into a slot, one rank after the other."""
        assert self.down is not None
        assert self._up is not None
        self.down[slot].zero_()
        self._up[slot].zero_()
        at = 0
        for down, up, weight in parts:
            end = at + len(down)
            self.down[slot, at:end] = down
            self._up[slot, :, at:end] = weight * up
            at = end

    def select(self, index: tuple[int, ...]) -> None:
        """Gather the slots of the requests of the calls that follow."""
        assert self.down is not None
        assert self._up is not None
        places = torch.tensor(index, device=self.down.device)
        down, up = self.down[places], self._up[places]
        if isinstance(self._module, torch.nn.Linear):
            down, up = down.transpose(1, 2).contiguous(), up.transpose(1, 2).contiguous()
        self._selected = (down, up)

    def _after(self, module: torch.nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        if not self.active or self._selected is None:
            return None
        down, up = self._selected
        requests, x = len(down), inputs[0]
        if isinstance(module, torch.nn.Conv2d):
            return output + self._convolved(module, x, down, up)
        rows = x.reshape(requests, -1, x.shape[-1])
        base = output.reshape(requests, -1, output.shape[-1])
        # In place: what the base layer gave is nobody else's yet, and a copy costs as much as the product.
        return base.baddbmm_(torch.bmm(rows, down), up).view(output.shape)

    @staticmethod
    def _convolved(module: torch.nn.Conv2d, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """One grouped convolution, a group for each request, then one product for each place."""
        requests, rank = down.shape[:2]
        each, (channels, height, width) = len(x) // requests, x.shape[1:]
        grouped = x.view(requests, each, channels, height, width).transpose(0, 1)
        grouped = grouped.reshape(each, requests * channels, height, width)
        if module.padding_mode != "zeros":
            grouped = torch.nn.functional.pad(
                grouped, module._reversed_padding_repeated_twice, mode=module.padding_mode
            )
        narrow = torch.nn.functional.conv2d(
            grouped,
            down.reshape(requests * rank, channels, *down.shape[3:]),
            stride=module.stride,
            padding=module.padding if module.padding_mode == "zeros" else 0,
            dilation=module.dilation,
            groups=requests,
        )
        size = narrow.shape[2:]
        places = narrow.view(each, requests, rank, -1).permute(1, 2, 0, 3).reshape(requests, rank, -1)
        wide = torch.bmm(up, places).view(requests, -1, each, *size)
        return wide.transpose(1, 2).reshape(requests * each, -1, *size)
