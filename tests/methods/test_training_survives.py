"""A training that is cut off anywhere ends with the same files, bit for bit, as one that was not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from executors.methods.base import Cancelled, MethodResult, ModelRef
from executors.methods.dreambooth import DreamBooth
from executors.methods.parameters import DreamBoothParameters

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]

EVERYTHING = {
    "prior_preservation": True,
    "prior_pictures": 4,
    "accumulate": 2,
    "snr_gamma": 5.0,
    "gradient_checkpointing": True,
    "aspect": "buckets",
    "validation_prompts": ["a photo of sks emblem", "a red star"],
    "validation_every": 2,
}


class Lost(Exception):
    """The process is gone: nothing after this line of the method runs."""


def asked(files: dict[str, Path], **changes: Any) -> DreamBoothParameters:
    usual = {"category": "emblem", "steps": 5, "batch": 1, "learning_rate": 1e-2, "size": 64, "checkpoint_every": 2}
    return DreamBoothParameters.model_validate({"pictures": list(files), **usual, **changes})


def trainer(ref: ModelRef) -> DreamBooth:
    method = DreamBooth()
    method.load(ref, "cpu")
    return method


def contents(result: MethodResult) -> dict[str, bytes]:
    return {file.name: file.path.read_bytes() for file in result.files}


def dies_after(context: Any, checkpoints: int, more_steps: int) -> Any:
    """Let the run die so many steps after it offered so many checkpoints, with no chance to save anything."""
    real, after = context.progress, []

    def progress(done: int, total: int, note: str = "") -> None:
        real(done, total, note)
        if len(context.offered) >= checkpoints:
            after.append(done)
            if len(after) >= more_steps:
                raise Lost

    context.progress = progress
    return context


@pytest.mark.parametrize("way", ["lora", "full"])
def test_a_killed_training_ends_with_the_same_bytes_from_its_last_checkpoint(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], subject_files: dict[str, Path], way: str
) -> None:
    parameters = asked(subject_files, method=way, **EVERYTHING)
    whole = trainer(model_ref("sd")).run(parameters, new_context(files=subject_files))
    killed = dies_after(new_context(files=subject_files), checkpoints=1, more_steps=1)
    with pytest.raises(Lost):
        trainer(model_ref("sd")).run(parameters, killed)
    assert [done for done, _, note in killed.seen if note.startswith("loss")] == [21, 22, 23]
    resumed_in = new_context(files=subject_files, checkpoint=killed.offered[-1])
    torch.manual_seed(99)
    torch.randn(1000)
    resumed = trainer(model_ref("sd")).run(parameters, resumed_in)
    assert [done for done, _, _ in resumed_in.seen] == [23, 24, 25], "only what is left is done"
    first, second = contents(whole), contents(resumed)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert resumed.metadata == whole.metadata


def test_a_training_that_is_killed_again_and_again_still_ends_with_the_same_bytes(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], subject_files: dict[str, Path]
) -> None:
    parameters = asked(subject_files, prior_preservation=False, steps=6, checkpoint_every=1)
    whole = trainer(model_ref("sd")).run(parameters, new_context(files=subject_files))
    checkpoint: Path | None = None
    for _ in range(5):
        context = dies_after(new_context(files=subject_files, checkpoint=checkpoint), checkpoints=1, more_steps=1)
        with pytest.raises(Lost):
            trainer(model_ref("sd")).run(parameters, context)
        checkpoint = context.offered[-1]
    last = new_context(files=subject_files, checkpoint=checkpoint)
    resumed = trainer(model_ref("sd")).run(parameters, last)
    assert len(last.seen) == 1
    assert contents(resumed) == contents(whole)


def test_a_stop_in_the_midst_of_a_validation_draws_it_anew_when_resumed(
    model_ref: Callable[..., ModelRef],
    new_context: Callable[..., Any],
    subject_files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"prior_preservation": False, "validation_prompts": ["a red star"], "validation_every": 2, "steps": 3}
    parameters = asked(subject_files, **options)
    whole = trainer(model_ref("sd")).run(parameters, new_context(files=subject_files))
    context = new_context(files=subject_files)
    asked_at: list[int] = []

    def should_stop() -> bool:
        if len(context.seen) == 2:
            asked_at.append(1)
        return len(asked_at) > 5

    monkeypatch.setattr(context, "should_stop", should_stop)
    with pytest.raises(Cancelled) as caught:
        trainer(model_ref("sd")).run(parameters, context)
    assert list(context.output_dir.glob("*.png")) == [], "what was half drawn is not kept"
    resumed = trainer(model_ref("sd")).run(
        parameters, new_context(files=subject_files, checkpoint=caught.value.checkpoint)
    )
    assert contents(resumed) == contents(whole)


def test_a_checkpoint_of_another_base_model_is_not_gone_on_from(
    model_ref: Callable[..., ModelRef],
    new_context: Callable[..., Any],
    subject_files: dict[str, Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    parameters = asked(subject_files, prior_preservation=False, steps=3)
    first = new_context(files=subject_files)
    trainer(model_ref("sd")).run(parameters, first)
    method = trainer(model_ref("sd"))
    method._base_sha256 = "0" * 64
    second = new_context(files=subject_files, checkpoint=first.offered[-1])
    method.run(parameters, second)
    assert [done for done, _, _ in second.seen] == [1, 2, 3]
    assert "base_sha256" in capfd.readouterr().err
