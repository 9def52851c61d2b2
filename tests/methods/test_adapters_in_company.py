"""Personalised models in one Pod's batch: loaded beside it by whoever needs them, kept within bounds, and no harm to others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from executors.batching.batch import RunningBatch
from executors.batching.company import Company, Part, StepShare
from executors.batching.lora import AdapterBank, PreparedAdapter
from executors.batching.shared import SharedBatch
from executors.batching.shelf import AdapterShelf
from executors.methods import adapters, pipelines
from executors.methods.base import GivenAdapter, InputRefused, ModelMissing, ModelRef
from executors.methods.parameters import TextToImageParameters
from executors.methods.text_to_image import TextToImage
from executors.tiny import MODEL_DIR

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]

GENEROUS_S = 120.0
RANK = 4


def write_adapter(folder: Path, seed: int, size: float = 0.05) -> Path:
    """An adapter as a training leaves it, on every linear layer of the UNet."""
    loaded = pipelines.load(ModelRef("tiny", MODEL_DIR), "cpu")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in loaded.parts["unet"].named_modules():
        if isinstance(layer, torch.nn.Linear):
            key = adapters.weight_key("unet", name)
            tensors[f"{key}.lora_A.weight"] = torch.randn((RANK, layer.in_features), generator=generator) * size
            tensors[f"{key}.lora_B.weight"] = torch.randn((layer.out_features, RANK), generator=generator) * size
    folder.mkdir()
    adapters.write(folder, tensors, {"kind": "lora", "base_model": "tiny"})
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [write_adapter(root / f"lora-{seed}", seed) for seed in range(4)]


@pytest.fixture
def bank() -> AdapterBank:
    return AdapterBank(pipelines.load(ModelRef("tiny", MODEL_DIR), "cpu"))


def given(folder: Path, **changes: Any) -> GivenAdapter:
    return GivenAdapter(folder.name, folder, **changes)


def drawn(method: TextToImage, context: Any, **asked: Any) -> np.ndarray[Any, Any]:
    """The picture of a run, and its facts behind it in the context."""
    from PIL import Image

    parameters = TextToImageParameters(prompt="a red star", steps=4, seed=3, **asked)
    result = method.run(parameters, context)
    context.facts = result
    return np.asarray(Image.open(result.files[0].path), dtype=float)


def plain(model: ModelRef | None = None) -> TextToImage:
    method = TextToImage()
    method.load(model or ModelRef("tiny", MODEL_DIR), "cpu")
    return method


def served(method: TextToImage) -> Callable[[], None]:
    assert method.share(4)
    server = threading.Thread(target=method.serve, daemon=True)
    server.start()

    def end() -> None:
        method.leave()
        server.join(GENEROUS_S)
        assert not server.is_alive()

    return end


def test_a_run_with_an_adapter_draws_what_the_fused_model_draws(made: list[Path], new_context: Any) -> None:
    fused = drawn(plain(ModelRef("lora-0", MODEL_DIR, made[0])), new_context())
    base = plain()
    unadapted = drawn(base, new_context())
    one_by_one = drawn(base, new_context(adapters=(given(made[0]),)))
    assert np.abs(one_by_one - fused).max() <= 1.0
    assert np.abs(unadapted - fused).max() > 2.0
    assert np.array_equal(drawn(base, new_context()), unadapted)  # Nothing of the adapter stays on the base.
    method = plain()
    end = served(method)
    try:
        context = new_context(adapters=(given(made[0]),), model="lora-0")
        shared = drawn(method, context)
        assert np.abs(shared - fused).max() <= 1.0
        facts = context.facts.metadata
        assert (facts["model"], facts["base_model"]) == ("lora-0", "tiny")
        assert facts["adapters"] == [{"model": "lora-0", "weight": 1.0}]
    finally:
        end()


def test_several_adapters_with_weights_draw_what_their_fused_sum_draws(made: list[Path], new_context: Any) -> None:
    method = plain()
    loaded = method._require()
    with torch.no_grad():
        for folder, weight in ((made[0], 0.8), (made[1], -0.5)):
            first = adapters.apply(folder, loaded.parts, weight)
            assert first is not None
    fused = drawn(method, new_context())
    method = plain()
    end = served(method)
    try:
        both = (given(made[0], weight=0.8), given(made[1], weight=-0.5))
        assert np.abs(drawn(method, new_context(adapters=both)) - fused).max() <= 1.0
        one = drawn(method, new_context(adapters=both[:1]))
        assert np.abs(one - fused).max() > 2.0
    finally:
        end()


def test_an_adapter_that_cannot_be_used_harms_its_own_run_alone(
    made: list[Path], new_context: Any, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter.safetensors").write_bytes(b"\x80\x04pickle")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    adapters.write(
        foreign, {"unet.mid.lora_A.weight": torch.ones(1, 3), "unet.mid.lora_B.weight": torch.ones(3, 1)}, {}
    )
    method = plain()
    end = served(method)
    try:
        for folder, reason in ((broken, "cannot be read"), (foreign, "another base")):
            with pytest.raises(ModelMissing, match=reason):
                drawn(method, new_context(adapters=(given(folder),)))
        with pytest.raises(InputRefused, match="named twice"):
            drawn(method, new_context(adapters=(given(made[0]), given(made[0]))))
        drawn(method, new_context(adapters=(given(made[0]),)))
    finally:
        end()


def test_an_adapter_is_read_by_the_run_that_needs_it_while_the_batch_goes_on(
    made: list[Path], new_context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader waits until another run has ended: had the batch waited for it, neither would."""
    other_ended = threading.Event()
    reading = threading.Event()
    read = AdapterBank.prepared

    def slow(bank: AdapterBank, name: str, source: Path) -> PreparedAdapter:
        reading.set()
        assert other_ended.wait(GENEROUS_S)
        return read(bank, name, source)

    monkeypatch.setattr(AdapterBank, "prepared", slow)
    method = plain()
    end = served(method)
    try:
        seen: list[Any] = []
        waiting = new_context(adapters=(given(made[0]),))
        reader = threading.Thread(target=lambda: seen.append(drawn(method, waiting)), daemon=True)
        reader.start()
        assert reading.wait(GENEROUS_S)
        drawn(method, new_context())
        other_ended.set()
        reader.join(GENEROUS_S)
        assert len(seen) == 1
    finally:
        other_ended.set()
        end()


