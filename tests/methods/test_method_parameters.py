"""Parameters of the AI methods: what passes, and what is refused under which field's name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from executors.methods import parameters
from executors.methods.parameters import (
    DreamBoothParameters,
    ParameterError,
    SleepParameters,
    TextToImageParameters,
    validate,
)

FILES = [character * 64 for character in "abcde"]


def refusal(method: str, given: dict[str, object]) -> dict[str, str]:
    with pytest.raises(ParameterError) as caught:
        validate(method, given)
    return {problem.field: problem.message for problem in caught.value.problems}


def test_a_prompt_alone_is_enough_for_pictures() -> None:
    made = validate("text_to_image", {"prompt": "a red star"})
    assert isinstance(made, TextToImageParameters)
    assert (made.count, made.steps, made.seed, made.model, made.width) == (1, 20, None, "tiny", None)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "   "}, "prompt"),
        ({"prompt": "x" * 2001}, "prompt"),
        ({"prompt": "x", "negative_prompt": "y" * 2001}, "negative_prompt"),
        ({"prompt": "x", "width": 100}, "width"),
        ({"prompt": "x", "height": 4096}, "height"),
        ({"prompt": "x", "steps": 0}, "steps"),
        ({"prompt": "x", "steps": 151}, "steps"),
        ({"prompt": "x", "steps": 2.5}, "steps"),
        ({"prompt": "x", "guidance": -1}, "guidance"),
        ({"prompt": "x", "guidance": float("nan")}, "guidance"),
        ({"prompt": "x", "count": 17}, "count"),
        ({"prompt": "x", "count": 16, "width": 2048, "height": 2048}, "count"),
        ({"prompt": "x", "seed": -1}, "seed"),
        ({"prompt": "x", "seed": 2**53}, "seed"),
        ({"prompt": "x", "scheduler": "magic"}, "scheduler"),
        ({"prompt": "x", "format": "gif"}, "format"),
        ({"prompt": "x", "adapter_scale": 3}, "adapter_scale"),
        ({"prompt": "x", "model": "../etc"}, "model"),
        ({"prompt": "x", "size": "64x64"}, "size"),
    ],
)
def test_a_wrong_picture_parameter_is_refused_by_its_name(given: dict[str, object], field: str) -> None:
    assert field in refusal("text_to_image", given)


def test_an_unknown_parameter_is_answered_with_the_known_ones() -> None:
    message = refusal("text_to_image", {"prompt": "x", "widht": 64})["widht"]
    assert "width" in message
    assert "no parameter" in message


def test_all_wrong_fields_are_named_at_once() -> None:
    assert set(refusal("text_to_image", {"prompt": " ", "steps": 0, "count": 0})) == {"prompt", "steps", "count"}


def test_too_many_pixels_are_refused_with_the_remedy() -> None:
    assert (
        "lower count" in refusal("text_to_image", {"prompt": "x", "count": 16, "width": 2048, "height": 2048})["count"]
    )


def test_three_to_five_pictures_and_a_category_are_enough_for_dreambooth() -> None:
    for number in (3, 4, 5):
        made = validate("dreambooth", {"pictures": FILES[:number], "category": "dog"})
        assert isinstance(made, DreamBoothParameters)
        assert made.method == "lora"
        assert made.prior_preservation


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"pictures": FILES[:2]}, "pictures"),
        ({"pictures": [*FILES, "f" * 64]}, "pictures"),
        ({"pictures": [FILES[0]] * 3}, "pictures"),
        ({"pictures": [*FILES[:2], "../secret"]}, "pictures.2"),
        ({"pictures": [*FILES[:2], "A" * 64]}, "pictures.2"),
        ({"category": ""}, "category"),
        ({"category": "dog; rm"}, "category"),
        ({"instance_token": "S K S"}, "instance_token"),
        ({"method": "magic"}, "method"),
        ({"rank": 0}, "rank"),
        ({"steps": 0}, "steps"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"prior_weight": -1}, "prior_weight"),
        ({"prior_pictures": 1}, "prior_pictures"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"size": 65}, "size"),
        ({"resume": True}, "resume"),
    ],
)
def test_a_wrong_training_parameter_is_refused_by_its_name(change: dict[str, object], field: str) -> None:
    assert field in refusal("dreambooth", {"pictures": FILES[:3], "category": "dog", **change})


@pytest.mark.parametrize(
    ("given", "field"), [({"seconds": -1}, "seconds"), ({"steps": 0}, "steps"), ({"fail": "shout"}, "fail")]
)
def test_a_wrong_sleep_parameter_is_refused_by_its_name(given: dict[str, object], field: str) -> None:
    assert field in refusal("sleep", given)


def test_sleep_needs_no_parameter() -> None:
    assert validate("sleep", {}) == SleepParameters()


def test_an_unknown_method_is_answered_with_the_known_ones() -> None:
    assert "text_to_image" in refusal("text_to_video", {})["method"]


def test_a_refusal_reads_as_one_sentence_per_field() -> None:
    with pytest.raises(ParameterError, match=r"^steps: .*; count: ") as caught:
        validate("text_to_image", {"prompt": "x", "steps": 0, "count": 0})
    assert caught.value.field == "steps"
    assert "1" in caught.value.message


def test_every_parameter_is_described_in_its_schema() -> None:
    for model in parameters.PARAMETERS.values():
        undescribed = [
            name for name, entry in model.model_json_schema()["properties"].items() if "description" not in entry
        ]
        assert undescribed == []


def test_parameters_are_checked_without_torch() -> None:
    code = (
        "import sys\n"
        "from executors.methods import parameters, registry\n"
        "registry.create('sleep')\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
