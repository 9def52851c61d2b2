"""What a training can be asked for, each with the number or the file that shows it."""

from __future__ import annotations

import csv
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from executors.methods import adapters, buckets, pipelines, prior_cache, provenance, training_step, validation
from executors.methods.base import InputRefused, MethodResult, ModelRef
from executors.methods.dreambooth import DreamBooth
from executors.methods.parameters import MAX_VALIDATION_PICTURES, DreamBoothParameters, ParameterError, validate

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]


def asked(files: dict[str, Path], **changes: Any) -> DreamBoothParameters:
    usual = {"category": "emblem", "steps": 3, "batch": 2, "learning_rate": 1e-2, "size": 64}
    return DreamBoothParameters.model_validate(
        {"pictures": list(files), **usual, "prior_preservation": False, **changes}
    )


def run(ref: ModelRef, parameters: DreamBoothParameters, context: Any) -> MethodResult:
    method = DreamBooth()
    method.load(ref, "cpu")
    return method.run(parameters, context)


def weights(result: MethodResult) -> dict[str, torch.Tensor]:
    return load_file(str(next(file.path for file in result.files if file.name == adapters.WEIGHTS)))


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["lora", "full"])
def test_gradient_checkpointing_computes_twice_and_trains_the_same_model(
    model_ref: Callable[..., ModelRef],
    new_context: Callable[..., Any],
    subject_files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    recomputed: list[object] = []
    real = torch.utils.checkpoint.checkpoint

    def counted(function: Any, *given: Any, **options: Any) -> Any:
        recomputed.append(function)
        return real(function, *given, **options)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", counted)
    plain = run(model_ref("sd"), asked(subject_files, method=way), new_context(files=subject_files))
    assert recomputed == []
    frugal = run(
        model_ref("sd"), asked(subject_files, method=way, gradient_checkpointing=True), new_context(files=subject_files)
    )
    assert {type(getattr(each, "__self__", each)).__name__ for each in recomputed} >= {"ResnetBlock2D"}
    for key, value in weights(plain).items():
        torch.testing.assert_close(weights(frugal)[key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_after_gradient_checkpointing_the_parts_are_as_they_were(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], subject_files: dict[str, Path]
) -> None:
    method = DreamBooth()
    method.load(model_ref("sd"), "cpu")
    method.run(asked(subject_files, gradient_checkpointing=True, steps=1), new_context(files=subject_files))
    assert method._loaded is not None
    for part in method._loaded.parts.values():
        assert not part.training
        assert not any(getattr(module, "gradient_checkpointing", False) for module in part.modules())


def test_accumulated_batches_make_one_step_of_their_mean_gradient(
    model_ref: Callable[..., ModelRef],
    new_context: Callable[..., Any],
    subject_files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, seen = training_step._loss, []

    def counted(*given: Any) -> torch.Tensor:
        loss = real(*given)
        seen.append(float(loss.detach()))
        return loss

    monkeypatch.setattr(training_step, "_loss", counted)
    result = run(model_ref("sd"), asked(subject_files, accumulate=3, steps=2), new_context(files=subject_files))
    assert len(seen) == 6
    assert len(set(seen)) == 6, "every batch draws its own"
    assert [loss for _, loss in result.metadata["loss_curve"]] == pytest.approx(
        [sum(seen[:3]) / 3, sum(seen[3:]) / 3], abs=1e-6
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_caps_the_weight_of_easy_times_and_leaves_hard_ones(kind: str) -> None:
    schedule = types.SimpleNamespace(
        alphas_cumprod=torch.tensor([0.99, 0.5, 0.0]), config=types.SimpleNamespace(prediction_type=kind)
    )
    easy, even, noise = training_step.snr_weights(schedule, torch.tensor([0, 1, 2]), 5.0).tolist()
    expected = {
        "epsilon": (5.0 / 99.0, 1.0, 1.0),
        "v_prediction": (5.0 / 100.0, 0.5, 0.0),
        "sample": (5.0, 1.0, 0.0),
    }[kind]
    assert (easy, even, noise) == pytest.approx(expected, rel=1e-4)


def test_min_snr_changes_what_is_trained(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], subject_files: dict[str, Path]
) -> None:
    plain = run(model_ref("sd"), asked(subject_files), new_context(files=subject_files))
    capped = run(model_ref("sd"), asked(subject_files, snr_gamma=0.1), new_context(files=subject_files))
    assert capped.metadata["loss"] < plain.metadata["loss"]


def test_eight_bit_adam_without_its_library_is_refused_with_the_remedy(
    model_ref: Callable[..., ModelRef],
    new_context: Callable[..., Any],
    subject_files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputRefused, match=r"^optimizer: adamw_8bit needs bitsandbytes.*or choose adamw"):
        run(model_ref("sd"), asked(subject_files, optimizer="adamw_8bit"), new_context(files=subject_files))


class _CountsInPlainNumbers(torch.optim.SGD):
    """Stands in for an 8-bit optimizer: its state holds a plain number and bytes, as theirs does."""

    def __init__(self, parameters: Any, lr: float, betas: Any, weight_decay: float) -> None:
        super().__init__(parameters, lr=lr)

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                state["absmax"] = torch.full((2,), state["step"], dtype=torch.uint8)
                assert type(state["step"]) is int
                parameter.data.add_(parameter.grad, alpha=-group["lr"] / state["step"])
        return None


def test_eight_bit_adam_is_used_where_it_is_installed_and_its_state_is_kept(
    model_ref: Callable[..., ModelRef],
    new_context: Callable[..., Any],
    subject_files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = types.SimpleNamespace(optim=types.SimpleNamespace(AdamW8bit=_CountsInPlainNumbers))
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    parameters = asked(subject_files, optimizer="adamw_8bit", checkpoint_every=2)
    context = new_context(files=subject_files)
    whole = run(model_ref("sd"), parameters, context)
    (checkpoint,) = context.offered
    resumed = run(model_ref("sd"), parameters, new_context(files=subject_files, checkpoint=checkpoint))
    for key, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[key]), key


# --- prior ------------------------------------------------------------------------------------------------------------


def test_a_prior_is_drawn_once_per_node_and_found_again(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], subject_files: dict[str, Path], tmp_path: Path
) -> None:
    cache = tmp_path / "priors"
    parameters = asked(subject_files, prior_preservation=True, prior_pictures=2)
    first = new_context(files=subject_files, cache_dir=cache)
    made = run(model_ref("sd"), parameters, first)
    assert any(note == "prior pictures" for _, _, note in first.seen)
    second = new_context(files=subject_files, cache_dir=cache)
    found = run(model_ref("sd"), parameters, second)
    assert not any(note == "prior pictures" for _, _, note in second.seen)
    for key, value in weights(made).items():
        assert torch.equal(value, weights(found)[key]), key


@pytest.mark.parametrize("change", [{"category": "robot"}, {"prior_pictures": 4}, {"seed": 1}, {"size": 32 * 4}])
def test_another_prior_is_not_taken_for_it(
    model_ref: Callable[..., ModelRef],
    new_context: Callable[..., Any],
    subject_files: dict[str, Path],
    tmp_path: Path,
    change: dict[str, Any],
) -> None:
    cache = tmp_path / "priors"
    usual = {"prior_preservation": True, "prior_pictures": 2, "steps": 1}
    run(model_ref("sd"), asked(subject_files, **usual), new_context(files=subject_files, cache_dir=cache))
    run(model_ref("sd"), asked(subject_files, **{**usual, **change}), new_context(files=subject_files, cache_dir=cache))
    assert len(list(cache.glob("*.safetensors"))) == 2


def test_a_damaged_prior_is_made_anew_and_old_ones_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prior_cache, "KEPT_FILES", 2)
    latents = torch.arange(4.0)
    for name in ("a", "b", "c"):
        prior_cache.keep(tmp_path, name, latents)
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "d.safetensors").write_bytes(b"\x00" * 30)
    assert prior_cache.find(tmp_path, "d") is None
    assert not (tmp_path / "d.safetensors").exists()
    kept = prior_cache.find(tmp_path, "c")
    assert kept is not None
    assert torch.equal(kept, latents)
    assert prior_cache.find(None, "c") is None


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [64, 128, 512, 1024])
def test_buckets_hold_no_more_pixels_than_the_square_and_come_in_both_ways(side: int) -> None:
    found = buckets.shapes(side)
    assert (side, side) in found
    for width, height in found:
        assert width * height <= side * side
        assert width % 16 == height % 16 == 0
        assert max(width, height) <= buckets.WIDEST * side
        assert (height, width) in found


