"""The running batch: pictures enter and leave at every step, each at its own step of its own sampler.

A picture does not depend on its company: alone, its numbers are bit for bit those of the plain pipeline; in company they differ
by what a matrix product of another size rounds differently. Everything that makes a picture is one `Trajectory`; only the calls
of the networks are shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from executors.batching import admission
from executors.batching.aside import Aside
from executors.batching.conditions import PromptEncoder
from executors.batching.controls import ControlNets
from executors.batching.lora import AdapterBank
from executors.batching.network import Network
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
from executors.methods.pipelines import LoadedPipeline

CAPACITY = 16
"""Pictures in the steps at once."""
DECODED_AT_ONCE = 4
"""Finished pictures that are decoded between two steps at most: the others' steps wait no longer than that."""
_IDLE_WAIT_S = 0.02
"""How long a step without pictures waits for what is made aside: who comes meanwhile waits no longer."""

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
        aside: Aside | None = None,
    ) -> None:
        """With `aside`, pictures are begun and decoded by its threads while the steps go on.

        Raises InputRefused for a model of a family that has no step loop here, ValueError for a capacity below 1.
        """
        if loaded.family == "other":
            raise InputRefused(
                "model", f"{type(loaded.pipe).__name__} has no step loop here; its requests run one after the other"
            )
        if capacity < 1 or decoded_at_once < 1:
            raise ValueError(f"capacity {capacity}, decoded_at_once {decoded_at_once}: both must be 1 or more")
        self.bank = bank or AdapterBank(loaded)
        self.controls = controls or ControlNets(loaded)
        self._network = Network(loaded, self.bank, self.controls)
        self._loaded = loaded
        self._capacity = capacity
        self._decoded_at_once = decoded_at_once
        self._encoder = PromptEncoder(loaded, self.bank)
        self._previews: PreviewMap | None = None
        # Parts that come to the device only while they are called cannot be called by two threads.
        self._aside = None if loaded.residence.hooks else aside
        # Nor can an adapter in the weights be made weaker for a prompt while a step needs it stronger.
        self._begins_aside = self._aside is not None and loaded.adapter is None and not loaded.foreign_adapter
        self._begun: dict[str, Trajectory] = {}
        """Waiting pictures that could take part at once."""
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
        self._begun.pop(id, None)
        if id in self._waiting:
            return self._waiting.pop(id)
        trajectory = self._running.pop(id, None) or self._denoised.pop(id, None)
        if trajectory is None:
            raise KeyError(f"picture {id!r} is not in this batch")
        return trajectory.keep()

    def resume(self, kept: KeptPicture) -> None:
        """Let a picture go on where it was kept, also in another batch of the same model; raises InputRefused."""
        if kept.request.id in self:
            raise InputRefused("id", f"{kept.request.id!r} is in the batch already")
        admission.check(kept.request, self._loaded, self.bank, self.controls)
        self._waiting[kept.request.id] = kept

    def cancel(self, id: str) -> bool:
        """Drop a picture: it takes part in no further step and is not decoded; False when it is not here."""
        self._begun.pop(id, None)
        places: tuple[dict[str, Any], ...] = (self._waiting, self._running, self._denoised)
        return any(place.pop(id, None) is not None for place in places)

    # --- work -------------------------------------------------------------------------------------------------------

    def step(self) -> list[BatchEvent]:
        """Let in whom there is room for, take every running picture one step on, and decode some of the finished ones."""
        events: list[BatchEvent] = []
        self._take_what_was_begun(events)
        self._fill(events)
        self._condition(events)
        self._begin_aside()
        buckets: dict[_Bucket, list[Trajectory]] = {}
        for trajectory in self._running.values():
            buckets.setdefault(self._bucket(trajectory), []).append(trajectory)
        for (width, height, guided, scale, _controls), members in buckets.items():
            self._loaded.set_adapter_scale(scale)
            planned = self.memory.decide(width, height, 2 if guided else 1).at_once
            limit = min(planned, self._call_limits.get((width, height), self._capacity))
            for start in range(0, len(members), limit):
                self._advance(members[start : start + limit], events)
        if self._aside is None:
            self._decode(events)
        else:
            self._decode_aside(self._aside, events, idle=not buckets)
        return events

    def _fill(self, events: list[BatchEvent]) -> None:
        """Let waiting pictures in, the most urgent first; where all places are taken a less urgent one goes back to wait."""
        nobody = not self._running
        highest = max((t.request.priority for t in self._running.values()), default=0)
        for kept in self._in_order():
            request = kept.request
            trajectory = self._begun.get(request.id)
            if trajectory is None and self._begins_aside and not nobody and request.priority <= highest:
                continue  # It is begun aside first: no step waits for it, and what is urgent waits for no step.
            if len(self._running) >= self._capacity:
                # Of the least urgent the one that is least far: it has the most left to do anyway.
                least = min(self._running.values(), key=lambda t: (t.request.priority, t.done))
                if least.request.priority >= request.priority:
                    return
                self._waiting[least.request.id] = self.pause(least.request.id)
                events.append(SetAside(least.request.id))
            del self._waiting[request.id]
            self._begun.pop(request.id, None)
            try:
                trajectory = trajectory or Trajectory(self._loaded, request, kept, self.controls)
            except Exception as error:
                events.append(Failed(request.id, error))
                continue
            events.append(Entered(request.id))
            place = self._running if trajectory.done < trajectory.total else self._denoised
            place[request.id] = trajectory

    def _in_order(self) -> list[KeptPicture]:
        """The waiting pictures as they may enter: the most urgent first, then those that have begun, then as they came."""
        arrival = {id: number for number, id in enumerate(self._waiting)}
        return sorted(
            self._waiting.values(),
            key=lambda kept: (-kept.request.priority, not kept.done, kept.request.place, arrival[kept.request.id]),
        )

    def _begin_aside(self) -> None:
        """Have those that enter next begun while the step goes on: their noise or picture, and their prompt."""
        if not self._begins_aside or self._aside is None or self._aside.busy("begin"):
            return
        following = [kept for kept in self._in_order()[: self._capacity] if kept.request.id not in self._begun]
        if following:
            self._aside.start("begin", lambda: [self._begin(kept) for kept in self._encoded_ahead(following)])

    def _encoded_ahead(self, following: list[KeptPicture]) -> list[KeptPicture]:
        """Encode prompts together, so that each finds its own remembered; one that fails is told when it is begun."""
        try:
            self._encoder.encode([kept.request for kept in following])
        except Exception:
            device.forget_unused(self._loaded.device)
        return following

    def _begin(self, kept: KeptPicture) -> tuple[KeptPicture, Trajectory | Exception]:
        try:
            trajectory = Trajectory(self._loaded, kept.request, kept, self.controls)
            self._encode([trajectory])
            if kept.request.preview_every:
                self._preview_map()
        except Exception as error:
            return kept, error
        return kept, trajectory

    def _take_what_was_begun(self, events: list[BatchEvent]) -> None:
        begun: list[tuple[KeptPicture, Trajectory | Exception]] = []
        if self._aside is not None:
            begun = self._aside.take("begin") or []
        for kept, made in begun:
            id = kept.request.id
            if self._waiting.get(id) is not kept:
                continue  # It was cancelled or taken out meanwhile, or has entered by itself.
            if isinstance(made, Exception):
                del self._waiting[id]
                events.append(Failed(id, made))
            else:
                assert self._aside is not None
                self._aside.hand_over(made.tensors())
                self._begun[id] = made

    def _condition(self, events: list[BatchEvent]) -> None:
        """Encode the prompts of those that have just entered; when a batch of them fails, each is tried alone."""
        entered = [trajectory for trajectory in self._running.values() if trajectory.conditioning is None]
        if not entered:
            return
        try:
            self._encode(entered)
        except Exception as error:
            self._encode_alone(entered, error, events)
        else:
            if self._aside is not None:  # What is remembered of a prompt may have been made there.
                for trajectory in entered:
                    self._aside.hand_over(trajectory.tensors())
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
            return self._network.guesses(members)

    def _preview_map(self) -> PreviewMap:
        if self._previews is None:
            self._previews = PreviewMap(self._loaded)
        return self._previews

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
            shown = trajectory.latents if trajectory.guess_of_end is None else trajectory.guess_of_end
            events.append(Previewed(request.id, trajectory.done, self._preview_map().show(shown)))

    def _decode(self, events: list[BatchEvent]) -> None:
        """Decode the oldest finished pictures, those of one size together."""
        if not self._denoised:
            return
        for trajectory, picture in self._decoded(*self._next_to_decode()):
            self._hand_out(trajectory, picture, events)
        self._loaded.residence.rest()

    def _next_to_decode(self) -> tuple[list[Trajectory], bool]:
        """The oldest finished pictures of one size, as many as may be decoded together, and whether in tiles."""
        first = next(iter(self._denoised.values()))
        planned = self.memory.decide(first.request.width, first.request.height, 1)
        alike = [t for t in self._denoised.values() if t.latents.shape == first.latents.shape]
        return alike[: min(self._decoded_at_once, planned.decoded_at_once)], planned.tiled

    def _decoded(self, alike: list[Trajectory], tiled: bool, measured: bool = True) -> list[tuple[Trajectory, Any]]:
        """Decode pictures together, or each alone where that fails; an error stands in the place of its picture."""
        try:
            made: list[Any] = self._decode_together(alike, tiled, measured)
        except Exception as error:
            if len(alike) == 1 and not device.is_out_of_memory(error):
                made = [error]
            else:
                made = [self._decode_alone(trajectory) for trajectory in alike]
        return list(zip(alike, made, strict=True))

    def _hand_out(self, trajectory: Trajectory, picture: Any, events: list[BatchEvent]) -> None:
        id = trajectory.request.id
        del self._denoised[id]
        share = self.memory.take_share(id)
        events.append(Failed(id, picture) if isinstance(picture, Exception) else Finished(id, picture, share))

    def _decode_aside(self, aside: Aside, events: list[BatchEvent], idle: bool) -> None:
        """Take what was decoded while the step went on and have the next ones decoded; wait a little when nobody steps."""
        if idle:
            aside.wait(_IDLE_WAIT_S)
        done: list[tuple[Trajectory, Any]] = aside.take("decode") or []
        for trajectory, picture in done:
            if self._denoised.get(trajectory.request.id) is trajectory:
                self._hand_out(trajectory, picture, events)
        if aside.busy("decode") or not self._denoised:
            return
        alike, tiled = self._next_to_decode()
        measured = idle and not aside.busy("begin")
        aside.start("decode", lambda: self._decoded(alike, tiled, measured))
        if idle and not self._waiting:
            aside.wait(_IDLE_WAIT_S)

    def _decode_together(self, alike: Sequence[Trajectory], tiled: bool, measured: bool = True) -> list[Any]:
        request = alike[0].request
        if not measured:  # What the steps take at the same time would be counted too.
            return sampling.decode(self._loaded, torch.cat([t.latents for t in alike]), tiled=tiled)
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
