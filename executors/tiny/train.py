"""Train the bundled model from nothing on drawn pictures: VAE, its decoder again, tokenizer, text warm-up, UNet.

    python -m executors.tiny.train --out DIR --minutes 60 --seed 0

One thread is enough. The work is cut into steps whose randomness depends on the seed and the step's number alone, so a
training that is stopped and started again goes on where its last snapshot was. `DIR/model` is a usable pipeline from the
UNet's first snapshot on.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from executors.tiny import drawing, networks, snapshots

# Steps of a training of sixty minutes on one core that is free.
VAE_STEPS, DECODER_STEPS, TEXT_STEPS, UNET_STEPS = 3200, 2000, 500, 7000
SNAPSHOT_EVERY = 250
EMPTY_CAPTIONS = 0.1


@dataclass(frozen=True, slots=True)
class Plan:
    out: Path
    seed: int
    minutes: float

    def steps(self, in_an_hour: int) -> int:
        return max(2, round(in_an_hour * self.minutes / 60.0))

    def drawings(self, usual: int) -> int:
        """How many pictures to draw: the usual number from six minutes on, fewer for a training that only shows that it runs."""
        return max(64, round(usual * min(1.0, self.minutes / 6.0)))

    @property
    def states(self) -> Path:
        return self.out / "states"


def to_tensor(pictures: list[drawing.Pixels]) -> torch.Tensor:
    """uint8 pictures as float32 [n, 3, 64, 64] in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def scenes(seed: int, stream: int, count: int) -> list[drawing.Scene]:
    return [drawing.random_scene(np.random.default_rng([seed, stream, index])) for index in range(count)]


def _generator(seed: int, stream: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 10 + stream) * 10_000_000 + step)


def _rate(step: int, steps: int, peak: float, warm_up: int = 50) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * done)))


def _steps(name: str, first: int, steps: int, losses: list[float]) -> Iterator[int]:
    """Count the steps and say every fifty of them how far the training is."""
    began = time.monotonic()
    for step in range(first, steps):
        yield step
        done = step + 1
        if done % 50 == 0 or done == steps:
            pace = (time.monotonic() - began) / (done - first)
            left = pace * (steps - done)
            recent = sum(losses[-50:]) / max(1, len(losses[-50:]))
            print(f"{name} {done}/{steps} loss {recent:.4f} {pace:.3f} s/step, {left / 60:.1f} min left", flush=True)


def train_vae(plan: Plan) -> AutoencoderTiny:
    """Learn to squeeze pictures into latents and back; scales the latents to unit variance at the end."""
    torch.manual_seed(plan.seed)
    vae, state, steps = networks.build_vae(), plan.states / "vae", plan.steps(VAE_STEPS)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, weight_decay=1e-4, fused=True)
    first = snapshots.restore(state, {"vae": vae}, optimizer)
    pictures = vae_pictures(plan)
    losses: list[float] = []
    for step in _steps("vae", min(first, steps), steps, losses):
        generator = _generator(plan.seed, 1, step)
        batch = pictures[torch.randint(len(pictures), (16,), generator=generator)].float() / 127.5 - 1.0
        if step < 0.7 * steps:
            x, y = (int(v) for v in torch.randint(0, 33, (2,), generator=generator))
            batch = batch[:, :, y : y + 32, x : x + 32]
        latents = vae.encode(batch).latents
        noise = torch.randn(latents.shape, generator=generator) * 0.02
        restored = vae.decode(latents + noise).sample
        loss = (
            torch.nn.functional.l1_loss(restored, batch)
            + 0.5 * torch.nn.functional.mse_loss(restored, batch)
            + 1e-3 * latents.square().mean()
        )
        _update(optimizer, loss, _rate(step, steps, 3e-3), losses)
        if (step + 1) % SNAPSHOT_EVERY == 0 or step + 1 == steps:
            snapshots.save(state, step + 1, {"vae": vae}, optimizer)
    vae.requires_grad_(False).eval()
    latents = encode(vae, [drawing.draw(scene) for scene in scenes(plan.seed, 1, 512)])
    vae.register_to_config(scaling_factor=float(1.0 / latents.std()))
    print(f"vae PSNR {psnr_db(plan, vae):.2f} dB, scaling factor {vae.config.scaling_factor:.4f}", flush=True)
    return vae


def vae_pictures(plan: Plan) -> torch.Tensor:
    """What the VAE is trained on, uint8 [n, 3, 64, 64]: seven tenths drawn scenes, the rest clutter."""
    drawn = [drawing.draw(scene) for scene in scenes(plan.seed, 1, plan.drawings(8400))]
    drawn += [drawing.clutter(np.random.default_rng([plan.seed, 2, index])) for index in range(plan.drawings(3600))]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)


