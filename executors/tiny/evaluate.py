"""Measure the bundled model: does it follow prompts, and does DreamBooth teach it a subject without making it forget?

    python -m executors.tiny.evaluate [--model DIR] [--prompts 280] [--subjects 3] [--json FILE] [--sheet FILE]

The judge is the CNN of `executors.tiny.judge`, trained on drawings alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from executors.methods import pipelines, sampling
from executors.methods.base import GivenAdapter, ModelRef
from executors.methods.dreambooth import DreamBooth
from executors.methods.parameters import DreamBoothParameters
from executors.tiny import JUDGE_DIR, MODEL_DIR, MODEL_ID, drawing
from executors.tiny import judge as judges

STEPS = 20
INSTANCE_WORD = "sks"


@dataclass(slots=True)
class LocalRun:
    """A method's context without a Pod: files by id, progress to a function, never stopped."""

    output_dir: Path
    files: dict[str, Path]
    say: Callable[[str], None]
    device: str = "cpu"
    checkpoint: Path | None = None
    cache_dir: Path | None = None
    adapters: tuple[GivenAdapter, ...] = ()
    model: str = ""
    priority: int = 0
    _said: int = field(default=0)

    def progress(self, done: int, total: int, note: str = "") -> None:
        if done * 10 // total > self._said:
            self._said = done * 10 // total
            self.say(f"  {done}/{total} {note}")

    def preview(self, picture: object) -> None:
        pass

    def offer_checkpoint(self, checkpoint: Path) -> None:
        pass

    def should_stop(self) -> bool:
        return False

    def fetch(self, file_id: str) -> Path:
        return self.files[file_id]

    def model_dir(self, model_id: str) -> Path:
        raise FileNotFoundError(model_id)


def generate(
    loaded: pipelines.LoadedPipeline, prompts: Sequence[str], seed: int, steps: int = STEPS
) -> list[Image.Image]:
    """One picture per prompt, picture k from seed + k, sixteen at a time."""
    guidance = float(loaded.defaults.get("guidance", 3.0))
    guided = sampling.is_guided(loaded, guidance)
    width, height = loaded.native_size
    made: list[Image.Image] = []
    for start in range(0, len(prompts), 16):
        part = prompts[start : start + 16]
        latents = sampling.denoise(
            loaded,
            sampling.stack([sampling.encode_prompt(loaded, prompt, "", guided) for prompt in part]),
            seeds=[seed + start + index for index in range(len(part))],
            steps=steps,
            guidance=guidance,
            width=width,
            height=height,
            scheduler_name="ddim",
            before_step=lambda _done, _total: None,
        )
        made += sampling.decode(loaded, latents)
    return made


def asked_scenes(count: int, seed: int = 0) -> list[tuple[drawing.Scene, str]]:
    """Scenes in which all kinds come up equally often, with a prompt that names kind, colour and ground."""
    asked = []
    for index in range(count):
        rng = np.random.default_rng([seed, 31, index])
        scene = drawing.random_scene(rng, kind=drawing.KINDS[index % len(drawing.KINDS)])
        thing = drawing.with_article(f"{scene.colour} {scene.kind}")
        asked.append((scene, f"{thing} on {drawing.with_article(scene.background)} background"))
    return asked


def prompt_following(
    loaded: pipelines.LoadedPipeline, judge: judges.Judge, count: int, seed: int = 0
) -> dict[str, float]:
    """Shares of generated pictures that show what their prompt names."""
    asked = asked_scenes(count, seed)
    verdicts = judge.look(generate(loaded, [prompt for _, prompt in asked], seed=seed))
    kinds = [scene.kind for scene, _ in asked]
    right = np.array([a == t for a, t in zip(verdicts.answers["kind"], kinds, strict=True)])
    plain = np.array([kind in drawing.SHAPES for kind in kinds])
    return {
        "background": verdicts.share("background", [scene.background for scene, _ in asked]),
        "colour": verdicts.share("colour", [scene.colour for scene, _ in asked]),
        "kind": float(right.mean()),
        "kind_plain": float(right[plain].mean()),
        "kind_composite": float(right[~plain].mean()),
    }


def likeness(
    loaded: pipelines.LoadedPipeline, judge: judges.Judge, subject: drawing.Scene, prompt: str, count: int = 16
) -> dict[str, float]:
    """How near generated pictures are to true ones of a subject: cosine of the judge's vectors, and equal answers."""
    true = judge.look(drawing.subject_pictures(subject, 16, seed=5)).vectors
    verdicts = judge.look(generate(loaded, [prompt] * count, seed=900))
    right = judges.truths(subject)
    asked = ("kind", "colour", "detail", "plate", "sign")
    same = [all(verdicts.answers[q][i] == right[q] for q in asked) for i in range(count)]
    centre = torch.nn.functional.normalize(true.mean(0), dim=0)
    return {"similarity": float((verdicts.vectors @ centre).mean()), "identical": sum(same) / count}