def test_a_picture_goes_to_the_bucket_nearest_to_its_shape() -> None:
    assert buckets.nearest(4000, 4000, 512) == (512, 512)
    assert buckets.nearest(3000, 4000, 512) == (448, 576)
    assert buckets.nearest(4000, 3000, 512) == (576, 448)
    assert buckets.nearest(10, 10_000, 512) == (256, 1024)


@pytest.fixture
def tall_and_wide(tmp_path: Path) -> dict[str, Path]:
    files = {}
    for index, size in enumerate(((60, 100), (100, 60), (64, 64), (61, 101))):
        path = tmp_path / f"{index}.png"
        pixels = np.random.default_rng(index).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        files[f"{index}" * 64] = path
    return files


@pytest.mark.parametrize("prior", [True, False])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_pictures_are_trained_in_their_own_shapes(
    model_ref: Callable[..., ModelRef],
    new_context: Callable[..., Any],
    tall_and_wide: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    prior: bool,
) -> None:
    seen: set[tuple[int, ...]] = set()
    real = training_step._row_losses

    def watched(training: Any, rows: Any) -> torch.Tensor:
        seen.add(tuple(rows.clean.shape[2:]))
        return real(training, rows)

    monkeypatch.setattr(training_step, "_row_losses", watched)
    parameters = asked(
        tall_and_wide, aspect="buckets", steps=8, batch=1, prior_preservation=prior, prior_pictures=2, size=64
    )
    result = run(model_ref(family), parameters, new_context(files=tall_and_wide))
    # The random models' autoencoder halves a side.
    assert seen == {(40, 24), (24, 40), (32, 32)}
    assert result.metadata["loss"] > 0


