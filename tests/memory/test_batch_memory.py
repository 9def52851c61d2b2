"""Memory in the running batch: calls stay within the plan, an error at any point harms only its own request, all is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from executors.batching.batch import RunningBatch
from executors.batching.requests import BatchEvent, Failed, Finished, PictureRequest
from executors.memory import residence
from executors.memory.calls import CallMemory
from executors.memory.footprint import read_footprint
from executors.memory.meter import HostMeter
from executors.memory.plan import GIB, MemoryPlan, Place
from executors.memory.residence import Residence
from executors.methods import dreambooth, pipelines, sampling
from executors.methods.base import ModelRef, NotFinite
from executors.methods.parameters import DreamBoothParameters
from executors.pod_models import BUILTIN_MODELS

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(
        not (BUILTIN_MODELS["tiny"] / "model_index.json").is_file(), reason="the bundled model is not in this tree"
    ),
]
OUT = torch.cuda.OutOfMemoryError
STEPS = 3


class Scripted:
    """A device whose memory is what the test says."""

    def __init__(self, free: int | None, base: int = 0, peaks: Iterator[int] | None = None) -> None:
        self.free = free
        self.base = base
        self.peaks = peaks

    def room_bytes(self) -> int | None:
        return None if self.free is None else self.free + self.base

    def free_bytes(self) -> int | None:
        return self.free

    def begin(self) -> int:
        return self.base

    def peak_bytes(self) -> int:
        return self.base + (0 if self.peaks is None else next(self.peaks))


class Failing:
    """Stands before a function and raises as it is told; notes how often it was called with how many rows."""

    def __init__(self, real: Callable[..., Any], error: Callable[[int, int], Exception | None]) -> None:
        self._real = real
        self._error = error
        self.rows: list[int] = []

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        first = next(value for value in arguments if isinstance(value, torch.Tensor | list))
        self.rows.append(len(first))
        error = self._error(len(self.rows), len(first))
        if error is not None:
            raise error
        return self._real(*arguments, **named)


@pytest.fixture
def tiny() -> pipelines.LoadedPipeline:
    return pipelines.load(ModelRef("tiny", BUILTIN_MODELS["tiny"]), "cpu")


def asked(id: str, **more: Any) -> PictureRequest:
    values = {"prompt": f"a red star {id}", "seed": 3, "steps": STEPS, "guidance": 3.0, "scheduler": "ddim", **more}
    return PictureRequest(id, **values)


def drained(batch: RunningBatch, *requests: PictureRequest) -> list[BatchEvent]:
    for request in requests:
        batch.admit(request)
    events: list[BatchEvent] = []
    for _ in range(200):
        if not len(batch):
            return events
        events += batch.step()
    raise AssertionError("the batch does not end")


def made(events: list[BatchEvent]) -> dict[str, Any]:
    return {e.id: np.asarray(e.picture, dtype=float) for e in events if isinstance(e, Finished)}


def failed(events: list[BatchEvent]) -> dict[str, Exception]:
    return {e.id: e.error for e in events if isinstance(e, Failed)}


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.abs(one[id] - other[id]).max() <= 1 for id in one)


# --- an error at any point ------------------------------------------------------------------------------------------------


def test_out_of_memory_while_prompts_are_encoded_together_harms_nobody(
    tiny: pipelines.LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = made(drained(RunningBatch(tiny), asked("a"), asked("b")))
    encoder = tiny.pipe.text_encoder
    hurt = Failing(encoder.forward, lambda _call, rows: OUT("no more") if rows > 1 else None)
    monkeypatch.setattr(encoder, "forward", hurt)
    events = drained(RunningBatch(tiny), asked("a"), asked("b"))
    assert failed(events) == {}
    assert alike(made(events), plain)
    assert hurt.rows[:2] == [2, 1], "it was tried together first"


def test_out_of_memory_while_one_prompt_is_encoded_is_tried_once_more_alone(
    tiny: pipelines.LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = tiny.pipe.text_encoder
    monkeypatch.setattr(
        encoder, "forward", Failing(encoder.forward, lambda call, _rows: OUT("no more") if call == 1 else None)
    )
    assert list(made(drained(RunningBatch(tiny), asked("a")))) == ["a"]


@pytest.mark.parametrize("error", [OUT("no more"), MemoryError("no more"), RuntimeError("can't allocate memory")])
def test_out_of_memory_in_a_step_alone_is_tried_once_more(
    tiny: pipelines.LoadedPipeline, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    plain = made(drained(RunningBatch(tiny), asked("a")))
    unet = tiny.pipe.unet
    hurt = Failing(unet.forward, lambda call, _rows: error if call == 2 else None)
    monkeypatch.setattr(unet, "forward", hurt)
    events = drained(RunningBatch(tiny), asked("a"))
    assert failed(events) == {}
    assert alike(made(events), plain)
    assert len(hurt.rows) == STEPS + 1


def test_a_picture_for_which_there_is_never_memory_fails_and_its_company_does_not(
    tiny: pipelines.LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = made(drained(RunningBatch(tiny), asked("a"), asked("b")))
    unet = tiny.pipe.unet
    real = unet.forward

    def forward(sample: Any, *arguments: Any, **named: Any) -> Any:
        if sample.shape[-1] > 8:
            raise OUT("no more")
        return real(sample, *arguments, **named)

    monkeypatch.setattr(unet, "forward", forward)
    events = drained(RunningBatch(tiny), asked("a"), asked("large", width=128, height=128), asked("b"))
    assert {id: type(error) for id, error in failed(events).items()} == {"large": OUT}
    assert alike(made(events), plain)


def test_other_errors_are_not_tried_again(tiny: pipelines.LoadedPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = tiny.pipe.unet
    hurt = Failing(unet.forward, lambda call, _rows: RuntimeError("shapes do not match") if call == 1 else None)
    monkeypatch.setattr(unet, "forward", hurt)
    events = drained(RunningBatch(tiny), asked("a"))
    assert list(failed(events)) == ["a"]
    assert len(hurt.rows) == 1


def test_out_of_memory_in_decoding_together_is_decoded_one_by_one(
    tiny: pipelines.LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = made(drained(RunningBatch(tiny), asked("a"), asked("b")))
    vae = tiny.pipe.vae
    hurt = Failing(vae.decode, lambda _call, rows: OUT("no more") if rows > 1 else None)
    monkeypatch.setattr(vae, "decode", hurt)
    events = drained(RunningBatch(tiny), asked("a"), asked("b"))
    assert alike(made(events), plain)
    assert hurt.rows == [2, 1, 1]


def test_where_a_whole_picture_cannot_be_decoded_it_is_decoded_in_tiles(
    tiny: pipelines.LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = tiny.pipe.vae
    real, tiled = vae.decode, []

    def decode(latents: Any, *arguments: Any, **named: Any) -> Any:
        tiled.append(vae.use_tiling)
        if not vae.use_tiling:
            raise OUT("no more")
        return real(latents, *arguments, **named)

    monkeypatch.setattr(vae, "decode", decode)
    events = drained(RunningBatch(tiny), asked("a"))
    assert list(made(events)) == ["a"]
    assert tiled == [False, False, True]
    assert not vae.use_tiling, "the next picture is decoded whole again"


# --- the plan -----------------------------------------------------------------------------------------------------------------


def _planned(loaded: pipelines.LoadedPipeline, meter: Scripted) -> MemoryPlan:
    plan = MemoryPlan(read_footprint(BUILTIN_MODELS["tiny"]), 4, GIB)
    loaded.memory = CallMemory(plan, meter)
    return plan


def test_no_call_takes_more_pictures_than_the_plan_has_room_for(
    tiny: pipelines.LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [asked(f"r{number}") for number in range(7)]
    plain = made(drained(RunningBatch(tiny), *requests))
    meter = Scripted(0)
    plan = _planned(tiny, meter)
    meter.free = int(plan.planned("step", 64, 64, 2, 3) * 1.3)  # Three pictures and the margin.
    unet, vae = tiny.pipe.unet, tiny.pipe.vae
    steps, decodes = Failing(unet.forward, lambda *_: None), Failing(vae.decode, lambda *_: None)
    monkeypatch.setattr(unet, "forward", steps)
    monkeypatch.setattr(vae, "decode", decodes)
    events = drained(RunningBatch(tiny), *requests)
    assert alike(made(events), plain)
    assert set(steps.rows) == {6, 2}, "two rows for each of three pictures, then the seventh"
    assert max(decodes.rows) <= 4


def test_one_picture_is_always_tried_and_decoded_in_tiles_where_the_plan_says_so(
    tiny: pipelines.LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    _planned(tiny, Scripted(1))
    vae = tiny.pipe.vae
    real, tiled = vae.decode, []

    def decode(*arguments: Any, **named: Any) -> Any:
        tiled.append(vae.use_tiling)
        return real(*arguments, **named)

    monkeypatch.setattr(vae, "decode", decode)
    assert list(made(drained(RunningBatch(tiny), asked("a")))) == ["a"]
    assert tiled == [True]


def test_a_picture_is_told_its_share_of_the_largest_call_it_was_in(tiny: pipelines.LoadedPipeline) -> None:
    peaks = iter([800, 400, 300, 90])  # Three steps of two pictures each, then their decoding.
    _planned(tiny, Scripted(GIB, base=5000, peaks=peaks))
    batch = RunningBatch(tiny)
    events = drained(batch, asked("a"), asked("b"))
    assert {e.id: e.working_bytes for e in events if isinstance(e, Finished)} == {"a": 400, "b": 400}
    assert batch.memory.base_bytes == 5000
    assert batch.memory.take_share("a") == 0, "nothing is kept of a picture that has left"


def test_what_calls_took_corrects_the_plan(tiny: pipelines.LoadedPipeline) -> None:
    meter = Scripted(GIB)
    plan = _planned(tiny, meter)
    each = plan.planned("step", 64, 64, 2, 1)
    meter.peaks = iter([2 * each] * STEPS + [1])
    drained(RunningBatch(tiny), asked("a"))
    assert plan.to_json()["step"] == pytest.approx(2.1, abs=0.01)


def test_a_call_that_failed_is_not_learned_from(tiny: pipelines.LoadedPipeline) -> None:
    plan = _planned(tiny, Scripted(GIB, peaks=iter([10**9])))
    memory = tiny.memory
    assert memory is not None
    with pytest.raises(OUT), memory.call("step", 64, 64, 2, ["a"]):
        raise OUT("no more")
    assert plan.to_json() == {}
    assert memory.take_share("a") == 0


def test_the_host_meter_sees_what_the_process_touches() -> None:
    meter = HostMeter()
    before = meter.begin()
    held = bytearray(b"x") * (192 << 20)  # far more than what other tests left may give back meanwhile
    assert meter.peak_bytes() - before >= 60 << 20
    del held
    assert (meter.room_bytes(), meter.free_bytes()) == (None, None)


# --- parts aside ---------------------------------------------------------------------------------------------------------------


def test_parts_that_lie_aside_come_when_they_are_called_and_the_picture_is_the_same(
    tiny: pipelines.LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = made(drained(RunningBatch(tiny), asked("a"), asked("b")))
    hooks = residence.lay_aside(tiny.pipe, torch.device("cpu"))
    assert sorted(hooks) == ["text_encoder", "vae"]
    tiny.residence = Residence(Place.ASIDE, hooks)
    moves: list[str] = []
    for name, hook in hooks.items():
        part = getattr(tiny.pipe, name)
        real = part.to

        def to(*where: Any, _name: str = name, _real: Any = real, **how: Any) -> Any:
            moves.append(_name)
            return _real(*where, **how)

        monkeypatch.setattr(part, "to", to)
        assert hook.model is part
    again = made(drained(RunningBatch(tiny), asked("a"), asked("b")))
    assert all((again[id] == plain[id]).all() for id in plain)
    assert {"text_encoder", "vae"} <= set(moves)


def test_settling_follows_the_plan(tiny: pipelines.LoadedPipeline) -> None:
    footprint = read_footprint(BUILTIN_MODELS["tiny"])
    device, size = torch.device("cpu"), residence.native_size(tiny.pipe)
    assert size == (64, 64)
    assert residence.settle(tiny.pipe, device, None, *size).place is Place.DEVICE
    whole = MemoryPlan(footprint, 4, 64 << 20)
    assert residence.settle(tiny.pipe, device, whole, *size) == Residence()
    narrow = MemoryPlan(footprint, 4, whole.least_bytes(*size) + 1)
    placed = residence.settle(tiny.pipe, device, narrow, *size)
    assert (placed.place, sorted(placed.hooks)) == (Place.ASIDE, ["text_encoder", "vae"])
    with pytest.raises(MemoryError, match=r"needs at least 0\.01 GiB of GPU memory for one picture of 64x64"):
        residence.settle(tiny.pipe, device, MemoryPlan(footprint, 4, 1 << 20), *size)


# --- numbers that are none ----------------------------------------------------------------------------------------------------


@contextmanager
def _half(loaded: pipelines.LoadedPipeline) -> Iterator[None]:
    loaded.pipe.vae.to(torch.float16)
    loaded.dtype = torch.float16
    yield


def test_latents_that_are_no_numbers_are_told_from_a_picture_that_is_none(tiny: pipelines.LoadedPipeline) -> None:
    latents = torch.zeros(1, 4, 8, 8)
    latents[0, 0, 0, 0] = float("nan")
    with pytest.raises(NotFinite, match="the latents hold numbers that are not finite"):
        sampling.decode(tiny, latents)
    tiny.pipe.vae.decoder.layers[0].weight.data.fill_(float("inf"))
    with pytest.raises(NotFinite, match="although its latents are: see tiny's vae"):
        sampling.decode(tiny, torch.ones(1, 4, 8, 8))


def test_an_overflow_in_half_precision_is_decoded_once_more_in_single(
    tiny: pipelines.LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    whole = np.asarray(sampling.decode(tiny, latents)[0], dtype=float)
    vae = tiny.pipe.vae
    real, seen = vae.decode, []

    def decode(given: Any, *arguments: Any, **named: Any) -> Any:
        seen.append(given.dtype)
        out = real(given, *arguments, **named)
        if given.dtype is torch.float16:
            out.sample[..., 0] = float("inf")
        return out

    monkeypatch.setattr(vae, "decode", decode)
    with _half(tiny):
        [picture] = sampling.decode(tiny, latents.half())
    assert seen == [torch.float16, torch.float32]
    assert np.abs(np.asarray(picture, dtype=float) - whole).max() <= 2
    assert vae.dtype is torch.float16, "the next picture is decoded in half again"


# --- training -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows_free", "parts"), [(100.0, 1), (3.5, 3), (0.0, 8)])
def test_a_training_begins_in_as_many_parts_as_the_device_asks_for(
    tiny: pipelines.LoadedPipeline, rows_free: float, parts: int
) -> None:
    meter = Scripted(0)
    plan = _planned(tiny, meter)
    meter.free = int(plan.footprint.train_bytes(64, 64, 1, 4) * 1.26 * rows_free)
    options = {"pictures": ["a" * 64, "b" * 64, "c" * 64], "category": "dog", "batch": 4}
    asked_for = DreamBoothParameters.model_validate(options)
    training: Any = SimpleNamespace(asked=asked_for, loaded=tiny, prior=object(), size_px=64)
    assert dreambooth._planned_parts(training) == parts
    meter.free = None
    assert dreambooth._planned_parts(training) == 1, "where nobody says how much is free, it is tried whole"
