"""What a training can be asked for, each with the number or the file that shows it."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import asked, run, weights

from executors.methods import buckets, prior, prior_cache, training_step
from executors.methods.base import InputRefused, ModelRef
from executors.methods.dreambooth import DreamBooth

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]


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
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
) -> None:
    monkeypatch.setattr(prior, "PICTURE_STEPS", 2)  # How good the pictures are does not matter here.
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
