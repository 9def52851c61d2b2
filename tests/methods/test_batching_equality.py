"""A picture from the running batch is the plain pipeline's: bit for bit alone, within a tolerance in any company."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from drained import drained
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from executors.batching.batch import RunningBatch
from executors.batching.requests import KeptPicture, PictureRequest
from executors.methods import pipelines, sampling
from executors.methods.base import ModelRef
from executors.methods.parameters import SchedulerName
from executors.tiny import MODEL_DIR

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]

LEVELS = 1.0
"""How far a channel of a pixel (of 255) may be from the plain pipeline's when the batch holds others too."""
NAMES: tuple[str, ...] = get_args(SchedulerName)
COMPANY = [
    PictureRequest("c0", "a blue house", seed=5, steps=9, guidance=2.0, scheduler="euler_a"),
    PictureRequest("c1", "a green circle", "a red star", seed=6, steps=3, guidance=8.0, scheduler="ddim"),
    PictureRequest("c2", "a red robot", seed=7, steps=4, guidance=1.0, scheduler="unipc"),
]


@pytest.fixture(scope="module")
def tiny() -> pipelines.LoadedPipeline:
    return pipelines.load(ModelRef("tiny", MODEL_DIR), "cpu")


def request(**changes: Any) -> PictureRequest:
    fields: dict[str, Any] = {"id": "mine", "prompt": "a red star", "negative_prompt": "a blue house", "seed": 3}
    return PictureRequest(**{**fields, "steps": 5, "guidance": 4.0, **changes})


def plain(loaded: pipelines.LoadedPipeline, asked: PictureRequest, output: str = "pil") -> Any:
    """What diffusers' own pipeline makes of a request."""
    before = loaded.pipe.scheduler
    loaded.pipe.scheduler = sampling.build_scheduler(loaded.pipe, asked.scheduler)
    try:
        made = loaded.pipe(
            prompt=asked.prompt,
            negative_prompt=asked.negative_prompt or None,
            num_inference_steps=asked.steps,
            guidance_scale=asked.guidance,
            width=asked.width,
            height=asked.height,
            generator=torch.Generator("cpu").manual_seed(asked.seed),
            output_type=output,
        ).images
    finally:
        loaded.pipe.scheduler = before
    return np.asarray(made[0], dtype=np.float64)


@pytest.mark.parametrize("scheduler", NAMES)
def test_a_picture_alone_is_the_plain_pipeline_s_bit_for_bit(tiny: pipelines.LoadedPipeline, scheduler: str) -> None:
    asked = request(scheduler=scheduler)
    batch = RunningBatch(tiny)
    batch.admit(asked)
    for _ in range(3):
        batch.step()
    kept = batch.pause("mine")
    assert kept.done == 3
    batch.resume(kept)
    assert np.array_equal(drained(batch)["mine"], plain(tiny, asked))


@pytest.mark.parametrize("scheduler", NAMES)
def test_latents_alone_are_the_plain_pipeline_s_bit_for_bit(tiny: pipelines.LoadedPipeline, scheduler: str) -> None:
    asked = request(scheduler=scheduler)
    batch = RunningBatch(tiny)
    batch.admit(asked)
    batch.step()
    trajectory = batch._running["mine"]
    drained(batch)
    assert np.array_equal(trajectory.latents[0].numpy(), plain(tiny, asked, "latent"))


