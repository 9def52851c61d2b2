"""What a plan is asked for, checked where it enters."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine import profiles
from sim.configuration import SimulationConfig
from sim.planner.objectives import Objective
from sim.prices import Price
from sim.workload import Workload, declared, with_models

Pool = tuple[tuple[str, int], ...]
"""(GPU model, number of GPUs), in the order of the offers; models with none are left out."""


class PlanError(ValueError):
    """A plan cannot be made; the message names the field and the remedy."""


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """Which workload is to be served how well on what hardware. Equal requests give equal plans."""

    base: SimulationConfig
    """Everything but the cluster: workload, profile, forecaster, failures, GPUs per node, first seed."""
    objectives: tuple[Objective, ...]
    offers: tuple[Price, ...]
    currency: str = "USD"
    workload: Workload | None = None
    """Arrivals that no file holds, such as those of a live journal; None: the configuration's own."""
    confidence: float = 0.95
    seeds: int = 5
    """Most repetitions of one cluster; what is clear after fewer gets fewer."""
    policies: tuple[str, ...] = ()
    """Profiles to set beside the base's own."""
    mixes: int = 12
    """Most mixed clusters that are tried."""
    most_gpus: int = 4096
    sensitivity: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be planned."""
        if not self.objectives:
            raise PlanError("slo: say what is to be kept, such as p99_wait<8s")
        if len({each.name for each in self.objectives}) < len(self.objectives):
            raise PlanError("slo: two objectives are about the same measure; keep the stricter one")
        if not self.offers:
            raise PlanError("gpu: name at least one GPU model and its price, such as a100:1.8/h")
        if not 0.5 <= self.confidence < 1:
            raise PlanError(f"confidence: must be at least 0.5 and below 1, got {self.confidence}; 0.95 is usual")
        if not 2 <= self.seeds <= 1000:
            raise PlanError(f"seeds: an interval needs at least 2, and more than 1000 are too many; got {self.seeds}")
        if self.most_gpus < 1:
            raise PlanError(f"most_gpus: must be at least 1, got {self.most_gpus}")
        if self.mixes < 0:
            raise PlanError(f"mixes: must be at least 0, got {self.mixes}")
        for name in (self.base.profile, *self.policies):
            _check_profile(name)
        if self.base.until_hours is not None:
            raise PlanError("until_hours: a plan needs every task to its end; use limit to take fewer tasks")

    def config(self, pool: Pool, number: int = 0, **changes: Any) -> SimulationConfig:
        """Return the simulation of a cluster with the seed of that number."""
        return replace(self.base, pools=pool, seed=self.base.seed + number, **changes)

    def cost(self, pool: Pool) -> float:
        """Return what a cluster costs per hour."""
        prices = {offer.gpu_model: offer.per_hour for offer in self.offers}
        return sum(prices[model] * count for model, count in pool)

    def pool(self, counts: tuple[int, ...]) -> Pool:
        """Return the cluster with so many GPUs of each offer."""
        pairs = zip(self.offers, counts, strict=True)
        return tuple((offer.gpu_model, count) for offer, count in pairs if count)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "base": {name: value for name, value in self.base.to_json().items() if name not in _CLUSTER},
            "objectives": [str(each) for each in self.objectives],
            "offers": {offer.gpu_model: offer.per_hour for offer in self.offers},
            "currency": self.currency,
            "workload": None if self.workload is None else self.workload.digest(),
            "confidence": self.confidence,
            "seeds": self.seeds,
            "policies": list(self.policies),
            "mixes": self.mixes,
            "most_gpus": self.most_gpus,
            "sensitivity": self.sensitivity,
        }

    def digest(self) -> str:
        """Return a short hash of the whole request."""
        text = json.dumps(self.to_json(), sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


_CLUSTER = ("nodes", "gpu_model", "pools")


def _check_profile(name: str) -> None:
    text = name
    if name.endswith(".toml"):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"profile: cannot read {name}: {error}; give a profile's name or a TOML file") from None
    profiles.load(text)


def workload_of(config: SimulationConfig, given: Workload | None) -> Workload:
    """Return a run's workload: the configuration's own, or the one that was given, changed as the configuration says."""
    if given is None:
        return config.workload()
    if config.forecaster == "declared":
        given = declared(given, config.declared_sigma, config.seed)
    return with_models(given, config.model_scale).scaled(config.rate_scale).limited(config.limit)


def pool_text(pool: Pool) -> str:
    """Write a cluster for people: ``12 a100 + 2 h100``."""
    return " + ".join(f"{count} {model}" for model, count in pool) or "nothing"


def gpus_of(pool: Pool) -> int:
    """Return how many GPUs a cluster has."""
    return sum(count for _, count in pool)
