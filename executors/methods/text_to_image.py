"""Pictures from a text, with any diffusers pipeline that lies in a local directory.

Stable Diffusion, SDXL, SD3 and Flux run in our own step loop; every other pipeline runs its own call, watched step by step.
In a Pod of several slots the runs share one running batch (`executors.batching`), in which every picture is at its own step.
Picture k of a job is made from seed + k, whatever the batch, so that it can be made again alone.
"""

from __future__ import annotations

import inspect
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import BaseModel

from executors.batching import kept_files
from executors.batching.aside import Aside
from executors.batching.batch import RunningBatch
from executors.batching.company import StepShare
from executors.batching.controls import ControlNets
from executors.batching.requests import AdapterWeights, KeptPicture, PictureRequest
from executors.batching.shared import SharedBatch, Stopped
from executors.batching.shelf import AdapterShelf, usual_budget, usual_host_budget
from executors.methods import device, inputs, pictures, pipelines, sampling
from executors.methods.base import (
    Cancelled,
    InputRefused,
    MethodContext,
    MethodResult,
    ModelMissing,
    ModelRef,
    ResultFile,
)
from executors.methods.inputs import Inputs
from executors.methods.parameters import TextToImageParameters, picture_fields

USUAL_GUIDANCE = 7.5
_EMBEDDED_GUIDANCE = 3.5
"""Usual for Flux, whose networks take it as an input."""
MAX_BATCH = 16


@dataclass(frozen=True, slots=True)
class _Job:
    """Parameters with everything that was left open filled in."""

    asked: TextToImageParameters
    seed: int
    guidance: float
    inputs: Inputs


