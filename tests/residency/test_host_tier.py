"""Adapters that leave a device wait in host memory: they come back without reading, within a budget, by what they are worth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from executors.batching.lora import AdapterBank, PreparedAdapter
from executors.batching.shelf import AdapterShelf, usual_host_budget
from executors.methods import adapters, pipelines
from executors.methods.base import GivenAdapter, ModelRef
from executors.residency.host import HostTier
from executors.tiny import MODEL_DIR


@pytest.fixture(scope="module")
def bank() -> AdapterBank:
    return AdapterBank(pipelines.load(ModelRef("tiny", MODEL_DIR), "cpu"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    loaded = pipelines.load(ModelRef("tiny", MODEL_DIR), "cpu")
    name, layer = next(
        (name, module) for name, module in loaded.parts["unet"].named_modules() if isinstance(module, torch.nn.Linear)
    )
    made = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        key = adapters.weight_key("unet", name)
        tensors = {
            f"{key}.lora_A.weight": torch.randn((4, layer.in_features), generator=generator),
            f"{key}.lora_B.weight": torch.randn((layer.out_features, 4), generator=generator),
        }
        folder = tmp_path_factory.mktemp(f"lora-{seed}")
        adapters.write(folder, tensors, {"kind": "lora", "base_model": "tiny"})
        made.append(folder)
    return made


def use(shelf: AdapterShelf, folders: list[Path], *numbers: int) -> None:
    for number in numbers:
        with shelf.holding([GivenAdapter(f"a{number}", folders[number])]):
            assert f"a{number}" in shelf.bank


def size_of(bank: AdapterBank, folder: Path) -> int:
    return bank.prepared("x", folder).size_bytes


def test_an_adapter_that_left_the_device_comes_back_without_being_read(bank: AdapterBank, folders: list[Path]) -> None:
    size = size_of(bank, folders[0])
    shelf = AdapterShelf(bank, size, host_bytes=2 * size)
    use(shelf, folders, 0, 1, 2)
    assert (shelf.loaded, shelf.returned) == (3, 0)
    use(shelf, folders, 1, 0)
    assert (shelf.loaded, shelf.returned) == (3, 2)
    assert shelf.size_bytes <= size


def test_what_comes_back_is_what_left(bank: AdapterBank, folders: list[Path]) -> None:
    size = size_of(bank, folders[0])
    shelf = AdapterShelf(bank, size, host_bytes=size)
    use(shelf, folders, 0)
    before = {key: [t.clone() for t in pair] for key, pair in bank._pairs["a0"].items()}
    use(shelf, folders, 1)
    assert "a0" not in bank
    use(shelf, folders, 0)
    assert shelf.returned == 1
    for key, pair in bank._pairs["a0"].items():
        for one, other in zip(pair, before[key], strict=True):
            assert torch.equal(one, other)


def test_without_room_in_host_memory_it_is_read_again(bank: AdapterBank, folders: list[Path]) -> None:
    size = size_of(bank, folders[0])
    shelf = AdapterShelf(bank, size)
    use(shelf, folders, 0, 1, 0)
    assert (shelf.loaded, shelf.returned) == (3, 0)


def test_the_adapter_that_takes_long_to_read_outlives_one_that_was_used_later(
    bank: AdapterBank, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from executors.batching import shelf as module

    clock = [0.0]
    read = AdapterBank.prepared

    def timed(bank: AdapterBank, name: str, source: Path) -> PreparedAdapter:
        clock[0] += 30.0 if name == "a0" else 0.5
        return read(bank, name, source)

    monkeypatch.setattr(AdapterBank, "prepared", timed)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    size = size_of(bank, folders[0])
    shelf = AdapterShelf(bank, 2 * size)
    use(shelf, folders, 0, 1, 2)
    assert {name for name in ("a0", "a1", "a2") if name in bank} == {"a0", "a2"}


def test_only_beside_a_device_is_host_memory_a_place_of_its_own() -> None:
    assert usual_host_budget(torch.device("cpu")) == 0
    assert usual_host_budget(torch.device("cuda")) > 0


def test_a_host_tier_keeps_within_its_budget_and_gives_things_out_once() -> None:
    tier: HostTier[str] = HostTier(20)
    assert tier.put("a", "A", 10, 10**6)
    assert tier.put("b", "B", 10, 20 * 10**6)
    assert tier.put("c", "C", 10, 10**6)
    assert ("a" in tier, "b" in tier, "c" in tier) == (False, True, True)
    assert not tier.put("huge", "H", 21, 1)
    assert not tier.has_room(21)
    assert tier.take("b") == "B"
    assert tier.take("b") is None
    tier.drop("c")
    assert tier.used_bytes == 0
    assert (tier.counts.hits, tier.counts.misses) == (1, 1)