@torch.no_grad()
def psnr_db(plan: Plan, vae: AutoencoderTiny) -> float:
    """How well scenes that the VAE has not seen come back, in decibels."""
    held_out = to_tensor([drawing.draw(scene) for scene in scenes(plan.seed, 9, 128)])
    restored = vae.decode(vae.encode(held_out).latents).sample.clamp(-1, 1)
    return -10.0 * math.log10(float((restored - held_out).square().mean()) / 4.0)


def train_decoder(plan: Plan, vae: AutoencoderTiny) -> None:
    """Sharpen the decoder over fixed latents, with the noise that a UNet's latents have; the encoder stays as it is."""
    state, steps = plan.states / "decoder", plan.steps(DECODER_STEPS)
    decoder = vae.decoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1.5e-3, weight_decay=1e-4, fused=True)
    first = min(snapshots.restore(state, {"decoder": decoder}, optimizer), steps)
    pictures = vae_pictures(plan) if first < steps else torch.empty(0)
    losses: list[float] = []
    for step in _steps("decoder", first, steps, losses):
        generator = _generator(plan.seed, 7, step)
        batch = pictures[torch.randint(len(pictures), (16,), generator=generator)].float() / 127.5 - 1.0
        with torch.no_grad():
            latents = vae.encode(batch).latents
        noise = torch.randn(latents.shape, generator=generator) * (0.05 / vae.config.scaling_factor)
        restored = vae.decode(latents + noise).sample
        l1, squared = torch.nn.functional.l1_loss(restored, batch), torch.nn.functional.mse_loss(restored, batch)
        _update(optimizer, l1 + 0.5 * squared, _rate(step, steps, 1.5e-3), losses)
        if (step + 1) % SNAPSHOT_EVERY == 0 or step + 1 == steps:
            snapshots.save(state, step + 1, {"decoder": decoder}, optimizer)
    decoder.requires_grad_(False)
    print(f"decoder PSNR {psnr_db(plan, vae):.2f} dB", flush=True)


def _update(optimizer: torch.optim.Optimizer, loss: torch.Tensor, rate: float, losses: list[float]) -> None:
    """One clipped optimizer step; a group may hold `share`, its part of the learning rate."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("share", 1.0)
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    losses.append(float(loss.detach()))


@torch.no_grad()
def encode(vae: AutoencoderTiny, pictures: list[drawing.Pixels]) -> torch.Tensor:
    """Unscaled latents of pictures, float32 [n, 4, 8, 8]."""
    parts = [vae.encode(to_tensor(pictures[i : i + 64])).latents for i in range(0, len(pictures), 64)]
    return torch.cat(parts)


def train_text(plan: Plan, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Warm the text encoder up by naming a caption's kind and colours from its last position."""
    torch.manual_seed(plan.seed + 1)
    text, state, steps = networks.build_text_encoder(tokenizer), plan.states / "text", plan.steps(TEXT_STEPS)
    colours, kinds = list(drawing.COLOURS), list(drawing.KINDS)
    sizes = (len(kinds), len(colours), len(colours) + 1, len(colours) + 1)
    heads = torch.nn.Linear(64, sum(sizes))
    modules: dict[str, torch.nn.Module] = {"text": text, "heads": heads}
    optimizer = torch.optim.AdamW([*text.parameters(), *heads.parameters()], lr=2e-3, weight_decay=0.01, fused=True)
    losses: list[float] = []
    for step in _steps("text", min(snapshots.restore(state, modules, optimizer), steps), steps, losses):
        captions, truths = [], []
        for index in range(64):
            rng = np.random.default_rng([plan.seed, 3, step, index])
            scene = drawing.random_scene(rng)
            words = drawing.caption(scene, rng)
            named = f" and {scene.detail} " in words
            ground = words.endswith(" background")
            captions.append(words)
            truths.append(
                [
                    kinds.index(scene.kind),
                    colours.index(scene.colour),
                    colours.index(scene.detail) if named else len(colours),
                    colours.index(scene.background) if ground else len(colours),
                ]
            )
        last = text(networks.token_ids(tokenizer, captions)).last_hidden_state[:, -1]
        guesses = heads(last).split(sizes, dim=1)
        truth = torch.tensor(truths)
        loss = sum((torch.nn.functional.cross_entropy(g, truth[:, i]) for i, g in enumerate(guesses)), torch.zeros(()))
        _update(optimizer, loss, _rate(step, steps, 2e-3), losses)
        if (step + 1) % SNAPSHOT_EVERY == 0 or step + 1 == steps:
            snapshots.save(state, step + 1, modules, optimizer)
    return text


