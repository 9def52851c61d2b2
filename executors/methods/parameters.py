"""The parameters of every AI method, checked before anything is queued; importing this file imports no torch.

Bounds are the platform's outer limits. What a particular model cannot do is refused by the method itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

MAX_PROMPT_CHARS = 2000
MAX_SIDE_PX = 2048
MAX_PIXELS_PER_JOB = 16 * 1024 * 1024
MAX_INPUT_PIXELS = 50_000_000
"""Pixels of a user's own picture."""
MAX_VALIDATION_PICTURES = 100
"""Validation pictures of one training: the description of a result must name them all."""
MAX_CONTROLS = 4
"""ControlNets in one request."""
USUAL_STRENGTH = 0.8
"""How much of a given picture may change, unless it is said."""
MAX_ADAPTERS = 8
"""Further personalised models in one request."""
MAX_SEED = 2**53 - 1
"""Largest integer that every JSON reader keeps exactly."""

SchedulerName = Literal[
    "ddim",
    "ddpm",
    "euler",
    "euler_a",
    "dpmpp_2m",
    "dpmpp_2m_karras",
    "dpmpp_2m_sde",
    "dpmpp_2m_sde_karras",
    "dpmpp_3m_sde",
    "dpmpp_2s",
    "dpm2",
    "dpm2_a",
    "unipc",
    "pndm",
    "lms",
    "heun",
    "deis",
    "lcm",
]
FileId = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ModelId = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$")]


@dataclass(frozen=True, slots=True)
class FieldProblem:
    """One parameter that is wrong, and why."""

    field: str
    message: str


class ParameterError(ValueError):
    """Parameters are refused; `problems` names every field, `field` and `message` are the first one's."""

    def __init__(self, problems: tuple[FieldProblem, ...]) -> None:
        super().__init__("; ".join(f"{p.field}: {p.message}" for p in problems))
        self.problems = problems

    @property
    def field(self) -> str:
        return self.problems[0].field

    @property
    def message(self) -> str:
        return self.problems[0].message


class _Parameters(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True, allow_inf_nan=False)


class AdapterUse(_Parameters):
    """A personalised model (LoRA) and how strongly it shows."""

    model: ModelId
    """Id of a model that was trained on the same base."""
    weight: float = Field(1.0, ge=-2.0, le=2.0)
    """1: as it was trained; negative ones lead away from it."""


