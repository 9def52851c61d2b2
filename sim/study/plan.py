"""What the GenTD26 study compares, checked where it enters."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from engine import profiles
from sim.configuration import ConfigError
from sim.study.case import StudyCase

OURS = "aigc"
TIES = ("first", "last", "name", "random")
GPU_MODEL = "a100"
GPU_PART = 0.23
"""GPU time per request of the same service: the duty cycles of its monitoring (630,353 GPU seconds in a day of 143 containers)
over its requests of that day (100,220 by the rate at its front door) over the mean recorded time (27.7 s)."""


@dataclass(frozen=True, slots=True)
class StudyPlan:
    """The whole study."""

    trace: Path
    load_times: Path | None = None
    """Folder of the monitoring files; None: load times worked out from bytes and bandwidths."""
    loads: tuple[float, ...] = (0.6, 0.8, 1.0)
    """Recorded work as a share of what the GPUs could do; model loads come on top."""
    profiles: tuple[str, ...] = field(default_factory=lambda: tuple(profiles.NAMES))
    seeds: int = 5
    first_seed: int = 0
    gpus: int = 16
    gpus_per_node: int = 8
    hours: float = 6.0
    slots: int = 8
    """Requests of one base model that a Pod runs at once; 1: one after the other."""
    gpu_part: float = GPU_PART
    """Share of a recorded run time in which the GPU computes; others in the same Pod make only that part longer."""
    forecaster: str = "online"
    rate_method: str = "superpose"
    first_day: str | None = None
    last_day: str | None = None
    ties: tuple[str, ...] = TIES
    """Tie rules of the placement to try, at the load where sizes are compared; empty: none."""
    equal_at: float | None = None
    """Load at which the fewest GPUs for equal p99 are looked for; None: the middle one of `loads`."""
    limit: int | None = None
    """Take only so many tasks; for trying the study out."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if not self.loads:
            raise ConfigError("loads: name at least one, such as 0.6,0.8,1.0")
        for load in (*self.loads, *(() if self.equal_at is None else (self.equal_at,))):
            if not 0.01 <= load <= 5:
                raise ConfigError(f"loads: {load} is out of range; 1 is the whole capacity, and 0.6 to 1.1 is usual")
        if not self.profiles:
            raise ConfigError(f"profiles: name at least one; known are {', '.join(profiles.NAMES)}")
        for list_name in ("profiles", "loads"):
            if len(set(getattr(self, list_name))) < len(getattr(self, list_name)):
                raise ConfigError(f"{list_name}: one of them is given twice")
        for name in self.profiles:
            profile_text(name)
        for name in ("seeds", "gpus", "gpus_per_node", "slots"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.gpu_part <= 1:
            raise ConfigError(f"gpu_part: must lie between 0 and 1, got {self.gpu_part}")
        for tie in self.ties:
            if tie not in TIES:
                raise ConfigError(f"ties: unknown {tie!r}; known are {', '.join(TIES)}")

    @property
    def size_load(self) -> float:
        """Load at which sizes are compared."""
        return sorted(self.loads)[len(self.loads) // 2] if self.equal_at is None else self.equal_at

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds of every comparison."""
        return tuple(range(self.first_seed, self.first_seed + self.seeds))

    def case(self, profile: str, load: float, seed: int, gpus: int | None = None) -> StudyCase:
        """Return one run: the load is that of `self.gpus`, however many there are."""
        return StudyCase(
            trace=self.trace,
            loads=self.load_times,
            profile=profile,
            seed=seed,
            pools=((GPU_MODEL, gpus or self.gpus),),
            gpus_per_node=self.gpus_per_node,
            busy_gpus=load * self.gpus,
            hours=self.hours,
            slots=self.slots,
            recorded_gpu_share=self.gpu_part,
            forecaster=self.forecaster,
            rate_method=self.rate_method,
            first_day=self.first_day,
            last_day=self.last_day,
            limit=self.limit,
        )


def profile_text(name: str) -> str:
    """Return a profile's TOML text, by its name or its file."""
    if name in profiles.NAMES:
        return resources.files("engine.profiles").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    if not name.endswith(".toml"):
        raise ConfigError(f"profiles: unknown {name!r}; known are {', '.join(profiles.NAMES)}, or name a TOML file")
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"profiles: cannot read {name}: {error}") from None


def with_tie(name: str, tie: str) -> str:
    """Return a profile's text with another tie rule of its placement."""
    lines = []
    placed = False
    section = ""
    for line in profile_text(name).splitlines():
        stripped = line.strip()
        if stripped.startswith("["):
            section = stripped
        if section == "[placement]" and stripped.partition("=")[0].strip() == "tie":
            continue
        lines.append(line)
        if stripped == "[placement]":
            lines.append(f'tie = "{tie}"')
            placed = True
    if not placed:
        lines += ["", "[placement]", f'tie = "{tie}"']
    return "\n".join(lines) + "\n"