@pytest.mark.parametrize("scheduler", NAMES)
def test_a_picture_in_company_that_comes_and_goes_is_the_plain_pipeline_s(
    tiny: pipelines.LoadedPipeline, scheduler: str
) -> None:
    asked = request(scheduler=scheduler, steps=6)
    batch = RunningBatch(tiny, capacity=3)
    batch.admit(COMPANY[0])
    made = drained(batch, steps=1)
    batch.admit(asked)
    batch.admit(COMPANY[1])
    made |= drained(batch, steps=2)
    kept = batch.pause("mine")
    batch.admit(COMPANY[2])
    made |= drained(batch, steps=1)
    batch.resume(kept)
    made |= drained(batch)
    for each in (asked, *COMPANY):
        assert np.abs(made[each.id] - plain(tiny, each)).max() <= LEVELS, each.id


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_families_and_sizes_share_a_step_and_stay_equal(
    model_ref: Callable[..., ModelRef], family: str, guidance: float
) -> None:
    loaded = pipelines.load(model_ref(family), "cpu")
    size = {"width": 32, "height": 32}
    requests = [
        request(id="wide", width=64, height=32, guidance=guidance, negative_prompt=""),
        request(id="small", **size, guidance=guidance, scheduler="euler", steps=3),
        request(id="other", **size, guidance=3.0, prompt="a blue house", seed=8),
    ]
    batch = RunningBatch(loaded)
    for each in requests:
        batch.admit(each)
    made = drained(batch)
    for each in requests:
        assert made[each.id].shape == (each.height, each.width, 3)
        assert np.abs(made[each.id] - plain(loaded, each)).max() <= LEVELS, each.id
    batch.admit(requests[0])
    assert np.array_equal(drained(batch)["wide"], plain(loaded, requests[0]))


def test_a_kept_picture_goes_on_in_another_batch(tiny: pipelines.LoadedPipeline) -> None:
    asked = request(scheduler="dpmpp_2m_sde", steps=6)
    first, second = RunningBatch(tiny), RunningBatch(tiny)
    first.admit(asked)
    first.step()
    first.step()
    kept = first.pause("mine")
    assert len(first) == 0
    assert all(tensor.device.type == "cpu" for tensor in kept.tensors.values())
    second.resume(kept)
    assert np.array_equal(drained(second)["mine"], plain(tiny, asked))


ANY_REQUEST = st.builds(
    request,
    prompt=st.sampled_from(["a red star", "a blue house", "a green circle on a white background"]),
    negative_prompt=st.sampled_from(["", "a pink heart"]),
    seed=st.integers(0, 2**32 - 1),
    steps=st.integers(1, 6),
    guidance=st.sampled_from([1.0, 2.5, 7.5]),
    scheduler=st.sampled_from([None, *NAMES]),
)
# PNDM's first steps need a second one to begin with, in the plain pipeline too.
SOUND = ANY_REQUEST.filter(lambda each: each.steps > 1)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    requests=st.lists(SOUND, min_size=1, max_size=5),
    capacity=st.integers(1, 4),
    moves=st.lists(
        st.tuples(st.sampled_from(["admit", "step", "pause", "resume", "urgent"]), st.integers(0, 9)), max_size=12
    ),
)
def test_no_company_changes_a_picture(
    tiny: pipelines.LoadedPipeline,
    requests: list[PictureRequest],
    capacity: int,
    moves: list[tuple[str, int]],
) -> None:
    batch = RunningBatch(tiny, capacity=capacity, decoded_at_once=2)
    todo = [
        PictureRequest(**{**{name: getattr(each, name) for name in each.__slots__}, "id": str(number)})
        for number, each in enumerate(requests)
    ]
    asked = {each.id: each for each in todo}
    kept: list[KeptPicture] = []
    made: dict[str, Any] = {}
    for move, which in [*moves, *[("resume", 0), ("admit", 0)] * 9]:
        present = [id for id in asked if id in batch]
        match move:
            case "admit" | "urgent" if todo:
                entering = todo.pop(which % len(todo))
                fields = {name: getattr(entering, name) for name in entering.__slots__}
                batch.admit(PictureRequest(**{**fields, "priority": int(move == "urgent")}))
            case "pause" if present:
                kept.append(batch.pause(present[which % len(present)]))
            case "resume" if kept:
                batch.resume(kept.pop(which % len(kept)))
            case "step":
                made |= drained(batch, steps=1)
            case _:
                pass
    while kept:
        batch.resume(kept.pop())
    for each in todo:
        batch.admit(each)
    made |= drained(batch)
    assert set(made) == set(asked)
    for id, each in asked.items():
        assert np.abs(made[id] - plain(tiny, each)).max() <= LEVELS, each
