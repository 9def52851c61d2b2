"""LoRA files of other tools give what diffusers makes of them, and what is no low-rank difference is refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from executors.batching import lora_files
from executors.batching.batch import RunningBatch
from executors.batching.lora import AdapterBank
from executors.batching.requests import Failed, Finished, PictureRequest
from executors.methods import adapters, pipelines
from executors.methods.base import ModelMissing, ModelRef

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]

LEVELS = 1.0
Tensors = dict[str, torch.Tensor]
ENCODERS = {
    "sd": {"text_encoder": "lora_te"},
    "sdxl": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
}


def kohya(loaded: pipelines.LoadedPipeline, seed: int, *, convolutions: bool = True) -> Tensors:
    """What kohya's scripts write: names with underscores, an alpha beside every pair, convolutions of rank 2 too."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = {"unet": "lora_unet", **ENCODERS[loaded.family]}
    tensors: Tensors = {}
    for part, whole in loaded.parts.items():
        for name, module in whole.named_modules():
            attention = isinstance(module, torch.nn.Linear) and ("attn" in name or "mlp" in name or "ff.net" in name)
            within = isinstance(module, torch.nn.Conv2d) and part == "unet" and "resnets" in name and convolutions
            if not (attention or within):
                continue
            path = name if part == "unet" else f"text_model.{name.removeprefix('text_model.')}"
            key = f"{prefixes[part]}_{path.replace('.', '_')}"
            shape = module.weight.shape
            down = torch.randn((2, *shape[1:]), generator=generator) * 0.2
            up = torch.randn((shape[0], 2, *([1] * (len(shape) - 2))), generator=generator) * 0.1
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = torch.tensor(1.5)
    return tensors


def numbered(loaded: pipelines.LoadedPipeline, tensors: Tensors) -> Tensors:
    """The same with the UNet's blocks numbered as in its first publication."""
    blocks = lora_files._original_blocks(loaded.pipe.unet.config)
    named: dict[str, str] = {}
    for name, module in loaded.pipe.unet.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            original = lora_files._original(name, blocks)
            assert original is not None, name
            named[f"lora_unet_{name.replace('.', '_')}"] = f"lora_unet_{original.replace('.', '_')}"
    return {
        named.get(key.partition(".")[0], key.partition(".")[0]) + key[key.index(".") :]: t for key, t in tensors.items()
    }


def drawn(loaded: pipelines.LoadedPipeline, adapted: tuple[tuple[str, float], ...], bank: AdapterBank) -> Any:
    batch = RunningBatch(loaded, bank=bank)
    request = PictureRequest("a", "a red star", "a house", 3, 3, 4.0, 32, 32, adapters=adapted)
    batch.admit(request)
    while len(batch):
        for event in batch.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Finished):
                made = np.asarray(event.picture, dtype=np.float64)
    return made


def theirs(ref: ModelRef, tensors: Tensors) -> Any:
    """The picture of diffusers' own pipeline with its own reading of the file."""
    loaded = pipelines.load(ref, "cpu")
    loaded.pipe.load_lora_weights(dict(tensors))
    made = loaded.pipe(
        prompt="a red star",
        negative_prompt="a house",
        num_inference_steps=3,
        guidance_scale=4.0,
        width=32,
        height=32,
        generator=torch.Generator("cpu").manual_seed(3),
    ).images
    return np.asarray(made[0], dtype=np.float64)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_file_of_kohya_s_scripts_is_read_as_diffusers_reads_it(
    model_ref: Callable[..., ModelRef], tmp_path: Path, family: str
) -> None:
    ref = model_ref(family)
    loaded = pipelines.load(ref, "cpu")
    tensors = kohya(loaded, 1)
    path = tmp_path / "mine.safetensors"
    save_file(tensors, str(path))
    bank = AdapterBank(loaded)
    bank.add("mine", path)
    bare = drawn(loaded, (), bank)
    mine = drawn(loaded, (("mine", 1.0),), bank)
    assert np.abs(mine - theirs(ref, tensors)).max() <= LEVELS
    assert np.abs(mine - bare).max() > 8


