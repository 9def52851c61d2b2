"""One step of a DreamBooth training: what is drawn for it, its loss, and the change of the weights."""

from __future__ import annotations

from typing import Any

import torch

from executors.methods.training import Training

OPENINGS = ("a photo of {}", "a picture of {}", "an image of {}", "{}")
MAX_GRADIENT_NORM = 1.0


def take(training: Training) -> float:
    """Take one step: the gradients of `accumulate` batches, clipped, then the optimizer; returns the mean loss."""
    asked = training.asked
    training.optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for part in range(asked.accumulate):
        seed = (asked.seed * 1_000_003 + training.step * asked.accumulate + part) % 2**63
        devices = [training.loaded.device] if training.loaded.device.type == "cuda" else []
        # Whatever a layer may draw by itself (dropout) follows from the step as well, and nobody else's draws are disturbed.
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            with training.precision():
                loss = _loss(training, torch.Generator().manual_seed(seed))
            (loss / asked.accumulate).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    for group in training.optimizer.param_groups:
        group["lr"] = training.rate * (1.0 - training.step / asked.steps)
    torch.nn.utils.clip_grad_norm_(training.trainable.values(), MAX_GRADIENT_NORM)
    training.optimizer.step()
    training.step += 1
    training.losses.append(total / asked.accumulate)
    return training.loss


def _loss(training: Training, generator: torch.Generator) -> torch.Tensor:
    """The denoising loss of subject rows, plus the weighted one of prior rows."""
    asked, known = training.asked, training.prior
    clean, prompts = _subject_rows(training, generator)
    if known is None:
        return _row_losses(training, clean, prompts, generator).mean()
    others = torch.randint(len(known.latents), (asked.batch,), generator=generator)
    prior_prompts = [known.prompts[row] for row in others.tolist()]
    prior_clean = known.latents[others.to(known.latents.device)]
    if prior_clean.shape[1:] == clean.shape[1:]:
        each = _row_losses(training, torch.cat([clean, prior_clean]), prompts + prior_prompts, generator)
        subject, prior = each[: asked.batch], each[asked.batch :]
    else:
        subject = _row_losses(training, clean, prompts, generator)
        prior = _row_losses(training, prior_clean, prior_prompts, generator)
    return subject.mean() + asked.prior_weight * prior.mean()


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


def _row_losses(
    training: Training, clean: torch.Tensor, prompts: list[str], generator: torch.Generator
) -> torch.Tensor:
    """The loss of each row [rows], weighted by its time if asked."""
    loaded, schedule = training.loaded, training.noise
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    times = torch.randint(schedule.config.num_train_timesteps, (len(clean),), generator=generator).to(clean.device)
    factor = int(loaded.pipe.vae_scale_factor)
    states, extra = training.conditions(prompts, clean.shape[3] * factor, clean.shape[2] * factor)
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
