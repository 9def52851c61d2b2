"""One step of a DreamBooth training: what is drawn for it, its loss, and the change of the weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from executors.methods import device
from executors.methods.training import Training

OPENINGS = ("a photo of {}", "a picture of {}", "an image of {}", "{}")
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of one shape, and all that was drawn for them; their loss is the sum of each row's times its weight."""

    clean: torch.Tensor
    prompts: list[str]
    noise: torch.Tensor
    times: torch.Tensor
    weights: torch.Tensor

    def parts(self, number: int) -> Iterator[_Rows]:
        """Return the rows in about so many parts."""
        size = -(-len(self.prompts) // number)
        for start in range(0, len(self.prompts), size):
            cut = slice(start, start + size)
            yield _Rows(self.clean[cut], self.prompts[cut], self.noise[cut], self.times[cut], self.weights[cut])


def take(training: Training) -> float:
    """Take one step: the gradients of `accumulate` batches, clipped, then the optimizer; returns the mean loss.

    Where memory runs out the step is taken anew with its batches in twice as many parts, which gives the same gradients but for
    rounding, and so are the steps after it.
    """
    while True:
        try:
            loss = _gradients(training)
            break
        except Exception as error:
            if not device.is_out_of_memory(error) or training.parts >= 2 * training.asked.batch:
                raise
        training.parts *= 2
        training.optimizer.zero_grad(set_to_none=True)
        device.forget_unused(training.loaded.device)
        print(
            f"memory ran out in step {training.step + 1}; batches go in {training.parts} parts now",
            file=sys.stderr,
            flush=True,
        )
    for group in training.optimizer.param_groups:
        group["lr"] = training.rate * (1.0 - training.step / training.asked.steps)
    torch.nn.utils.clip_grad_norm_(training.trainable.values(), MAX_GRADIENT_NORM)
    training.optimizer.step()
    training.step += 1
    training.losses.append(loss)
    return training.loss


def _gradients(training: Training) -> float:
    """Leave the mean gradients of `accumulate` batches in the weights; returns their mean loss."""
    asked = training.asked
    training.optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for turn in range(asked.accumulate):
        seed = (asked.seed * 1_000_003 + training.step * asked.accumulate + turn) % 2**63
        devices = [training.loaded.device] if training.loaded.device.type == "cuda" else []
        # Whatever a layer may draw by itself (dropout) follows from the step as well, and nobody else's draws are disturbed.
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            for rows in _drawn(training, torch.Generator().manual_seed(seed)):
                for part in rows.parts(training.parts):
                    with training.precision():
                        loss = _loss(training, part)
                    (loss / asked.accumulate).backward()  # type: ignore[no-untyped-call]
                    total += float(loss.detach())
    return total / asked.accumulate


def _drawn(training: Training, generator: torch.Generator) -> list[_Rows]:
    """Draw subject rows, and weighted prior rows beside them, in one batch where their shapes allow it."""
    asked, known = training.asked, training.prior
    clean, prompts = _subject_rows(training, generator)
    if known is None:
        return [_noised(training, clean, prompts, [1.0] * asked.batch, generator)]
    others = torch.randint(len(known.latents), (asked.batch,), generator=generator)
    prior_prompts = [known.prompts[row] for row in others.tolist()]
    prior_clean = known.latents[others.to(known.latents.device)]
    ours, theirs = [1.0] * asked.batch, [asked.prior_weight] * asked.batch
    if prior_clean.shape[1:] == clean.shape[1:]:
        together = torch.cat([clean, prior_clean])
        return [_noised(training, together, prompts + prior_prompts, ours + theirs, generator)]
    return [
        _noised(training, clean, prompts, ours, generator),
        _noised(training, prior_clean, prior_prompts, theirs, generator),
    ]


def _noised(
    training: Training, clean: torch.Tensor, prompts: list[str], weights: list[float], generator: torch.Generator
) -> _Rows:
    """Draw noise and times for rows; each counts for its share of a batch."""
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    steps = training.noise.config.num_train_timesteps
    times = torch.randint(steps, (len(clean),), generator=generator).to(clean.device)
    shares = torch.tensor(weights, device=clean.device) / training.asked.batch
    return _Rows(clean, prompts, noise, times, shares)


def _subject_rows(training: Training, generator: torch.Generator) -> tuple[torch.Tensor, list[str]]:
    """Draw a batch of one shape, every picture with the same chance, and an opening for each."""
    subject, batch = training.subject, training.asked.batch
    group = subject.groups[0]
    if len(subject.groups) > 1:
        chosen = int(torch.randint(len(subject.group_of), (1,), generator=generator))
        group = subject.groups[subject.group_of[chosen]]
    rows = torch.randint(len(group), (batch,), generator=generator)
    openings = torch.randint(len(OPENINGS), (batch,), generator=generator).tolist()
    return group[rows.to(group.device)], [OPENINGS[opening].format(training.thing) for opening in openings]


def _loss(training: Training, rows: _Rows) -> torch.Tensor:
    return (_row_losses(training, rows) * rows.weights).sum()


def _row_losses(training: Training, rows: _Rows) -> torch.Tensor:
    """The loss of each row [rows], weighted by its time if asked."""
    loaded, schedule = training.loaded, training.noise
    clean, noise, times = rows.clean, rows.noise, rows.times
    factor = int(loaded.pipe.vae_scale_factor)
    states, extra = training.conditions(rows.prompts, clean.shape[3] * factor, clean.shape[2] * factor)
    noisy = schedule.add_noise(clean, noise, times).to(loaded.dtype)
    guess = loaded.pipe.unet(noisy, times, encoder_hidden_states=states, **extra).sample.float()
    match schedule.config.prediction_type:
        case "epsilon":
            target = noise
        case "v_prediction":
            target = schedule.get_velocity(clean, noise, times)
        case _:
            target = clean
    each: torch.Tensor = (guess - target).square().mean(dim=(1, 2, 3))
    if training.asked.snr_gamma is not None:
        each = each * snr_weights(schedule, times, training.asked.snr_gamma)
    return each


def snr_weights(schedule: Any, times: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return the min-SNR weight of each time [rows] for what the model predicts.

    Source: Hang et al. 2023, arXiv 2303.09556, section 3.4.
    """
    kept = schedule.alphas_cumprod.to(times.device)[times].double()
    snr = kept / (1.0 - kept)
    capped = torch.clamp(snr, max=gamma)
    match schedule.config.prediction_type:
        case "epsilon":
            # At a time of pure noise the ratio is 0 / 0; its limit is 1.
            weights = torch.where(snr > 0.0, capped / snr, torch.ones_like(snr))
        case "v_prediction":
            weights = capped / (snr + 1.0)
        case _:
            weights = capped
    return weights.float()
