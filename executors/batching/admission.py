"""What a picture's request must be to enter a running batch; whatever is wrong is refused under its field's name."""

from __future__ import annotations

from executors.batching import beginnings
from executors.batching.controls import ControlNets
from executors.batching.lora import AdapterBank
from executors.batching.requests import PictureRequest
from executors.methods import sampling
from executors.methods.base import InputRefused
from executors.methods.parameters import MAX_SEED
from executors.methods.pipelines import LoadedPipeline


def check(request: PictureRequest, loaded: LoadedPipeline, bank: AdapterBank, controls: ControlNets) -> None:
    """Raise InputRefused when the loaded model, its adapters or its ControlNets cannot make the picture."""
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
    if request.scheduler is not None and request.scheduler not in sampling.offered(loaded.pipe):
        raise InputRefused("scheduler", f"{loaded.model.id} keeps its own sampler; leave scheduler out")
    grain = loaded.size_grain
    for name, value in (("width", request.width), ("height", request.height)):
        if value < grain or value % grain:
            raise InputRefused(name, f"must be a multiple of {grain} for {loaded.model.id}, not {value}")
    if loaded.family == "flux" and request.negative_prompt:
        raise InputRefused(
            "negative_prompt", f"{loaded.model.id} is guided by its training and takes none; leave it out"
        )
    beginnings.check(loaded, request)
    _check_controls(request, controls)
    for name, _weight in request.adapters:
        if name not in bank:
            raise InputRefused("adapters", f"{name!r} is not loaded here; load it before the request enters")


def _check_controls(request: PictureRequest, controls: ControlNets) -> None:
    names = [control.name for control in request.controls]
    if names != sorted(set(names)):
        raise InputRefused("control", "must name different ControlNets, in the order of their names")
    for control in request.controls:
        if control.name not in controls:
            raise InputRefused("control", f"{control.name!r} is not loaded here; load it before the request enters")
        if control.picture.size != (request.width, request.height):
            wide, high = control.picture.size
            raise InputRefused("control", f"is {wide}x{high}, the picture to make is {request.width}x{request.height}")
    controls.together(names)