class TextToImage:
    """Holds one model and makes pictures with it; a `SharedMethod`."""

    def __init__(self) -> None:
        self._loaded: pipelines.LoadedPipeline | None = None
        self._batch = MAX_BATCH
        self._shared: SharedBatch | None = None
        self._shelf: AdapterShelf | None = None
        self._controls: ControlNets
        self._aside: Aside | None = None
        self._served = False
        """Whether another thread takes the steps of all runs."""

    def load(self, model: ModelRef | None, device: str) -> None:
        """Load the pipeline and its adapter; raises ModelMissing."""
        if model is None:
            raise ModelMissing("model: text_to_image needs one; name a base model or a trained one")
        self._loaded = pipelines.load(model, device)

    def run(self, parameters: BaseModel, context: MethodContext) -> MethodResult:
        """Make the pictures and write them as PNG; nothing is written when stopped."""
        assert isinstance(parameters, TextToImageParameters)
        loaded = self._require()
        if loaded.family != "other":
            return self._run_batched(parameters, loaded, context)
        job = _complete(parameters, loaded, context)
        device.start_peak(loaded.device)
        loaded.set_adapter_scale(parameters.adapter_scale)
        made = self._make(job, loaded, context)
        if context.should_stop():
            raise Cancelled
        files, facts = _save(made, job, loaded, context)
        return MethodResult(files, facts, device.peak_bytes(loaded.device))

    @property
    def paced(self) -> bool:
        """Whether every step is heard of: a pipeline that calls nobody between two steps keeps its pace to itself."""
        if self._loaded is None or self._loaded.family != "other":
            return True
        return "callback_on_step_end" in inspect.signature(type(self._loaded.pipe).__call__).parameters

    def close(self) -> None:
        """Give the model's memory back."""
        if self._loaded is not None:
            self._loaded.release()
            self._loaded = None

    def share(self, slots: int) -> bool:
        """Let up to `slots` threads call `run` at once; False for models whose pipelines have no step loop here."""
        loaded = self._require()
        if loaded.family == "other":
            return False
        device.start_peak(loaded.device)
        self._aside = Aside(loaded.device)
        self._open(loaded, max(MAX_BATCH, slots), self._aside)
        self._served = True
        return True

    def _open(self, loaded: pipelines.LoadedPipeline, capacity: int, aside: Aside | None = None) -> SharedBatch:
        self._controls = ControlNets(loaded)
        batch = RunningBatch(loaded, capacity=capacity, controls=self._controls, aside=aside)
        self._shelf = AdapterShelf(batch.bank, usual_budget(loaded.device), usual_host_budget(loaded.device))
        self._shared = SharedBatch(batch)
        return self._shared

    def serve(self) -> None:
        """Take the steps of all runs, in the thread that calls, until `leave`."""
        assert self._shared is not None
        self._shared.serve()

    def leave(self) -> None:
        """Let `serve` return."""
        if self._shared is not None:
            self._shared.close()
        if self._aside is not None:
            self._aside.close()

    def _run_batched(
        self, asked: TextToImageParameters, loaded: pipelines.LoadedPipeline, context: MethodContext
    ) -> MethodResult:
        """Bring the pictures into the batch and wait for them; a stop leaves what the next attempt goes on from."""
        shared = self._shared or self._open(loaded, MAX_BATCH)
        assert self._shelf is not None
        if not self._served:
            device.start_peak(loaded.device)
        job = _complete(asked, loaded, context)
        for control in job.inputs.controls:
            self._controls.load(control.name)
        fused = loaded.model.adapter_dir is not None
        todo: Mapping[int, PictureRequest | KeptPicture] = _requests(job, fused)
        before: Mapping[int, Any] = {}
        if context.checkpoint is not None:
            try:
                job, kept = _resumed(job, context.checkpoint, fused)
                todo, before = kept.kept, kept.made
            except ValueError as error:
                print(f"{error}; starting from the beginning", file=sys.stderr, flush=True)
        share = StepShare()
        with self._shelf.holding(context.adapters) as adapters:
            todo = {place: _in_company(each, adapters, context.priority) for place, each in todo.items()}
            try:
                made = shared.make(
                    todo,
                    before,
                    context.progress,
                    context.should_stop,
                    preview=context.preview,
                    share=share,
                    served=self._served,
                )
            except Stopped as stopped:
                raise Cancelled(_kept(job.seed, stopped, context.output_dir)) from None
        if context.should_stop():
            raise Cancelled
        files, facts = _save([made[place] for place in sorted(made)], job, loaded, context)
        company = (round(share.company_us), share.company_permille)
        return MethodResult(files, facts, shared.peak_bytes(share), *company)

    def _require(self) -> pipelines.LoadedPipeline:
        if self._loaded is None:
            raise RuntimeError("text_to_image runs before load; call load first")
        return self._loaded

    def _make(self, job: _Job, loaded: pipelines.LoadedPipeline, context: MethodContext) -> list[Image.Image]:
        """Make all pictures in batches; when memory runs out the batch is halved once for this job and what follows."""
        made: list[Image.Image] = []
        halved = False
        while len(made) < job.asked.count:
            batch = min(self._batch, job.asked.count - len(made))
            seeds = [job.seed + len(made) + index for index in range(batch)]
            try:
                made += self._batch_of(job, loaded, context, seeds, len(made))
            except Exception as error:
                if not device.is_out_of_memory(error) or halved or batch == 1:
                    raise
                halved = True
                self._batch = batch // 2
            if halved:
                device.forget_unused(loaded.device)
        return made

    def _batch_of(
        self, job: _Job, loaded: pipelines.LoadedPipeline, context: MethodContext, seeds: list[int], before: int
    ) -> list[Image.Image]:
        """Make one picture per seed; progress counts the steps of all pictures of the job."""
        asked = job.asked

        def before_step(done: int, total: int) -> None:
            if done:
                context.progress(
                    before * total + done * len(seeds), total * asked.count, f"{before + len(seeds)}/{asked.count}"
                )
            if context.should_stop():
                raise Cancelled

        return _call_pipeline(job, loaded, seeds, before_step)


def _complete(asked: TextToImageParameters, loaded: pipelines.LoadedPipeline, context: MethodContext) -> _Job:
    """Fill in what was left open, and read the pictures that the job begins with."""
    seed = asked.seed if asked.seed is not None else secrets.randbelow(2**32)
    usual = _EMBEDDED_GUIDANCE if loaded.family == "flux" else USUAL_GUIDANCE
    guidance = asked.guidance if asked.guidance is not None else float(loaded.defaults.get("guidance", usual))
    if loaded.family == "other":
        unknown = [name for name in ("image", "mask", "control") if getattr(asked, name)]
        for name in [*unknown, *(["adapters"] if context.adapters else [])]:
            raise InputRefused(
                name, f"{type(loaded.pipe).__name__} runs its own call here, which takes text only; leave it out"
            )
        return _Job(asked, seed, guidance, Inputs(asked.width or 0, asked.height or 0))
    found = inputs.read(asked, context.fetch, loaded.native_size, loaded.size_grain)
    return _Job(asked, seed, guidance, found)


def _requests(job: _Job, fused: bool) -> dict[int, PictureRequest]:
    """The pictures of a job by place; the scale of an adapter that is not part of the loaded model is its weight in the bank."""
    asked = job.asked
    return {
        place: PictureRequest(
            id=str(place),
            prompt=asked.prompt,
            negative_prompt=asked.negative_prompt,
            seed=job.seed + place,
            steps=asked.steps,
            guidance=job.guidance,
            width=job.inputs.width,
            height=job.inputs.height,
            scheduler=asked.scheduler,
            adapter_scale=asked.adapter_scale if fused else 1.0,
            place=place,
            preview_every=asked.preview_every,
            image=job.inputs.image,
            strength=job.inputs.strength,
            mask=job.inputs.mask,
            controls=job.inputs.controls,
        )
        for place in range(asked.count)
    }


