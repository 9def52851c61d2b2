"""What a training shows on its way and leaves behind: validation pictures, losses, recipe and card; and what is refused ahead."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import asked, run, weights

from executors.methods import pipelines, provenance, validation
from executors.methods.base import ModelRef
from executors.methods.parameters import MAX_VALIDATION_PICTURES, DreamBoothParameters, ParameterError, validate

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]


# --- what is seen on the way, and what is left ------------------------------------------------------------------------


def test_validation_pictures_show_the_model_as_it_is_at_that_step(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], subject_files: dict[str, Path]
) -> None:
    prompts = ["a photo of sks emblem", "a red star"]
    options = {"validation_prompts": prompts, "validation_every": 2}
    context = new_context(files=subject_files)
    result = run(model_ref("sd"), asked(subject_files, **options), context)
    pictures = {file.name: file.path for file in result.files if file.role == "validation"}
    assert sorted(pictures) == [f"validation-{step:06d}-{index}.png" for step in (2, 3) for index in (0, 1)]
    shown = json.loads(Image.open(pictures["validation-000002-1.png"]).text["aigc"])  # type: ignore[attr-defined]
    assert (shown["prompt"], shown["model"]) == ("a red star", "tiny after 2 training steps")
    assert pictures["validation-000002-0.png"].read_bytes() != pictures["validation-000003-0.png"].read_bytes()
    assert len(context.previews) == 4, "each is shown as soon as it is made"


def test_looking_at_the_model_does_not_change_what_it_becomes(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], subject_files: dict[str, Path]
) -> None:
    plain = run(model_ref("sd"), asked(subject_files), new_context(files=subject_files))
    watched = asked(subject_files, validation_prompts=["a red star"], validation_every=1, gradient_checkpointing=False)
    seen = run(model_ref("sd"), watched, new_context(files=subject_files))
    for key, value in weights(plain).items():
        assert torch.equal(value, weights(seen)[key]), key


def test_a_validation_picture_that_cannot_be_decoded_is_left_out_and_the_training_goes_on(
    model_ref: Callable[..., ModelRef],
    new_context: Callable[..., Any],
    subject_files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    real, calls = validation.sampling.decode, []

    def sometimes(loaded: Any, latents: torch.Tensor) -> Any:
        calls.append(latents)
        return real(loaded, latents * float("nan") if len(calls) == 1 else latents)

    monkeypatch.setattr(validation.sampling, "decode", sometimes)
    options = {"validation_prompts": ["a red star"], "validation_every": 2}
    result = run(model_ref("sd"), asked(subject_files, **options), new_context(files=subject_files))
    assert [file.name for file in result.files if file.role == "validation"] == ["validation-000003-0.png"]
    assert "validation after step 2: no picture of 'a red star'" in capfd.readouterr().err


def test_validation_draws_what_generation_draws_with_the_finished_model(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], subject_files: dict[str, Path]
) -> None:
    from executors.methods.parameters import TextToImageParameters
    from executors.methods.text_to_image import TextToImage

    context = new_context(files=subject_files)
    parameters = asked(subject_files, validation_prompts=["a photo of sks emblem"], seed=7)
    result = run(model_ref("sd"), parameters, context)
    last = next(file.path for file in result.files if file.role == "validation")
    method = TextToImage()
    method.load(model_ref("sd", context.output_dir), "cpu")
    wish = TextToImageParameters(
        prompt="a photo of sks emblem",
        seed=7,
        steps=validation.PICTURE_STEPS,
        scheduler="ddim",
        width=64,
        height=64,
    )
    drawn = method.run(wish, new_context()).files[0].path
    mine, theirs = (np.asarray(Image.open(path), dtype=int) for path in (last, drawn))
    assert np.abs(mine - theirs).max() <= 1


def test_the_loss_of_every_step_is_in_the_result(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], subject_files: dict[str, Path]
) -> None:
    context = new_context(files=subject_files)
    result = run(model_ref("sd"), asked(subject_files, steps=4), context)
    (log,) = [file for file in result.files if file.role == "log"]
    rows = list(csv.DictReader(log.path.read_text().splitlines()))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])
    assert [f"loss {float(row['loss']):.4f}" for row in rows] == [note for _, _, note in context.seen]
    assert result.metadata["loss_curve"] == [[i + 1, round(float(row["loss"]), 6)] for i, row in enumerate(rows)]


def test_a_long_curve_is_thinned_to_means_and_keeps_its_end() -> None:
    assert provenance.curve([]) == []
    assert provenance.curve([1.0, 2.0, 3.0, 4.0], 2) == [(2, 1.5), (4, 3.5)]
    assert provenance.curve([float(n) for n in range(1, 1001)])[-1] == (1000, 995.5)


def test_the_result_tells_its_recipe_and_its_base_to_people_and_programs(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], subject_files: dict[str, Path]
) -> None:
    context = new_context(files=subject_files)
    result = run(model_ref("sd"), asked(subject_files, rank=3), context)
    facts = json.loads((context.output_dir / "adapter.json").read_text())
    assert facts["recipe"]["rank"] == 3
    assert facts["recipe"]["pictures"] == list(subject_files)
    assert facts["recipe"]["learning_rate"] == 1e-2
    base = provenance.base_digest(model_ref("sd").base_dir)
    assert facts["base_model_sha256"] == result.metadata["base_model_sha256"] == base
    card = (context.output_dir / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    told = {key: json.loads(value) for key, value in (line.split(": ", 1) for line in front.splitlines())}
    assert told["base_model_sha256"] == base
    assert told["instance_prompt"] == "a photo of sks emblem"
    assert "lora" in told["tags"]
    assert "| `rank` | `3` |" in body
    again = DreamBoothParameters.model_validate(facts["recipe"])
    remade = run(model_ref("sd"), again, new_context(files=subject_files))
    for key, value in weights(result).items():
        assert torch.equal(value, weights(remade)[key]), "the recipe leads to the same model"


def test_a_deployed_model_may_carry_its_card(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], subject_files: dict[str, Path]
) -> None:
    context = new_context(files=subject_files)
    result = run(model_ref("sd"), asked(subject_files, steps=1), context)
    kept = context.output_dir.parent / "deployed"
    kept.mkdir()
    for file in result.files:
        if file.role == "adapter":
            (kept / file.name).write_bytes(file.path.read_bytes())
    assert pipelines.load(model_ref("sd", kept), "cpu").adapter is not None


def test_a_base_with_one_other_byte_has_another_hash(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    weight = tmp_path / "unet" / "weights.safetensors"
    weight.write_bytes(b"one")
    first = provenance.base_digest(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"not part of the model")
    assert provenance.base_digest(tmp_path) == first
    weight.write_bytes(b"two")
    assert provenance.base_digest(tmp_path) != first


def test_a_card_cannot_be_broken_by_what_a_user_wrote() -> None:
    facts = {
        "kind": "full",
        "rank": None,
        "base_model": 'x"\n---\nevil: yes',
        "base_model_sha256": "0" * 64,
        "prompt": "a `b`\n# c",
        "instance_token": "t`",
        "category": "c",
        "pictures": 3,
        "steps": 1,
        "versions": {"torch": "1"},
    }
    text = provenance.card(facts, {"prior_prompts": ["a|b\n---"]}, [])
    assert text.count("\n---\n") == 1
    assert "\nevil" not in text
    assert "\n# c" not in text
    assert "a\\|b" in text


# --- what is refused before anything is queued ------------------------------------------------------------------------


def test_the_remedy_for_too_many_validations_is_one() -> None:
    usual = {"pictures": ["a" * 64, "b" * 64, "c" * 64], "category": "dog", "validation_prompts": ["a", "b", "c"]}
    with pytest.raises(
        ParameterError, match=r"validation_every: 150 .*more than 100; raise it to (\d+) or more"
    ) as caught:
        validate("dreambooth", {**usual, "steps": 1000, "validation_every": 20})
    enough = int(caught.value.message.split("raise it to ")[1].split()[0])
    validate("dreambooth", {**usual, "steps": 1000, "validation_every": enough})
    with pytest.raises(ParameterError):
        validate("dreambooth", {**usual, "steps": 1000, "validation_every": enough - 1})


def test_the_largest_result_still_fits_into_its_report() -> None:
    from executors.agent_items import RESULT_BYTES

    file = {"file_id": "f" * 64, "media_type": "image/png", "size_bytes": 10**8, "role": "validation"}
    files = [{**file, "name": f"validation-{step:06d}-3.png"} for step in range(MAX_VALIDATION_PICTURES + 4)]
    curve = [[20_000, 12345.123456]] * 100
    texts = {"category": "c" * 60, "base_model": "b" * 200, "prompt": "p" * 120, "rest": "r" * 2000}
    assert len(json.dumps({"files": files, "metadata": {**texts, "loss_curve": curve}})) < RESULT_BYTES


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"accumulate": 0}, "accumulate"),
        ({"snr_gamma": 0}, "snr_gamma"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"aspect": "stretch"}, "aspect"),
        ({"validation_prompts": ["a"] * 5}, "validation_prompts"),
        ({"validation_prompts": ["  "]}, "validation_prompts"),
        ({"validation_prompts": ["a"], "validation_every": 1}, "validation_every"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(change: dict[str, Any], field: str) -> None:
    usual = {"pictures": ["a" * 64, "b" * 64, "c" * 64], "category": "dog"}
    with pytest.raises(ParameterError) as caught:
        validate("dreambooth", {**usual, **change})
    assert caught.value.field == field
