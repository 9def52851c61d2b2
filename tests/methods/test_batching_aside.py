"""What is begun and decoded beside the steps: no step waits for it, and no picture shows it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from executors.batching import batch as batch_module
from executors.batching.aside import Aside
from executors.batching.batch import RunningBatch
from executors.batching.requests import BatchEvent, Entered, Failed, Finished, PictureRequest, Stepped
from executors.methods import adapters, pipelines, sampling
from executors.methods.base import ModelRef
from executors.tiny import MODEL_DIR

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]

GENEROUS_S = 60.0
LEVELS = 1.0


@pytest.fixture(scope="module")
def tiny() -> pipelines.LoadedPipeline:
    return pipelines.load(ModelRef("tiny", MODEL_DIR), "cpu")


@pytest.fixture
def batch(tiny: pipelines.LoadedPipeline) -> Iterator[RunningBatch]:
    aside = Aside(torch.device("cpu"))
    yield RunningBatch(tiny, capacity=3, aside=aside)
    aside.close()


def asked(id: str, **changes: Any) -> PictureRequest:
    fields: dict[str, Any] = {"prompt": f"a red star {id}", "seed": 3, "steps": 5, "guidance": 3.0, **changes}
    return PictureRequest(id, **fields)


def until(batch: RunningBatch, true: Callable[[list[BatchEvent]], bool]) -> list[BatchEvent]:
    """Step until it holds for all events so far."""
    events: list[BatchEvent] = []
    end = time.monotonic() + GENEROUS_S
    while not true(events):
        assert time.monotonic() < end, f"it did not come true: {events[-5:]}"
        events += batch.step()
    return events


def over(id: str) -> Callable[[list[BatchEvent]], bool]:
    return lambda events: id in ids(Finished, events) + ids(Failed, events)


def ids(kind: type[Any], events: list[BatchEvent]) -> list[str]:
    return [event.id for event in events if isinstance(event, kind)]


def pixels(events: list[BatchEvent]) -> dict[str, Any]:
    return {e.id: np.asarray(e.picture, dtype=float) for e in events if isinstance(e, Finished)}


def alone(tiny: pipelines.LoadedPipeline, request: PictureRequest) -> Any:
    plain = RunningBatch(tiny)
    plain.admit(request)
    return pixels(until(plain, over(request.id)))[request.id]


class Gate:
    """Holds calls of a function until it is opened."""

    def __init__(self, real: Callable[..., Any]) -> None:
        self._real = real
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.reached.set()
        assert self.open.wait(GENEROUS_S)
        return self._real(*arguments, **named)


def test_pictures_are_those_of_a_batch_that_does_all_itself(
    tiny: pipelines.LoadedPipeline, batch: RunningBatch
) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    requests = [
        asked("a", steps=6, scheduler="euler_a"),
        asked("b", image=image, strength=0.5, steps=8),
        asked("c", image=image, mask=Image.new("L", (64, 64), 255), scheduler="unipc"),
        asked("d", width=96),
        asked("e", guidance=1.0, steps=3),
        asked("f", priority=100, scheduler="dpmpp_2m"),
    ]
    events: list[BatchEvent] = []
    for request in requests:
        batch.admit(request)
        events += batch.step()
    events += until(batch, lambda _: not len(batch))
    made = pixels(events)
    assert sorted(made) == ["a", "b", "c", "d", "e", "f"]
    for request in requests:
        assert np.abs(made[request.id] - alone(tiny, request)).max() <= LEVELS, request.id


def test_one_that_is_alone_is_the_same_bit_for_bit(tiny: pipelines.LoadedPipeline, batch: RunningBatch) -> None:
    batch.admit(asked("a"))
    assert np.array_equal(pixels(until(batch, over("a")))["a"], alone(tiny, asked("a")))


def test_steps_go_on_while_a_picture_is_decoded(batch: RunningBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(sampling.decode)
    monkeypatch.setattr(sampling, "decode", gate)
    batch.admit(asked("short", steps=2))
    batch.admit(asked("long", steps=30))
    events = until(batch, lambda events: ids(Stepped, events).count("long") == 20)
    assert gate.reached.is_set()
    assert ids(Finished, events) == []
    gate.open.set()
    events = until(batch, lambda _: not len(batch))
    assert ids(Finished, events) == ["short", "long"]


def test_steps_go_on_while_a_prompt_is_encoded(
    tiny: pipelines.LoadedPipeline, batch: RunningBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch.admit(asked("long", steps=30))
    batch.step()
    gate = Gate(tiny.pipe.text_encoder.forward)
    monkeypatch.setattr(tiny.pipe.text_encoder, "forward", gate)
    batch.admit(asked("late", steps=2))
    events = until(batch, lambda events: ids(Stepped, events).count("long") == 20)
    assert gate.reached.is_set()
    assert ids(Entered, events) == []
    assert batch.waiting == ("late",)
    gate.open.set()
    assert "late" in ids(Finished, until(batch, lambda _: not len(batch)))


def test_an_urgent_picture_enters_at_the_next_step(batch: RunningBatch) -> None:
    for name in ("a", "b", "c", "d"):
        batch.admit(asked(name, steps=20))
    until(batch, lambda _: len(batch.running) == 3)
    batch.step()
    batch.admit(asked("urgent", priority=100, steps=2))
    events = batch.step()
    assert ids(Entered, events) == ["urgent"]
    assert "urgent" in ids(Stepped, events)
    assert sorted(pixels(until(batch, lambda _: not len(batch)))) == ["a", "b", "c", "d", "urgent"]


def test_ordinary_pictures_enter_together_with_those_that_step(batch: RunningBatch) -> None:
    batch.admit(asked("a", steps=40))
    batch.step()
    batch.admit(asked("b", steps=2))
    batch.admit(asked("c", steps=2))
    events = until(batch, lambda events: {"b", "c"} <= set(ids(Entered, events)))
    assert batch.running[0] == "a"
    assert "a" in ids(Stepped, events)


def test_a_picture_that_is_cancelled_while_it_is_decoded_never_comes(
    batch: RunningBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(sampling.decode)
    monkeypatch.setattr(sampling, "decode", gate)
    batch.admit(asked("a", steps=1))
    batch.step()
    assert gate.reached.wait(GENEROUS_S)
    assert batch.cancel("a")
    assert len(batch) == 0
    batch.admit(asked("a", steps=1, seed=9))  # The same name again: what is under way is not its picture.
    gate.open.set()
    events = until(batch, lambda _: not len(batch))
    assert ids(Finished, events) == ["a"]


def test_a_picture_that_is_taken_out_while_it_is_decoded_goes_on_elsewhere(
    tiny: pipelines.LoadedPipeline, batch: RunningBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(tiny, asked("a"))
    gate = Gate(sampling.decode)
    monkeypatch.setattr(sampling, "decode", gate)
    batch.admit(asked("a"))
    until(batch, lambda _: gate.reached.is_set())
    kept = batch.pause("a")
    gate.open.set()
    assert kept.done == 5
    assert len(batch) == 0
    other = RunningBatch(tiny)
    other.resume(kept)
    assert np.array_equal(pixels(until(other, over("a")))["a"], expected)


def test_a_picture_that_is_cancelled_while_it_is_begun_never_enters(
    tiny: pipelines.LoadedPipeline, batch: RunningBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch.admit(asked("long", steps=20))
    batch.step()
    gate = Gate(tiny.pipe.text_encoder.forward)
    monkeypatch.setattr(tiny.pipe.text_encoder, "forward", gate)
    batch.admit(asked("late"))
    batch.step()
    assert gate.reached.wait(GENEROUS_S)
    assert batch.cancel("late")
    gate.open.set()
    events = until(batch, lambda _: not len(batch))
    assert set(ids(Stepped, events)) == {"long"}


def test_what_fails_aside_harms_nobody_else(
    tiny: pipelines.LoadedPipeline, batch: RunningBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = batch_module.Trajectory

    def failing(loaded: Any, request: PictureRequest, *more: Any) -> Any:
        if request.id == "bad":
            raise ValueError("of its own")
        return real(loaded, request, *more)

    batch.admit(asked("long", steps=20))
    batch.step()
    monkeypatch.setattr(batch_module, "Trajectory", failing)
    batch.admit(asked("bad"))
    batch.admit(asked("good", steps=2))
    events = until(batch, lambda _: not len(batch))
    assert ids(Failed, events) == ["bad"]
    assert sorted(ids(Finished, events)) == ["good", "long"]


def test_what_cannot_be_decoded_aside_fails_alone(batch: RunningBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sampling.decode

    seen: list[int] = []

    def decode(loaded: Any, latents: torch.Tensor, **named: Any) -> Any:
        seen.append(len(latents))
        if seen[-1] > 1 or len(seen) == 2:
            raise ValueError("no picture")
        return real(loaded, latents, **named)

    monkeypatch.setattr(sampling, "decode", decode)
    batch.admit(asked("a", steps=2))
    batch.admit(asked("b", steps=2))
    events = until(batch, lambda _: not len(batch))
    assert seen == [2, 1, 1]
    assert sorted(ids(Failed, events) + ids(Finished, events)) == ["a", "b"]
    assert len(ids(Failed, events)) == 1


def test_adapters_of_prompts_and_steps_do_not_meet(tiny: pipelines.LoadedPipeline, batch: RunningBatch) -> None:
    """One picture's prompt is encoded with its adapter while another one's steps run with theirs."""
    generator = torch.Generator().manual_seed(0)

    def random() -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for part, whole in tiny.parts.items():
            for name, module in whole.named_modules():
                if isinstance(module, torch.nn.Linear):
                    key = adapters.weight_key(part, name)
                    down = torch.randn((4, module.in_features), generator=generator) * 0.2
                    up = torch.randn((module.out_features, 4), generator=generator) * 0.02
                    tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
        return tensors

    plain = RunningBatch(tiny, bank=batch.bank)
    for number in range(4):
        batch.bank.put(f"m{number}", random())
    requests = [asked(str(n), adapters=((f"m{n % 4}", 1.0),), steps=4 + n % 3, prompt="a star") for n in range(8)]
    events: list[BatchEvent] = []
    for request in requests:
        batch.admit(request)
        events += batch.step()
    made = pixels(events + until(batch, lambda _: not len(batch)))
    for request in requests:
        plain.admit(request)
        expected = pixels(until(plain, over(request.id)))[request.id]
        assert np.abs(made[request.id] - expected).max() <= LEVELS, request.id
