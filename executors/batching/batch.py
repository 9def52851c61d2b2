"""The running batch: pictures enter and leave at every step, each at its own step of its own sampler.

A picture does not depend on its company: alone, its numbers are bit for bit those of the plain pipeline; in company they differ
by what a matrix product of another size rounds differently. Everything that makes a picture is one `Trajectory`; only the calls
of the networks are shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from executors.batching import beginnings
from executors.batching.conditions import PromptEncoder
from executors.batching.controls import ControlNets
from executors.batching.lora import AdapterBank
from executors.batching.previews import PreviewMap
from executors.batching.requests import (
    BatchEvent,
    Entered,
    Failed,
    Finished,
    KeptPicture,
    PictureRequest,
    Previewed,
    SetAside,
    Stepped,
)
from executors.batching.trajectory import Trajectory
from executors.memory.calls import CallMemory
from executors.memory.meter import meter_of
from executors.methods import device, sampling
from executors.methods.base import InputRefused
from executors.methods.parameters import MAX_SEED
from executors.methods.pipelines import LoadedPipeline

CAPACITY = 16
"""Pictures in the steps at once."""
DECODED_AT_ONCE = 4
"""Finished pictures that are decoded between two steps at most: the others' steps wait no longer than that."""

_Bucket = tuple[int, int, bool, float, tuple[str, ...]]


