"""What an AI method is, to the Pod that runs it: load once, run many times, stop between two steps.

A method sees local paths only. Whoever starts it has resolved models and files, and stores what it leaves behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model resolved to local directories.

    ``base_dir`` is a diffusers pipeline directory. ``adapter_dir`` holds what a training left: ``adapter.json`` and
    ``adapter.safetensors`` (LoRA or full weights), or a foreign LoRA file in a format that diffusers reads.
    """

    id: str
    base_dir: Path
    adapter_dir: Path | None = None


@dataclass(frozen=True, slots=True)
class GivenAdapter:
    """A personalised model (LoRA) that a run adds to the loaded one, resolved to a local directory."""

    model: str
    folder: Path
    weight: float = 1.0
    pinned: bool = False
    """It stays in memory where others would go."""
    identity: str = ""
    """Differs where the files behind `model` differ."""


@dataclass(frozen=True, slots=True)
class ResultFile:
    """A file that a method left in its output directory."""

    path: Path
    media_type: str
    role: str
    """``picture``, ``adapter`` (what a trained model is loaded from), ``validation`` (a picture made on the way) or ``log``."""

    @property
    def name(self) -> str:
        """The file's name, under which it is kept."""
        return self.path.name


@dataclass(frozen=True, slots=True)
class MethodResult:
    """What a run made; `metadata` can be written as JSON."""

    files: tuple[ResultFile, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    peak_gpu_memory_bytes: int = 0
    company_us: int = 0
    """How much of the run's time others cost that shared the device with it."""
    company_permille: int = 0
    """How many others shared it, on average, in thousandths."""


class Cancelled(Exception):
    """The run stopped between two steps because it was told to; `checkpoint` is a directory to go on from, if one was kept."""

    def __init__(self, checkpoint: Path | None = None) -> None:
        super().__init__("stopped between two steps, as told")
        self.checkpoint = checkpoint


class InputRefused(Exception):
    """The run cannot work with what it was given (a file that is no picture, a model of another kind): retrying is in vain."""

    def __init__(self, field_name: str, message: str) -> None:
        super().__init__(f"{field_name}: {message}")
        self.field = field_name


class NotFinite(ArithmeticError):
    """What was computed holds numbers that are infinite or none: once more may help on another device, no further."""


class ModelMissing(Exception):
    """The model's directory is absent or cannot be read as a pipeline."""


class MethodContext(Protocol):
    """What a run gets from its Pod."""

    @property
    def output_dir(self) -> Path:
        """An empty directory of this attempt's own; results and checkpoints go there."""
        ...

    @property
    def device(self) -> str:
        """``cpu``, ``cuda`` or ``cuda:N``."""
        ...

    @property
    def checkpoint(self) -> Path | None:
        """A directory kept by an earlier attempt (`Cancelled.checkpoint`), None for a fresh start."""
        ...

    @property
    def adapters(self) -> tuple[GivenAdapter, ...]:
        """Personalised models to add to the loaded one; their folders stay until the run is over."""
        ...

    @property
    def model(self) -> str:
        """The model that was asked for, where it is not the loaded one (but its base); empty otherwise."""
        ...

    @property
    def priority(self) -> int:
        """How urgent the run is, higher first."""
        ...

    @property
    def cache_dir(self) -> Path | None:
        """A directory that outlives the attempt, shared by the Pods of a node; None: there is none."""
        ...

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Say that `done` of `total` steps are behind the run; called after every step."""
        ...

    def preview(self, picture: Any) -> None:
        """Show a small PIL picture of what there is so far; may be called from any thread, and costs the caller no time."""
        ...

    def offer_checkpoint(self, checkpoint: Path) -> None:
        """Keep a directory that another attempt can go on from should this one be lost; copied before the call returns."""
        ...

    def should_stop(self) -> bool:
        """Whether the run is to stop; asked before every step."""
        ...

    def fetch(self, file_id: str) -> Path:
        """Return a local path of a stored file; raises FileNotFoundError."""
        ...

    def model_dir(self, model_id: str) -> Path:
        """Return the local directory of a base model; raises FileNotFoundError."""
        ...


class Method(Protocol):
    """An AI method inside a Pod.

    One that has the attribute ``paced = True`` promises to call `progress` after each step of a run, and its Pod is killed when
    that stays away for many times what a step takes.
    """

    def load(self, model: ModelRef | None, device: str) -> None:
        """Load the model onto the device; raises ModelMissing."""
        ...

    def run(self, parameters: BaseModel, context: MethodContext) -> MethodResult:
        """Run once; raises Cancelled, InputRefused, MemoryError or torch's out-of-memory error."""
        ...

    def close(self) -> None:
        """Give the model's memory back."""
        ...
