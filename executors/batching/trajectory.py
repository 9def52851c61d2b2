"""One picture on its way through the steps: its latents, its scheduler, its random numbers, and nobody else's."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from executors.batching import scheduler_state
from executors.batching.requests import KeptPicture, PictureRequest
from executors.methods import sampling
from executors.methods.pipelines import LoadedPipeline

_LATENTS, _GENERATOR, _SCHEDULER = "latents", "generator", "scheduler/"


class Trajectory:
    """The state of one request between two steps. A fresh one starts at the seed's noise, another where it was kept."""

    def __init__(self, loaded: LoadedPipeline, request: PictureRequest, kept: KeptPicture | None = None) -> None:
        """Raises ValueError when what was kept does not fit the model."""
        self.request = request
        self.guided = sampling.is_guided(loaded, request.guidance)
        self.conditioning: sampling.Conditioning | None = None
        self.times_condition: torch.Tensor | None = None
        self.guess_of_end: torch.Tensor | None = None
        """The sampler's own idea of the finished latents after the last step, where it has one; previews show it."""
        self._loaded = loaded
        self._scheduler = self._fresh_scheduler()
        self._generator = torch.Generator("cpu").manual_seed(request.seed)
        accepted = inspect.signature(self._scheduler.step).parameters
        self._options = {"generator": [self._generator]} if "generator" in accepted else {}
        self.done = 0
        if kept is None or not kept.tensors:
            noise = torch.randn(self._shape(), generator=self._generator)
            self.latents = noise.to(loaded.device, loaded.dtype) * self._scheduler.init_noise_sigma
        else:
            self._restore(kept)

    @property
    def total(self) -> int:
        """Evaluations of the network in all: more than the steps for samplers that look twice."""
        return len(self._scheduler.timesteps)

    @property
    def time(self) -> torch.Tensor:
        """The time of the next step, a single number on the CPU."""
        result: torch.Tensor = self._scheduler.timesteps[self.done]
        return result

    def input(self) -> torch.Tensor:
        """What the network sees next, [1, channels, height, width]."""
        result: torch.Tensor = self._scheduler.scale_model_input(self.latents, self.time)
        return result

    def advance(self, guess: torch.Tensor) -> None:
        """Take the network's answer, [2, ...] with the negative one first when guided, else [1, ...], and go one step on."""
        if self.guided:
            without, following = guess.chunk(2)
            guess = without + self.request.guidance * (following - without)
        stepped = self._scheduler.step(guess, self.time, self.latents, **self._options)
        self.latents = stepped.prev_sample.to(self._loaded.dtype)
        self.guess_of_end = getattr(stepped, "pred_original_sample", None)
        self.done += 1

    def keep(self) -> KeptPicture:
        """Copy everything that the next steps depend on into host memory."""
        tensors, values = scheduler_state.export(self._scheduler, self._fresh_scheduler())
        kept = {_SCHEDULER + name: tensor for name, tensor in tensors.items()}
        kept[_LATENTS] = self.latents.detach().cpu().clone()
        kept[_GENERATOR] = self._generator.get_state()
        return KeptPicture(self.request, self.done, kept, values)

    def _restore(self, kept: KeptPicture) -> None:
        try:
            latents, state = kept.tensors[_LATENTS], kept.tensors[_GENERATOR]
        except KeyError as error:
            raise ValueError(f"kept picture {kept.request.id}: {error} is missing; start it anew") from None
        if tuple(latents.shape) != self._shape() or not 0 <= kept.done <= self.total:
            raise ValueError(
                f"kept picture {kept.request.id}: step {kept.done} of latents {tuple(latents.shape)} does not fit this "
                f"model's {self._shape()} in {self.total} steps; start it anew"
            )
        own = {name.removeprefix(_SCHEDULER): t for name, t in kept.tensors.items() if name.startswith(_SCHEDULER)}
        scheduler_state.restore(self._scheduler, own, kept.values, self._loaded.device)
        try:
            self._generator.set_state(state)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"kept picture {kept.request.id}: its random state cannot be read: {error}") from None
        self.latents = latents.to(self._loaded.device, self._loaded.dtype, copy=True)
        self.done = kept.done

    def _fresh_scheduler(self) -> Any:
        scheduler = sampling.build_scheduler(self._loaded.pipe, self.request.scheduler)
        # Times stay on the CPU: a scheduler that looks its step up there makes no GPU wait.
        scheduler.set_timesteps(self.request.steps, device="cpu")
        return scheduler

    def _shape(self) -> tuple[int, int, int, int]:
        pipe = self._loaded.pipe
        factor = int(pipe.vae_scale_factor)
        return (1, int(pipe.unet.config.in_channels), self.request.height // factor, self.request.width // factor)
