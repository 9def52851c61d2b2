"""The running batch as its owner sees it: who takes part, who waits, who fails alone, and what a cancel costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from executors.batching.batch import RunningBatch
from executors.batching.conditions import PromptEncoder
from executors.batching.lora import AdapterBank
from executors.batching.previews import PreviewMap
from executors.batching.requests import (
    BatchEvent,
    Entered,
    Failed,
    Finished,
    KeptPicture,
    PictureRequest,
    Previewed,
    SetAside,
    Stepped,
)
from executors.methods import pipelines, sampling
from executors.methods.base import InputRefused, ModelRef
from executors.tiny import MODEL_DIR

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]


@pytest.fixture(scope="module")
def tiny() -> pipelines.LoadedPipeline:
    return pipelines.load(ModelRef("tiny", MODEL_DIR), "cpu")


def asked(id: str, **changes: Any) -> PictureRequest:
    return replace(PictureRequest(id, "a red star", seed=len(id), steps=4, guidance=3.0), **changes)


def of(kind: type[Any], events: list[BatchEvent]) -> list[str]:
    return [event.id for event in events if isinstance(event, kind)]


def drained(batch: RunningBatch) -> list[BatchEvent]:
    events: list[BatchEvent] = []
    while len(batch):
        events += batch.step()
    return events


class Network:
    """Stands before the UNet, counts its calls and the rows in them, and fails as it is told."""

    def __init__(self, loaded: pipelines.LoadedPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        self.error: Callable[[torch.Tensor], Exception | None] = lambda _rows: None
        forward = loaded.pipe.unet.forward

        def counted(rows: torch.Tensor, *arguments: Any, **named: Any) -> Any:
            self.rows.append(len(rows))
            error = self.error(rows)
            if error is not None:
                raise error
            return forward(rows, *arguments, **named)

        monkeypatch.setattr(loaded.pipe.unet, "forward", counted)


@pytest.fixture
def network(tiny: pipelines.LoadedPipeline, monkeypatch: pytest.MonkeyPatch) -> Network:
    return Network(tiny, monkeypatch)


def test_requests_enter_and_leave_at_any_step_and_share_every_call(
    tiny: pipelines.LoadedPipeline, network: Network
) -> None:
    batch = RunningBatch(tiny)
    batch.admit(asked("a", steps=2))
    batch.admit(asked("b", steps=4, guidance=9.0, scheduler="euler"))
    assert of(Entered, batch.step()) == ["a", "b"]
    batch.admit(asked("c", steps=3, scheduler="dpmpp_2m"))
    second = batch.step()
    assert of(Entered, second) == ["c"]
    assert of(Finished, second) == ["a"]
    drained(batch)
    assert network.rows == [4, 6, 4, 4]


def test_sizes_and_unguided_requests_form_calls_of_their_own(tiny: pipelines.LoadedPipeline, network: Network) -> None:
    batch = RunningBatch(tiny)
    for request in (asked("a"), asked("b", width=96), asked("c", guidance=1.0), asked("d"), asked("e", width=96)):
        batch.admit(request)
    batch.step()
    assert sorted(network.rows) == [1, 4, 4]


def test_every_step_is_told_with_its_total(tiny: pipelines.LoadedPipeline) -> None:
    batch = RunningBatch(tiny)
    batch.admit(asked("a", steps=3))
    batch.admit(asked("b", steps=3, scheduler="heun"))
    events = drained(batch)
    assert [(e.done, e.total) for e in events if isinstance(e, Stepped) and e.id == "a"] == [(1, 3), (2, 3), (3, 3)]
    assert [(e.done, e.total) for e in events if isinstance(e, Stepped) and e.id == "b"][-1] == (5, 5)


def test_an_urgent_request_enters_at_the_next_step_and_the_one_set_aside_is_made_all_the_same(
    tiny: pipelines.LoadedPipeline,
) -> None:
    batch = RunningBatch(tiny, capacity=2)
    alone = RunningBatch(tiny)
    requests = [asked("a", steps=6), asked("b", steps=6, scheduler="unipc"), asked("c", steps=6)]
    for request in requests:
        batch.admit(request)
    batch.step()
    assert batch.running == ("a", "b")
    assert batch.waiting == ("c",)
    batch.admit(asked("urgent", priority=100, steps=2))
    step = batch.step()
    assert of(Entered, step) == ["urgent"]
    assert of(SetAside, step) == ["a"]
    assert set(batch.running) == {"b", "urgent"}
    events = drained(batch)
    # The one that has begun comes before the one that has not.
    assert of(Entered, events) == ["a", "c"]
    pictures = {event.id: np.asarray(event.picture, float) for event in events if isinstance(event, Finished)}
    for request in requests:
        alone.admit(request)
        [expected] = [event.picture for event in drained(alone) if isinstance(event, Finished)]
        assert np.abs(pictures[request.id] - np.asarray(expected, float)).max() <= 1.0


def test_equal_priority_never_sets_anybody_aside(tiny: pipelines.LoadedPipeline) -> None:
    batch = RunningBatch(tiny, capacity=1)
    batch.admit(asked("a", priority=5))
    batch.step()
    batch.admit(asked("b", priority=5))
    batch.admit(asked("c", priority=1))
    assert of(SetAside, batch.step()) == []
    assert of(Entered, drained(batch)) == ["b", "c"]


def test_first_pictures_of_jobs_enter_before_second_ones(tiny: pipelines.LoadedPipeline) -> None:
    batch = RunningBatch(tiny, capacity=2)
    for id, place in (("a0", 0), ("a1", 1), ("b0", 0)):
        batch.admit(asked(id, place=place))
    assert of(Entered, batch.step()) == ["a0", "b0"]


def test_a_cancelled_picture_costs_no_further_row_and_no_decoding(
    tiny: pipelines.LoadedPipeline, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = RunningBatch(tiny, capacity=2)
    for id in ("a", "b", "waits"):
        batch.admit(asked(id))
    batch.step()
    assert batch.cancel("a")
    assert batch.cancel("waits")
    assert not batch.cancel("a")
    decoded: list[int] = []
    decode = sampling.decode

    def counted(loaded: pipelines.LoadedPipeline, latents: torch.Tensor, **how: Any) -> list[Any]:
        decoded.append(len(latents))
        return decode(loaded, latents, **how)

    monkeypatch.setattr(sampling, "decode", counted)
    assert of(Finished, drained(batch)) == ["b"]
    assert network.rows == [4, 2, 2, 2]
    assert decoded == [1]


def test_finished_pictures_are_decoded_a_few_at_a_time_while_others_go_on(tiny: pipelines.LoadedPipeline) -> None:
    batch = RunningBatch(tiny, decoded_at_once=2)
    for index in range(3):
        batch.admit(asked(f"short-{index}", steps=1))
    batch.admit(asked("long", steps=3))
    first, second = batch.step(), batch.step()
    assert of(Finished, first) == ["short-0", "short-1"]
    assert of(Finished, second) == ["short-2"]
    assert of(Stepped, second) == ["long"]


def test_memory_that_runs_out_halves_the_call_and_harms_nobody(
    tiny: pipelines.LoadedPipeline, network: Network
) -> None:
    network.error = lambda rows: MemoryError("no more") if len(rows) > 4 else None
    batch = RunningBatch(tiny)
    for index in range(4):
        batch.admit(asked(str(index), steps=2))
    events = drained(batch)
    assert of(Finished, events) == ["0", "1", "2", "3"]
    assert network.rows == [8, 4, 4, 4, 4]


def test_a_request_that_fails_alone_fails_and_the_others_finish(
    tiny: pipelines.LoadedPipeline, network: Network
) -> None:
    network.error = lambda rows: MemoryError("no more") if rows.shape[-1] > 8 else None
    batch = RunningBatch(tiny)
    for request in (asked("a"), asked("large", width=96), asked("b")):
        batch.admit(request)
    events = drained(batch)
    [failed] = [event for event in events if isinstance(event, Failed)]
    assert failed.id == "large"
    assert isinstance(failed.error, MemoryError)
    assert of(Finished, events) == ["a", "b"]


def test_a_picture_that_is_no_number_fails_and_its_company_does_not(
    tiny: pipelines.LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = RunningBatch(tiny)
    batch.admit(asked("good"))
    batch.admit(asked("bad"))
    batch.step()
    batch._running["bad"].latents.fill_(float("nan"))
    events = drained(batch)
    assert of(Finished, events) == ["good"]
    [failed] = [event for event in events if isinstance(event, Failed)]
    assert failed.id == "bad"
    assert "not finite" in str(failed.error)


def test_prompts_that_enter_together_are_encoded_together_and_only_once(
    tiny: pipelines.LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    forward = tiny.pipe.text_encoder.forward

    def counted(tokens: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        calls.append(len(tokens))
        return forward(tokens, *arguments, **named)

    monkeypatch.setattr(tiny.pipe.text_encoder, "forward", counted)
    batch = RunningBatch(tiny)
    for id, prompt in (("a", "a red star"), ("b", "a blue house"), ("c", "a red star")):
        batch.admit(asked(id, prompt=prompt))
    batch.step()
    batch.admit(asked("d", prompt="a blue house"))
    drained(batch)
    assert calls == [2, 2]


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_families_encode_prompts_together_as_they_do_alone(
    model_ref: Callable[..., ModelRef], monkeypatch: pytest.MonkeyPatch, family: str, guided: bool
) -> None:
    loaded = pipelines.load(model_ref(family), "cpu")
    guidance = 4.0 if guided else 1.0
    requests = [
        PictureRequest("a", "a red star", guidance=guidance),
        PictureRequest("b", "a blue house", "" if family == "flux" else "a star", guidance=guidance),
        PictureRequest("c", "a green house on a star", guidance=guidance),
    ]
    calls: list[int] = []
    forward = loaded.pipe.text_encoder_2.forward

    def counted(tokens: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        calls.append(len(tokens))
        return forward(tokens, *arguments, **named)

    monkeypatch.setattr(loaded.pipe.text_encoder_2, "forward", counted)
    together = PromptEncoder(loaded, AdapterBank(loaded)).encode(requests)
    # Only SDXL cannot say in one call that some have a negative prompt and others none.
    assert calls[0] == (2 if family == "sdxl" and guided else 3)
    for request, found in zip(requests, together, strict=True):
        alone = sampling.encode_prompt(loaded, request.prompt, request.negative_prompt, guided and family != "flux")
        for name in ("positive", "negative", "pooled_positive", "pooled_negative"):
            one, other = getattr(found, name), getattr(alone, name)
            assert (one is None) == (other is None), name
            assert one is None or torch.allclose(one, other, atol=1e-5), name


def test_previews_come_every_few_steps_and_look_like_the_picture(tiny: pipelines.LoadedPipeline) -> None:
    batch = RunningBatch(tiny)
    batch.admit(asked("a", prompt="a red circle on a blue background", steps=12, preview_every=5))
    events = drained(batch)
    previews = [event for event in events if isinstance(event, Previewed)]
    assert [preview.done for preview in previews] == [5, 10]
    [picture] = [event.picture for event in events if isinstance(event, Finished)]
    shown = previews[-1].picture
    assert shown.size == (8, 8)
    small = np.asarray(picture.resize(shown.size, 4), float)
    wrong = np.asarray(picture.resize(shown.size, 4).transpose(1), float)[..., ::-1]
    seen = np.asarray(shown, float)
    assert np.abs(seen - small).mean() < 40 < np.abs(seen - wrong).mean()


def test_the_preview_map_gives_plain_colours_back(tiny: pipelines.LoadedPipeline) -> None:
    colour = torch.tensor([0.8, -0.6, 0.1]).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    shown = np.asarray(PreviewMap(tiny).show(sampling.encode_pixels(tiny, colour)), float)
    assert np.abs(shown.mean(axis=(0, 1)) - np.array([229.5, 51.0, 140.3])).max() < 40


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"width": 60}, "width"),
        ({"height": 0}, "height"),
        ({"steps": 0}, "steps"),
        ({"seed": -1}, "seed"),
        ({"scheduler": "nonesuch"}, "scheduler"),
        ({"adapters": (("gone", 1.0),)}, "adapters"),
        ({"id": ""}, "id"),
        ({"id": "here"}, "id"),
    ],
)
def test_what_cannot_run_is_refused_with_its_field(
    tiny: pipelines.LoadedPipeline, changes: dict[str, Any], field: str
) -> None:
    batch = RunningBatch(tiny)
    batch.admit(asked("here"))
    with pytest.raises(InputRefused) as refused:
        batch.admit(replace(asked("new"), **changes))
    assert refused.value.field == field
    assert len(batch) == 1


def test_models_without_a_step_loop_are_refused(model_ref: Callable[..., ModelRef]) -> None:
    with pytest.raises(InputRefused, match="one after the other"):
        RunningBatch(pipelines.load(model_ref("pag"), "cpu"))


def _kept(tiny: pipelines.LoadedPipeline) -> KeptPicture:
    batch = RunningBatch(tiny)
    batch.admit(asked("a", scheduler="unipc"))
    batch.step()
    batch.step()
    return batch.pause("a")


@pytest.mark.parametrize(
    "broken",
    [
        lambda kept: replace(kept, tensors={**kept.tensors, "latents": torch.zeros(1, 4, 9, 9)}),
        lambda kept: replace(kept, tensors={n: t for n, t in kept.tensors.items() if n != "generator"}),
        lambda kept: replace(kept, tensors={**kept.tensors, "generator": torch.zeros(3, dtype=torch.uint8)}),
        lambda kept: replace(kept, tensors={n: t for n, t in kept.tensors.items() if not n.endswith("/1")}),
        lambda kept: replace(kept, values={**kept.values, "step": 3}),
        lambda kept: replace(kept, done=99),
    ],
)
def test_a_kept_picture_that_does_not_fit_fails_alone(
    tiny: pipelines.LoadedPipeline, broken: Callable[[KeptPicture], KeptPicture]
) -> None:
    batch = RunningBatch(tiny)
    batch.admit(asked("other"))
    batch.resume(broken(_kept(tiny)))
    events = drained(batch)
    assert of(Failed, events) == ["a"]
    assert of(Finished, events) == ["other"]
