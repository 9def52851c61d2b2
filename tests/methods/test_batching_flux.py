"""Flux in the running batch: packed tokens, guidance as an input and flows bent by size, equal to diffusers' own pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from drained import drained, paused_and_resumed
from PIL import Image

from executors.batching import packing
from executors.batching.batch import RunningBatch
from executors.batching.requests import PictureRequest, Previewed
from executors.methods import pipelines, sampling
from executors.methods.base import InputRefused, ModelMissing, ModelRef
from executors.methods.parameters import TextToImageParameters
from executors.methods.text_to_image import TextToImage

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]

LEVELS = 1.0
"""How far a channel of a pixel (of 255) may be from the plain pipeline's when the batch holds others too."""
SIDE = 32


def drawn(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def half() -> Image.Image:
    mask = Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, (0, 0, SIDE // 2, SIDE))
    return mask


def request(**changes: Any) -> PictureRequest:
    fields: dict[str, Any] = {"id": "mine", "prompt": "a red star", "seed": 3, "steps": 5, "guidance": 3.5}
    return PictureRequest(**{**fields, "width": SIDE, "height": SIDE, **changes})


def plain(loaded: pipelines.LoadedPipeline, asked: PictureRequest) -> Any:
    """What diffusers' own pipeline of the request's kind makes of it."""
    given: dict[str, Any] = {}
    kind = diffusers.FluxPipeline
    if asked.image is not None:
        given, kind = {"image": asked.image, "strength": asked.strength}, diffusers.FluxImg2ImgPipeline
    if asked.mask is not None:
        given, kind = {**given, "mask_image": asked.mask}, diffusers.FluxInpaintPipeline
    pipe = kind(**loaded.pipe.components)
    pipe.scheduler = sampling.build_scheduler(loaded.pipe, None)
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        prompt=asked.prompt,
        num_inference_steps=asked.steps,
        guidance_scale=asked.guidance,
        width=asked.width,
        height=asked.height,
        generator=torch.Generator("cpu").manual_seed(asked.seed),
        max_sequence_length=24,
        **given,
    ).images
    return np.asarray(made[0], dtype=np.float64)


KINDS = {
    "text": request(),
    "text, another size": request(width=48, height=16, steps=4, guidance=1.0),
    "image": request(image=drawn(1), strength=0.65, steps=7),
    "mask": request(image=drawn(2), mask=half(), strength=0.8),
    "mask, all steps": request(image=drawn(2), mask=half()),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["flux", "flux-fast"])
def test_a_flux_picture_alone_is_the_plain_pipeline_s_bit_for_bit(
    model_ref: Callable[..., ModelRef], model: str, kind: str
) -> None:
    loaded = pipelines.load(model_ref(model), "cpu")
    assert loaded.family == "flux"
    asked = KINDS[kind]
    assert np.array_equal(paused_and_resumed(RunningBatch(loaded), asked), plain(loaded, asked))


def test_flux_pictures_in_company_are_the_plain_pipeline_s(model_ref: Callable[..., ModelRef]) -> None:
    loaded = pipelines.load(model_ref("flux"), "cpu")
    asked = [
        request(id="first", guidance=1.0),
        request(id="strong", prompt="a blue house", guidance=9.0, seed=8, steps=3),
        request(id="wide", width=48, guidance=2.0),
        replace(KINDS["image"], id="image"),
        replace(KINDS["mask"], id="mask", prompt="a star"),
    ]
    batch = RunningBatch(loaded)
    batch.admit(asked[0])
    made = drained(batch, steps=2)
    for each in asked[1:]:
        batch.admit(each)
    made |= drained(batch, steps=1)
    batch.resume(batch.pause("strong"))
    made |= drained(batch)
    for each in asked:
        assert np.abs(made[each.id] - plain(loaded, each)).max() <= LEVELS, each.id
    weak, strong = (plain(loaded, request(guidance=guidance)) for guidance in (1.0, 9.0))
    assert not np.array_equal(weak, strong)


def test_flux_pictures_of_one_size_share_their_calls(
    model_ref: Callable[..., ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = pipelines.load(model_ref("flux"), "cpu")
    network, rows = loaded.pipe.transformer, list[int]()
    forward = network.forward

    def counted(tokens: torch.Tensor, **named: Any) -> Any:
        rows.append(len(tokens))
        return forward(tokens, **named)

    monkeypatch.setattr(network, "forward", counted)
    batch = RunningBatch(loaded)
    for index in range(3):
        batch.admit(request(id=str(index), seed=index, steps=2, guidance=1.0 + 4 * index))
    assert set(drained(batch)) == {"0", "1", "2"}
    assert rows == [3, 3]


def adapter(loaded: pipelines.LoadedPipeline, seed: int) -> dict[str, torch.Tensor]:
    """A LoRA of rank 2 on the attention of both kinds of blocks and on what the single ones give."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in loaded.pipe.transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and (".attn." in name or name.endswith("proj_out")) and "blocks" in name:
            key = f"transformer.{name}"
            down = torch.randn((2, module.in_features), generator=generator)
            tensors[f"{key}.lora_A.weight"] = down * 0.3
            tensors[f"{key}.lora_B.weight"] = torch.randn((module.out_features, 2), generator=generator) * 0.3
    return tensors


def test_flux_pictures_have_adapters_of_their_own(model_ref: Callable[..., ModelRef]) -> None:
    loaded = pipelines.load(model_ref("flux"), "cpu")
    batch = RunningBatch(loaded)
    known = {name: adapter(loaded, seed) for seed, name in enumerate(("mine", "yours"))}
    for name, tensors in known.items():
        batch.bank.put(name, tensors)
    asked = [
        request(id="mine", adapters=(("mine", 1.0),)),
        request(id="yours", adapters=(("yours", 0.5),), seed=4),
        request(id="both", adapters=(("mine", 0.7), ("yours", 0.4))),
        request(id="bare"),
    ]
    for each in asked:
        batch.admit(each)
    made = drained(batch)
    for each in asked:
        fused = pipelines.load(model_ref("flux"), "cpu")
        for name, _weight in each.adapters:
            fused.pipe.load_lora_weights(dict(known[name]), adapter_name=name)
        if each.adapters:
            fused.pipe.set_adapters([name for name, _ in each.adapters], [weight for _, weight in each.adapters])
        assert np.abs(made[each.id] - plain(fused, each)).max() <= LEVELS, each.id
    assert np.abs(made["mine"] - made["bare"]).max() > LEVELS


def published(loaded: pipelines.LoadedPipeline, style: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A LoRA as the first publication names and joins the layers of a block of each kind, and the same layer by layer."""
    double, single = "transformer.transformer_blocks.1", "transformer.single_transformer_blocks.0"
    joined = {
        "double_blocks.1.img_attn.qkv": [f"{double}.attn.to_{name}" for name in "qkv"],
        "double_blocks.1.txt_attn.qkv": [f"{double}.attn.add_{name}_proj" for name in "qkv"],
        "double_blocks.1.txt_attn.proj": [f"{double}.attn.to_add_out"],
        "double_blocks.1.img_mlp.2": [f"{double}.ff.net.2"],
        "double_blocks.1.img_mod.lin": [f"{double}.norm1.linear"],
        "single_blocks.0.linear1": [*(f"{single}.attn.to_{name}" for name in "qkv"), f"{single}.proj_mlp"],
        "single_blocks.0.linear2": [f"{single}.proj_out"],
        "guidance_in.in_layer": ["transformer.time_text_embed.guidance_embedder.linear_1"],
    }
    ends = {"kohya": ("lora_down", "lora_up"), "dotted": ("lora_A", "lora_B")}[style]
    generator = torch.Generator().manual_seed(4)
    given: dict[str, torch.Tensor] = {}
    layers: dict[str, torch.Tensor] = {}
    for name, keys in joined.items():
        modules = [loaded.pipe.transformer.get_submodule(key.removeprefix("transformer.")) for key in keys]
        down = torch.randn((2, modules[0].in_features), generator=generator) * 0.3
        ups = [torch.randn((module.out_features, 2), generator=generator) * 0.3 for module in modules]
        own = f"lora_unet_{name.replace('.', '_')}" if style == "kohya" else f"diffusion_model.{name}"
        given |= {f"{own}.{ends[0]}.weight": down, f"{own}.{ends[1]}.weight": torch.cat(ups)}
        if style == "kohya":
            given[f"{own}.alpha"] = torch.tensor(1.0)
        for key, up in zip(keys, ups, strict=True):
            layers |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up * (0.5 if style == "kohya" else 1.0)}
    return given, layers


@pytest.mark.parametrize("style", ["kohya", "dotted"])
def test_joined_layers_of_published_names_are_taken_apart(model_ref: Callable[..., ModelRef], style: str) -> None:
    loaded = pipelines.load(model_ref("flux"), "cpu")
    batch = RunningBatch(loaded)
    joined, layers = published(loaded, style)
    batch.bank.put("joined", joined)
    batch.bank.put("layers", layers)
    for name in ("joined", "layers"):
        batch.admit(request(id=name, adapters=((name, 1.0),)))
    batch.admit(request(id="bare"))
    made = drained(batch)
    assert np.abs(made["joined"] - made["layers"]).max() <= LEVELS
    assert np.abs(made["joined"] - made["bare"]).max() > LEVELS
    if style == "kohya":  # Diffusers takes apart only what it knows the published size of.
        taken = {key: tensor for key, tensor in joined.items() if "double" in key}
        batch.bank.put("taken", taken)
        batch.admit(request(id="taken", adapters=(("taken", 1.0),)))
        fused = pipelines.load(model_ref("flux"), "cpu")
        fused.pipe.load_lora_weights(taken)
        assert np.abs(drained(batch)["taken"] - plain(fused, request())).max() <= LEVELS


def test_joined_layers_that_do_not_fit_or_come_twice_are_refused(model_ref: Callable[..., ModelRef]) -> None:
    loaded = pipelines.load(model_ref("flux"), "cpu")
    bank = RunningBatch(loaded).bank
    joined, layers = published(loaded, "kohya")
    key = "lora_unet_double_blocks_1_img_attn_qkv"
    for name, tensors, reason in (
        ("short", {**joined, f"{key}.lora_up.weight": joined[f"{key}.lora_up.weight"][1:]}, "95 rows for transformer"),
        ("twice", {**joined, **layers}, "joined|same layer"),
        ("unknown", {f"{key}0.lora_up.weight": joined[f"{key}.lora_up.weight"]}, "belongs to another base"),
    ):
        with pytest.raises(ModelMissing, match=reason):
            bank.put(name, tensors)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"negative_prompt": "a blue house"}, "negative_prompt"),
        ({"scheduler": "ddim"}, "scheduler"),
        ({"width": SIDE + 2}, "width"),
        ({"mask": half()}, "mask"),
    ],
)
def test_what_flux_cannot_do_is_refused_by_its_name(
    model_ref: Callable[..., ModelRef], changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(InputRefused) as caught:
        RunningBatch(pipelines.load(model_ref("flux"), "cpu")).admit(request(**changes))
    assert caught.value.field == field


def test_flux_pictures_are_previewed_on_the_way(model_ref: Callable[..., ModelRef]) -> None:
    batch = RunningBatch(pipelines.load(model_ref("flux"), "cpu"))
    batch.admit(request(preview_every=2))
    shown = [event for _ in range(5) for event in batch.step() if isinstance(event, Previewed)]
    assert [event.done for event in shown] == [2, 4]
    assert shown[0].picture.size == (SIDE // 2, SIDE // 2)


def test_tokens_are_unpacked_as_they_were_packed() -> None:
    latents = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    tokens = packing.pack(latents)
    assert tokens.shape == (2, 6, 12)
    assert tokens[1, 4].tolist() == latents[1, :, 2:4, 2:4].flatten().tolist()
    assert torch.equal(packing.unpack(tokens, 4, 6), latents)
    assert packing.places(4, 6, latents).tolist()[4] == [0.0, 1.0, 1.0]


def test_a_flux_job_has_the_family_s_guidance_and_size(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any]
) -> None:
    method = TextToImage()
    method.load(model_ref("flux"), "cpu")
    asked = TextToImageParameters(prompt="a red star", steps=2, seed=1, width=64, height=64)
    made = method.run(asked, new_context())
    assert made.metadata["guidance"] == 3.5
    loaded = method._require()
    assert loaded.native_size == (256, 256)
    assert loaded.size_grain == 4
    method.close()


@pytest.mark.parametrize("own", [0, 513, "24"])
def test_a_flux_model_s_wrong_number_of_tokens_is_named(model_ref: Callable[..., ModelRef], own: object) -> None:
    loaded = pipelines.load(model_ref("flux"), "cpu")
    loaded.defaults = {"prompt_tokens": own}
    with pytest.raises(ModelMissing, match="prompt_tokens of flux's defaults"):
        sampling.encode_prompt(loaded, "a red star", "", False)


def test_flux_is_computed_in_the_wider_half_precision_on_a_gpu(model_ref: Callable[..., ModelRef]) -> None:
    gpu = torch.device("cuda")
    assert pipelines._precision(model_ref("flux").base_dir, gpu) == torch.bfloat16
    assert pipelines._precision(model_ref("sd").base_dir, gpu) == torch.float16
    assert pipelines._precision(model_ref("flux").base_dir, torch.device("cpu")) == torch.float32
