"""DreamBooth's mechanics on random models: adapters, checkpoints, stops, and a base model that is left as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from executors.methods import adapters, pipelines
from executors.methods.base import Cancelled, InputRefused, ModelMissing, ModelRef
from executors.methods.dreambooth import DreamBooth
from executors.methods.parameters import DreamBoothParameters, TextToImageParameters
from executors.methods.prior import prompts_for
from executors.methods.text_to_image import TextToImage

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]

PRIOR_UNITS = 20


def asked(files: dict[str, Path], **changes: Any) -> DreamBoothParameters:
    usual = {
        "pictures": list(files),
        "category": "emblem",
        "steps": 6,
        "batch": 2,
        "prior_pictures": 4,
        "learning_rate": 1e-2,
    }
    return DreamBoothParameters.model_validate({**usual, "checkpoint_every": 100, "size": 64, **changes})


def trainer(ref: ModelRef) -> DreamBooth:
    method = DreamBooth()
    method.load(ref, "cpu")
    return method


def weights(method: DreamBooth) -> dict[str, torch.Tensor]:
    assert method._loaded is not None
    parts = method._loaded.parts
    return {
        f"{part}.{key}": value.clone() for part, module in parts.items() for key, value in module.state_dict().items()
    }


def by_key(loaded: pipelines.LoadedPipeline) -> dict[str, torch.Tensor]:
    """Weights under the names that adapters use."""
    parts = loaded.parts.items()
    return {
        adapters.weight_key(part, name): value for part, module in parts for name, value in module.state_dict().items()
    }


@pytest.mark.parametrize("way", ["lora", "full"])
def test_a_resumed_training_equals_an_uninterrupted_one(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], subject_files: dict[str, Path], way: str
) -> None:
    method = trainer(model_ref("sd"))
    parameters = asked(subject_files, method=way)
    whole = method.run(parameters, new_context(files=subject_files))
    stopped = new_context(files=subject_files, stop_at=PRIOR_UNITS + 2)
    with pytest.raises(Cancelled) as caught:
        method.run(parameters, stopped)
    assert caught.value.checkpoint is not None
    assert {path.suffix for path in caught.value.checkpoint.iterdir()} == {".safetensors", ".json"}
    fresh = trainer(model_ref("sd"))
    resumed = fresh.run(parameters, new_context(files=subject_files, checkpoint=caught.value.checkpoint))
    first, second = load_file(str(whole.files[0].path)), load_file(str(resumed.files[0].path))
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=0, atol=0, msg=key)
    assert resumed.metadata["loss"] == pytest.approx(whole.metadata["loss"], rel=1e-5)


def test_a_resumed_training_does_only_what_is_left(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], subject_files: dict[str, Path]
) -> None:
    method = trainer(model_ref("sd"))
    with pytest.raises(Cancelled) as caught:
        method.run(asked(subject_files), new_context(files=subject_files, stop_at=PRIOR_UNITS + 4))
    context = new_context(files=subject_files, checkpoint=caught.value.checkpoint)
    method.run(asked(subject_files), context)
    assert [done for done, _, _ in context.seen] == [PRIOR_UNITS + 5, PRIOR_UNITS + 6]


@pytest.mark.parametrize("way", ["lora", "full"])
def test_training_leaves_the_base_model_as_it_was(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], subject_files: dict[str, Path], way: str
) -> None:
    method = trainer(model_ref("sd"))
    before = weights(method)
    method.run(asked(subject_files, method=way), new_context(files=subject_files))
    after = weights(method)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("text_encoder", [True, False])
@pytest.mark.parametrize("way", ["lora", "full"])
def test_what_was_trained_is_what_generation_applies(
    model_ref: Callable[..., ModelRef],
    new_context: Callable[..., Any],
    subject_files: dict[str, Path],
    family: str,
    text_encoder: bool,
    way: str,
) -> None:
    context = new_context(files=subject_files)
    changes: dict[str, Any] = {"prior_preservation": False, "steps": 2, "text_encoder": text_encoder, "method": way}
    result = trainer(model_ref(family)).run(asked(subject_files, **changes), context)
    facts = json.loads((context.output_dir / "adapter.json").read_text())
    texts = {"text_encoder"} if family == "sd" else {"text_encoder", "text_encoder_2"}
    assert set(facts["trained"]) == ({"unet"} | texts if text_encoder else {"unet"})
    assert (facts["kind"], facts["base_model"], facts["prompt"]) == (way, "tiny", "a photo of sks emblem")
    assert [file.name for file in result.files if file.role == "adapter"] == [
        "adapter.safetensors",
        "adapter.json",
        "README.md",
    ]
    base = pipelines.load(model_ref(family), "cpu")
    taught = pipelines.load(model_ref(family, context.output_dir), "cpu")
    changed = {
        part
        for part, module in taught.parts.items()
        for key, value in module.state_dict().items()
        if not torch.equal(value, base.parts[part].state_dict()[key])
    }
    assert changed == set(facts["trained"])
    after, before, written = by_key(taught), by_key(base), load_file(str(result.files[0].path))
    for key, kept in written.items():
        if way == "full":
            torch.testing.assert_close(after[key], kept.float(), rtol=0, atol=1e-6)
        elif key.endswith(".lora_A.weight"):
            weight, up = key.replace(".lora_A", ""), written[key.replace("lora_A", "lora_B")]
            torch.testing.assert_close(after[weight], before[weight] + up @ kept, rtol=0, atol=1e-6)
    taught.set_adapter_scale(0.0)
    for part, module in taught.parts.items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, base.parts[part].state_dict()[key]), key


def test_a_trained_model_makes_other_pictures_and_its_scale_matters(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], subject_files: dict[str, Path]
) -> None:
    context = new_context(files=subject_files)
    trainer(model_ref("sd")).run(asked(subject_files, prior_preservation=False), context)
    method = TextToImage()
    method.load(model_ref("sd", context.output_dir), "cpu")
    made = {}
    for scale in (0.0, 1.0, 0.0):
        parameters = TextToImageParameters(prompt="a photo of sks emblem", seed=1, steps=3, adapter_scale=scale)
        result = method.run(parameters, new_context())
        made.setdefault(scale, []).append(result.files[0].path.read_bytes())
    plain = TextToImage()
    plain.load(model_ref("sd"), "cpu")
    assert made[0.0][0] == made[0.0][1]
    assert made[1.0][0] != made[0.0][0]
    assert result.metadata["base_model"] == "tiny"


def test_the_libraries_read_the_adapter_as_a_lora_of_theirs(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], subject_files: dict[str, Path]
) -> None:
    context = new_context(files=subject_files)
    trainer(model_ref("sd")).run(asked(subject_files, prior_preservation=False), context)
    ours = pipelines.load(model_ref("sd", context.output_dir), "cpu")
    foreign = context.output_dir / "foreign"
    foreign.mkdir()
    shutil.copy(context.output_dir / adapters.WEIGHTS, foreign / "lora.safetensors")
    theirs = pipelines.load(model_ref("sd", foreign), "cpu")
    assert theirs.foreign_adapter
    latents, time = torch.randn(1, 4, 16, 16), torch.tensor(500)
    states = torch.randn(1, 32, 16)
    with torch.no_grad():
        mine = ours.pipe.unet(latents, time, encoder_hidden_states=states).sample
        other = theirs.pipe.unet(latents, time, encoder_hidden_states=states).sample
        ids = torch.arange(32)[None]
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            ours.pipe.text_encoder(ids).last_hidden_state,
            theirs.pipe.text_encoder(ids).last_hidden_state,
            rtol=1e-4,
            atol=1e-5,
        )


def test_half_of_the_prior_shows_the_category_and_half_anything_else(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], subject_files: dict[str, Path]
) -> None:
    prompts = prompts_for("emblem", ("one thing", "another"), 8)
    assert prompts.count("a photo of an emblem") == 4
    assert prompts.count("one thing") == 2
    context = new_context(files=subject_files)
    result = trainer(model_ref("sd")).run(asked(subject_files, steps=1), context)
    assert result.metadata["prior_pictures"] == 4
    assert next(note for _, _, note in context.seen) == "prior pictures"
    done = [entry[0] for entry in context.seen]
    assert done == sorted(done)
    assert context.seen[-1][:2] == (PRIOR_UNITS + 1, PRIOR_UNITS + 1)


def test_a_stop_while_the_prior_is_made_keeps_nothing(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], subject_files: dict[str, Path]
) -> None:
    context = new_context(files=subject_files, stop_at=3)
    with pytest.raises(Cancelled) as caught:
        trainer(model_ref("sd")).run(asked(subject_files), context)
    assert caught.value.checkpoint is None
    assert list(context.output_dir.iterdir()) == []


def test_checkpoints_come_every_so_often(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], subject_files: dict[str, Path]
) -> None:
    context = new_context(files=subject_files)
    trainer(model_ref("sd")).run(asked(subject_files, checkpoint_every=4, prior_preservation=False), context)
    assert int(load_file(str(context.output_dir / "checkpoint" / "state.safetensors"))["step"]) == 4


@pytest.mark.parametrize("kind", ["of other parameters", "damaged", "without its facts", "empty"])
def test_a_checkpoint_that_cannot_be_used_costs_the_work_not_the_task(
    model_ref: Callable[..., ModelRef],
    new_context: Callable[..., Any],
    subject_files: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    method = trainer(model_ref("sd"))
    parameters = asked(subject_files, prior_preservation=False, steps=3)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    if kind == "damaged":
        (folder / "state.safetensors").write_bytes(b"\x00" * 40)
    elif kind != "empty":
        with pytest.raises(Cancelled) as caught:
            method.run(
                asked(subject_files, prior_preservation=False, steps=3, seed=1),
                new_context(files=subject_files, stop_at=2),
            )
        assert caught.value.checkpoint is not None
        shutil.copytree(caught.value.checkpoint, folder, dirs_exist_ok=True)
        if kind == "without its facts":
            (folder / "state.json").unlink()
    context = new_context(files=subject_files, checkpoint=folder)
    method.run(parameters, context)
    assert [done for done, _, _ in context.seen] == [1, 2, 3]
    said = capfd.readouterr().err
    assert ("starting from the beginning" in said) == (kind != "empty")
    assert ("other parameters (seed)" in said) == (kind == "of other parameters")


def test_a_file_that_is_no_picture_is_refused_by_its_place(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], subject_files: dict[str, Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture")
    files = {**dict(list(subject_files.items())[:2]), "0" * 64: text}
    with pytest.raises(InputRefused, match=r"^pictures\.2: is no picture"):
        trainer(model_ref("sd")).run(asked(files), new_context(files=files))
    with pytest.raises(InputRefused, match=r"^pictures: file .* upload it first"):
        trainer(model_ref("sd")).run(asked(subject_files), new_context())


def test_models_that_cannot_be_taught_are_refused(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], subject_files: dict[str, Path]
) -> None:
    with pytest.raises(ModelMissing, match="needs a base model"):
        DreamBooth().load(None, "cpu")
    with pytest.raises(InputRefused, match="StableDiffusionPAGPipeline"):
        trainer(model_ref("pag")).run(asked(subject_files), new_context(files=subject_files))
    taught = new_context(files=subject_files)
    trainer(model_ref("sd")).run(asked(subject_files, prior_preservation=False, steps=1), taught)
    with pytest.raises(InputRefused, match="itself a trained model"):
        trainer(model_ref("sd", taught.output_dir)).run(asked(subject_files), new_context(files=subject_files))


def test_an_adapter_of_another_base_model_is_refused(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], subject_files: dict[str, Path]
) -> None:
    taught = new_context(files=subject_files)
    trainer(model_ref("sd")).run(asked(subject_files, prior_preservation=False, steps=1), taught)
    with pytest.raises(ModelMissing, match="base"):
        pipelines.load(model_ref("sdxl", taught.output_dir), "cpu")


def test_a_runaway_rate_is_named_as_the_cause(
    model_ref: Callable[..., ModelRef],
    new_context: Callable[..., Any],
    subject_files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from executors.methods import training_step

    real = training_step._loss
    monkeypatch.setattr(training_step, "_loss", lambda *given: real(*given) * float("inf"))
    with pytest.raises(InputRefused, match=r"^learning_rate: .*lower the rate"):
        trainer(model_ref("sd")).run(asked(subject_files, prior_preservation=False), new_context(files=subject_files))


@pytest.mark.parametrize(("family", "way"), [("sd", "lora"), ("sd", "full"), ("sdxl", "full")])
def test_half_precision_trains_single_precision_weights(
    model_ref: Callable[..., ModelRef],
    new_context: Callable[..., Any],
    subject_files: dict[str, Path],
    family: str,
    way: str,
) -> None:
    method = DreamBooth()
    method._loaded = pipelines.load(model_ref(family), "cpu", torch.bfloat16)
    before = weights(method)
    losses = []
    for rate in (1e-9, 1e-2):
        context = new_context(files=subject_files)
        parameters = asked(subject_files, method=way, steps=6, batch=1, learning_rate=rate, prior_preservation=False)
        losses.append(method.run(parameters, context).metadata["loss"])
        made = load_file(str(context.output_dir / "adapter.safetensors"))
        assert all(torch.isfinite(value).all() for value in made.values())
    assert losses[1] < losses[0], "the weights of a step must be the ones the step before left"
    after = weights(method)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_low_rank_layers_start_as_the_base_model_and_come_off_again() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Sequential(torch.nn.Linear(5, 4)))
    x = torch.randn(3, 6)
    before = module(x)
    trainable = adapters.attach({"unet": module}, rank=2, seed=0)
    assert sorted(trainable) == [f"unet.{name}.lora_{side}.weight" for name in ("0", "1.0") for side in "AB"]
    assert torch.equal(module(x), before)
    with torch.no_grad():
        trainable["unet.0.lora_B.weight"].fill_(1.0)
    assert not torch.equal(module(x), before)
    adapters.detach({"unet": module})
    assert torch.equal(module(x), before)
