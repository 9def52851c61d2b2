"""One case of the GenTD26 study: which days of the trace, how busy, with which load times."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sim import measured_loads
from sim.configuration import ConfigError, SimulationConfig
from sim.hardware import Hardware
from sim.study import scaled
from sim.workload import Workload, declared, demanding


@dataclass(frozen=True, slots=True)
class StudyCase(SimulationConfig):
    """A simulation of GenTD26 at a rate of one's own, with its users' bursts and its containers' load times."""

    busy_gpus: float = 6.4
    """GPUs that the recorded work keeps busy on average: the load times the GPUs that it is a load for."""
    hours: float = 6.0
    """Length of what is simulated."""
    rate_method: str = "superpose"
    first_day: str | None = None
    last_day: str | None = None
    loads: Path | None = None
    """Folder of the monitoring files; None: load times worked out from bytes and bandwidths."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        SimulationConfig.__post_init__(self)
        if self.trace is None:
            raise ConfigError("trace: a study of GenTD26 needs the path of lora_request_trace.csv")
        for name in ("busy_gpus", "hours"):
            if not 0 < getattr(self, name) < 1e6:
                raise ConfigError(f"{name}: must be greater than 0 and below 1e6, got {getattr(self, name)}")
        if self.rate_method not in scaled.METHODS:
            raise ConfigError(f"rate_method: unknown {self.rate_method!r}; use {' or '.join(scaled.METHODS)}")

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as plain values."""
        values = SimulationConfig.to_json(self)
        values["loads"] = self.loads.name if self.loads else None
        return values

    def hardware(self) -> Hardware:
        """Return the cluster."""
        made = SimulationConfig.hardware(replace(self, load_scale=1.0))
        if self.loads is not None:
            made = replace(made, measured=measured_loads.read(self.loads))
        return made if self.load_scale == 1 else made.loading(self.load_scale)

    def workload(self) -> Workload:
        """Make the workload; raises `WorkloadError`."""
        if self.trace is None:
            raise ConfigError("trace: a study of GenTD26 needs the path of lora_request_trace.csv")
        made = scaled.scaled(
            scaled.window(self.trace, self.first_day, self.last_day),
            busy_gpus=self.busy_gpus,
            hours=self.hours,
            method=self.rate_method,
            tenants=self.tenants,
            urgent_share=self.urgent_share,
            seed=self.seed,
        ).limited(self.limit)
        made = demanding(made, gpu_share=self.gpu_share, gpu_memory_gib=self.gpu_memory_gib, slots=self.slots)
        return declared(made, self.declared_sigma, self.seed) if self.forecaster == "declared" else made
