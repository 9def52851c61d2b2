"""What is planned about memory is what the true architectures take, and what is decided from it is kept within the room."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_folders import VAE, model_dir, write_safetensors

from executors.memory.footprint import (
    Footprint,
    FootprintUnknown,
    PartWeights,
    read_footprint,
    read_header,
    weight_files,
)
from executors.memory.plan import (
    GIB,
    MARGIN,
    MemoryPlan,
    Place,
    SizePlan,
    TrainingNeeds,
    described,
    too_large,
    training_parts,
    training_too_large,
)
from executors.pod_models import BUILTIN_MODELS

SD15_UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
SD3_TRANSFORMER = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 192,
}
SD15_PARTS = {
    "unet": PartWeights(859_520_964),
    "vae": PartWeights(83_653_863),
    "text_encoder": PartWeights(123_060_480, 616),
}


@pytest.fixture
def sd15(tmp_path: Path) -> Footprint:
    read = read_footprint(model_dir(tmp_path / "sd15", "StableDiffusionPipeline", SD15_UNET))
    return replace(read, parts=SD15_PARTS, upcasts=False)


@pytest.fixture
def sdxl(tmp_path: Path) -> Footprint:
    return read_footprint(model_dir(tmp_path / "sdxl", "StableDiffusionXLPipeline", SDXL_UNET))


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_are_counted_exactly_from_the_headers(tmp_path: Path) -> None:
    read = read_footprint(model_dir(tmp_path, "StableDiffusionPipeline", SD15_UNET))
    assert read.parts == {"unet": PartWeights(100), "vae": PartWeights(5, 24)}
    assert read.weights_bytes(2) == 100 * 2 + 5 * 2 + 24
    assert read.weights_bytes(4, ("vae",)) == 5 * 4 + 24
    assert (read.stepped, read.factor) == (("unet",), 8)


@pytest.mark.skipif(not (BUILTIN_MODELS["tiny"] / "model_index.json").is_file(), reason="the bundled model is not here")
def test_the_bundled_models_weights_are_what_its_modules_hold() -> None:
    torch = pytest.importorskip("torch")
    from executors.methods import pipelines
    from executors.methods.base import ModelRef

    loaded = pipelines.load(ModelRef("tiny", BUILTIN_MODELS["tiny"]), "cpu")
    read = read_footprint(BUILTIN_MODELS["tiny"])
    for name, part in read.parts.items():
        module = getattr(loaded.pipe, name)
        held = sum(p.numel() * p.element_size() for p in module.parameters() if p.dtype is torch.float32)
        assert part.nbytes(4) == held, name


def test_files_of_a_variant_are_not_counted_twice(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.fp16.safetensors"):
        write_safetensors(tmp_path / name, w=("F16", (4,)))
    assert [file.name for file in weight_files(tmp_path)] == ["model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    assert [file.name for file in weight_files(tmp_path)] == ["model.fp16.safetensors"]


def test_shards_are_summed(tmp_path: Path) -> None:
    for number in (1, 2):
        write_safetensors(tmp_path / f"model-0000{number}-of-00002.safetensors", w=("BF16", (number, 10)))
    assert sum(read_header(file).numbers for file in weight_files(tmp_path)) == 30


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 50) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b"not json!",
        struct.pack("<Q", 12) + b'{"a": [1,2]}',
        struct.pack("<Q", 32) + b'{"a":{"dtype":"X9","shape":[1]}}',
    ],
)
def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(FootprintUnknown, match=r"model\.safetensors"):
        read_header(file)


@pytest.mark.parametrize("missing", ["model_index.json", "unet/config.json", "vae/config.json"])
def test_a_directory_that_tells_too_little_says_what_is_missing(tmp_path: Path, missing: str) -> None:
    folder = model_dir(tmp_path, "StableDiffusionPipeline", SD15_UNET)
    (folder / missing).unlink()
    with pytest.raises(FootprintUnknown, match=missing.replace(".", r"\.")):
        read_footprint(folder)


# --- activations --------------------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize(("rows", "side_px"), [(4, 512), (1, 768)])
def test_a_step_of_stable_diffusion_takes_what_is_planned(sd15: Footprint, rows: int, side_px: int) -> None:
    torch = pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel
    from fake_tracing import peak_bytes

    side, half = side_px // 8, torch.float16

    def call(unet: Any) -> None:
        unet(torch.randn(rows, 4, side, side), torch.zeros(rows), encoder_hidden_states=torch.randn(rows, 77, 768))

    traced = peak_bytes(lambda: UNet2DConditionModel(**SD15_UNET), half, call)
    assert sd15.step_bytes(side_px, side_px, rows, 2) == pytest.approx(traced, rel=0.03)


@pytest.mark.torch
@pytest.mark.slow
def test_a_step_of_sdxl_takes_what_is_planned(sdxl: Footprint) -> None:
    torch = pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel
    from fake_tracing import peak_bytes

    def call(unet: Any) -> None:
        extra = {"text_embeds": torch.randn(2, 1280), "time_ids": torch.randn(2, 6)}
        states = torch.randn(2, 77, 2048)
        unet(torch.randn(2, 4, 128, 128), torch.zeros(2), encoder_hidden_states=states, added_cond_kwargs=extra)

    traced = peak_bytes(lambda: UNet2DConditionModel(**SDXL_UNET), torch.float16, call)
    assert sdxl.step_bytes(1024, 1024, 2, 2) == pytest.approx(traced, rel=0.03)


@pytest.mark.torch
def test_a_step_of_sd3_takes_what_is_planned(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from diffusers import SD3Transformer2DModel
    from fake_tracing import peak_bytes

    read = read_footprint(model_dir(tmp_path, "StableDiffusion3Pipeline", SD3_TRANSFORMER))

    def call(transformer: Any) -> None:
        transformer(
            hidden_states=torch.randn(2, 16, 128, 128),
            encoder_hidden_states=torch.randn(2, 154, 4096),
            pooled_projections=torch.randn(2, 2048),
            timestep=torch.zeros(2),
        )

    traced = peak_bytes(lambda: SD3Transformer2DModel(**SD3_TRANSFORMER), torch.float16, call)
    assert read.step_bytes(1024, 1024, 2, 2) == pytest.approx(traced, rel=0.05)


@pytest.mark.torch
@pytest.mark.parametrize("pictures", [1, 3])
def test_decoding_takes_what_is_planned(sd15: Footprint, pictures: int) -> None:
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKL
    from fake_tracing import peak_bytes

    def call(vae: Any) -> None:
        vae.decode(torch.randn(pictures, 4, 64, 64))

    traced = peak_bytes(lambda: AutoencoderKL(**VAE), torch.float16, call)
    assert sd15.decode_bytes(512, 512, pictures, 2) == pytest.approx(traced, rel=0.02)


@pytest.mark.torch
def test_decoding_in_tiles_takes_little_more_than_one_tile(sd15: Footprint) -> None:
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKL
    from fake_tracing import peak_bytes

    def call(vae: Any) -> None:
        vae.enable_tiling()
        vae.decode(torch.randn(1, 4, 256, 256))

    traced = peak_bytes(lambda: AutoencoderKL(**VAE), torch.float16, call)
    planned = sd15.decode_bytes(2048, 2048, 1, 2, tiled=True)
    assert traced <= planned <= 1.2 * traced
    assert sd15.decode_bytes(2048, 2048, 1, 2) > 10 * planned


@pytest.mark.torch
@pytest.mark.skipif(not (BUILTIN_MODELS["tiny"] / "model_index.json").is_file(), reason="the bundled model is not here")
def test_the_bundled_models_activations_are_what_is_planned() -> None:
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderTiny, UNet2DConditionModel
    from fake_tracing import peak_bytes

    folder = BUILTIN_MODELS["tiny"]
    read = read_footprint(folder)

    def config(kind: Any, name: str) -> Any:
        return kind.from_config(kind.load_config(folder / name))

    def step(unet: Any) -> None:
        unet(torch.randn(8, 4, 8, 8), torch.zeros(8), encoder_hidden_states=torch.randn(8, 32, 64))

    traced = peak_bytes(lambda: config(UNet2DConditionModel, "unet"), torch.float32, step)
    assert read.step_bytes(64, 64, 8, 4) == pytest.approx(traced, rel=0.05)
    traced = peak_bytes(
        lambda: config(AutoencoderTiny, "vae"), torch.float32, lambda vae: vae.decode(torch.randn(2, 4, 8, 8))
    )
    assert read.decode_bytes(64, 64, 2, 4) == pytest.approx(traced, rel=0.06)


def test_sdxl_decodes_in_single_precision_where_it_is_told_to(sdxl: Footprint, sd15: Footprint) -> None:
    assert sdxl.decode_bytes(512, 512, 1, 2) == 2 * sd15.decode_bytes(512, 512, 1, 2)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("frugal", [False, True])
def test_a_training_of_stable_diffusion_takes_what_is_planned(sd15: Footprint, frugal: bool) -> None:
    torch = pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel
    from fake_tracing import peak_bytes

    from executors.methods import adapters

    def build() -> Any:
        unet = UNet2DConditionModel(**SD15_UNET)
        if frugal:
            unet.enable_gradient_checkpointing()
        adapters.attach({"unet": unet}, 8, 0)
        return unet

    def call(unet: Any) -> None:
        with torch.enable_grad():
            states = torch.randn(2, 77, 768)
            guess = unet.train()(torch.randn(2, 4, 32, 32), torch.zeros(2), encoder_hidden_states=states).sample
            guess.float().square().mean().backward()

    traced = peak_bytes(build, torch.bfloat16, call)
    assert sd15.train_bytes(256, 256, 2, 2, frugal=frugal) == pytest.approx(traced, rel=0.06)


# --- decisions ------------------------------------------------------------------------------------------------------------


def test_a_roomy_card_holds_everything_and_many_pictures(sd15: Footprint) -> None:
    plan = MemoryPlan(sd15, 2, 24 * GIB)
    assert plan.place(512, 512) is Place.DEVICE
    size = plan.size(512, 512)
    assert (size.tiled, size.possible) == (False, True)
    assert size.at_once > 64


def test_a_small_card_lays_what_waits_aside(sd15: Footprint) -> None:
    everything = sd15.weights_bytes(2)
    room = everything + int(0.3 * GIB)
    plan = MemoryPlan(sd15, 2, room)
    assert plan.place(512, 512) is Place.ASIDE
    assert plan.size(512, 512, place=Place.ASIDE).at_once > plan.size(512, 512, place=Place.DEVICE).at_once
    assert MemoryPlan(sd15, 2, GIB).place(512, 512) is Place.NOWHERE


def test_a_picture_too_large_to_be_decoded_whole_is_decoded_in_tiles(sd15: Footprint) -> None:
    plan = MemoryPlan(sd15, 2, 6 * GIB)
    assert plan.size(1024, 1024) == SizePlan(1024, 1024, 6, 2, tiled=False)
    large = plan.size(2048, 2048)
    assert (large.tiled, large.decoded_at_once, large.possible) == (True, 1, True)
    assert not plan.size(8192, 8192).possible


def test_what_was_measured_takes_the_place_of_the_margin(sd15: Footprint) -> None:
    plan = MemoryPlan(sd15, 2, 6 * GIB)
    before = plan.size(512, 512).at_once
    planned = plan.planned("step", 512, 512, 2, 4)
    plan.learn("step", planned, planned)
    assert plan.size(512, 512).at_once > before
    plan.learn("step", planned, 2 * planned)
    assert plan.size(512, 512).at_once < before * MARGIN / 2 + 1
    assert plan.to_json() == {"step": 2.1}


def test_one_large_measurement_fades(sd15: Footprint) -> None:
    plan = MemoryPlan(sd15, 2, 6 * GIB)
    plan.learn("decode", 100, 400)
    for _ in range(300):
        plan.learn("decode", 100, 100)
    assert plan.to_json()["decode"] == pytest.approx(1.05, abs=0.02)
    plan.learn("decode", 0, 100)
    plan.learn("decode", 100, 0)
    assert plan.to_json()["decode"] == pytest.approx(1.05, abs=0.02)


@given(
    room=st.integers(0, 100 * GIB),
    width=st.integers(1, 512).map(lambda n: 8 * n),
    height=st.integers(1, 512).map(lambda n: 8 * n),
    rows=st.sampled_from([1, 2]),
)
def test_what_is_decided_stays_within_the_room(room: int, width: int, height: int, rows: int) -> None:
    footprint = Footprint(SD15_PARTS, 8352.0, 768.0, 8)
    plan = MemoryPlan(footprint, 2, room)
    place = plan.place(width, height, rows)
    size = plan.size(width, height, rows, place=place)
    if place is Place.NOWHERE:
        return
    assert size.possible
    weights = footprint.weights_bytes(2, footprint.stepped if place is Place.ASIDE else None)
    assert weights + plan.planned("step", width, height, rows, size.at_once) <= room
    assert (
        weights + plan.planned("decode", width, height, size.decoded_at_once, size.decoded_at_once, size.tiled) <= room
    )


@given(st.integers(0, 100 * GIB))
def test_more_room_never_means_less(room: int) -> None:
    footprint = Footprint(SD15_PARTS, 8352.0, 768.0, 8)
    small, large = MemoryPlan(footprint, 2, room), MemoryPlan(footprint, 2, room + GIB)
    order = [Place.NOWHERE, Place.ASIDE, Place.DEVICE]
    assert order.index(small.place(512, 512)) <= order.index(large.place(512, 512))
    assert small.size(512, 512, place=Place.DEVICE).at_once <= large.size(512, 512, place=Place.DEVICE).at_once


def test_what_can_never_be_made_is_told_with_the_remedy(sd15: Footprint) -> None:
    assert too_large(sd15, 2, 512, 512, 8 * GIB, "sd15") == ""
    said = too_large(sd15, 2, 16384, 16384, 8 * GIB, "sd15")
    assert said.startswith("pictures of 16384x16384 from sd15 need at least ")
    assert said.endswith("the largest GPU here has 8.0 GiB; ask for a smaller picture")


def test_a_plan_can_be_told_in_a_line(sd15: Footprint) -> None:
    place, said = described(sd15, 2, 24 * GIB)
    assert place is Place.DEVICE
    assert said.startswith("weights 1.99 GiB; 512 px: ")
    assert "in a step" in said
    assert "1024 px: " in said
    place, said = described(sd15, 2, sd15.weights_bytes(2) + GIB // 4)
    assert place is Place.ASIDE
    assert "text encoders and autoencoder lie in host memory" in said
    place, said = described(sd15, 2, GIB)
    assert (place, "one picture needs" in said) == (Place.NOWHERE, True)


def test_a_training_is_cut_into_as_many_parts_as_it_must(sd15: Footprint) -> None:
    each = sd15.train_bytes(512, 512, 1, 2)
    assert each == pytest.approx(915 << 20, rel=0.01)
    needs = TrainingNeeds(512, 8)
    assert training_parts(sd15, 2, needs, int(8 * each * MARGIN) + 1) == 1
    assert training_parts(sd15, 2, needs, int(3.5 * each * MARGIN)) == 3
    assert training_parts(sd15, 2, needs, 0) == 8
    frugal = TrainingNeeds(512, 8, frugal=True)
    assert training_parts(sd15, 2, frugal, int(3.5 * each * MARGIN)) == 1
    full = TrainingNeeds(512, 8, full=True)
    assert training_parts(sd15, 2, full, 16 * 859_520_964) == 8, "what is trained takes its room first"


def test_a_training_that_fits_no_card_is_told_with_the_ways_out(sd15: Footprint) -> None:
    assert training_too_large(sd15, 2, TrainingNeeds(512, 8), 8 * GIB, "sd15") == ""
    said = training_too_large(sd15, 2, TrainingNeeds(512, 8, full=True), 8 * GIB, "sd15")
    assert said.startswith("a training of sd15 at 512 px needs at least 15.7 GiB of GPU memory")
    assert said.endswith(
        "the largest GPU here has 8.0 GiB; ask for gradient_checkpointing, method lora, a smaller size"
    )


def test_what_was_published_of_sd_1_4_lies_within_the_margin(sd15: Footprint) -> None:
    published = 1760 * 512 * 512  # At the peak of diffusers' pipeline in half precision, weights left out.
    planned = sd15.decode_bytes(512, 512, 1, 2)
    assert planned <= published <= planned * MARGIN
