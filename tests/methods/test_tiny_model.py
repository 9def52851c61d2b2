"""The model that comes with the package follows prompts, learns a subject, and can be trained anew by its own script."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from executors.methods import device, pipelines
from executors.methods.base import ModelRef
from executors.methods.parameters import TextToImageParameters
from executors.methods.text_to_image import TextToImage
from executors.tiny import JUDGE_DIR, MODEL_DIR, drawing, evaluate, networks, snapshots, train
from executors.tiny import judge as judges

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]


@pytest.fixture(scope="module")
def judge() -> judges.Judge:
    device.resolve("cpu")
    return judges.load(JUDGE_DIR)


@pytest.fixture(scope="module")
def tiny() -> pipelines.LoadedPipeline:
    return pipelines.load(ModelRef("tiny", MODEL_DIR), "cpu")


def test_the_judge_knows_drawings(judge: judges.Judge) -> None:
    assert min(judges.on_drawings(judge, count=140, seed=3).values()) >= 0.95


def test_the_bundled_model_follows_prompts(judge: judges.Judge, tiny: pipelines.LoadedPipeline) -> None:
    figures = evaluate.prompt_following(tiny, judge, count=42)
    assert figures["background"] >= 0.9
    assert figures["colour"] >= 0.9
    assert figures["kind"] >= 0.85


def test_the_prompt_is_what_decides(judge: judges.Judge, tiny: pipelines.LoadedPipeline) -> None:
    asked = evaluate.asked_scenes(28)
    pictures = evaluate.generate(tiny, ["" for _ in asked], seed=0)
    kinds = [scene.kind for scene, _ in asked]
    assert judge.look(pictures).share("kind", kinds) <= 0.4


def test_the_bundled_model_is_small_safe_and_says_nothing_of_its_maker() -> None:
    files = [path for path in MODEL_DIR.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}
    for path in files:
        if path.suffix == ".json":
            assert "/" not in json.dumps(json.loads(path.read_text()).get("_name_or_path", ""))


def test_a_job_without_size_guidance_or_model_uses_the_bundled_model_s_own(new_context: Callable[..., Any]) -> None:
    method = TextToImage()
    method.load(ModelRef("tiny", MODEL_DIR), "cpu")
    result = method.run(TextToImageParameters(prompt="a red star", seed=1, steps=2), new_context())
    assert (result.metadata["width"], result.metadata["height"], result.metadata["guidance"]) == (64, 64, 3.0)


@pytest.mark.slow
def test_dreambooth_teaches_the_bundled_model_a_subject(
    judge: judges.Judge, tiny: pipelines.LoadedPipeline, tmp_path: Path
) -> None:
    subject = drawing.subject_scene(1)
    prompt = f"a photo of {evaluate.INSTANCE_WORD} {subject.kind}"
    before = evaluate.likeness(tiny, judge, subject, prompt, count=8)
    evaluate.learn(MODEL_DIR, subject, tmp_path, lambda _line: None, "lora", steps=120)
    taught_model = pipelines.load(ModelRef("subject", MODEL_DIR, tmp_path), "cpu")
    after = evaluate.likeness(taught_model, judge, subject, prompt, count=8)
    assert after["similarity"] > before["similarity"] + 0.1
    assert after["identical"] > before["identical"]
    kept = evaluate.prompt_following(taught_model, judge, count=28)
    assert kept["background"] >= 0.8
    assert kept["kind"] >= 0.6


def test_the_training_script_runs_from_nothing_to_a_pipeline(tmp_path: Path) -> None:
    assert train.main(["--out", str(tmp_path), "--minutes", "0.02", "--seed", "5"]) == 0
    loaded = pipelines.load(ModelRef("new", tmp_path / "model"), "cpu")
    assert loaded.native_size == (64, 64)
    assert len(loaded.defaults["prior_prompts"]) == 48
    written = json.loads((tmp_path / "states" / "unet.json").read_text())
    assert written["step"] == train.Plan(tmp_path, 5, 0.02).steps(train.UNET_STEPS)
    pictures = evaluate.generate(loaded, ["a red star"], seed=0, steps=2)
    assert np.asarray(pictures[0]).shape == (64, 64, 3)


def test_a_training_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    def step(module: torch.nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        rows = torch.randn(8, 3, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        module(rows).square().mean().backward()
        optimizer.step()

    def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        module = torch.nn.Linear(3, 2)
        return module, torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)

    whole, optimizer = fresh()
    for number in range(6):
        step(whole, optimizer, number)
        if number == 2:
            snapshots.save(tmp_path / "state", 3, {"module": whole}, optimizer)
    resumed, optimizer = fresh()
    assert snapshots.restore(tmp_path / "state", {"module": resumed}, optimizer) == 3
    for number in range(3, 6):
        step(resumed, optimizer, number)
    assert torch.equal(whole.weight, resumed.weight)  # type: ignore[arg-type]
    assert snapshots.restore(tmp_path / "absent", {"module": resumed}) == 0


def test_the_tokenizer_reads_the_captions_in_few_pieces(tmp_path: Path) -> None:
    captions = [
        drawing.caption(drawing.random_scene(np.random.default_rng(s)), np.random.default_rng(s)) for s in range(300)
    ]
    tokenizer = networks.train_tokenizer(captions, tmp_path)
    assert tokenizer.tokenize("A Picture of a red star") == [
        "a</w>",
        "picture</w>",
        "of</w>",
        "a</w>",
        "red</w>",
        "star</w>",
    ]
    ids = networks.token_ids(tokenizer, ["a red star", "something never seen: ж"])
    assert ids.shape == (2, networks.TOKENS)
    assert ids[0, 0] == tokenizer.bos_token_id
    assert ids[0, -1] == tokenizer.eos_token_id
