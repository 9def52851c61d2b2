"""A network larger than its card: layers travel, pictures stay the same, and no more than a layer is there at once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_folders import write_safetensors

from executors.batching.batch import RunningBatch
from executors.batching.lora import AdapterBank
from executors.batching.requests import Failed, Finished, PictureRequest
from executors.memory import layers, residence
from executors.memory.calls import CallMemory
from executors.memory.footprint import Footprint, PartWeights, read_footprint, read_header
from executors.memory.plan import GIB, MANY, MemoryPlan, Place, described, too_large
from executors.methods import adapters, dreambooth, pipelines
from executors.methods.base import ModelRef
from executors.pod_models import BUILTIN_MODELS

TINY = BUILTIN_MODELS["tiny"]
pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(not (TINY / "model_index.json").is_file(), reason="the bundled model is not in this tree"),
]
CPU = torch.device("cpu")
# As in the true SDXL: the largest layers of its UNet and autoencoder are convolutions, those of its text encoders token tables.
SDXL = Footprint(
    parts={
        "unet": PartWeights(2_567_463_684, rest_numbers=2_567_463_684 - 29_492_480),
        "vae": PartWeights(83_653_863, rest_numbers=83_653_863 - 2_359_808),
        "text_encoder": PartWeights(123_060_480, rest_numbers=123_060_480 - 37_945_344),
        "text_encoder_2": PartWeights(694_659_840, rest_numbers=694_659_840 - 63_242_240),
    },
    step_elements=15.9 * 320,
    decode_elements=6.0 * 128,
    factor=8,
    upcasts=True,
    native_px=1024,
)


@pytest.fixture
def tiny() -> pipelines.LoadedPipeline:
    return pipelines.load(ModelRef("tiny", TINY), "cpu")


class Card:
    """Stands in for a device: what is brought there is a copy, and is counted for as long as it lives."""

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0
        self.brought = 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        self.now += copy.nbytes
        self.brought += copy.nbytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(copy.untyped_storage(), self._left, copy.nbytes)
        return copy

    def _left(self, nbytes: int) -> None:
        self.now -= nbytes


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    made = Card()
    monkeypatch.setattr(layers, "_copied", lambda _device, tensor: made(tensor))
    return made


def drawn(loaded: pipelines.LoadedPipeline, *names: str, **more: Any) -> dict[str, Any]:
    batch = RunningBatch(loaded, bank=more.pop("bank", None))
    for name in names:
        batch.admit(PictureRequest(name, f"a red star {name}", seed=3, steps=3, guidance=3.0, scheduler="ddim", **more))
    made: dict[str, Any] = {}
    for _ in range(60):
        for event in batch.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Finished):
                made[event.id] = np.asarray(event.picture, dtype=float)
        if not len(batch):
            return made
    raise AssertionError("the batch does not end")


def narrow(footprint: Footprint) -> MemoryPlan:
    """A card on which the tiny model's network fits layer by layer only."""
    whole = MemoryPlan(footprint, 4, GIB)
    return MemoryPlan(footprint, 4, whole.least_bytes(64, 64, place=Place.LAYERS) + 1)


def test_layers_come_while_they_compute_and_the_picture_is_the_same(tiny: pipelines.LoadedPipeline, card: Card) -> None:
    plain = drawn(tiny, "a", "b")
    footprint = read_footprint(TINY)
    plan = narrow(footprint)
    tiny.residence = residence.settle(tiny.pipe, CPU, plan, 64, 64)
    assert (tiny.residence.place, plan.settled, sorted(tiny.residence.hooks)) == (Place.LAYERS, Place.LAYERS, ["vae"])
    home = {id(p): p.data_ptr() for part in (tiny.pipe.unet, tiny.pipe.text_encoder) for p in part.parameters()}
    again = drawn(tiny, "a", "b")
    assert all((again[name] == plain[name]).all() for name in plain)
    gc.collect()
    assert card.now == 0, "nothing stays on the device"
    assert card.brought >= 3 * footprint.weights_bytes(4, ("unet",)), "every step brings the whole network"
    assert 0 < card.peak <= footprint.layer_bytes(4) + 1024, "and never more than its largest layer"
    parameters = [p for part in (tiny.pipe.unet, tiny.pipe.text_encoder) for p in part.parameters()]
    assert {id(p): p.data_ptr() for p in parameters} == home, "the weights at home have not moved"


