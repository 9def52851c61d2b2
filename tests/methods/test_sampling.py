"""The own step loop gives the pictures that the libraries' pipelines give, for every sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest

from executors.methods import pipelines, sampling
from executors.methods.base import ModelMissing, ModelRef
from executors.methods.parameters import SchedulerName

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]


def ours(
    loaded: pipelines.LoadedPipeline, seeds: list[int], scheduler: str | None, guidance: float = 5.0, **size: int
) -> Any:
    conditioning = sampling.encode_prompt(loaded, "a red star", "a blue house", sampling.is_guided(loaded, guidance))
    latents = sampling.denoise(
        loaded,
        conditioning,
        seeds=seeds,
        steps=5,
        guidance=guidance,
        width=size.get("width", 32),
        height=size.get("height", 32),
        scheduler_name=scheduler,
        before_step=lambda _done, _total: None,
    )
    return np.stack([np.asarray(picture, dtype=np.float64) for picture in sampling.decode(loaded, latents)])


def theirs(loaded: pipelines.LoadedPipeline, seeds: list[int], guidance: float = 5.0, **size: int) -> Any:
    output = loaded.pipe(
        prompt="a red star",
        negative_prompt="a blue house",
        num_images_per_prompt=len(seeds),
        num_inference_steps=5,
        guidance_scale=guidance,
        width=size.get("width", 32),
        height=size.get("height", 32),
        generator=sampling.generators(seeds),
    )
    return np.stack([np.asarray(picture, dtype=np.float64) for picture in output.images])


@pytest.mark.parametrize("scheduler", get_args(SchedulerName))
def test_every_sampler_gives_the_pipeline_s_own_picture(model_ref: Callable[..., ModelRef], scheduler: str) -> None:
    loaded = pipelines.load(model_ref("sd"), "cpu")
    mine = ours(loaded, [3, 4], scheduler)
    loaded.pipe.scheduler = sampling.build_scheduler(loaded.pipe, scheduler)
    assert np.abs(mine - theirs(loaded, [3, 4])).max() <= 1.0


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_families_and_sizes_agree_with_their_pipelines(
    model_ref: Callable[..., ModelRef], family: str, guidance: float
) -> None:
    loaded = pipelines.load(model_ref(family), "cpu")
    assert loaded.family == family
    size = {"width": 64, "height": 32}
    mine = ours(loaded, [7], None, guidance, **size)
    assert mine.shape == (1, 32, 64, 3)
    assert np.abs(mine - theirs(loaded, [7], guidance, **size)).max() <= 1.0


def test_different_seeds_and_prompts_give_different_pictures(model_ref: Callable[..., ModelRef]) -> None:
    loaded = pipelines.load(model_ref("sd"), "cpu")
    made = ours(loaded, [1, 2], None)
    assert np.abs(made[0] - made[1]).max() > 8.0


def test_a_stop_leaves_before_the_next_step_without_decoding(
    model_ref: Callable[..., ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = pipelines.load(model_ref("sd"), "cpu")
    calls = 0
    forward = loaded.pipe.unet.forward

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(*arguments, **named)

    monkeypatch.setattr(loaded.pipe.unet, "forward", counted)

    class Stop(Exception):
        pass

    def before_step(done: int, _total: int) -> None:
        if done == 2:
            raise Stop

    conditioning = sampling.encode_prompt(loaded, "a", "", guided=False)
    with pytest.raises(Stop):
        sampling.denoise(
            loaded,
            conditioning,
            seeds=[1],
            steps=5,
            guidance=1.0,
            width=32,
            height=32,
            scheduler_name=None,
            before_step=before_step,
        )
    assert calls == 2


def test_both_kinds_of_autoencoder_encode_to_scaled_latents(model_ref: Callable[..., ModelRef]) -> None:
    import torch

    from executors.tiny import MODEL_DIR

    for ref, expected in ((model_ref("sd"), (1, 4, 32, 32)), (ModelRef("tiny", MODEL_DIR), (1, 4, 8, 8))):
        loaded = pipelines.load(ref, "cpu")
        latents = sampling.encode_pixels(loaded, torch.zeros(1, 3, 64, 64))
        assert tuple(latents.shape) == expected


def test_an_absent_model_is_named(tmp_path: Any) -> None:
    with pytest.raises(ModelMissing, match=r"model_index\.json"):
        pipelines.load(ModelRef("gone", tmp_path / "gone"), "cpu")


def test_a_model_with_a_broken_part_is_missing_not_a_crash(tmp_path: Any, model_ref: Callable[..., ModelRef]) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(model_ref("sd").base_dir, broken)
    (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelMissing, match="cannot be loaded"):
        pipelines.load(ModelRef("broken", broken), "cpu")