class RunningBatch:
    """Makes many pictures with one loaded model. Not for use by several threads; `step` does all the work."""

    def __init__(
        self,
        loaded: LoadedPipeline,
        *,
        capacity: int = CAPACITY,
        decoded_at_once: int = DECODED_AT_ONCE,
        bank: AdapterBank | None = None,
        controls: ControlNets | None = None,
    ) -> None:
        """Raises InputRefused for a model of a family that has no step loop here, ValueError for a capacity below 1."""
        if loaded.family == "other":
            raise InputRefused(
                "model", f"{type(loaded.pipe).__name__} has no step loop here; its requests run one after the other"
            )
        if capacity < 1 or decoded_at_once < 1:
            raise ValueError(f"capacity {capacity}, decoded_at_once {decoded_at_once}: both must be 1 or more")
        self.bank = bank or AdapterBank(loaded)
        self.controls = controls or ControlNets(loaded)
        self._loaded = loaded
        self._capacity = capacity
        self._decoded_at_once = decoded_at_once
        self._encoder = PromptEncoder(loaded, self.bank)
        self._previews: PreviewMap | None = None
        self._waiting: dict[str, KeptPicture] = {}
        self._running: dict[str, Trajectory] = {}
        self._denoised: dict[str, Trajectory] = {}
        self._call_limits: dict[tuple[int, int], int] = {}
        """Pictures in one call of the network by width and height, where memory has run out before."""
        self.memory = loaded.memory or CallMemory(None, meter_of(loaded.device))

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running) + len(self._denoised)

    def __contains__(self, id: str) -> bool:
        return id in self._waiting or id in self._running or id in self._denoised

    @property
    def running(self) -> tuple[str, ...]:
        """The pictures that take part in the next step, unless a more urgent one comes."""
        return tuple(self._running)

    @property
    def waiting(self) -> tuple[str, ...]:
        """The pictures that wait for room."""
        return tuple(self._waiting)

    # --- orders -----------------------------------------------------------------------------------------------------

    def admit(self, request: PictureRequest) -> None:
        """Let a picture enter at the next step; raises InputRefused naming the field."""
        self.resume(KeptPicture(request))

    def pause(self, id: str) -> KeptPicture:
        """Take a picture out between two steps and return what it needs to go on, in host memory; raises KeyError."""
        if id in self._waiting:
            return self._waiting.pop(id)
        trajectory = self._running.pop(id, None) or self._denoised.pop(id, None)
        if trajectory is None:
            raise KeyError(f"picture {id!r} is not in this batch")
        return trajectory.keep()

    def resume(self, kept: KeptPicture) -> None:
        """Let a picture go on where it was kept, also in another batch of the same model; raises InputRefused."""
        self._check(kept.request)
        self._waiting[kept.request.id] = kept

    def cancel(self, id: str) -> bool:
        """Drop a picture: it takes part in no further step and is not decoded; False when it is not here."""
        places: tuple[dict[str, Any], ...] = (self._waiting, self._running, self._denoised)
        return any(place.pop(id, None) is not None for place in places)

    # --- work -------------------------------------------------------------------------------------------------------

    def step(self) -> list[BatchEvent]:
        """Let in whom there is room for, take every running picture one step on, and decode some of the finished ones."""
        events: list[BatchEvent] = []
        self._fill(events)
        self._condition(events)
        buckets: dict[_Bucket, list[Trajectory]] = {}
        for trajectory in self._running.values():
            buckets.setdefault(self._bucket(trajectory), []).append(trajectory)
        for (width, height, guided, scale, _controls), members in buckets.items():
            self._loaded.set_adapter_scale(scale)
            planned = self.memory.decide(width, height, 2 if guided else 1).at_once
            limit = min(planned, self._call_limits.get((width, height), self._capacity))
            for start in range(0, len(members), limit):
                self._advance(members[start : start + limit], events)
        self._decode(events)
        return events

    def _fill(self, events: list[BatchEvent]) -> None:
        """Let waiting pictures in, the most urgent first; where all places are taken a less urgent one goes back to wait."""
        arrival = {id: number for number, id in enumerate(self._waiting)}
        order = sorted(
            self._waiting.values(),
            key=lambda kept: (-kept.request.priority, not kept.done, kept.request.place, arrival[kept.request.id]),
        )
        for kept in order:
            request = kept.request
            if len(self._running) >= self._capacity:
                # Of the least urgent the one that is least far: it has the most left to do anyway.
                least = min(self._running.values(), key=lambda t: (t.request.priority, t.done))
                if least.request.priority >= request.priority:
                    return
                self._waiting[least.request.id] = self.pause(least.request.id)
                events.append(SetAside(least.request.id))
            del self._waiting[request.id]
            try:
                trajectory = Trajectory(self._loaded, request, kept)
            except Exception as error:
                events.append(Failed(request.id, error))
                continue
            events.append(Entered(request.id))
            place = self._running if trajectory.done < trajectory.total else self._denoised
            place[request.id] = trajectory

    def _condition(self, events: list[BatchEvent]) -> None:
        """Encode the prompts of those that have just entered; when a batch of them fails, each is tried alone."""
        entered = [trajectory for trajectory in self._running.values() if trajectory.conditioning is None]
        if not entered:
            return
        try:
            self._encode(entered)
        except Exception as error:
            self._encode_alone(entered, error, events)
        finally:
            self._loaded.residence.rest()

    def _encode(self, entered: Sequence[Trajectory]) -> None:
        found = self._encoder.encode([trajectory.request for trajectory in entered])
        for trajectory, conditioning in zip(entered, found, strict=True):
            self._give(trajectory, conditioning)

    def _encode_alone(self, entered: Sequence[Trajectory], error: Exception, events: list[BatchEvent]) -> None:
        """Try each alone: those that failed in company, and one that found no memory, since there may be more by now."""
        if len(entered) == 1 and not device.is_out_of_memory(error):
            self._fail(entered[0], error, events)
            return
        device.forget_unused(self._loaded.device)
        for trajectory in entered:
            try:
                self._encode([trajectory])
            except Exception as own:
                self._fail(trajectory, own, events)

    def _give(self, trajectory: Trajectory, conditioning: sampling.Conditioning) -> None:
        trajectory.conditioning = conditioning
        rows = 2 if trajectory.guided else 1
        trajectory.times_condition = sampling.guidance_embedding(self._loaded, trajectory.request.guidance, rows)

    def _advance(self, members: Sequence[Trajectory], events: list[BatchEvent]) -> None:
        """Take pictures of one bucket a step on; what fails in company is tried in halves, so that only the culprit fails."""
        try:
            guesses = self._measured(members)
        except Exception as error:
            if len(members) == 1:
                self._advance_alone(members[0], error, events)
                return
            half = (len(members) + 1) // 2
            if device.is_out_of_memory(error):
                size = (members[0].request.width, members[0].request.height)
                self._call_limits[size] = min(self._call_limits.get(size, half), half)
                device.forget_unused(self._loaded.device)
            self._advance(members[:half], events)
            self._advance(members[half:], events)
            return
        for trajectory, guess in zip(members, guesses, strict=True):
            self._take_or_fail(trajectory, guess, events)

    def _advance_alone(self, trajectory: Trajectory, error: Exception, events: list[BatchEvent]) -> None:
        """Try a picture that found no memory once more, with everything given back that is not in use."""
        if not device.is_out_of_memory(error):
            self._fail(trajectory, error, events)
            return
        device.forget_unused(self._loaded.device)
        try:
            [guess] = self._measured([trajectory])
        except Exception as again:
            self._fail(trajectory, again, events)
            return
        self._take_or_fail(trajectory, guess, events)

    def _measured(self, members: Sequence[Trajectory]) -> list[torch.Tensor]:
        request = members[0].request
        rows = 2 if members[0].guided else 1
        with self.memory.call("step", request.width, request.height, rows, [t.request.id for t in members]):
            return self._predict(members)

    def _take_or_fail(self, trajectory: Trajectory, guess: torch.Tensor, events: list[BatchEvent]) -> None:
        try:
            self._take(trajectory, guess, events)
        except Exception as error:
            self._fail(trajectory, error, events)

    def _take(self, trajectory: Trajectory, guess: torch.Tensor, events: list[BatchEvent]) -> None:
        trajectory.advance(guess)
        request = trajectory.request
        events.append(Stepped(request.id, trajectory.done, trajectory.total))
        if trajectory.done == trajectory.total:
            self._denoised[request.id] = self._running.pop(request.id)
        elif request.preview_every and trajectory.done % request.preview_every == 0:
            self._previews = self._previews or PreviewMap(self._loaded)
            shown = trajectory.latents if trajectory.guess_of_end is None else trajectory.guess_of_end
            events.append(Previewed(request.id, trajectory.done, self._previews.show(shown)))

    @torch.no_grad()
    def _predict(self, members: Sequence[Trajectory]) -> list[torch.Tensor]:
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
        elif self._loaded.family == "sd3":
            extra["pooled_projections"] = self._pooled(members)
        inputs, times, followed = torch.cat(rows), times.to(self._loaded.device), torch.cat(states)
        if members[0].request.controls:
            extra |= self._controlled(members, each, inputs, times, followed, extra)
        if beginnings.takes_parts(self._loaded):
            seen = [part for trajectory in members for part in [trajectory.seen()] * each if part is not None]
            inputs = torch.cat([inputs, torch.cat(seen)], dim=1)
        with self.bank.applied([trajectory.request.adapters for trajectory in members]):
            guess = self._call(inputs, times, followed, extra)
        return list(torch.split(guess, each))

    def _call(
        self, inputs: torch.Tensor, times: torch.Tensor, states: torch.Tensor, extra: dict[str, Any]
    ) -> torch.Tensor:
        network = self._loaded.denoiser
        if self._loaded.family == "sd3":
            guess = network(inputs, timestep=times, encoder_hidden_states=states, **extra)
        else:
            guess = network(inputs, times, encoder_hidden_states=states, **extra)
        result: torch.Tensor = guess.sample
        return result

    def _controlled(
        self,
        members: Sequence[Trajectory],
        each: int,
        rows: torch.Tensor,
        times: torch.Tensor,
        states: torch.Tensor,
        extra: dict[str, Any],
    ) -> dict[str, Any]:
        """What the ControlNets of a bucket add to the blocks of the UNet."""
        names = [control.name for control in members[0].request.controls]
        numbers = range(len(names))
        pictures = [torch.cat([t.control(number) for t in members for _ in range(each)]) for number in numbers]
        scales = [[t.control_scale(number) for t in members for _ in range(each)] for number in numbers]
        known = {name: extra[name] for name in ("added_cond_kwargs",) if name in extra}
        return self.controls.residuals(names, rows, times, states, pictures, scales, **known)

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

    def _decode(self, events: list[BatchEvent]) -> None:
        """Decode the oldest finished pictures, those of one size together."""
        if not self._denoised:
            return
        first = next(iter(self._denoised.values()))
        planned = self.memory.decide(first.request.width, first.request.height, 1)
        alike = [t for t in self._denoised.values() if t.latents.shape == first.latents.shape]
        alike = alike[: min(self._decoded_at_once, planned.decoded_at_once)]
        try:
            made: list[Any] = self._decode_together(alike, planned.tiled)
        except Exception as error:
            if len(alike) == 1 and not device.is_out_of_memory(error):
                made = [error]
            else:
                made = [self._decode_alone(trajectory) for trajectory in alike]
        self._loaded.residence.rest()
        for trajectory, picture in zip(alike, made, strict=True):
            id = trajectory.request.id
            del self._denoised[id]
            share = self.memory.take_share(id)
            events.append(Failed(id, picture) if isinstance(picture, Exception) else Finished(id, picture, share))

    def _decode_together(self, alike: Sequence[Trajectory], tiled: bool) -> list[Any]:
        request = alike[0].request
        with self.memory.call("decode", request.width, request.height, 1, [t.request.id for t in alike], tiled=tiled):
            return sampling.decode(self._loaded, torch.cat([t.latents for t in alike]), tiled=tiled)

    def _decode_alone(self, trajectory: Trajectory) -> Any:
        """Decode one picture after a failure; where memory runs out again, in tiles."""
        device.forget_unused(self._loaded.device)
        try:
            return self._decode_together([trajectory], False)[0]
        except Exception as error:
            if not device.is_out_of_memory(error) or not hasattr(self._loaded.pipe.vae, "enable_tiling"):
                return error
        device.forget_unused(self._loaded.device)
        try:
            return self._decode_together([trajectory], True)[0]
        except Exception as error:
            return error

    def _fail(self, trajectory: Trajectory, error: Exception, events: list[BatchEvent]) -> None:
        self.cancel(trajectory.request.id)
        self.memory.take_share(trajectory.request.id)
        events.append(Failed(trajectory.request.id, error))

    @staticmethod
    def _bucket(trajectory: Trajectory) -> _Bucket:
        request = trajectory.request
        controls = tuple(control.name for control in request.controls)
        return (request.width, request.height, trajectory.guided, request.adapter_scale, controls)

    def _check(self, request: PictureRequest) -> None:
        if request.id in self:
            raise InputRefused("id", f"{request.id!r} is in the batch already")
        if not request.id:
            raise InputRefused("id", "must not be empty")
        if request.steps < 1:
            raise InputRefused("steps", f"must be 1 or more, not {request.steps}")
        if not 0 <= request.seed <= MAX_SEED * 2:
            raise InputRefused("seed", f"must be 0 or more, not {request.seed}")
        if request.scheduler is not None and request.scheduler not in sampling.SCHEDULERS:
            raise InputRefused(
                "scheduler", f"{request.scheduler!r} is unknown; choose from {', '.join(sampling.SCHEDULERS)}"
            )
        if request.scheduler is not None and request.scheduler not in sampling.offered(self._loaded.pipe):
            raise InputRefused("scheduler", f"{self._loaded.model.id} keeps its own sampler; leave scheduler out")
        grain = self._loaded.size_grain
        for name, value in (("width", request.width), ("height", request.height)):
            if value < grain or value % grain:
                raise InputRefused(name, f"must be a multiple of {grain} for {self._loaded.model.id}, not {value}")
        beginnings.check(self._loaded, request)
        self._check_controls(request)
        for name, _weight in request.adapters:
            if name not in self.bank:
                raise InputRefused("adapters", f"{name!r} is not loaded here; load it before the request enters")

    def _check_controls(self, request: PictureRequest) -> None:
        names = [control.name for control in request.controls]
        if names != sorted(set(names)):
            raise InputRefused("control", "must name different ControlNets, in the order of their names")
        if names and beginnings.takes_parts(self._loaded):
            raise InputRefused(
                "control", f"{self._loaded.model.id} was made for inpainting and takes no ControlNet here"
            )
        for control in request.controls:
            if control.name not in self.controls:
                raise InputRefused("control", f"{control.name!r} is not loaded here; load it before the request enters")
            if control.picture.size != (request.width, request.height):
                wide, high = control.picture.size
                raise InputRefused(
                    "control", f"is {wide}x{high}, the picture to make is {request.width}x{request.height}"
                )