def test_cut_to_squares_there_is_one_shape(
    model_ref: Callable[..., ModelRef],
    new_context: Callable[..., Any],
    tall_and_wide: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from executors.methods import dreambooth

    found: list[Any] = []
    real = dreambooth._read_subject
    monkeypatch.setattr(dreambooth, "_read_subject", lambda *given: found.append(real(*given)) or found[-1])
    run(model_ref("sd"), asked(tall_and_wide, steps=1), new_context(files=tall_and_wide))
    assert [len(group) for group in found[0].groups] == [4]


# --- memory -----------------------------------------------------------------------------------------------------------


class _Tight:
    """A network that has memory for so many rows; `calls` are the rows it was asked for."""

    def __init__(self, unet: Any, rows: int) -> None:
        self._real, self._rows = unet.forward, rows
        self.calls: list[int] = []

    def __call__(self, sample: torch.Tensor, *given: Any, **named: Any) -> Any:
        self.calls.append(len(sample))
        if len(sample) > self._rows:
            raise torch.cuda.OutOfMemoryError("no more")
        return self._real(sample, *given, **named)


@pytest.mark.parametrize("prior", [True, False])
def test_where_memory_runs_out_a_step_is_taken_in_parts_and_ends_with_the_same_model(
    model_ref: Callable[..., ModelRef],
    new_context: Callable[..., Any],
    subject_files: dict[str, Path],
    capfd: pytest.CaptureFixture[str],
    prior: bool,
) -> None:
    options = {"batch": 3, "steps": 3, "prior_preservation": prior, "prior_pictures": 2}
    plain = run(model_ref("sd"), asked(subject_files, **options), new_context(files=subject_files))
    method = DreamBooth()
    method.load(model_ref("sd"), "cpu")
    assert method._loaded is not None
    unet = method._loaded.pipe.unet
    tight = _Tight(unet, 2)
    # Not before the prior is drawn: that is generation, whose memory is another matter.
    real = training_step.take

    def take(training: Any) -> float:
        unet.forward = tight
        return real(training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_step, "take", take)
        split = method.run(asked(subject_files, **options), new_context(files=subject_files))
    assert max(tight.calls) == (6 if prior else 3), "it was tried whole first"
    assert [rows for rows in tight.calls if rows > 2] == ([6, 3] if prior else [3]), "and not again in later steps"
    losses, others = ([loss for _, loss in each.metadata["loss_curve"]] for each in (plain, split))
    assert others == pytest.approx(losses, rel=1e-4)
    one, other = (torch.cat([value.flatten() for _, value in sorted(weights(each).items())]) for each in (plain, split))
    assert float(torch.cosine_similarity(one, other, dim=0)) > 0.9999, "the same model but for rounding"
    assert "memory ran out in step 1; batches go in" in capfd.readouterr().err


def test_a_single_row_for_which_there_is_no_memory_ends_the_training(
    model_ref: Callable[..., ModelRef], new_context: Callable[..., Any], subject_files: dict[str, Path]
) -> None:
    method = DreamBooth()
    method.load(model_ref("sd"), "cpu")
    assert method._loaded is not None
    tight = _Tight(method._loaded.pipe.unet, 0)
    method._loaded.pipe.unet.forward = tight
    with pytest.raises(torch.cuda.OutOfMemoryError):
        method.run(asked(subject_files, batch=2, prior_preservation=False), new_context(files=subject_files))
    assert tight.calls == [2, 1, 1], "whole, in halves, in as many parts as there could be rows with a prior"


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
