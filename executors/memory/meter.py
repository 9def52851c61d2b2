"""How much memory a device has left and what a call took of it: CUDA's own counts, or the process's where the model lies in RAM."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Protocol

import torch

_STATM = Path("/proc/self/statm")
_PAGE_BYTES = resource.getpagesize()
_PEAK_RESET = Path("/proc/self/clear_refs")


class Meter(Protocol):
    """Looks at the memory of one device, as this process uses it."""

    def room_bytes(self) -> int | None:
        """Return what this process may allocate in all; None where nobody says."""
        ...

    def card_bytes(self) -> int | None:
        """Return what a process may allocate that has the whole card; None where nobody says."""
        ...

    def free_bytes(self) -> int | None:
        """Return what this process may still allocate; None where nobody says."""
        ...

    def begin(self) -> int:
        """Begin to measure a peak; returns what is allocated now."""
        ...

    def peak_bytes(self) -> int:
        """Return the most that was allocated since `begin`."""
        ...


class CudaMeter:
    """The allocator's counts, within the cap that the process was given and the card's own free memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def room_bytes(self) -> int:
        """Return the cap, or what is left of the card by others."""
        free, total = torch.cuda.mem_get_info(self._device)
        own = torch.cuda.memory_reserved(self._device)
        return min(int(_fraction(self._device) * total), free + own)

    def card_bytes(self) -> int:
        """Return the card's memory."""
        return int(torch.cuda.mem_get_info(self._device)[1])

    def free_bytes(self) -> int:
        """Return the room less what is allocated; memory that the allocator only holds back counts as free."""
        return max(0, self.room_bytes() - int(torch.cuda.memory_allocated(self._device)))

    def begin(self) -> int:
        """Begin anew."""
        torch.cuda.reset_peak_memory_stats(self._device)
        return int(torch.cuda.memory_allocated(self._device))

    def peak_bytes(self) -> int:
        """Return the allocator's peak."""
        return int(torch.cuda.max_memory_allocated(self._device))


class HostMeter:
    """The process's own memory beyond what it had before its model was loaded."""

    def __init__(self) -> None:
        self._before = _resident_bytes()
        self._resets = True

    def room_bytes(self) -> None:
        """Return None: limits of the host's memory are the cgroup's."""
        return

    def card_bytes(self) -> None:
        """Return None, as `room_bytes`."""
        return

    def free_bytes(self) -> None:
        """Return None, as `room_bytes`."""
        return

    def begin(self) -> int:
        """Have the kernel begin its peak anew, where it lets us; returns what the model and its work hold now."""
        try:
            _PEAK_RESET.write_text("5")
        except OSError:
            self._resets = False
        return max(0, _resident_bytes() - self._before)

    def peak_bytes(self) -> int:
        """Return the kernel's peak; what is held now where it cannot be begun anew."""
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if self._resets else _resident_bytes()
        return max(0, held - self._before)


def meter_of(device: torch.device) -> Meter:
    """Return the meter of a device; for a CPU, to be called before the model is loaded."""
    return CudaMeter(device) if device.type == "cuda" else HostMeter()


def _fraction(device: torch.device) -> float:
    """The share of the card that the allocator was told to keep to."""
    try:
        return float(torch.cuda.memory.get_per_process_memory_fraction(device))
    except (AttributeError, RuntimeError):
        return 1.0


def _resident_bytes() -> int:
    try:
        return int(_STATM.read_text("ascii").split()[1]) * _PAGE_BYTES
    except OSError:
        return 0