def test_two_runs_that_want_one_adapter_read_it_once(made: list[Path], bank: AdapterBank) -> None:
    shelf = AdapterShelf(bank, 1 << 30)
    with shelf.holding([given(made[0])]) as first, shelf.holding([given(made[0], weight=0.5)]) as second:
        assert [name for name, _ in first] == [name for name, _ in second]
        assert (first[0][1], second[0][1]) == (1.0, 0.5)
    assert shelf.loaded == 1


def test_files_that_changed_behind_a_name_are_another_adapter(made: list[Path], bank: AdapterBank) -> None:
    shelf = AdapterShelf(bank, 1 << 30)
    with shelf.holding([given(made[0], identity="a")]) as old, shelf.holding([given(made[0], identity="b")]) as new:
        assert old != new
    assert shelf.loaded == 2


def test_adapters_stay_within_their_budget_and_what_runs_or_is_deployed_goes_last(
    made: list[Path], bank: AdapterBank
) -> None:
    size = bank.prepared("x", made[0]).size_bytes
    shelf = AdapterShelf(bank, 2 * size)
    with shelf.holding([given(made[0], pinned=True)]):
        pass
    with shelf.holding([given(made[1])]), shelf.holding([given(made[2])]):
        assert "lora-0" not in bank  # All the room is in use.
        assert shelf.size_bytes <= 2 * size
    with shelf.holding([given(made[0], pinned=True)]):
        pass
    with shelf.holding([given(made[3])]):
        pass
    assert set(bank.names()) == {"lora-0", "lora-3"}
    with shelf.holding([given(each) for each in made]):
        assert len(bank.names()) == 4  # In use, they may take more.
    assert shelf.size_bytes <= 2 * size