def test_blocks_numbered_as_first_published_are_found(model_ref: Callable[..., ModelRef]) -> None:
    loaded = pipelines.load(model_ref("sdxl"), "cpu")
    bank = AdapterBank(loaded)
    tensors = kohya(loaded, 2)
    other = numbered(loaded, tensors)
    assert set(other) != set(tensors)
    assert any(key.startswith("lora_unet_input_blocks_") for key in other)
    bank.put("named", tensors)
    bank.put("numbered", other)
    assert np.array_equal(drawn(loaded, (("named", 1.0),), bank), drawn(loaded, (("numbered", 1.0),), bank))


def test_the_numbers_are_those_of_the_published_architectures() -> None:
    sdxl = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
    }
    blocks = lora_files._original_blocks(sdxl)
    expected = {
        "down_blocks.1.attentions.0.proj_in": "input_blocks.4.1.proj_in",
        "down_blocks.2.attentions.1.transformer_blocks.9.attn1.to_q": "input_blocks.8.1.transformer_blocks.9.attn1.to_q",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "mid_block.attentions.0.proj_out": "middle_block.1.proj_out",
        "up_blocks.0.attentions.2.proj_in": "output_blocks.2.1.proj_in",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.2.resnets.2.conv_shortcut": "output_blocks.8.0.skip_connection",
        "conv_in": "input_blocks.0.0",
    }
    assert {path: lora_files._original(path, blocks) for path in expected} == expected
    sd15 = {
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 2,
    }
    blocks = lora_files._original_blocks(sd15)
    assert blocks["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.1.conv"
    assert blocks["up_blocks.3.attentions.2"] == "output_blocks.11.1"
    assert blocks["down_blocks.3.resnets.1"] == "input_blocks.11.0"


LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture
def sd(model_ref: Callable[..., ModelRef]) -> pipelines.LoadedPipeline:
    return pipelines.load(model_ref("sd"), "cpu")


def pair(sd: pipelines.LoadedPipeline, leaf: str = "to_q", rank: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    weight = sd.pipe.unet.get_submodule(f"{LAYER}.{leaf}").weight
    generator = torch.Generator().manual_seed(7)
    return (
        torch.randn((rank, weight.shape[1]), generator=generator),
        torch.randn((weight.shape[0], rank), generator=generator),
    )


def difference(bank: AdapterBank, name: str) -> dict[str, torch.Tensor]:
    return {key: up @ down.flatten(1) for key, (down, up) in bank._pairs[name].items()}


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (f"unet.{LAYER}.to_q.lora_A.weight", f"unet.{LAYER}.to_q.lora_B.weight"),
        (f"unet.{LAYER}.to_q.lora.down.weight", f"unet.{LAYER}.to_q.lora.up.weight"),
        (f"unet.{LAYER}.processor.to_q_lora.down.weight", f"unet.{LAYER}.processor.to_q_lora.up.weight"),
        (f"base_model.model.{LAYER}.to_q.lora_A.weight", f"base_model.model.{LAYER}.to_q.lora_B.weight"),
        (f"{LAYER}.to_q.lora_A.default.weight", f"{LAYER}.to_q.lora_B.default.weight"),
    ],
)
def test_the_names_of_every_tool_mean_the_same_layer(sd: pipelines.LoadedPipeline, down: str, up: str) -> None:
    a, b = pair(sd)
    bank = AdapterBank(sd)
    bank.put("mine", {down: a, up: b})
    [(key, made)] = difference(bank, "mine").items()
    assert key == f"unet.{LAYER}.to_q"
    assert torch.allclose(made, b @ a)


def test_alpha_scales_wherever_it_is_written(sd: pipelines.LoadedPipeline, tmp_path: Path) -> None:
    a, b = pair(sd)
    named = {f"unet.{LAYER}.to_q.lora_A.weight": a, f"unet.{LAYER}.to_q.lora_B.weight": b}
    bank = AdapterBank(sd)
    bank.put("beside", {**named, f"unet.{LAYER}.to_q.alpha": torch.tensor(8.0)})
    noted = tmp_path / "noted.safetensors"
    save_file(named, str(noted), {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 8})})
    bank.add("noted", noted)
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file(
        {key.replace("unet.", "base_model.model.", 1): t for key, t in named.items()}, str(folder / "a.safetensors")
    )
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8}))
    bank.add("peft", folder)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8, "use_rslora": True}))
    bank.add("rslora", folder)
    for name, scale in (("beside", 4.0), ("noted", 4.0), ("peft", 4.0), ("rslora", 8 / 2**0.5)):
        [made] = difference(bank, name).values()
        assert torch.allclose(made, b @ a * scale, rtol=1e-5), name