class ControlUse(_Parameters):
    """A ControlNet of the base model, and the picture that it follows."""

    model: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """The ControlNet's name beside the base model, like `canny`."""
    image: FileId
    """File id of an uploaded picture of the kind that it was trained on: edges, depth, a pose."""
    scale: float = Field(1.0, ge=0.0, le=2.0)
    """How strongly it is followed."""
    start: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of the steps before which it is left out."""
    end: float = Field(1.0, gt=0.0, le=1.0)
    """Share of the steps after which it is left out."""

    @model_validator(mode="after")
    def _takes_part(self) -> ControlUse:
        if self.start >= self.end:
            raise ValueError(f"end: must be above start, {self.start:g}")
        return self


class TextToImageParameters(_Parameters):
    """Pictures from a text, and from other pictures."""

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT_CHARS)
    """What the pictures show."""
    negative_prompt: str = Field("", max_length=MAX_PROMPT_CHARS)
    """What they should not show."""
    model: ModelId = "tiny"
    """A base model or a trained one."""
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    """Picture k of a job uses seed + k; absent: a random seed is taken and reported."""
    steps: int = Field(20, ge=1, le=150)
    """Denoising steps."""
    guidance: float | None = Field(None, ge=0.0, le=30.0)
    """How strongly the prompt is followed; up to 1 switches guidance off; absent: the model's own default."""
    width: int | None = Field(None, ge=64, le=MAX_SIDE_PX, multiple_of=8)
    """Pixels; absent: the model's native size."""
    height: int | None = Field(None, ge=64, le=MAX_SIDE_PX, multiple_of=8)
    """Pixels; absent: the model's native size."""
    count: int = Field(1, ge=1, le=16)
    """Pictures to make."""
    scheduler: SchedulerName | None = None
    """Sampler by name; absent: the model's own."""
    adapter_scale: float = Field(1.0, ge=0.0, le=2.0)
    """How much of a trained model's difference to its base is applied."""
    adapters: tuple[AdapterUse, ...] = Field((), max_length=MAX_ADAPTERS)
    """Further personalised models (LoRA) of the same base to draw with, each with its weight."""
    preview_every: int = Field(0, ge=0, le=150)
    """Steps between two small previews among the job's events; 0: none."""
    image: FileId | None = None
    """File id of an uploaded picture to begin with; without width and height the result has its shape."""
    strength: float | None = Field(None, gt=0.0, le=1.0)
    """How much of `image` may change: the share of the steps that are taken; absent: 0.8, with a mask 1."""
    mask: FileId | None = None
    """File id of an uploaded picture as large as `image`: what of it is painted anew."""
    mask_from: Literal["white", "transparent"] = "white"
    """What in the mask says "paint here": its white, or its transparent part."""
    control: tuple[ControlUse, ...] = Field((), max_length=MAX_CONTROLS)
    """ControlNets to follow, each with its own picture."""
    format: Literal["png"] = "png"
    """File format of the pictures."""

    @field_validator("adapters")
    @classmethod
    def _names_each_once(cls, value: tuple[AdapterUse, ...]) -> tuple[AdapterUse, ...]:
        names = [use.model for use in value]
        if len(set(names)) != len(names):
            raise ValueError("must all differ; a model is named twice, add up its weights instead")
        return value

    @field_validator("control")
    @classmethod
    def _controls_each_once(cls, value: tuple[ControlUse, ...]) -> tuple[ControlUse, ...]:
        names = [use.model for use in value]
        if len(set(names)) != len(names):
            raise ValueError("must all differ; a ControlNet is named twice")
        return value

    @field_validator("prompt")
    @classmethod
    def _says_something(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must say something, not only spaces")
        return value

    @model_validator(mode="after")
    def _begins_with_a_picture(self) -> TextToImageParameters:
        if self.image is None:
            for name in ("mask", "strength"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: is for a picture to begin with; send image too, or leave it out")
        if self.mask is None and self.mask_from != "white":
            raise ValueError("mask_from: says how mask is meant; send mask too, or leave it out")
        strength = strength_of(self.image, self.mask, self.strength)
        if int(self.steps * strength) < 1:
            raise ValueError(f"strength: {strength:g} of {self.steps} steps is less than one; raise strength or steps")
        return self

    @model_validator(mode="after")
    def _fits(self) -> TextToImageParameters:
        pixels = (self.width or 64) * (self.height or 64) * self.count
        if pixels > MAX_PIXELS_PER_JOB:
            raise ValueError(
                f"count: {self.count} pictures of {self.width}x{self.height} are {pixels} pixels, more than "
                f"{MAX_PIXELS_PER_JOB} in one job; lower count, width or height"
            )
        return self


class DreamBoothParameters(_Parameters):
    """Teach a base model one subject from a few pictures of it."""

    pictures: tuple[FileId, ...] = Field(min_length=3, max_length=5)
    """File ids of 3 to 5 uploaded pictures of the subject."""
    category: str = Field(min_length=1, max_length=60, pattern=r"^[A-Za-z][A-Za-z -]*$")
    """The class noun: what the subject is one of, like `dog`."""
    instance_token: str = Field("sks", min_length=2, max_length=20, pattern=r"^[a-z0-9]+$")
    """The rare word that will name the subject in prompts: "a photo of sks dog"."""
    base_model: ModelId = "tiny"
    """The model to start from."""
    method: Literal["lora", "full"] = "lora"
    """Small adapter (LoRA), or all weights."""
    rank: int = Field(8, ge=1, le=128)
    """Rank of the adapter; LoRA only."""
    steps: int = Field(300, ge=1, le=20_000)
    """Training steps."""
    learning_rate: float | None = Field(None, gt=0.0, le=0.1)
    """Peak of the linear decay; absent: fits the method and the base model."""
    batch: int = Field(4, ge=1, le=16)
    """Subject pictures a step, and as many prior pictures."""
    accumulate: int = Field(1, ge=1, le=64)
    """Batches whose gradients make one step: larger steps in the memory of a small one."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, more time, the same model."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` keeps its moments in 8 bits; it needs bitsandbytes on the node."""
    snr_gamma: float | None = Field(None, gt=0.0, le=100.0)
    """Min-SNR weighting: no timestep weighs more than this signal-to-noise ratio lets it, 5 is usual; absent: all alike."""
    prior_preservation: bool = True
    """Train on the base model's own pictures too, so that it forgets nothing."""
    prior_weight: float = Field(1.0, ge=0.0, le=10.0)
    """Weight of the prior pictures in the loss."""
    prior_pictures: int = Field(48, ge=2, le=500)
    """Prior pictures made by the base model: half of the category, half of general prompts."""
    prior_prompts: tuple[Annotated[str, Field(min_length=1, max_length=300)], ...] = Field((), max_length=200)
    """General prompts for the prior; absent: the base model's own list, or a built-in one."""
    text_encoder: bool = True
    """Train the text encoder along with the UNet."""
    checkpoint_every: int = Field(100, ge=1)
    """Steps between two checkpoints."""
    size: int | None = Field(None, ge=64, le=1024, multiple_of=8)
    """Side in pixels that pictures are cut to; absent: the model's native size."""
    aspect: Literal["crop", "buckets"] = "crop"
    """Cut pictures to squares, or train each in the shape nearest to its own, of no more pixels than the square."""
    validation_prompts: tuple[Annotated[str, Field(min_length=1, max_length=300)], ...] = Field((), max_length=4)
    """Prompts to draw on the way and at the end; the pictures are part of the result."""
    validation_every: int = Field(100, ge=1)
    """Steps between two validations."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Equal seeds give equal trainings on one machine."""

    @field_validator("validation_prompts")
    @classmethod
    def _say_something(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(prompt.strip() for prompt in value):
            raise ValueError("must all say something, not only spaces")
        return value

    @model_validator(mode="after")
    def _validates_not_too_often(self) -> DreamBoothParameters:
        made = -(-self.steps // self.validation_every) * len(self.validation_prompts)
        if made > MAX_VALIDATION_PICTURES:
            rounds = MAX_VALIDATION_PICTURES // len(self.validation_prompts)
            raise ValueError(
                f"validation_every: {made} validation pictures, more than {MAX_VALIDATION_PICTURES}; raise it to "
                f"{-(-self.steps // rounds)} or more"
            )
        return self

    @field_validator("pictures")
    @classmethod
    def _differ(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("must all differ; a picture is named twice")
        return value


class SleepParameters(_Parameters):
    """Do nothing for a while: for tests, drills and measurements of the platform itself."""

    seconds: float = Field(1.0, ge=0.0, le=86_400.0)
    """How long."""
    steps: int = Field(10, ge=1, le=100_000)
    """Into how many steps the time is cut; progress and cancel come between them."""
    fail: Literal["crash", "oom", "error"] | None = None
    """Fail after half of the steps: kill the own process, run out of memory, or raise."""


PARAMETERS: dict[str, type[BaseModel]] = {
    "text_to_image": TextToImageParameters,
    "dreambooth": DreamBoothParameters,
    "sleep": SleepParameters,
}


def strength_of(image: str | None, mask: str | None, strength: float | None) -> float:
    """Return the share of the steps that a generation takes."""
    if image is None:
        return 1.0
    if strength is not None:
        return strength
    return 1.0 if mask is not None else USUAL_STRENGTH


def steps_taken(parameters: Mapping[str, Any]) -> int | None:
    """Return how many steps a generation's checked parameters cost, None where they name none: a given picture saves some."""
    steps, strength = parameters.get("steps"), parameters.get("strength")
    if not isinstance(steps, int):
        return None
    return max(1, int(steps * strength_of(parameters.get("image"), parameters.get("mask"), strength)))


def picture_fields(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the files that a generation's checked parameters name, by field."""
    named = {name: parameters[name] for name in ("image", "mask") if parameters.get(name)}
    for index, use in enumerate(parameters.get("control") or ()):
        named[f"control.{index}.image"] = use["image"]
    return named


def validate(method: str, parameters: Mapping[str, Any]) -> BaseModel:
    """Check parameters of a method; raises ParameterError that names every wrong field."""
    model = PARAMETERS.get(method)
    if model is None:
        known = ", ".join(sorted(PARAMETERS))
        raise ParameterError((FieldProblem("method", f"{method!r} is unknown; choose one of: {known}"),))
    try:
        return model.model_validate(dict(parameters))
    except ValidationError as error:
        raise ParameterError(_problems(error, model)) from None


def _problems(error: ValidationError, model: type[BaseModel]) -> tuple[FieldProblem, ...]:
    problems: list[FieldProblem] = []
    for entry in error.errors(include_url=False, include_context=True):
        field = ".".join(str(part) for part in entry["loc"])
        message = entry["msg"].removeprefix("Value error, ")
        if entry["type"] == "extra_forbidden":
            message = "is no parameter of this method; it has: " + ", ".join(sorted(model.model_fields))
        elif not field:
            field, _, message = message.partition(": ")
        elif entry["type"] == "string_pattern_mismatch" and _names_a_file(field):
            message = "must be the id of an uploaded file: 64 hexadecimal digits, lower case"
        problems.append(FieldProblem(field, message))
    return tuple(problems)


def _names_a_file(field: str) -> bool:
    return field.startswith("pictures") or field in ("image", "mask") or field.endswith(".image")
