"""Many adapters in one batch give what the fused model gives, and a file that is no adapter of this model is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drained import drained
from safetensors.torch import save_file

from executors.batching.batch import RunningBatch
from executors.batching.lora import AdapterBank
from executors.batching.requests import PictureRequest
from executors.methods import adapters, pipelines
from executors.methods.base import ModelMissing, ModelRef
from executors.tiny import MODEL_DIR

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]

LEVELS = 1.0
"""How far a channel of a pixel (of 255) may be from the fused model's."""


def random_adapter(
    loaded: pipelines.LoadedPipeline, seed: int, rank: int = 4, strength: float = 0.02
) -> dict[str, Any]:
    """Differences on every linear layer, strong enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Any] = {}
    for part, whole in loaded.parts.items():
        for name, module in whole.named_modules():
            if isinstance(module, torch.nn.Linear):
                key = adapters.weight_key(part, name)
                tensors[f"{key}.lora_A.weight"] = torch.randn((rank, module.in_features), generator=generator) * 0.2
                tensors[f"{key}.lora_B.weight"] = (
                    torch.randn((module.out_features, rank), generator=generator) * strength
                )
    return tensors


def fused(
    ref: ModelRef, loaded: pipelines.LoadedPipeline, parts: list[tuple[dict[str, Any], float]], asked: PictureRequest
) -> Any:
    """The picture of a model whose weights hold the differences themselves."""
    own = pipelines.load(ref, "cpu")
    weights = {
        adapters.weight_key(part, name): value
        for part, whole in own.parts.items()
        for name, value in whole.state_dict().items()
    }
    with torch.no_grad():
        for tensors, weight in parts:
            for key in tensors:
                if key.endswith("lora_A.weight"):
                    target = weights[key.replace("lora_A.weight", "weight")]
                    down, up = tensors[key], tensors[key.replace("lora_A", "lora_B")]
                    target += weight * (up.flatten(1) @ down.flatten(1)).view(target.shape)
    batch = RunningBatch(own)
    batch.admit(
        PictureRequest(
            asked.id,
            asked.prompt,
            seed=asked.seed,
            steps=asked.steps,
            guidance=asked.guidance,
            width=asked.width,
            height=asked.height,
            scheduler=asked.scheduler,
        )
    )
    return drained(batch)[asked.id]


@pytest.mark.parametrize("family", ["tiny", "sd", "sdxl"])
def test_each_request_gets_its_own_adapters_with_their_weights(model_ref: Callable[..., ModelRef], family: str) -> None:
    ref = ModelRef("tiny", MODEL_DIR) if family == "tiny" else model_ref(family)
    loaded = pipelines.load(ref, "cpu")
    bank = AdapterBank(loaded)
    known = {
        name: random_adapter(loaded, seed, rank) for name, seed, rank in (("dog", 1, 4), ("cat", 2, 2), ("fox", 3, 8))
    }
    for name, tensors in known.items():
        bank.put(name, tensors)
    sets: list[tuple[tuple[str, float], ...]] = [
        (("dog", 1.0),),
        (),
        (("cat", 0.5), ("dog", 0.7)),
        (("fox", 1.5),),
        (("dog", 1.0),),
    ]
    batch = RunningBatch(loaded, bank=bank)
    requests = [
        PictureRequest(
            str(index), "a red star", seed=index, steps=3 + index % 2, guidance=3.0, width=32, height=32, adapters=own
        )
        for index, own in enumerate(sets)
    ]
    for request in requests[:3]:
        batch.admit(request)
    batch.step()
    for request in requests[3:]:
        batch.admit(request)
    made = drained(batch)
    for request in requests:
        own = [(known[name], weight) for name, weight in request.adapters]
        assert np.abs(made[request.id] - fused(ref, loaded, own, request)).max() <= LEVELS, request
    bare = fused(ref, loaded, [], requests[0])
    assert np.abs(made["0"] - bare).max() > LEVELS


def test_convolutions_are_adapted_too(model_ref: Callable[..., ModelRef]) -> None:
    loaded = pipelines.load(model_ref("sd"), "cpu")
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Any] = {}
    for name, module in loaded.pipe.unet.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            shape = (2, *module.weight.shape[1:])
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(shape, generator=generator) * 0.2
            tensors[f"unet.{name}.lora_B.weight"] = (
                torch.randn((len(module.weight), 2, 1, 1), generator=generator) * 0.1
            )
    bank = AdapterBank(loaded)
    bank.put("conv", tensors)
    batch = RunningBatch(loaded, bank=bank)
    requests = [
        PictureRequest("a", "a star", seed=1, steps=2, width=32, height=64, adapters=(("conv", 0.8),)),
        PictureRequest("b", "a star", seed=2, steps=2, width=32, height=64),
    ]
    for request in requests:
        batch.admit(request)
    made = drained(batch)
    for request in requests:
        own = [(tensors, weight) for _, weight in request.adapters]
        assert np.abs(made[request.id] - fused(model_ref("sd"), loaded, own, request)).max() <= LEVELS
    assert np.abs(made["a"] - fused(model_ref("sd"), loaded, [], requests[0])).max() > LEVELS


def test_without_adapters_nothing_is_touched() -> None:
    loaded = pipelines.load(ModelRef("tiny", MODEL_DIR), "cpu")
    before = {name: value.clone() for name, value in loaded.pipe.unet.state_dict().items()}
    bank = AdapterBank(loaded)
    batch = RunningBatch(loaded, bank=bank)
    plain = PictureRequest("plain", "a red star", steps=2)
    batch.admit(plain)
    first = drained(batch)
    bank.put("dog", random_adapter(loaded, 1))
    batch.admit(PictureRequest("dog", "a red star", steps=2, adapters=(("dog", 1.0),)))
    drained(batch)
    batch.admit(plain)
    assert np.array_equal(drained(batch)["plain"], first["plain"])
    after = loaded.pipe.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_more_sets_than_slots_and_a_changed_adapter_are_written_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    import executors.batching.lora as lora

    monkeypatch.setattr(lora, "SLOTS", 3)
    loaded = pipelines.load(ModelRef("tiny", MODEL_DIR), "cpu")
    bank = AdapterBank(loaded)
    linear = loaded.pipe.unet.time_embedding.linear_1
    key = "unet.time_embedding.linear_1"
    x = torch.randn(6, linear.in_features)

    def delta(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return (
            torch.randn((2, linear.in_features), generator=generator),
            torch.randn((linear.out_features, 2), generator=generator),
        )

    def put(name: str, seed: int) -> None:
        down, up = delta(seed)
        bank.put(name, {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up})

    def expect(seed: int, rows: torch.Tensor) -> torch.Tensor:
        down, up = delta(seed)
        base: torch.Tensor = linear(rows)
        return base + rows @ down.T @ up.T

    for seed in range(6):
        put(f"a{seed}", seed)
    with torch.no_grad():
        for turn in ((0, 1), (2, 3), (1, 4), (5, 0), (0, 1, 2, 3, 4, 5), (3, 2)):
            rows = x[: len(turn)]
            expected = torch.cat([expect(seed, rows[i : i + 1]) for i, seed in enumerate(turn)])
            with bank.applied([((f"a{seed}", 1.0),) for seed in turn]):
                made = linear(rows)
            assert torch.allclose(made, expected, atol=1e-4), turn
        put("a0", 9)
        expected = expect(9, x[:1])
        with bank.applied([(("a0", 1.0),)]):
            assert torch.allclose(linear(x[:1]), expected, atol=1e-4)
        bank.remove("a0")
        with pytest.raises(KeyError, match="a0"), bank.applied([(("a0", 1.0),)]):
            pass


def test_a_prompt_is_encoded_anew_when_its_adapter_was_exchanged() -> None:
    loaded = pipelines.load(ModelRef("tiny", MODEL_DIR), "cpu")
    text = {
        seed: {
            key: t for key, t in random_adapter(loaded, seed, strength=0.2).items() if key.startswith("text_encoder")
        }
        for seed in (1, 2)
    }
    bank = AdapterBank(loaded)
    batch = RunningBatch(loaded, bank=bank)

    def made() -> Any:
        batch.admit(PictureRequest("a", "a red star", steps=2, adapters=(("mine", 1.0),)))
        return drained(batch)["a"]

    bank.put("mine", text[1])
    first = made()
    bank.put("mine", text[2])
    assert np.abs(made() - first).max() > LEVELS
    bank.put("mine", text[1])
    assert np.array_equal(made(), first)


def test_what_a_training_left_is_read_from_its_directory(tmp_path: Path) -> None:
    loaded = pipelines.load(ModelRef("tiny", MODEL_DIR), "cpu")
    adapters.write(tmp_path, random_adapter(loaded, 1), {"method": "lora"})
    bank = AdapterBank(loaded)
    bank.add("mine", tmp_path)
    assert bank.names() == ("mine",)
    assert "mine" in bank
    assert bank.size_bytes("mine") == sum(t.numel() * 4 for t in random_adapter(loaded, 1).values())


def _file(tmp_path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> Path:
    path = tmp_path / "adapter.safetensors"
    save_file(tensors, str(path), metadata)
    return path


LAYER = "unet.time_embedding.linear_1"
DOWN, UP = torch.zeros(2, 64), torch.zeros(256, 2)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({f"{LAYER}.lora_A.weight": DOWN}, "without its lora_B"),
        ({f"{LAYER}.lora_B.weight": UP}, "without its lora_A"),
        ({f"{LAYER}.weight": DOWN}, "Pod of its own"),
        ({"unet.nonesuch.lora_A.weight": DOWN, "unet.nonesuch.lora_B.weight": UP}, "another base"),
        ({f"{LAYER}.lora_A.weight": DOWN[:, :5].contiguous(), f"{LAYER}.lora_B.weight": UP}, "another base"),
        ({f"{LAYER}.lora_A.weight": DOWN / 0.0, f"{LAYER}.lora_B.weight": UP}, "not finite"),
        ({}, "no weights"),
    ],
)
def test_a_file_that_is_no_adapter_of_this_model_is_refused_with_the_reason(
    tmp_path: Path, tensors: dict[str, Any], reason: str
) -> None:
    bank = AdapterBank(pipelines.load(ModelRef("tiny", MODEL_DIR), "cpu"))
    with pytest.raises(ModelMissing, match=reason):
        bank.add("mine", _file(tmp_path, tensors))
    assert bank.names() == ()


def test_files_that_cannot_be_read_or_scaled_are_refused(tmp_path: Path) -> None:
    bank = AdapterBank(pipelines.load(ModelRef("tiny", MODEL_DIR), "cpu"))
    pair = {f"{LAYER}.lora_A.weight": DOWN, f"{LAYER}.lora_B.weight": UP}
    path = _file(tmp_path, pair, {"lora_adapter_metadata": '{"unet.lora_alpha": 8, "unet.alpha_pattern": {"a": 1}}'})
    with pytest.raises(ModelMissing, match="by pattern"):
        bank.add("mine", path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ModelMissing, match="cannot be read"):
        bank.add("mine", path)
    path.write_bytes(b"\x80\x04cposix\nsystem\n")
    with pytest.raises(ModelMissing, match="cannot be read"):
        bank.add("mine", path)
    path.unlink()
    with pytest.raises(ModelMissing, match="0 safetensors"):
        bank.add("mine", tmp_path)
