"""The state of one DreamBooth training: everything that a step reads or changes, and how it is kept and found again.

What a step draws - pictures, prompts, noise, times - follows from the seed and the step's number alone, and so does the learning
rate. So weights, the optimizer's moments, the prior and the number of steps are the whole state: there is no generator to lose.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from executors.methods import checkpoints, pipelines, prior, sampling
from executors.methods.base import InputRefused
from executors.methods.parameters import DreamBoothParameters

_PICTURES = "validation"
_ANY_NODE = ("checkpoint_every",)
"""Parameters that change nothing of the outcome."""


@dataclass(slots=True)
class Subject:
    """The subject's latents, by shape: rows [n, channels, height, width], and each picture's place in them."""

    groups: list[torch.Tensor]
    group_of: list[int]


@dataclass(slots=True)
class Training:
    """Everything one run changes or reads at each step."""

    asked: DreamBoothParameters
    loaded: pipelines.LoadedPipeline
    noise: Any
    trainable: Mapping[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    rate: float
    size_px: int
    subject: Subject
    base_sha256: str
    output_dir: Path
    prior: prior.Prior | None = None
    step: int = 0
    parts: int = 1
    """Into how many parts a batch is cut, each with a pass of its own: more where memory ran out."""
    losses: list[float] = field(default_factory=list)
    """The loss of every step so far."""
    validated: set[int] = field(default_factory=set)
    """Steps after which the validation prompts have been drawn."""

    _encoded: dict[str, sampling.Conditioning] = field(default_factory=dict)

    @property
    def thing(self) -> str:
        """What prompts call the subject."""
        return f"{self.asked.instance_token} {self.asked.category}"

    @property
    def loss(self) -> float:
        """The last step's loss; not a number before the first."""
        return self.losses[-1] if self.losses else math.nan

    @property
    def prior_units(self) -> int:
        """Progress units of making the prior: one for each denoising step."""
        if not self.asked.prior_preservation:
            return 0
        return len(prior.batches(self.asked.prior_pictures, self.size_px)) * prior.PICTURE_STEPS

    @property
    def units(self) -> int:
        """Progress units of the whole run."""
        return self.prior_units + self.asked.steps

    def prior_prompts(self) -> tuple[str, ...]:
        """Prompts of the prior pictures, in their order."""
        general = self.asked.prior_prompts or tuple(self.loaded.defaults.get("prior_prompts", prior.GENERAL_PROMPTS))
        return prior.prompts_for(self.asked.category, general, self.asked.prior_pictures)

    def precision(self) -> AbstractContextManager[Any]:
        """Full training on a GPU computes in half precision over single precision weights.

        To be entered anew for every forward pass: within one region autocast keeps half copies of weights that have changed since.
        """
        if self.asked.method == "full" and self.loaded.dtype != torch.float32:
            return torch.autocast(self.loaded.device.type, dtype=self.loaded.dtype)
        return nullcontext()

    def conditions(self, prompts: list[str], width: int, height: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """Text states of prompts, and what else the UNet takes; encoded once each when the text encoders are frozen."""
        if self.asked.text_encoder:
            conditioning = sampling.encode_prompts(self.loaded, prompts)
        else:
            for prompt in prompts:
                if prompt not in self._encoded:
                    self._encoded[prompt] = sampling.encode_prompt(self.loaded, prompt, "", guided=False)
            conditioning = sampling.stack([self._encoded[prompt] for prompt in prompts])
        if self.loaded.family == "sd":
            return conditioning.positive, {}
        conditions = sampling.sdxl_conditions(self.loaded, conditioning, len(prompts), width, height)
        return conditioning.positive, {"added_cond_kwargs": conditions}

    # --- kept and found again -----------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to fit: all that changes the outcome, as JSON reads it."""
        told = self.asked.model_dump(mode="json", exclude=set(_ANY_NODE))
        return {**told, "learning_rate": self.rate, "size": self.size_px, "base_sha256": self.base_sha256}

    def save(self, folder: Path) -> None:
        """Write a checkpoint, with the validation pictures made so far."""
        tensors: dict[str, torch.Tensor] = {f"weight/{key}": value for key, value in self.trainable.items()}
        tensors |= checkpoints.optimizer_tensors(self.optimizer)
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        if self.prior is not None:
            tensors["prior"] = self.prior.latents
        checkpoints.write(folder, self.step, tensors, self.identity())
        pictures = sorted(self.output_dir.glob(f"{_PICTURES}-*.png"))
        if pictures:
            (folder / _PICTURES).mkdir(exist_ok=True)
        for picture in pictures:
            shutil.copyfile(picture, folder / _PICTURES / picture.name)

    def restore(self, folder: Path) -> bool:
        """Go on from a checkpoint of the same training; False when the directory holds none. Raises InputRefused."""
        found = checkpoints.read(folder)
        if found is None:
            return False
        mine = self.identity()
        differ = sorted(key for key in {*mine, *found.facts} if mine.get(key) != found.facts.get(key))
        if differ:
            named = ", ".join(differ)
            raise InputRefused("checkpoint", f"belongs to a training with other parameters ({named}); start anew")
        weights = found.named("weight/")
        with torch.no_grad():
            for key, parameter in self.trainable.items():
                parameter.copy_(weights[key])
        checkpoints.restore_optimizer(self.optimizer, found.tensors)
        if "prior" in found.tensors:
            latents = found.tensors["prior"].clone().to(self.loaded.device)
            self.prior = prior.Prior(latents, self.prior_prompts())
        self.losses = found.tensors["losses"].tolist()
        self.step = found.step
        for picture in sorted((folder / _PICTURES).glob(f"{_PICTURES}-*.png")):
            shutil.copyfile(picture, self.output_dir / picture.name)
            self.validated.add(int(picture.stem.split("-")[1]))
        return True

    def validation_path(self, index: int) -> Path:
        """Where a validation picture of this step is written."""
        return self.output_dir / f"{_PICTURES}-{self.step:06d}-{index}.png"

    def validation_pictures(self) -> list[Path]:
        """Every validation picture made, oldest first."""
        return sorted(self.output_dir.glob(f"{_PICTURES}-*.png"))
