"""GPUs from a JSON file that may be edited while the agent runs: for drills of hot plug and failure, and for tests.

``{"gpus": [{"uuid": "gpu-a", "model": "a100", "memory_bytes": 85899345920, "healthy": true}]}``; a GPU may also carry
`memory_used_bytes` and `busy_permille`. Pods on such GPUs run on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.resources import GpuSpec
from executors.devices.cpu import NO_GPU_ENVIRONMENT
from executors.ports import DeviceUse


class _Gpu(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    uuid: str = Field(min_length=1, max_length=120, pattern=r"^[A-Za-z0-9._:-]+$")
    model: str = Field(min_length=1, max_length=60)
    memory_bytes: int = Field(gt=0)
    healthy: bool = True
    memory_used_bytes: int = Field(default=0, ge=0)
    busy_permille: int = Field(default=0, ge=0, le=1000)


class _Inventory(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    gpus: tuple[_Gpu, ...]

    @model_validator(mode="after")
    def _differ(self) -> _Inventory:
        uuids = [gpu.uuid for gpu in self.gpus]
        for uuid in uuids:
            if uuids.count(uuid) > 1:
                raise ValueError(f"the uuid {uuid!r} is listed twice")
        return self


class FilePlugin:
    """Reads the file at each call; while it is absent or wrong, the last good inventory holds and `error` says why."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.error = ""
        inventory = self._read()
        if inventory is None:
            raise ValueError(f"device inventory {path}: {self.error}")
        self._inventory = inventory

    def devices(self) -> tuple[GpuSpec, ...]:
        """Return the GPUs that the file lists now, in its order."""
        self._inventory = self._read() or self._inventory
        return tuple(GpuSpec(gpu.uuid, gpu.model, gpu.memory_bytes, gpu.healthy) for gpu in self._inventory.gpus)

    def use(self) -> tuple[DeviceUse, ...]:
        """Return the use that the file states."""
        self._inventory = self._read() or self._inventory
        return tuple(DeviceUse(gpu.uuid, gpu.memory_used_bytes, gpu.busy_permille) for gpu in self._inventory.gpus)

    def environment(self, uuids: Sequence[str]) -> Mapping[str, str]:
        """Return the environment of a process on the CPU: what the file lists is not really there."""
        return dict(NO_GPU_ENVIRONMENT)

    def _read(self) -> _Inventory | None:
        try:
            inventory = _Inventory.model_validate_json(self._path.read_bytes())
        except OSError as error:
            self.error = f"cannot be read: {error.strerror}"
            return None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "file"
            self.error = f"{where}: {first['msg']}; the last good inventory is kept"
            return None
        self.error = ""
        return inventory
