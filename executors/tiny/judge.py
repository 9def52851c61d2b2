"""A small CNN that says what a picture of the drawn world shows: the measure of prompt following and of likeness.

    python -m executors.tiny.judge --out DIR

It is trained on drawings alone, never on generated pictures, so it does not learn a model's mistakes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from executors.tiny import JUDGE_DIR, drawing

QUESTIONS: dict[str, tuple[str, ...]] = {
    "kind": drawing.KINDS,
    "colour": tuple(drawing.COLOURS),
    "background": tuple(drawing.COLOURS),
    "detail": (*drawing.COLOURS, "none"),
    "plate": (*drawing.EMBLEM_PLATES, "none"),
    "sign": (*drawing.EMBLEM_SIGNS, "none"),
}
WEIGHTS, FACTS = "judge.safetensors", "judge.json"


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Answers for n pictures: one word per question and picture, and unit vectors [n, 128] whose products are likenesses."""

    answers: dict[str, tuple[str, ...]]
    vectors: torch.Tensor

    def share(self, question: str, truths: Sequence[str]) -> float:
        """Share of pictures whose answer is the truth."""
        return sum(a == t for a, t in zip(self.answers[question], truths, strict=True)) / len(truths)


class Judge(torch.nn.Module):
    """Four strided convolutions, an embedding of width 128 and one linear head for all questions."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 96), (96, 128)):
            layers += [
                torch.nn.Conv2d(before, after, 3, stride=2, padding=1),
                torch.nn.GroupNorm(8, after),
                torch.nn.SiLU(),
            ]
        self.features = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(128 * 16, 128))
        self.heads = torch.nn.Linear(128, sum(len(words) for words in QUESTIONS.values()))

    def forward(self, pixels: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        embedding = self.features(pixels)
        scores = self.heads(torch.nn.functional.silu(embedding)).split(
            [len(words) for words in QUESTIONS.values()], dim=1
        )
        return scores, embedding

    @torch.no_grad()
    def look(self, pictures: Sequence[Image.Image | drawing.Pixels]) -> Verdicts:
        """Judge pictures of any size."""
        pixels = torch.stack([_pixels(picture) for picture in pictures])
        scores, embedding = self(pixels)
        answers = {
            question: tuple(words[index] for index in score.argmax(1).tolist())
            for (question, words), score in zip(QUESTIONS.items(), scores, strict=True)
        }
        return Verdicts(answers, torch.nn.functional.normalize(embedding, dim=1))


def _pixels(picture: Image.Image | drawing.Pixels) -> torch.Tensor:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    side = (drawing.SIDE_PX, drawing.SIDE_PX)
    if image.size != side:
        image = image.resize(side, Image.Resampling.LANCZOS)
    values = np.asarray(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(values.copy()).permute(2, 0, 1) / 127.5 - 1.0


def truths(scene: drawing.Scene) -> dict[str, str]:
    """The right answers for a scene."""
    composite, emblem = scene.kind in drawing.COMPOSITES, scene.kind == "emblem"
    return {
        "kind": scene.kind,
        "colour": scene.colour,
        "background": scene.background,
        "detail": scene.detail if composite else "none",
        "plate": scene.plate if emblem else "none",
        "sign": scene.sign if emblem else "none",
    }


def train(seed: int = 0, steps: int = 1500, drawings: int = 16_000, say: Callable[[str], None] = print) -> Judge:
    """Train a judge on drawings, blurred and noised at random so that soft generated pictures are judged as well."""
    torch.manual_seed(seed)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    scenes = [drawing.random_scene(np.random.default_rng([seed, 21, index])) for index in range(drawings)]
    pictures = torch.from_numpy(np.stack([drawing.draw(scene) for scene in scenes])).permute(0, 3, 1, 2)
    right = [truths(scene) for scene in scenes]
    labels = torch.tensor([[words.index(row[question]) for question, words in QUESTIONS.items()] for row in right])
    for step in range(steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(pictures), (64,), generator=generator)
        pixels = pictures[rows].float() / 127.5 - 1.0
        if step % 2:
            pixels = torch.nn.functional.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
        pixels = pixels + 0.08 * torch.randn(pixels.shape, generator=generator)
        scores, _ = judge(pixels)
        losses = [torch.nn.functional.cross_entropy(score, labels[rows, index]) for index, score in enumerate(scores)]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        rate.step()
        if (step + 1) % 100 == 0:
            say(f"judge {step + 1}/{steps} loss {float(loss.detach()):.3f}")
    return judge.eval()


def on_drawings(judge: Judge, count: int = 1000, seed: int = 1) -> dict[str, float]:
    """Share of right answers on drawings the judge has not seen."""
    scenes = [drawing.random_scene(np.random.default_rng([seed, 22, index])) for index in range(count)]
    verdicts = judge.look([drawing.draw(scene) for scene in scenes])
    right = [truths(scene) for scene in scenes]
    return {question: verdicts.share(question, [row[question] for row in right]) for question in QUESTIONS}


def save(judge: Judge, folder: Path, facts: dict[str, float]) -> None:
    """Write half-precision weights and what the judge scores on drawings."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.half().contiguous() for key, value in judge.state_dict().items()}, str(folder / WEIGHTS))
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def load(folder: Path = JUDGE_DIR) -> Judge:
    """Read a judge; the one that comes with the package unless told otherwise."""
    judge = Judge()
    judge.load_state_dict({key: value.float() for key, value in load_file(str(folder / WEIGHTS)).items()})
    return judge.eval()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the judge of the drawn world.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    judge = train(chosen.seed, chosen.steps, say=lambda line: print(line, flush=True))
    facts = on_drawings(judge)
    save(judge, chosen.out, facts)
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
