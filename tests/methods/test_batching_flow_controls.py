"""SD3 and Flux follow ControlNets in the running batch as in diffusers' own pipelines."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from drained import drained, paused_and_resumed
from PIL import Image

from executors.batching.batch import RunningBatch
from executors.batching.controls import ControlNets
from executors.batching.requests import ControlPicture, PictureRequest
from executors.methods import pipelines, sampling
from executors.methods.base import InputRefused, ModelMissing, ModelRef

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]

LEVELS = 1.0
"""How far a channel of a pixel (of 255) may be from the plain pipeline's when the batch holds others too."""
SIDE = 32
KINDS = {
    ("sd3", "text"): diffusers.StableDiffusion3ControlNetPipeline,
    ("flux", "text"): diffusers.FluxControlNetPipeline,
    ("flux", "image"): diffusers.FluxControlNetImg2ImgPipeline,
    ("flux", "mask"): diffusers.FluxControlNetInpaintPipeline,
}


def drawn(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def half() -> Image.Image:
    mask = Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, (0, 0, SIDE // 2, SIDE))
    return mask


def request(**changes: Any) -> PictureRequest:
    fields: dict[str, Any] = {"id": "mine", "prompt": "a red star", "seed": 3, "steps": 4, "guidance": 4.0}
    return PictureRequest(**{**fields, "width": SIDE, "height": SIDE, **changes})


def plain(loaded: pipelines.LoadedPipeline, asked: PictureRequest, controls: ControlNets) -> Any:
    """What diffusers' own pipeline makes of a request that follows ControlNets."""
    pictures = [each.picture for each in asked.controls]
    given: dict[str, Any] = {
        "control_image": pictures,
        "controlnet_conditioning_scale": [each.scale for each in asked.controls],
        "control_guidance_start": [each.start for each in asked.controls],
        "control_guidance_end": [each.end for each in asked.controls],
    }
    nets = [controls._nets[each.name] for each in asked.controls]
    if len(nets) == 1:
        # Several at once are another class's, which knows nothing of what one alone was made for.
        given = {name: value[0] for name, value in given.items()}
    if asked.image is not None:
        given |= {"image": asked.image, "strength": asked.strength}
    if asked.mask is not None:
        given |= {"mask_image": asked.mask}
    kind = KINDS[loaded.family, "text" if asked.image is None else "image" if asked.mask is None else "mask"]
    taken = inspect.signature(kind.__init__).parameters
    parts = {name: part for name, part in loaded.pipe.components.items() if name in taken}
    pipe = kind(**parts, controlnet=nets[0] if len(nets) == 1 else nets)
    pipe.scheduler = sampling.build_scheduler(loaded.pipe, None)
    pipe.set_progress_bar_config(disable=True)
    if loaded.family == "flux":
        given["max_sequence_length"] = 24
    made = pipe(
        prompt=asked.prompt,
        num_inference_steps=asked.steps,
        guidance_scale=asked.guidance,
        width=asked.width,
        height=asked.height,
        generator=torch.Generator("cpu").manual_seed(asked.seed),
        **given,
    ).images
    return np.asarray(made[0], dtype=np.float64)


@pytest.fixture
def repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a plain pipeline take the middle of what its autoencoder gives where it would draw from no seed."""
    sample = DiagonalGaussianDistribution.sample

    def drawn_from_seed(self: Any, generator: Any = None) -> Any:
        return self.mode() if generator is None else sample(self, generator)

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", drawn_from_seed)


CANNY = ControlPicture("canny", drawn(1))
SD3 = [
    request(id="one", controls=(CANNY,)),
    request(id="weak", controls=(replace(CANNY, picture=drawn(2), scale=0.4, start=0.2, end=0.7),), steps=7),
    request(id="unguided", controls=(CANNY,), guidance=1.0),
    request(id="two", controls=(CANNY, ControlPicture("depth", drawn(3), scale=0.5))),
    request(id="blind", controls=(ControlPicture("blind", drawn(4)),)),
]
FLUX = [
    request(id="one", controls=(CANNY,)),
    request(id="weak", controls=(replace(CANNY, picture=drawn(2), scale=0.4, start=0.2, end=0.7),), steps=7),
    request(id="untold", controls=(ControlPicture("depth", drawn(3), scale=0.8),), guidance=2.0),
    request(id="two", controls=(CANNY, ControlPicture("pose", drawn(5), scale=0.5))),
    request(id="image", controls=(CANNY,), image=drawn(4), strength=0.6, steps=6),
    request(id="mask", controls=(CANNY,), image=drawn(4), mask=half(), strength=0.8),
]


HINTED = [
    request(id="hinted", controls=(ControlPicture("hinted", drawn(3)),)),
    request(id="weak", controls=(ControlPicture("hinted", drawn(4), scale=0.3),), steps=3),
]


@pytest.mark.parametrize(("model", "asked"), [("sd3", SD3), ("flux", FLUX), ("flux-fast", HINTED)])
@pytest.mark.usefixtures("repeatable")
def test_flows_follow_controlnets_as_the_plain_pipelines_do(
    model_ref: Callable[..., ModelRef], model: str, asked: list[PictureRequest]
) -> None:
    loaded = pipelines.load(model_ref(model), "cpu")
    batch = RunningBatch(loaded)
    for name in {control.name for each in asked for control in each.controls}:
        batch.controls.load(name)
    expected = {each.id: plain(loaded, each, batch.controls) for each in asked}
    for each in asked:
        assert np.array_equal(paused_and_resumed(batch, each), expected[each.id]), each.id
    none = request(id="none")
    for each in (*asked, none):
        batch.admit(each)
    made = drained(batch)
    for each in asked:
        assert np.abs(made[each.id] - expected[each.id]).max() <= LEVELS, each.id
        assert np.abs(made[each.id] - made["none"]).max() > LEVELS, each.id


def test_rows_of_one_call_follow_pictures_and_scales_of_their_own(
    model_ref: Callable[..., ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = pipelines.load(model_ref("sd3"), "cpu")
    batch = RunningBatch(loaded)
    batch.controls.load("canny")
    net, rows = batch.controls._nets["canny"], list[int]()
    forward = net.forward

    def counted(*, hidden_states: torch.Tensor, **named: Any) -> Any:
        rows.append(len(hidden_states))
        return forward(hidden_states=hidden_states, **named)

    monkeypatch.setattr(net, "forward", counted)
    asked = [
        request(id=str(index), controls=(replace(CANNY, picture=drawn(index), scale=0.2 + index),), steps=2)
        for index in range(3)
    ]
    for each in asked:
        batch.admit(each)
    made = drained(batch)
    assert rows == [6, 6]
    for each in asked:
        batch.admit(each)
        assert np.abs(made[each.id] - drained(batch)[each.id]).max() <= LEVELS, each.id


def test_a_flow_begins_with_a_picture_and_follows_another(model_ref: Callable[..., ModelRef]) -> None:
    batch = RunningBatch(pipelines.load(model_ref("sd3"), "cpu"))
    batch.controls.load("canny")
    both = request(controls=(CANNY,), image=drawn(4), strength=0.6)
    made = paused_and_resumed(batch, both)
    for other in (replace(both, controls=()), replace(both, image=drawn(5))):
        batch.admit(other)
        assert np.abs(made - drained(batch)["mine"]).max() > LEVELS
    batch.admit(both)
    assert np.array_equal(made, drained(batch)["mine"])


@pytest.mark.parametrize(
    ("model", "name", "reason"),
    [
        ("sd3", "narrow", "has width 16 instead of 32; it belongs to another base"),
        ("sd3", "masked", "takes a mask besides its picture"),
        ("flux", "union", "takes a mode besides its picture"),
        ("flux", "foreign", "is a SD3ControlNetModel and no FluxControlNetModel; it belongs to another base"),
    ],
)
def test_controlnets_that_do_not_fit_a_flow_are_refused_with_the_reason(
    model_ref: Callable[..., ModelRef], model: str, name: str, reason: str
) -> None:
    with pytest.raises(ModelMissing, match=reason):
        ControlNets(pipelines.load(model_ref(model), "cpu")).load(name)


def test_controlnets_that_answer_to_different_layers_are_not_added_up(model_ref: Callable[..., ModelRef]) -> None:
    batch = RunningBatch(pipelines.load(model_ref("sd3"), "cpu"))
    for name in ("canny", "few"):
        batch.controls.load(name)
    with pytest.raises(InputRefused, match="canny, few answer to different layers"):
        batch.admit(request(controls=(CANNY, ControlPicture("few", drawn(2)))))