def test_an_adapter_that_fails_to_load_may_be_tried_again(made: list[Path], bank: AdapterBank, tmp_path: Path) -> None:
    shelf = AdapterShelf(bank, 1 << 30)
    with pytest.raises(ModelMissing), shelf.holding([given(tmp_path / "absent")]):
        pass
    assert len(shelf) == 0
    write_adapter(tmp_path / "absent", 9)
    with shelf.holding([given(tmp_path / "absent")]):
        assert "absent" in bank


def test_previews_come_every_so_many_steps(new_context: Any) -> None:
    method = plain()
    end = served(method)
    try:
        context = new_context()
        method.run(TextToImageParameters(prompt="a red star", steps=7, seed=3, preview_every=3), context)
        assert [picture.size for picture in context.previews] == [(8, 8), (8, 8)]
        silent = new_context()
        method.run(TextToImageParameters(prompt="a red star", steps=4, seed=3), silent)
        assert silent.previews == []
    finally:
        end()


def test_company_costs_what_the_steps_say_it_costs() -> None:
    """Steps of 10 + 4 ms a row: three rows beside one's own are 12 of 26 ms."""
    company = Company()
    for rows in (1, 2, 4, 1, 3, 4, 2, 1) * 8:
        parts = [Part(number, {"64": 1.0}) for number in range(rows)]
        company.step(1000.0 * (10 + 4 * rows), parts, {part.job: StepShare() for part in parts})
    shares = {number: StepShare() for number in range(4)}
    company.step(26_000.0, [Part(number, {"64": 1.0}) for number in range(4)], shares)
    for share in shares.values():
        assert share.company_us == pytest.approx(12_000, rel=0.05)
        assert share.company_permille == 3000
    alone = StepShare()
    company.step(14_000.0, [Part(0, {"64": 1.0})], {0: alone})
    assert (alone.company_us, alone.company_permille) == (0.0, 0)


def test_steps_that_a_job_waits_through_are_its_companys_cost() -> None:
    company, runs, waits = Company(), StepShare(), StepShare()
    company.step(5_000.0, [Part("runs", {"64": 2.0})], {"runs": runs, "waits": waits})
    assert (runs.company_us, waits.company_us) == (0.0, 5_000.0)


def test_an_urgent_picture_sets_an_ordinary_one_aside_and_both_are_as_alone(new_context: Any) -> None:
    alone = {seed: _alone(new_context, seed) for seed in (3, 5)}
    method = plain()
    method._shared = full = SharedBatch(RunningBatch(method._require(), capacity=1))
    method._served = True
    method._shelf = AdapterShelf(full._batch.bank, 1 << 30)
    server = threading.Thread(target=full.serve, daemon=True)
    server.start()
    try:
        order: list[str] = []
        begun = threading.Event()
        ordinary = new_context()
        ordinary.progress = lambda *_: begun.set()

        def draw(name: str, context: Any, seed: int, steps: int) -> None:
            result = method.run(TextToImageParameters(prompt="a red star", steps=steps, seed=seed), context)
            pictures[name] = result.files[0].path.read_bytes()
            order.append(name)

        pictures: dict[str, bytes] = {}
        first = threading.Thread(target=draw, args=("ordinary", ordinary, 3, 60), daemon=True)
        first.start()
        assert begun.wait(GENEROUS_S)
        draw("urgent", new_context(priority=100), 5, 4)
        assert order == ["urgent"]
        first.join(GENEROUS_S)
        assert order == ["urgent", "ordinary"]
        for name, seed in (("urgent", 5), ("ordinary", 3)):
            assert _pixels(pictures[name]).tolist() == _pixels(alone[seed]).tolist()
    finally:
        full.close()
        server.join(GENEROUS_S)
        assert not server.is_alive()


def _alone(new_context: Any, seed: int) -> bytes:
    steps = 60 if seed == 3 else 4
    method = plain()
    end = served(method)
    try:
        result = method.run(TextToImageParameters(prompt="a red star", steps=steps, seed=seed), new_context())
        return bytes(result.files[0].path.read_bytes())
    finally:
        end()


def _pixels(png: bytes) -> np.ndarray[Any, Any]:
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)))