def learn(
    model_dir: Path,
    subject: drawing.Scene,
    folder: Path,
    say: Callable[[str], None],
    method: Literal["lora", "full"],
    steps: int,
) -> float:
    """Run DreamBooth on four drawn pictures of a subject; returns process CPU seconds."""
    files = {}
    for index, pixels in enumerate(drawing.subject_pictures(subject, 4, seed=1)):
        path = folder / f"subject-{index}.png"
        Image.fromarray(pixels).save(path)
        files[f"{index:064x}"] = path
    trainer = DreamBooth()
    trainer.load(ModelRef(MODEL_ID, model_dir), "cpu")
    asked = DreamBoothParameters(
        pictures=tuple(files), category=subject.kind, instance_token=INSTANCE_WORD, method=method, steps=steps
    )
    began = time.process_time()
    trainer.run(asked, LocalRun(folder, files, say))
    trainer.close()
    return time.process_time() - began


def dreambooth_report(
    model_dir: Path,
    judge: judges.Judge,
    subjects: int,
    prompts: int,
    say: Callable[[str], None],
    method: Literal["lora", "full"],
) -> dict[str, float]:
    """Means over subjects: likeness before and after, other prompts before and after, CPU seconds of a training."""
    rows: list[dict[str, float]] = []
    base = pipelines.load(ModelRef(MODEL_ID, model_dir), "cpu")
    before = prompt_following(base, judge, prompts, seed=7)["kind"]
    for number in range(subjects):
        subject = drawing.subject_scene(number + 1)
        prompt = f"a photo of {INSTANCE_WORD} {subject.kind}"
        untaught = likeness(base, judge, subject, prompt)
        with tempfile.TemporaryDirectory() as folder:
            about = f"{subject.colour} {subject.plate}, {subject.detail} {subject.sign}"
            say(f"dreambooth {method} subject {number + 1}/{subjects}: {about}")
            seconds = learn(model_dir, subject, Path(folder), say, method, steps=300 if method == "lora" else 200)
            taught_model = pipelines.load(ModelRef("subject", model_dir, Path(folder)), "cpu")
        taught = likeness(taught_model, judge, subject, prompt)
        ground = next(name for name in drawing.COLOURS if name not in (subject.colour, subject.detail))
        moved = likeness(taught_model, judge, subject, f"{prompt} on {drawing.with_article(ground)} background")
        rows.append(
            {
                "similarity_before": untaught["similarity"],
                "similarity_after": taught["similarity"],
                "identical_before": untaught["identical"],
                "identical_after": taught["identical"],
                "identical_on_named_ground": moved["identical"],
                "other_prompts_before": before,
                "other_prompts_after": prompt_following(taught_model, judge, prompts, seed=7)["kind"],
                "cpu_s": seconds,
            }
        )
        say(json.dumps({key: round(value, 3) for key, value in rows[-1].items()}))
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def contact_sheet(loaded: pipelines.LoadedPipeline, path: Path, columns: int = 10) -> None:
    """A row of generated pictures for every kind."""
    rows = []
    for kind in drawing.KINDS:
        prompts = []
        for index in range(columns):
            scene = drawing.random_scene(np.random.default_rng([8, 31, index]), kind=kind)
            prompts.append(f"a {scene.colour} {kind} on a {scene.background} background")
        rows.append(np.concatenate([np.asarray(picture) for picture in generate(loaded, prompts, seed=50)], axis=1))
    Image.fromarray(np.concatenate(rows)).save(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure prompt following and subject learning of the tiny model.")
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--judge", type=Path, default=JUDGE_DIR)
    parser.add_argument("--prompts", type=int, default=280, help="prompts to judge; all kinds equally often")
    parser.add_argument("--subjects", type=int, default=3, help="subjects to learn; 0: no DreamBooth")
    parser.add_argument("--full", action="store_true", help="measure full fine-tuning too")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of generated pictures here")
    chosen = parser.parse_args(arguments)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    judge = judges.load(chosen.judge)
    loaded = pipelines.load(ModelRef(MODEL_ID, chosen.model), "cpu")
    if chosen.sheet is not None:
        contact_sheet(loaded, chosen.sheet)
    figures: dict[str, Any] = {"judge_on_drawings": judges.on_drawings(judge, 500)}
    figures["prompt_following"] = prompt_following(loaded, judge, chosen.prompts)
    if chosen.subjects:
        methods: tuple[Literal["lora", "full"], ...] = ("lora", "full") if chosen.full else ("lora",)
        for method in methods:
            figures[f"dreambooth_{method}"] = dreambooth_report(chosen.model, judge, chosen.subjects, 140, say, method)
    for part, values in figures.items():
        print(part)
        for name, value in values.items():
            print(f"  {name:28s} {value:.3f}")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
