"""One call of the stepped network for pictures of one bucket, each with its own time, prompt, adapters and ControlNet pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from executors.batching import beginnings, packing
from executors.batching.controls import ControlNets
from executors.batching.lora import AdapterBank
from executors.batching.trajectory import Trajectory
from executors.methods import sampling
from executors.methods.pipelines import FLOWS, LoadedPipeline


class Network:
    """The network of a loaded model, with all that goes into its calls."""

    def __init__(self, loaded: LoadedPipeline, bank: AdapterBank, controls: ControlNets) -> None:
        self._loaded = loaded
        self._bank = bank
        self._controls = controls

    @torch.no_grad()
    def guesses(self, members: Sequence[Trajectory]) -> list[torch.Tensor]:
        """One call of the network: each guided picture has two rows, the negative one first, as the plain pipeline has them."""
        each = 2 if members[0].guided else 1
        rows: list[torch.Tensor] = []
        states: list[torch.Tensor] = []
        for trajectory in members:
            conditioning = trajectory.conditioning
            assert conditioning is not None
            rows += [trajectory.input()] * each
            states += (
                [conditioning.positive]
                if conditioning.negative is None
                else [conditioning.negative, conditioning.positive]
            )
        times = torch.stack([trajectory.time for trajectory in members]).float().repeat_interleave(each)
        extra: dict[str, Any] = {}
        if members[0].times_condition is not None:
            extra["timestep_cond"] = torch.cat([t.times_condition for t in members if t.times_condition is not None])
        if self._loaded.family == "sdxl":
            extra["added_cond_kwargs"] = self._sizes_and_pooled(members)
        elif self._loaded.family in FLOWS:
            extra["pooled_projections"] = self._pooled(members)
        inputs, times, followed = torch.cat(rows), times.to(self._loaded.device), torch.cat(states)
        if self._loaded.family == "flux":
            return list(torch.split(self._packed(members, inputs, times, followed, extra), each))
        if members[0].request.controls:
            extra |= self._controlled(members, inputs, times, followed, extra)
        if beginnings.takes_parts(self._loaded):
            seen = [part for trajectory in members for part in [trajectory.seen()] * each if part is not None]
            inputs = torch.cat([inputs, torch.cat(seen)], dim=1)
        with self._bank.applied([trajectory.request.adapters for trajectory in members], "steps"):
            guess = self._call(inputs, times, followed, extra)
        return list(torch.split(guess, each))

    def _call(
        self, inputs: torch.Tensor, times: torch.Tensor, states: torch.Tensor, extra: dict[str, Any]
    ) -> torch.Tensor:
        network = self._loaded.denoiser
        if self._loaded.family in FLOWS:
            guess = network(inputs, timestep=times, encoder_hidden_states=states, **extra)
        else:
            guess = network(inputs, times, encoder_hidden_states=states, **extra)
        result: torch.Tensor = guess.sample
        return result

    def _packed(
        self,
        members: Sequence[Trajectory],
        latents: torch.Tensor,
        times: torch.Tensor,
        states: torch.Tensor,
        extra: dict[str, Any],
    ) -> torch.Tensor:
        """Flux: latents go in as tokens with their places, and the guidance is an input."""
        height, width = latents.shape[2:]
        given = {
            "img_ids": packing.places(height, width, latents),
            "txt_ids": states.new_zeros((states.shape[1], 3)),
            **extra,
        }
        guidance = torch.tensor([trajectory.request.guidance for trajectory in members], device=latents.device)
        if self._loaded.denoiser.config.guidance_embeds:
            given["guidance"] = guidance
        # The network multiplies times by a thousand again, in its own precision.
        times, tokens = times.to(latents.dtype) / 1000, packing.pack(latents)
        if members[0].request.controls:
            given |= self._controlled(members, tokens, times, states, {**given, "guidance": guidance})
        with self._bank.applied([trajectory.request.adapters for trajectory in members], "steps"):
            guess = self._call(tokens, times, states, given)
        return packing.unpack(guess, height, width)

    def _controlled(
        self,
        members: Sequence[Trajectory],
        rows: torch.Tensor,
        times: torch.Tensor,
        states: torch.Tensor,
        extra: dict[str, Any],
    ) -> dict[str, Any]:
        """What the ControlNets of a bucket add to the blocks of the network."""
        each = len(rows) // len(members)
        names = [control.name for control in members[0].request.controls]
        numbers = range(len(names))
        pictures = [torch.cat([t.control(number) for t in members for _ in range(each)]) for number in numbers]
        scales = [[t.control_scale(number) for t in members for _ in range(each)] for number in numbers]
        return self._controls.residuals(names, rows, times, states, pictures, scales, extra)

    def _sizes_and_pooled(self, members: Sequence[Trajectory]) -> dict[str, torch.Tensor]:
        """SDXL's further inputs, the rows of each picture together."""
        own = [
            sampling.sdxl_conditions(self._loaded, t.conditioning, 1, t.request.width, t.request.height)
            for t in members
            if t.conditioning is not None
        ]
        return {name: torch.cat([each[name] for each in own]) for name in own[0]}

    @staticmethod
    def _pooled(members: Sequence[Trajectory]) -> torch.Tensor:
        """The pooled text states of a transformer's pictures, the negative one of each first."""
        found = [t.conditioning for t in members if t.conditioning is not None]
        pooled = [part for one in found for part in (one.pooled_negative, one.pooled_positive) if part is not None]
        return torch.cat(pooled)
