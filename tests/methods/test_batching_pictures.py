"""Pictures that begin with another picture, follow a ControlNet or come from a transformer are the plain pipelines' too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import diffusers
import numpy as np
import pytest
import torch
from drained import drained, paused_and_resumed
from PIL import Image

from executors.batching.batch import RunningBatch
from executors.batching.controls import ControlNets
from executors.batching.requests import ControlPicture, PictureRequest
from executors.methods import pipelines, sampling
from executors.methods.base import InputRefused, ModelMissing, ModelRef
from executors.methods.parameters import SchedulerName
from executors.tiny import MODEL_DIR

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]

LEVELS = 1.0
"""How far a channel of a pixel (of 255) may be from the plain pipeline's when the batch holds others too."""
NAMES: tuple[str, ...] = get_args(SchedulerName)
SIDE = 32


def drawn(seed: int, side: int = SIDE) -> Image.Image:
    """A picture of soft colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)


def half(side: int = SIDE) -> Image.Image:
    """A mask: the left half is painted anew."""
    mask = Image.new("L", (side, side), 0)
    mask.paste(255, (0, 0, side // 2, side))
    return mask


def request(**changes: Any) -> PictureRequest:
    fields: dict[str, Any] = {"id": "mine", "prompt": "a red star", "negative_prompt": "a blue house", "seed": 3}
    return PictureRequest(**{**fields, "steps": 5, "guidance": 4.0, "width": SIDE, "height": SIDE, **changes})


@pytest.fixture(scope="module")
def tiny() -> pipelines.LoadedPipeline:
    return pipelines.load(ModelRef("tiny", MODEL_DIR), "cpu")


KINDS = {
    ("sd", "image"): diffusers.StableDiffusionImg2ImgPipeline,
    ("sd", "mask"): diffusers.StableDiffusionInpaintPipeline,
    ("sdxl", "image"): diffusers.StableDiffusionXLImg2ImgPipeline,
    ("sdxl", "mask"): diffusers.StableDiffusionXLInpaintPipeline,
    ("sd3", "image"): diffusers.StableDiffusion3Img2ImgPipeline,
    ("sd3", "mask"): diffusers.StableDiffusion3InpaintPipeline,
    ("sd", "control"): diffusers.StableDiffusionControlNetPipeline,
    ("sdxl", "control"): diffusers.StableDiffusionXLControlNetPipeline,
    ("sd", "image control"): diffusers.StableDiffusionControlNetImg2ImgPipeline,
    ("sd", "mask control"): diffusers.StableDiffusionControlNetInpaintPipeline,
    ("sdxl", "image control"): diffusers.StableDiffusionXLControlNetImg2ImgPipeline,
    ("sdxl", "mask control"): diffusers.StableDiffusionXLControlNetInpaintPipeline,
}


def plain(loaded: pipelines.LoadedPipeline, asked: PictureRequest, controls: ControlNets | None = None) -> Any:
    """What diffusers' own pipeline of the request's kind makes of it."""
    kind = "mask" if asked.mask is not None else "image" if asked.image is not None else ""
    kind = f"{kind} control".strip() if asked.controls else kind
    given: dict[str, Any] = {}
    parts = dict(loaded.pipe.components)
    if asked.image is not None:
        given |= {"image": asked.image, "strength": asked.strength}
    if asked.mask is not None:
        given |= {"mask_image": asked.mask}
    if asked.controls:
        assert controls is not None
        parts["controlnet"] = [controls._nets[each.name] for each in asked.controls]
        given["control_image" if asked.image is not None else "image"] = [each.picture for each in asked.controls]
        given["controlnet_conditioning_scale"] = [each.scale for each in asked.controls]
        given["control_guidance_start"] = [each.start for each in asked.controls]
        given["control_guidance_end"] = [each.end for each in asked.controls]
    if asked.mask is not None or (asked.image is None and not asked.controls):
        given |= {"width": asked.width, "height": asked.height}
    if loaded.family == "sd":
        parts |= {"requires_safety_checker": False}
    elif loaded.family == "sdxl":
        parts |= {"add_watermarker": False}
    pipe = KINDS[loaded.family, kind](**parts) if kind else type(loaded.pipe)(**parts)
    pipe.scheduler = sampling.build_scheduler(loaded.pipe, asked.scheduler)
    pipe.set_progress_bar_config(disable=True)
    # Diffusers 0.42 leaves the shift of SD3's autoencoder out when it decodes a painted picture; its latents are right.
    shiftless = loaded.family == "sd3" and asked.mask is not None
    made = pipe(
        prompt=asked.prompt,
        negative_prompt=asked.negative_prompt or None,
        num_inference_steps=asked.steps,
        guidance_scale=asked.guidance,
        generator=torch.Generator("cpu").manual_seed(asked.seed),
        output_type="latent" if shiftless else "pil",
        **given,
    ).images
    if shiftless:
        made = sampling.decode(loaded, made)
    return np.asarray(made[0], dtype=np.float64)


@pytest.mark.parametrize("scheduler", NAMES)
@pytest.mark.parametrize("kind", ["image", "mask", "mask, all steps"])
def test_a_picture_from_a_picture_alone_is_the_plain_pipeline_s_bit_for_bit(
    model_ref: Callable[..., ModelRef], kind: str, scheduler: str
) -> None:
    loaded = pipelines.load(model_ref("sd"), "cpu")
    asked = request(scheduler=scheduler, image=drawn(1), strength=0.7, steps=6)
    if "mask" in kind:
        asked = replace(asked, mask=half(), strength=1.0 if "all" in kind else 0.7)
    assert np.array_equal(paused_and_resumed(RunningBatch(loaded), asked), plain(loaded, asked))


@pytest.mark.parametrize("scheduler", NAMES)
def test_kinds_share_one_batch_and_stay_the_plain_pipeline_s(tiny: pipelines.LoadedPipeline, scheduler: str) -> None:
    size = {"width": 64, "height": 64}
    asked = [
        request(id="text", **size, scheduler=scheduler),
        request(id="image", **size, scheduler=scheduler, image=drawn(1, 64), strength=0.6),
        request(id="mask", **size, scheduler=scheduler, image=drawn(2, 64), mask=half(64), strength=0.9),
        request(id="other", **size, scheduler="ddim", image=drawn(3, 64), strength=0.5, guidance=7.0),
    ]
    batch = RunningBatch(tiny)
    batch.admit(asked[0])
    made = drained(batch, steps=1)
    for each in asked[1:]:
        batch.admit(each)
    made |= drained(batch)
    for each in asked:
        assert np.abs(made[each.id] - plain(tiny, each)).max() <= LEVELS, each.id


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_every_family_begins_with_pictures(model_ref: Callable[..., ModelRef], family: str, guidance: float) -> None:
    loaded = pipelines.load(model_ref(family), "cpu")
    plainly = request(id="text", guidance=guidance, negative_prompt="")
    asked = [
        plainly,
        replace(plainly, id="image", image=drawn(4), strength=0.65, seed=9),
        replace(plainly, id="mask", image=drawn(5), mask=half(), strength=0.8),
        replace(plainly, id="whole", image=drawn(5), mask=half(), strength=1.0, negative_prompt="a blue house"),
    ]
    for each in asked:
        assert np.array_equal(paused_and_resumed(RunningBatch(loaded), each), plain(loaded, each)), each.id
    batch = RunningBatch(loaded)
    for each in asked:
        batch.admit(each)
    made = drained(batch)
    for each in asked:
        assert np.abs(made[each.id] - plain(loaded, each)).max() <= LEVELS, each.id


@pytest.mark.parametrize("scheduler", [None, "euler_a", "dpmpp_2m"])
@pytest.mark.parametrize("strength", [0.7, 1.0])
@pytest.mark.parametrize("family", ["inpaint", "inpaint-xl"])
def test_networks_made_for_inpainting_see_the_mask(
    model_ref: Callable[..., ModelRef], family: str, strength: float, scheduler: str | None
) -> None:
    loaded = pipelines.load(model_ref(family), "cpu")
    asked = [
        request(id="a", image=drawn(1), mask=half(), strength=strength, scheduler=scheduler),
        request(id="b", image=drawn(2), mask=half().rotate(90), strength=strength, scheduler=scheduler, guidance=1.0),
        request(id="c", image=drawn(3), mask=half(), strength=0.5, steps=8),
    ]
    batch = RunningBatch(loaded)
    assert np.array_equal(paused_and_resumed(batch, asked[0]), plain(loaded, asked[0]))
    for each in asked:
        batch.admit(each)
    made = drained(batch)
    for each in asked:
        assert np.abs(made[each.id] - plain(loaded, each)).max() <= LEVELS, each.id
    with pytest.raises(InputRefused, match="mask"):
        batch.admit(request())


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_controlnets_are_followed_as_in_the_plain_pipeline(model_ref: Callable[..., ModelRef], family: str) -> None:
    loaded = pipelines.load(model_ref(family), "cpu")
    batch = RunningBatch(loaded)
    for name in ("canny", "depth"):
        batch.controls.load(name)
    canny = ControlPicture("canny", drawn(1))
    asked = [
        request(id="one", controls=(canny,)),
        request(id="weak", controls=(replace(canny, picture=drawn(2), scale=0.4, start=0.2, end=0.7),), steps=7),
        request(id="two", controls=(canny, ControlPicture("depth", drawn(3), scale=0.5))),
        request(id="image", controls=(canny,), image=drawn(4), strength=0.6),
        request(id="none"),
        request(id="mask", controls=(canny,), image=drawn(4), mask=half(), strength=0.8),
    ]
    for each in asked:
        assert np.array_equal(paused_and_resumed(batch, each), plain(loaded, each, batch.controls)), each.id
    for each in asked:
        batch.admit(each)
    made = drained(batch)
    for each in asked:
        assert np.abs(made[each.id] - plain(loaded, each, batch.controls)).max() <= LEVELS, each.id
    assert np.abs(made["one"] - made["none"]).max() > LEVELS


def test_a_network_made_for_inpainting_follows_controlnets_too(model_ref: Callable[..., ModelRef]) -> None:
    loaded = pipelines.load(model_ref("inpaint"), "cpu")
    other = ControlNets(pipelines.load(model_ref("sd"), "cpu"))
    other.load("canny")
    batch = RunningBatch(loaded)
    batch.controls.put("canny", other._nets["canny"])
    asked = request(image=drawn(1), mask=half(), controls=(ControlPicture("canny", drawn(2)),))
    assert np.array_equal(paused_and_resumed(batch, asked), plain(loaded, asked, batch.controls))


def test_requests_of_one_set_of_controlnets_share_their_calls(
    model_ref: Callable[..., ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = pipelines.load(model_ref("sd"), "cpu")
    batch = RunningBatch(loaded)
    batch.controls.load("canny")
    rows: list[int] = []
    net = batch.controls._nets["canny"]
    forward = net.forward

    def counted(first: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        rows.append(len(first))
        return forward(first, *arguments, **named)

    monkeypatch.setattr(net, "forward", counted)
    for index in range(3):
        batch.admit(
            request(id=str(index), controls=(ControlPicture("canny", drawn(index), scale=0.5 + index),), steps=2)
        )
    batch.admit(request(id="without", steps=2))
    assert set(drained(batch)) == {"0", "1", "2", "without"}
    assert rows == [6, 6]


def test_a_transformer_keeps_its_own_sampler_and_adapts(model_ref: Callable[..., ModelRef]) -> None:
    loaded = pipelines.load(model_ref("sd3"), "cpu")
    batch = RunningBatch(loaded)
    with pytest.raises(InputRefused, match="scheduler"):
        batch.admit(request(scheduler="ddim"))
    with pytest.raises(InputRefused, match="width"):
        batch.admit(request(width=SIDE + 2))
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in loaded.pipe.transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and ".attn." in name:
            tensors[f"transformer.{name}.lora_A.weight"] = (
                torch.randn((2, module.in_features), generator=generator) * 0.3
            )
            up = torch.randn((module.out_features, 2), generator=generator) * 0.3
            tensors[f"transformer.{name}.lora_B.weight"] = up
    batch.bank.put("mine", tensors)
    asked = [request(id="adapted", adapters=(("mine", 1.0),)), request(id="bare")]
    for each in asked:
        batch.admit(each)
    made = drained(batch)
    assert np.abs(made["bare"] - plain(loaded, asked[1])).max() <= LEVELS
    fused = pipelines.load(model_ref("sd3"), "cpu")
    fused.pipe.load_lora_weights(tensors)
    expected = plain(fused, replace(asked[1], id="adapted"))
    assert np.abs(made["adapted"] - expected).max() <= LEVELS
    assert np.abs(made["adapted"] - made["bare"]).max() > LEVELS


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"mask": half()}, "mask"),
        ({"image": drawn(1, 64)}, "image"),
        ({"image": drawn(1), "mask": half(64)}, "mask"),
        ({"image": drawn(1), "strength": 0.1}, "strength"),
        ({"image": drawn(1), "strength": 1.5}, "strength"),
        ({"controls": (ControlPicture("canny", drawn(1)),)}, "control"),
    ],
)
def test_what_cannot_be_begun_is_refused_by_its_name(
    tiny: pipelines.LoadedPipeline, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(InputRefused) as caught:
        RunningBatch(tiny).admit(request(**changes))
    assert caught.value.field == field


def test_controlnets_that_are_absent_or_of_another_base_are_refused(
    model_ref: Callable[..., ModelRef], random_models: dict[str, Path]
) -> None:
    nets = ControlNets(pipelines.load(model_ref("sd"), "cpu"))
    assert nets.names() == ("broken", "canny", "depth", "foreign")
    with pytest.raises(InputRefused, match="it has: broken, canny, depth, foreign"):
        nets.load("pose")
    with pytest.raises(InputRefused, match="no ControlNet"):
        nets.load("../../sdxl/controlnets/canny")
    with pytest.raises(ModelMissing, match="another base"):
        nets.load("foreign")
    with pytest.raises(ModelMissing, match="cannot be loaded"):
        nets.load("broken")
    assert ControlNets(pipelines.load(model_ref("inpaint"), "cpu")).names() == ()