def test_a_layer_that_fails_goes_home_as_well(card: Card) -> None:
    def broken(_x: torch.Tensor) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("no more")

    layer = torch.nn.Linear(4, 4)
    weight = layer.weight.data_ptr()
    layers.travel(layer, CPU, card)
    layer.forward = broken
    with pytest.raises(torch.cuda.OutOfMemoryError):
        layer(torch.ones(1, 4))
    gc.collect()
    assert card.now == 0
    assert layer.weight.data_ptr() == weight


def test_what_a_part_makes_beside_its_weights_comes_along(card: Card) -> None:
    seen: list[Any] = []

    class Part(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(4, 2)
            self.register_buffer("places", torch.arange(4), persistent=False)

        def forward(self, x: torch.Tensor, *, scale: float) -> torch.Tensor:
            seen.append(self.places.data_ptr())
            return self.table(self.places) * scale + x

    part = Part().requires_grad_(False)
    expected = part(torch.ones(4, 2), scale=2.0)
    layers.travel(part, CPU, card)
    assert (part(torch.ones(4, 2), scale=2.0) == expected).all()
    assert seen[0] != seen[1], "buffers travel too"
    assert card.brought == part.table.weight.nbytes + part.places.nbytes


def test_adapters_are_applied_to_layers_that_travel(tiny: pipelines.LoadedPipeline, card: Card, tmp_path: Path) -> None:
    loose = adapters.attach({"unet": tiny.pipe.unet, "text_encoder": tiny.pipe.text_encoder}, 4, 7)
    generator = torch.Generator().manual_seed(1)
    trained = {key: torch.randn(value.shape, generator=generator) * 0.05 for key, value in loose.items()}
    adapters.detach({"unet": tiny.pipe.unet, "text_encoder": tiny.pipe.text_encoder})
    adapters.write(tmp_path, trained, {"kind": "lora"})
    bank = AdapterBank(tiny)
    bank.add("mine", tmp_path)
    plain, adapted = drawn(tiny, "a"), drawn(tiny, "a", bank=bank, adapters=(("mine", 1.0),))
    assert np.abs(plain["a"] - adapted["a"]).max() > 2
    tiny.residence = residence.settle(tiny.pipe, CPU, narrow(read_footprint(TINY)), 64, 64)
    again = drawn(tiny, "a", bank=bank, adapters=(("mine", 1.0),))
    assert (again["a"] == adapted["a"]).all()
    applied = adapters.apply(tmp_path, tiny.parts)
    fused = drawn(tiny, "a")
    assert np.abs(fused["a"] - adapted["a"]).max() <= 2
    applied.set_scale(0.0)
    assert (drawn(tiny, "a")["a"] == plain["a"]).all()


def test_adapters_go_to_where_layers_compute_and_not_to_where_they_wait(tiny: pipelines.LoadedPipeline) -> None:
    tiny.device = torch.device("meta")
    bank = AdapterBank(tiny)
    layer = next(iter(bank._layers.values()))
    down, up = layer.placed((torch.zeros(2, 3), torch.zeros(3, 2)))
    layer.allocate(1, 2)
    assert {tensor.device.type for tensor in (down, up, layer.down)} == {"meta"}


def test_the_strength_of_an_adapter_changes_weights_that_were_elsewhere_meanwhile(
    tiny: pipelines.LoadedPipeline, tmp_path: Path
) -> None:
    encoder = tiny.pipe.text_encoder
    key, weight = next((k, v) for k, v in encoder.named_parameters() if k.endswith("q_proj.weight"))
    base = weight.detach().clone()
    adapters.write(tmp_path, {adapters.weight_key("text_encoder", key): base + 1.0}, {"kind": "full"})
    applied = adapters.apply(tmp_path, {"text_encoder": encoder})
    encoder.to(torch.float64).to(torch.float32)  # As a journey to a device and back: other memory afterwards.
    applied.set_scale(0.5)
    assert torch.allclose(encoder.get_parameter(key), base + 0.5)


def test_a_share_in_which_layers_would_travel_is_given_back_where_the_whole_card_would_do(
    tiny: pipelines.LoadedPipeline,
) -> None:
    footprint = read_footprint(TINY)
    room = narrow(footprint).room_bytes
    roomy, full = (MemoryPlan(footprint, 4, room, card_bytes=card) for card in (64 << 20, room + 1))
    with pytest.raises(MemoryError, match=r"its share of the card is 0\.0\d GiB; give it the whole card of 0\.06 GiB"):
        residence.settle(tiny.pipe, CPU, roomy, 64, 64)
    assert residence.settle(tiny.pipe, CPU, full, 64, 64).place is Place.LAYERS, "no card here does better"
    assert not MemoryPlan(footprint, 4, 32 << 20, card_bytes=64 << 20).wants_the_card(64, 64)


# --- the plan -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gib", "place"),
    [(24, Place.DEVICE), (7, Place.ASIDE), (6, Place.LAYERS), (2, Place.LAYERS), (1, Place.NOWHERE)],
)
def test_the_smaller_the_card_the_more_lies_aside(gib: int, place: Place) -> None:
    plan = MemoryPlan(SDXL, 2, gib * GIB)
    assert plan.place(1024, 1024) is place
    assert plan.size(1024, 1024, place=place).possible is (place is not Place.NOWHERE)