def test_a_convolution_in_three_parts_is_folded_into_two(sd: pipelines.LoadedPipeline) -> None:
    conv = sd.pipe.unet.down_blocks[0].resnets[0].conv1
    generator = torch.Generator().manual_seed(1)
    down = torch.randn((3, conv.in_channels, 1, 1), generator=generator)
    middle = torch.randn((3, 3, 3, 3), generator=generator)
    up = torch.randn((conv.out_channels, 3, 1, 1), generator=generator)
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    bank = AdapterBank(sd)
    bank.put(
        "mine", {f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": middle, f"{name}.lora_up.weight": up}
    )
    x = torch.randn((2, conv.in_channels, 8, 8), generator=generator)
    with torch.no_grad():
        bare = conv(x)
        one, three, last = (torch.nn.functional.conv2d for _ in range(3))
        expected = bare + last(three(one(x, down), middle, padding=1), up)
        with bank.applied([(("mine", 1.0),)]):
            made = conv(x)
    assert torch.allclose(made, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "LoHa"),
        ("lora_unet_mid_block_attentions_0_proj_in.lokr_w1", "LoKr"),
        ("lora_unet_mid_block_attentions_0_proj_in.dora_scale", "DoRA"),
        ("lora_unet_mid_block_attentions_0_proj_in.diff", "full difference"),
        ("lora_unet_mid_block_attentions_0_proj_in.oft_blocks", "OFT"),
        (f"unet.{LAYER}.to_q.lora_magnitude_vector", "DoRA"),
        (f"unet.{LAYER}.to_q.weight", "Pod of its own"),
        ("lora_unet_nonesuch.alpha", "another base"),
        ("lora_te3_encoder_block_0.alpha", "another base"),
        ("something", "no low-rank difference"),
    ],
)
def test_other_kinds_are_refused_with_the_reason(sd: pipelines.LoadedPipeline, key: str, reason: str) -> None:
    a, b = pair(sd)
    good = {f"unet.{LAYER}.to_q.lora_A.weight": a, f"unet.{LAYER}.to_q.lora_B.weight": b}
    bank = AdapterBank(sd)
    with pytest.raises(ModelMissing, match=reason):
        bank.put("mine", {**good, key: torch.zeros(4, 4)})
    assert bank.names() == ()


def test_broken_pairs_and_scales_are_refused(sd: pipelines.LoadedPipeline, tmp_path: Path) -> None:
    a, b = pair(sd)
    down, up = f"unet.{LAYER}.to_q.lora_A.weight", f"unet.{LAYER}.to_q.lora_B.weight"
    cases: list[tuple[Tensors, str]] = [
        ({down: a, up: b, down.replace("lora_A", "lora.down"): a}, "same layer"),
        ({down: a.reshape(-1), up: b}, "no product"),
        ({down: a, up: b[:, :0]}, "no product"),
        ({down: a, up: b, f"unet.{LAYER}.to_q.alpha": torch.tensor(float("nan"))}, "not finite"),
        ({down: a, up: b, f"unet.{LAYER}.to_q.alpha": torch.ones(2)}, "one number"),
        ({down: a, up: b, f"unet.{LAYER}.to_q.lora_mid.weight": torch.ones(3, 3, 3, 3)}, "no product"),
        ({down: a, up: b[:, :1].contiguous()}, "another base"),
    ]
    bank = AdapterBank(sd)
    for tensors, reason in cases:
        with pytest.raises(ModelMissing, match=reason):
            bank.put("mine", tensors)
    for number, noted in enumerate(({"unet.lora_alpha": "much"}, {"unet.lora_alpha": 4, "unet.use_dora": True}, [])):
        path = tmp_path / f"{number}.safetensors"
        save_file({down: a, up: b}, str(path), {"lora_adapter_metadata": json.dumps(noted) if noted != [] else "[1]"})
        with pytest.raises(ModelMissing, match=r"no number|DoRA|metadata"):
            bank.add("mine", path)


def test_adapters_of_our_own_training_need_no_translation(sd: pipelines.LoadedPipeline) -> None:
    keys = [
        adapters.weight_key(part, name)
        for part, whole in sd.parts.items()
        for name, module in whole.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    names = lora_files.LayerNames(keys, sd.pipe.unet.config)
    assert [names.find(key) for key in keys] == keys
