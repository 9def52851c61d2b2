"""Generation as a Pod runs it: files, metadata, seeds, stops, and what happens when memory runs out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from executors.methods import pipelines
from executors.methods.base import Cancelled, InputRefused, ModelMissing, ModelRef
from executors.methods.parameters import TextToImageParameters
from executors.methods.text_to_image import TextToImage

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]


def asked(**changes: Any) -> TextToImageParameters:
    return TextToImageParameters.model_validate(
        {"prompt": "a red star", "steps": 3, "seed": 11, "width": 64, "height": 64, **changes}
    )


def loaded(ref: ModelRef) -> TextToImage:
    method = TextToImage()
    method.load(ref, "cpu")
    return method


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path), dtype=np.float64)


def test_pictures_are_written_with_the_parameters_that_made_them(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any]
) -> None:
    context = new_context()
    result = loaded(model_ref("sd")).run(asked(count=2, scheduler="euler_a", negative_prompt="a blue house"), context)
    assert [file.name for file in result.files] == ["picture-00.png", "picture-01.png"]
    assert {file.role for file in result.files} == {"picture"}
    with Image.open(result.files[1].path) as picture:
        assert picture.size == (64, 64)
        facts = json.loads(picture.text["aigc"])  # type: ignore[attr-defined]
        readable = picture.text["parameters"]  # type: ignore[attr-defined]
    assert (facts["prompt"], facts["seed"], facts["steps"], facts["scheduler"]) == ("a red star", 12, 3, "euler_a")
    assert (facts["model"], facts["guidance"], facts["negative_prompt"]) == ("sd", 7.5, "a blue house")
    assert set(facts["versions"]) == {"torch", "diffusers", "transformers"}
    assert readable.startswith("a red star\nNegative prompt: a blue house\nSteps: 3, Sampler: euler_a")
    assert result.metadata["seeds"] == [11, 12]
    json.dumps(result.metadata)


def test_progress_ends_at_its_total_and_never_goes_back(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any]
) -> None:
    context = new_context()
    method = loaded(model_ref("sd"))
    method._batch = 2
    method.run(asked(count=3), context)
    done = [entry[0] for entry in context.seen]
    assert done == sorted(done)
    assert context.seen[-1][:2] == (9, 9)


def test_a_picture_depends_on_its_seed_and_not_on_the_batch(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any]
) -> None:
    method = loaded(model_ref("sd"))
    together = method.run(asked(count=3, scheduler="euler_a"), new_context())
    alone = method.run(asked(count=1, seed=13, scheduler="euler_a"), new_context())
    assert np.abs(pixels(together.files[2].path) - pixels(alone.files[0].path)).max() <= 1.0


def test_an_absent_seed_is_drawn_and_reported(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any]
) -> None:
    method = loaded(model_ref("sd"))
    first = method.run(asked(seed=None), new_context())
    again = method.run(asked(seed=first.metadata["seeds"][0]), new_context())
    other = method.run(asked(seed=None), new_context())
    assert np.array_equal(pixels(first.files[0].path), pixels(again.files[0].path))
    assert other.metadata["seeds"] != first.metadata["seeds"]


@pytest.mark.parametrize("family", ["sd", "sdxl", "pag"])
def test_a_stop_in_mid_run_decodes_nothing_and_saves_no_picture(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    method = loaded(model_ref(family))
    assert method._loaded is not None

    def no_decoding(*_: Any, **__: Any) -> None:
        raise AssertionError("a stopped run decoded its latents")

    monkeypatch.setattr(method._loaded.pipe.vae, "decode", no_decoding)
    context = new_context(stop_at=1)
    with pytest.raises(Cancelled) as caught:
        method.run(asked(steps=5), context)
    assert list(context.output_dir.rglob("*.png")) == []
    assert context.seen[-1][0] == 1
    # What has a step loop here leaves something to go on from, also where one run has the device for itself.
    assert (caught.value.checkpoint is None) == (family == "pag")


def test_a_run_that_was_stopped_goes_on_to_the_same_picture(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any]
) -> None:
    method = loaded(model_ref("sd"))
    with pytest.raises(Cancelled) as caught:
        method.run(asked(steps=5, scheduler="dpmpp_2m"), new_context(stop_at=2))
    context = new_context(checkpoint=caught.value.checkpoint)
    made = method.run(asked(steps=5, scheduler="dpmpp_2m"), context)
    whole = method.run(asked(steps=5, scheduler="dpmpp_2m"), new_context())
    assert context.seen[0][0] == 3
    assert np.array_equal(pixels(made.files[0].path), pixels(whole.files[0].path))


def test_a_stopped_method_runs_again(model_ref: Callable[..., ModelRef], new_context: Callable[..., Any]) -> None:
    method = loaded(model_ref("pag"))
    with pytest.raises(Cancelled):
        method.run(asked(), new_context(stop_at=1))
    assert len(method.run(asked(), new_context()).files) == 1


def test_a_pipeline_without_an_own_loop_runs_its_own_call(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any]
) -> None:
    context = new_context()
    result = loaded(model_ref("pag")).run(asked(count=2), context)
    assert len(result.files) == 2
    assert context.seen[-1][:2] == (6, 6)


def test_a_sampler_is_refused_where_the_pipeline_keeps_its_own(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any]
) -> None:
    with pytest.raises(InputRefused, match=r"^scheduler: .*leave scheduler out"):
        loaded(model_ref("pag")).run(asked(scheduler="euler"), new_context())


def narrow(method: TextToImage, monkeypatch: pytest.MonkeyPatch, widest: int) -> list[int]:
    """Let the network run out of memory with more pictures than that; returns the pictures of its calls."""
    assert method._loaded is not None
    unet, sizes = method._loaded.pipe.unet, []
    real = unet.forward

    def forward(rows: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        sizes.append(len(rows) // 2)
        if len(rows) // 2 > widest:
            raise MemoryError("too many at once")
        return real(rows, *arguments, **named)

    monkeypatch.setattr(unet, "forward", forward)
    return sizes


def test_memory_that_runs_out_halves_the_calls_of_the_network(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = loaded(model_ref("sd"))
    sizes = narrow(method, monkeypatch, widest=2)
    result = method.run(asked(count=4), new_context())
    assert sizes == [4, 2, 2, 2, 2, 2, 2]
    assert result.metadata["seeds"] == [11, 12, 13, 14]
    sizes.clear()
    method.run(asked(count=3, steps=1), new_context())
    assert sizes == [2, 1], "the narrower calls are remembered"


def test_memory_that_runs_out_for_one_picture_fails_the_job(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = loaded(model_ref("sd"))
    sizes = narrow(method, monkeypatch, widest=0)
    context = new_context()
    with pytest.raises(MemoryError):
        method.run(asked(count=2), context)
    assert sizes == [2, 1, 1, 1, 1], "each is tried alone, once more with all memory given back"
    assert list(context.output_dir.iterdir()) == []


def test_generation_without_a_model_is_refused() -> None:
    with pytest.raises(ModelMissing, match="needs one"):
        TextToImage().load(None, "cpu")


def test_the_size_falls_back_to_the_model_s_own(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any]
) -> None:
    result = loaded(model_ref("sd")).run(asked(width=None, height=None), new_context())
    assert (result.metadata["width"], result.metadata["height"]) == (32, 32)


def test_closing_gives_the_model_back(model_ref: Callable[..., ModelRef], new_context: Callable[..., Any]) -> None:
    method = loaded(model_ref("sd"))
    method.close()
    with pytest.raises(RuntimeError, match="before load"):
        method.run(asked(), new_context())


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_half_precision_makes_nearly_the_same_picture(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], family: str
) -> None:
    exact = loaded(model_ref(family)).run(asked(), new_context())
    method = TextToImage()
    method._loaded = pipelines.load(model_ref(family), "cpu", torch.bfloat16)
    rough = method.run(asked(), new_context())
    assert rough.metadata["dtype"] == "bfloat16"
    assert np.abs(pixels(exact.files[0].path) - pixels(rough.files[0].path)).mean() <= 8.0
