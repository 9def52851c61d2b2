"""What breaks and when: mean times between failures, drawn with the run's seed, or an explicit list for a drill."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from engine.tasks import Micros
from sim.draws import exponential


class FaultKind(StrEnum):
    """What can break."""

    NODE_LOST = "node_lost"
    """The machine dies with all that runs on it; its disk survives, its memory does not."""
    GPU_ILL = "gpu_ill"
    """One GPU falls ill: what runs on it hangs until it is told to go."""
    PODS_CRASHED = "pods_crashed"
    """Every Pod on the node crashes; the node stays."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One failure at a known moment. `repair_after_us` None: it never comes back."""

    at: Micros
    kind: FaultKind
    node: str
    gpu: str = ""
    repair_after_us: Micros | None = None


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """Failures of one run. A mean time of 0 switches that kind off."""

    node_mtbf_us: Micros = 0
    node_mttr_us: Micros = 1_800_000_000
    gpu_mtbf_us: Micros = 0
    gpu_mttr_us: Micros = 14_400_000_000
    attempt_crash_ppm: int = 0
    """Chance, in parts per million, that an attempt takes its Pod down with it."""
    faults: tuple[Fault, ...] = ()

    def __post_init__(self) -> None:
        for name in ("node_mtbf_us", "gpu_mtbf_us", "attempt_crash_ppm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative, got {getattr(self, name)}; 0 switches it off")
        for name in ("node_mttr_us", "gpu_mttr_us"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: must be greater than 0, got {getattr(self, name)}; a repair takes some time")

    def next_up_us(self, seed: int, kind: FaultKind, name: str, nth: int) -> Micros | None:
        """Draw how long a node or GPU lives after its `nth` repair; None when it never fails by itself."""
        mean = self.node_mtbf_us if kind is FaultKind.NODE_LOST else self.gpu_mtbf_us
        return max(1, round(exponential(mean, seed, "up", kind, name, nth))) if mean else None

    def next_down_us(self, seed: int, kind: FaultKind, name: str, nth: int) -> Micros:
        """Draw how long its `nth` repair takes."""
        mean = self.node_mttr_us if kind is FaultKind.NODE_LOST else self.gpu_mttr_us
        return max(1, round(exponential(mean, seed, "down", kind, name, nth)))