def test_text_encoders_count_where_they_come_beside_the_network() -> None:
    resident, encoders = SDXL.weights_bytes(2, ("unet",)), SDXL.encoders_bytes(2)
    assert MemoryPlan(SDXL, 2, 8 * GIB).least_bytes(512, 512) == resident + encoders
    assert MemoryPlan(SDXL, 2, resident + encoders - 1).place(512, 512) is Place.LAYERS


def test_a_network_whose_layers_are_not_told_apart_does_not_travel() -> None:
    whole = replace(SDXL, parts={**SDXL.parts, "unet": PartWeights(2_567_463_684)})
    assert not whole.layered
    assert MemoryPlan(whole, 2, 4 * GIB).place(1024, 1024) is Place.NOWHERE


def test_what_travels_is_left_room_for_and_is_not_taken_for_activations() -> None:
    plan = MemoryPlan(SDXL, 2, 4 * GIB, settled=Place.LAYERS)
    layer = SDXL.layer_bytes(2)
    assert plan.coming_bytes("step") == layer == 63_242_240 * 2
    each = int(plan.planned("step", 512, 512, 2, 1) * 1.25)
    assert plan.size(512, 512, free_bytes=layer + 3 * each).at_once == 3
    assert plan.size(512, 512, free_bytes=layer - 1).at_once == 0
    meter: Any = _Scripted(peak=layer + 2 * plan.planned("step", 512, 512, 2, 1))
    with CallMemory(plan, meter).call("step", 512, 512, 2, ["a"]):
        pass
    assert plan.to_json()["step"] == pytest.approx(2.1, abs=0.001)


class _Scripted:
    def __init__(self, peak: int) -> None:
        self.peak = peak

    def free_bytes(self) -> int:
        return 4 * GIB

    def begin(self) -> int:
        return 0

    def peak_bytes(self) -> int:
        return self.peak


def test_what_fits_layer_by_layer_is_let_in_and_told() -> None:
    assert too_large(SDXL, 2, 1024, 1024, 3 * GIB, "sdxl") == ""
    assert "sdxl need at least" in too_large(SDXL, 2, 1024, 1024, GIB // 2, "sdxl")
    place, said = described(SDXL, 2, 4 * GIB)
    assert place is Place.LAYERS
    assert "all weights lie in host memory and travel in every step, layer by layer: slow" in said
    assert MemoryPlan(SDXL, 2, 4 * GIB).size(1024, 1024).at_once < MANY


def test_the_largest_layer_is_counted_from_the_headers(tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "model.safetensors"
    tensors: dict[str, Any] = {"a.weight": ("F16", (6, 5)), "a.bias": ("F16", (6,)), "b.c.weight": ("F32", (7,))}
    write_safetensors(one, **tensors)
    assert read_header(one) == PartWeights(43, 0, 7)
    assert read_header(one).layer_bytes(2) == 72
    write_safetensors(two, **{"a.ids": ("I64", (3,)), "b.c.weight": ("F32", (7,))})
    assert read_header(two).layer_bytes(4) == 7 * 4 + 24


def test_the_bundled_models_largest_layer_is_that_of_its_modules(tiny: pipelines.LoadedPipeline) -> None:
    own: Callable[[Any], int] = lambda layer: sum(p.numel() for p in layer.parameters(recurse=False))  # noqa: E731
    largest = max(own(layer) for part in tiny.parts.values() for layer in part.modules())
    assert read_footprint(TINY).layer_bytes(4) == pytest.approx(largest * 4, abs=2048)


def test_a_training_is_not_begun_where_the_layers_would_travel(
    monkeypatch: pytest.MonkeyPatch, tiny: pipelines.LoadedPipeline
) -> None:
    tiny.residence = residence.Residence(Place.LAYERS)
    monkeypatch.setattr(dreambooth.pipelines, "load", lambda *_: tiny)
    with pytest.raises(MemoryError, match="base_model: the weights of tiny do not fit the device"):
        dreambooth.DreamBooth().load(ModelRef("tiny", TINY), "cpu")
