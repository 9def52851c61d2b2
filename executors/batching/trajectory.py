"""One picture on its way through the steps: its latents, its scheduler, its random numbers, and nobody else's."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from executors.batching import beginnings, scheduler_state
from executors.batching.beginnings import Beginning, Painting
from executors.batching.controls import ControlNets
from executors.batching.requests import KeptPicture, PictureRequest
from executors.methods import sampling
from executors.methods.pipelines import LoadedPipeline

_LATENTS, _GENERATOR, _SCHEDULER = "latents", "generator", "scheduler/"


class Trajectory:
    """The state of one request between two steps. A fresh one starts at the seed's noise, another where it was kept."""

    def __init__(
        self,
        loaded: LoadedPipeline,
        request: PictureRequest,
        kept: KeptPicture | None = None,
        controls: ControlNets | None = None,
    ) -> None:
        """`controls` are those that the request may follow. Raises ValueError when what was kept does not fit the model."""
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
        self._times = self._scheduler.timesteps[self._skipped() :]
        self._beginning = Beginning(loaded, request, self._scheduler, self._generator)
        self._painting: Painting | None = None
        self._controls: tuple[torch.Tensor, ...] = ()
        if controls is not None:
            # Before anything else is drawn, as the plain pipelines do.
            rows = 2 if self.guided else 1
            self._controls = tuple(controls.followed(each, rows, self._generator) for each in request.controls)
        self.done = 0
        if kept is None or not kept.tensors:
            self.latents, self._painting = self._beginning.make(self._times[0])
        else:
            self._restore(kept)

    @property
    def total(self) -> int:
        """Evaluations of the network in all: more than the steps for samplers that look twice."""
        return len(self._times)

    @property
    def time(self) -> torch.Tensor:
        """The time of the next step, a single number on the CPU."""
        result: torch.Tensor = self._times[self.done]
        return result

    def input(self) -> torch.Tensor:
        """What the network sees next, [1, channels, height, width]."""
        if not hasattr(self._scheduler, "scale_model_input"):
            return self.latents
        result: torch.Tensor = self._scheduler.scale_model_input(self.latents, self.time)
        return result

    def tensors(self) -> list[torch.Tensor | None]:
        """Everything on the device that the first step uses."""
        one, own = self.conditioning, self._painting
        found: list[torch.Tensor | None] = [self.latents, self.times_condition, *self._controls]
        if one is not None:
            found += [one.positive, one.negative, one.pooled_positive, one.pooled_negative]
        if own is not None:
            found += [own.mask, own.own, own.noise, own.seen]
        return found

    def seen(self) -> torch.Tensor | None:
        """What a network made for inpainting sees besides: the mask and the rest of the picture."""
        painting = self._painting
        return None if painting is None or painting.seen is None else torch.cat([painting.mask, painting.seen], dim=1)

    def control(self, index: int) -> torch.Tensor:
        """What a ControlNet follows, a row of one."""
        return self._controls[index]

    def control_scale(self, index: int) -> float:
        """How much a ControlNet counts in the next step."""
        control = self.request.controls[index]
        left_out = self.done / self.total < control.start or (self.done + 1) / self.total > control.end
        return control.scale * (1.0 - float(left_out))

    def advance(self, guess: torch.Tensor) -> None:
        """Take the network's answer, [2, ...] with the negative one first when guided, else [1, ...], and go one step on."""
        if self.guided:
            without, following = guess.chunk(2)
            guess = without + self.request.guidance * (following - without)
        stepped = self._scheduler.step(guess, self.time, self.latents, **self._options)
        self.latents = stepped.prev_sample.to(self._loaded.dtype)
        self.guess_of_end = getattr(stepped, "pred_original_sample", None)
        self.done += 1
        if self._painting is not None:
            next_time = self.time if self.done < self.total else None
            self.latents = self._painting.put_back(self.latents, self._scheduler, next_time)

    def keep(self) -> KeptPicture:
        """Copy everything that the next steps depend on into host memory."""
        tensors, values = scheduler_state.export(self._scheduler, self._fresh_scheduler())
        kept = {_SCHEDULER + name: tensor for name, tensor in tensors.items()}
        if self._painting is not None:
            kept |= self._painting.tensors()
        kept[_LATENTS] = self.latents.detach().cpu().clone()
        kept[_GENERATOR] = self._generator.get_state()
        return KeptPicture(self.request, self.done, kept, values)

    def _restore(self, kept: KeptPicture) -> None:
        try:
            latents, state = kept.tensors[_LATENTS], kept.tensors[_GENERATOR]
        except KeyError as error:
            raise ValueError(f"kept picture {kept.request.id}: {error} is missing; start it anew") from None
        shape = self._beginning.shape
        if tuple(latents.shape) != shape or not 0 <= kept.done <= self.total:
            raise ValueError(
                f"kept picture {kept.request.id}: step {kept.done} of latents {tuple(latents.shape)} does not fit this "
                f"model's {shape} in {self.total} steps; start it anew"
            )
        own = {name.removeprefix(_SCHEDULER): t for name, t in kept.tensors.items() if name.startswith(_SCHEDULER)}
        scheduler_state.restore(self._scheduler, own, kept.values, self._loaded.device)
        try:
            self._generator.set_state(state)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"kept picture {kept.request.id}: its random state cannot be read: {error}") from None
        self.latents = latents.to(self._loaded.device, self._loaded.dtype, copy=True)
        self._painting = Painting.restored(kept.tensors, self._loaded)
        if (self._painting is None) != (self.request.mask is None):
            raise ValueError(f"kept picture {kept.request.id}: its mask is missing, or is one too many; start it anew")
        self.done = kept.done

    def _skipped(self) -> int:
        """Leave out the steps that a given picture stands for; returns how many evaluations that are."""
        if self.request.image is None:
            return 0
        skipped = beginnings.first_step(self._loaded, self.request) * int(self._scheduler.order)
        if hasattr(self._scheduler, "set_begin_index"):
            self._scheduler.set_begin_index(skipped)
        return skipped

    def _fresh_scheduler(self) -> Any:
        request = self.request
        scheduler = sampling.build_scheduler(self._loaded.pipe, request.scheduler)
        # Times stay on the CPU: a scheduler that looks its step up there makes no GPU wait.
        sampling.set_times(self._loaded, scheduler, request.steps, request.width, request.height, "cpu")
        return scheduler