def _in_company(
    given: PictureRequest | KeptPicture, adapters: AdapterWeights, priority: int
) -> PictureRequest | KeptPicture:
    """Return a picture with what its run's terms say: the bank's names of its adapters, and how urgent it is."""
    request = given.request if isinstance(given, KeptPicture) else given
    request = replace(request, adapters=adapters, priority=priority)
    return replace(given, request=request) if isinstance(given, KeptPicture) else request


def _resumed(job: _Job, folder: Path, fused: bool) -> tuple[_Job, kept_files.KeptJob]:
    """What an earlier attempt of the job kept, with the seed that it may have drawn; raises ValueError when it is another's."""
    seed = kept_files.read_seed(folder)
    if job.asked.seed not in (None, seed):
        raise ValueError(f"kept job in {folder.name} has seed {seed} instead of {job.asked.seed}")
    job = replace(job, seed=seed)
    return job, kept_files.read(folder, _requests(job, fused))


def _kept(seed: int, stopped: Stopped, output_dir: Path) -> Path:
    folder = output_dir / "kept"
    folder.mkdir()
    kept_files.write(folder, kept_files.KeptJob(seed, stopped.kept, stopped.made))
    return folder


@torch.no_grad()
def _call_pipeline(
    job: _Job, loaded: pipelines.LoadedPipeline, seeds: list[int], before_step: sampling.BeforeStep
) -> list[Image.Image]:
    """Run a pipeline's own call; what it does not take is refused, and a stop leaves by an exception between two steps."""
    pipe, asked = loaded.pipe, job.asked
    accepted = inspect.signature(type(pipe).__call__).parameters
    if asked.scheduler is not None:
        raise InputRefused("scheduler", f"{type(pipe).__name__} keeps its own sampler; leave scheduler out")
    wanted: dict[str, Any] = {
        "negative_prompt": asked.negative_prompt or None,
        "guidance_scale": job.guidance if asked.guidance is not None else None,
        "width": asked.width,
        "height": asked.height,
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    for name in given:
        if name not in accepted:
            raise InputRefused(name.removesuffix("_scale"), f"{type(pipe).__name__} does not take it; leave it out")
    before_step(0, asked.steps)

    def on_step_end(_pipe: Any, index: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        before_step(min(index + 1, asked.steps), asked.steps)
        return tensors

    if "callback_on_step_end" in accepted:
        given["callback_on_step_end"] = on_step_end
    output = pipe(
        prompt=asked.prompt,
        num_inference_steps=asked.steps,
        num_images_per_prompt=len(seeds),
        generator=sampling.generators(seeds),
        **given,
    )
    before_step(asked.steps, asked.steps)
    return list(output.images)


def _save(
    made: list[Image.Image], job: _Job, loaded: pipelines.LoadedPipeline, context: MethodContext
) -> tuple[tuple[ResultFile, ...], dict[str, Any]]:
    asked = job.asked
    facts: dict[str, Any] = {
        "prompt": asked.prompt,
        "negative_prompt": asked.negative_prompt,
        "steps": asked.steps,
        "guidance": job.guidance,
        "scheduler": asked.scheduler or type(loaded.pipe.scheduler).__name__,
        "model": context.model or loaded.model.id,
        "device": loaded.device.type,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }
    if loaded.model.adapter_dir is not None:
        facts["adapter_scale"] = asked.adapter_scale
        facts["base_model"] = loaded.adapter.facts.get("base_model", "") if loaded.adapter else ""
    if context.adapters:
        facts["adapters"] = [{"model": given.model, "weight": given.weight} for given in context.adapters]
        facts["base_model"] = loaded.model.id
    given = picture_fields(asked.model_dump())
    if given:
        facts |= {"inputs": given, "strength": job.inputs.strength}
    if asked.control:
        facts["control"] = [use.model_dump() for use in asked.control]
    files: list[ResultFile] = []
    seeds: list[int] = []
    for index, picture in enumerate(made):
        own = {**facts, "seed": job.seed + index, "width": picture.width, "height": picture.height}
        path = context.output_dir / f"picture-{index:02d}.png"
        pictures.save_png(picture, path, own)
        files.append(ResultFile(path, "image/png", "picture"))
        seeds.append(job.seed + index)
    return tuple(files), {**facts, "seeds": seeds, "width": made[0].width, "height": made[0].height}