@dataclass(slots=True)
class _Averaged:
    """The trained parts and their exponential averages; the averages are what is kept."""

    unet: UNet2DConditionModel
    text: CLIPTextModel
    mean_unet: UNet2DConditionModel
    mean_text: CLIPTextModel

    def modules(self) -> dict[str, torch.nn.Module]:
        return {"unet": self.unet, "text": self.text, "mean_unet": self.mean_unet, "mean_text": self.mean_text}

    @torch.no_grad()
    def average(self, step: int) -> None:
        weight = 1.0 - min(0.998, (1 + step) / (10 + step))
        for kept, live in ((self.mean_unet, self.unet), (self.mean_text, self.text)):
            torch._foreach_lerp_(list(kept.parameters()), list(live.parameters()), weight)


def train_unet(plan: Plan, vae: AutoencoderTiny, tokenizer: CLIPTokenizer, text: CLIPTextModel) -> None:
    """Learn to denoise latents by their captions, the text encoder along with it, and keep writing `DIR/model`."""
    torch.manual_seed(plan.seed + 2)
    parts = _Averaged(networks.build_unet(), text, networks.build_unet(), networks.build_text_encoder(tokenizer))
    parts.mean_unet.load_state_dict(parts.unet.state_dict())
    parts.mean_text.load_state_dict(parts.text.state_dict())
    optimizer = torch.optim.AdamW(
        [{"params": parts.unet.parameters()}, {"params": text.parameters(), "share": 0.3}],
        lr=1.5e-3,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        fused=True,
    )
    state, steps = plan.states / "unet", plan.steps(UNET_STEPS)
    first = min(snapshots.restore(state, parts.modules(), optimizer), steps)
    load = _latent_loader(plan, vae)
    kept = networks.build_scheduler().alphas_cumprod
    losses: list[float] = []
    few, many = plan.drawings(8000), plan.drawings(24_000)
    truths, latents = load(few)
    for step in _steps("unet", first, steps, losses):
        if step >= 0.3 * steps and len(latents) < many:
            truths, latents = load(many)
        generator = _generator(plan.seed, 3, step)
        rows = torch.randint(len(latents), (32,), generator=generator)
        rng = np.random.default_rng([plan.seed, 5, step])
        captions = ["" if rng.random() < EMPTY_CAPTIONS else drawing.caption(truths[row], rng) for row in rows.tolist()]
        clean = latents[rows]
        noise = torch.randn(clean.shape, generator=generator)
        times = torch.randint(1000, (32,), generator=generator)
        signal = kept[times].sqrt().view(-1, 1, 1, 1)
        spread = (1.0 - kept[times]).sqrt().view(-1, 1, 1, 1)
        states = text(networks.token_ids(tokenizer, captions)).last_hidden_state
        guess = parts.unet(signal * clean + spread * noise, times, states).sample
        loss = torch.nn.functional.mse_loss(guess, signal * noise - spread * clean)
        _update(optimizer, loss, _rate(step, steps, 1.5e-3), losses)
        parts.average(step)
        if (step + 1) % SNAPSHOT_EVERY == 0 or step + 1 == steps:
            snapshots.save(state, step + 1, parts.modules(), optimizer, steps=steps)
            networks.write_pipeline(plan.out / "model", vae, parts.mean_text, tokenizer, parts.mean_unet)
    if first >= steps:
        networks.write_pipeline(plan.out / "model", vae, parts.mean_text, tokenizer, parts.mean_unet)


def _latent_loader(plan: Plan, vae: AutoencoderTiny) -> Callable[[int], tuple[list[drawing.Scene], torch.Tensor]]:
    """A function that draws the first n scenes of the training set and encodes them, scaled."""

    def load(count: int) -> tuple[list[drawing.Scene], torch.Tensor]:
        truths = scenes(plan.seed, 4, count)
        latents = encode(vae, [drawing.draw(scene) for scene in truths]) * vae.config.scaling_factor
        return truths, latents

    return load


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the bundled tiny model on drawn pictures.")
    parser.add_argument("--out", type=Path, required=True, help="directory for snapshots and the finished model")
    parser.add_argument("--minutes", type=float, default=60.0, help="the training's size in minutes of one free core")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    plan = Plan(out=chosen.out, seed=chosen.seed, minutes=chosen.minutes)
    vae = train_vae(plan)
    train_decoder(plan, vae)
    captions = []
    for index in range(plan.drawings(4000)):
        rng = np.random.default_rng([plan.seed, 6, index])
        captions.append(drawing.caption(drawing.random_scene(rng), rng))
    tokenizer = networks.train_tokenizer(captions, plan.out / "tokenizer")
    print(f"tokenizer: {len(tokenizer)} pieces", flush=True)
    text = train_text(plan, tokenizer)
    train_unet(plan, vae, tokenizer, text)
    print(f"done: {plan.out / 'model'}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
