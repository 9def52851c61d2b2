"""CPU slots: a machine without a GPU offers each slot as one GPU of the model `cpu`, so that everything runs everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.resources import GpuSpec
from executors.limits import HostResources, host_resources
from executors.ports import DeviceUse

SLOT_MEMORY_MIN_BYTES = 2 << 30
"""A slot that nobody counted gets at least this much memory: an AI method with torch fits in."""
NO_GPU_ENVIRONMENT: Mapping[str, str] = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
"""One thread a slot: two slots with two threads each on two cores run several times slower than with one."""


class CpuPlugin:
    """`slots` devices `cpu-0`, `cpu-1` ... that share the host's memory evenly; 0 slots: one a core, as far as memory goes."""

    def __init__(self, slots: int = 0, host: HostResources | None = None, proc: Path = Path("/proc")) -> None:
        host = host or host_resources()
        if slots <= 0:
            slots = max(1, min(host.cpu_milli // 1000, host.memory_bytes // SLOT_MEMORY_MIN_BYTES))
        self._proc = proc
        self._ticks: tuple[int, int] = (0, 0)
        self._devices = tuple(GpuSpec(f"cpu-{slot}", "cpu", host.memory_bytes // slots) for slot in range(slots))
        self.error = ""

    def devices(self) -> tuple[GpuSpec, ...]:
        """Return the slots."""
        return self._devices

    def use(self) -> tuple[DeviceUse, ...]:
        """Return each slot's even share of the host's use, CPU since the last call; the kernel knows no slots."""
        busy = self._busy_permille()
        used = self._memory_used_bytes() // len(self._devices)
        return tuple(DeviceUse(device.uuid, min(used, device.memory_bytes), busy) for device in self._devices)

    def environment(self, uuids: Sequence[str]) -> Mapping[str, str]:
        """Return the environment of a process on these slots: no GPU, one thread."""
        return dict(NO_GPU_ENVIRONMENT)

    def _busy_permille(self) -> int:
        fields = [int(field) for field in (self._proc / "stat").read_text().splitlines()[0].split()[1:]]
        idle, total = fields[3] + fields[4], sum(fields[:8])
        idle_before, total_before = self._ticks
        self._ticks = (idle, total)
        passed = total - total_before
        return max(0, min(1000, 1000 - (idle - idle_before) * 1000 // passed)) if passed > 0 else 0

    def _memory_used_bytes(self) -> int:
        lines = dict(line.split(":", 1) for line in (self._proc / "meminfo").read_text().splitlines())
        return (int(lines["MemTotal"].split()[0]) - int(lines["MemAvailable"].split()[0])) * 1024
