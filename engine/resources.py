"""What a node offers and what a Pod asks for: the vocabulary of the physical resource list.

Shares of a GPU are integers in thousandths, memory is in bytes, CPU in thousandths of a core, network in bits per second.
Any resource an operator names travels in ``extra`` as sorted ``(name, amount)`` pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

WHOLE_GPU = 1000
"""A whole GPU, in thousandths."""


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """One GPU device of a node, as its DevicePlugin reports it."""

    uuid: str
    """Stable identity of the device on its node (NVML's UUID, ``cpu-0`` for a CPU slot)."""
    model: str
    """Product name that prices, filters and predictions key on (``a100``, ``h100``, ``cpu``)."""
    memory_bytes: int
    healthy: bool = True


class Tier(StrEnum):
    """Where a node holds a model's files, the farthest first. What it does not hold comes from the file store."""

    DISK = "disk"
    MEMORY = "memory"


@dataclass(frozen=True, slots=True)
class ResidentModel:
    """A model whose files a node holds."""

    model: str
    tier: Tier = Tier.DISK
    """The nearest one."""
    size_bytes: int = 0
    pinned: bool = False
    """It stays until it is released."""


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """A machine with an agent, and everything it offers."""

    name: str
    gpus: tuple[GpuSpec, ...] = ()
    cpu_milli: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    network_bps: int = 0
    extra: tuple[tuple[str, int], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Demand:
    """What one Pod takes of one node.

    ``gpu_share`` and ``gpu_memory_bytes`` are per GPU; ``gpus == 0`` asks for no GPU at all. With ``gpu_share == WHOLE_GPU`` the
    devices are exclusive. ``gpu_models`` empty means any model.
    """

    gpus: int = 1
    gpu_share: int = WHOLE_GPU
    gpu_memory_bytes: int = 0
    gpu_models: tuple[str, ...] = ()
    cpu_milli: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    network_bps: int = 0
    extra: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class GpuGrant:
    """A share of one device that a Pod holds."""

    uuid: str
    share: int
    memory_bytes: int
