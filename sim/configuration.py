"""What to simulate, checked where it enters: every message names the field and the remedy."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sim import synthetic
from sim.faults import Fault, FaultPlan
from sim.hardware import FAMILIES, GPU_MODELS, Hardware, cluster, pooled
from sim.readers import registry
from sim.readers.gpu_types import held_to
from sim.synthetic import SyntheticConfig
from sim.workload import Workload, declared, demanding, with_models

FORECASTERS = ("online", "declared", "oracle", "none")
_HOUR_US = 3_600_000_000
_MINUTE_US = 60_000_000


class ConfigError(ValueError):
    """A simulation cannot be run as configured."""


@dataclass(frozen=True, slots=True)
class SimulationConfig:
    """One run. Equal configurations give equal results, byte for byte."""

    trace: Path | None = None
    """A file in any format of `sim.readers.registry`; None: synthetic."""
    trace_format: str = ""
    """The format's name; empty: told by the file."""
    synthetic: SyntheticConfig | None = None
    """The synthetic workload; None: GenTD26's figures with `synthetic_tasks` tasks and this run's seed."""
    synthetic_tasks: int = 10_000
    nodes: int = 8
    gpus_per_node: int = 8
    gpu_model: str = "a100"
    family: str = "sdxl"
    """Family that models are taken for: decides the bytes of a load and memory."""
    profile: str = "aigc"
    """A profile's name, or the path of a TOML file."""
    seed: int = 0
    forecaster: str = "online"
    declared_sigma: float = 0.5
    """Spread of the error of declared run times, where ``declared`` has to make them up."""
    rate_scale: float = 1.0
    limit: int | None = None
    step_ms: float = 0.0
    """The scheduler decides at most once in so many milliseconds, as one does that waits for a disk; 0: at every instant."""
    until_hours: float | None = None
    """Stop at this simulated time; None: when every task is over."""
    tenants: int = 4
    urgent_share: float = 0.1
    gpu_share: int = 1000
    """Thousandths of a GPU that each task of GenTD26 or the synthetic workload takes."""
    gpu_memory_gib: float = 24.0
    slots: int = 1
    """Tasks that one Pod runs at once."""
    recorded_gpu_share: float = 1.0
    """Share of a run time that a trace brings in which the GPU computes: others in the Pod make only that part longer."""
    mtbf_hours: float | None = None
    """Mean time between failures of a node; None: none fails."""
    mttr_minutes: float = 30.0
    gpu_mtbf_hours: float | None = None
    gpu_mttr_minutes: float = 240.0
    attempt_crash_ppm: int = 0
    faults: tuple[Fault, ...] = ()
    pools: tuple[tuple[str, int], ...] = ()
    """A mixed cluster: GPU model and number of its GPUs, in nodes of `gpus_per_node` of which the last may be smaller.
    Empty: `nodes` full nodes of `gpu_model`."""
    reference_gpu: str = ""
    """GPU model that the workload's run times hold on. Empty: a100, but for batch traces the cluster's own (first) model, so that
    their jobs run as long as they did."""
    load_scale: float = 1.0
    """Loads of models and adapters take so many times as long."""
    model_scale: float = 1.0
    """So many times as many different models are asked for (`sim.workload.with_models`)."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if self.trace is not None and self.synthetic is not None:
            raise ConfigError("trace, synthetic: give one of the two, not both")
        for name in ("nodes", "gpus_per_node", "tenants", "synthetic_tasks", "slots"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.trace_format and self.trace_format not in {form.name for form in registry.FORMATS}:
            known = ", ".join(form.name for form in registry.FORMATS)
            raise ConfigError(f"trace_format: unknown {self.trace_format!r}; known are {known}")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit: must be at least 1, got {self.limit}; leave it out to take every task")
        if self.gpu_model not in GPU_MODELS:
            raise ConfigError(f"gpu_model: unknown {self.gpu_model!r}; known are {', '.join(sorted(GPU_MODELS))}")
        for model, count in self.pools:
            if model not in GPU_MODELS:
                raise ConfigError(f"pools: unknown GPU model {model!r}; known are {', '.join(sorted(GPU_MODELS))}")
            if count < 1:
                raise ConfigError(f"pools: {model} needs at least 1 GPU, got {count}; leave out what is not there")
        if self.reference_gpu and self.reference_gpu not in GPU_MODELS:
            raise ConfigError(
                f"reference_gpu: unknown {self.reference_gpu!r}; known are {', '.join(sorted(GPU_MODELS))}"
            )
        if self.family not in FAMILIES:
            raise ConfigError(f"family: unknown {self.family!r}; known are {', '.join(sorted(FAMILIES))}")
        if self.forecaster not in FORECASTERS:
            raise ConfigError(f"forecaster: unknown {self.forecaster!r}; known are {', '.join(FORECASTERS)}")
        if not 0 <= self.step_ms <= 60_000:
            raise ConfigError(f"step_ms: must lie between 0 and 60000, got {self.step_ms}")
        if not 0 <= self.urgent_share <= 1:
            raise ConfigError(f"urgent_share: must lie between 0 and 1, got {self.urgent_share}")
        for name in (
            "rate_scale",
            "mttr_minutes",
            "gpu_mttr_minutes",
            "until_hours",
            "mtbf_hours",
            "gpu_mtbf_hours",
            "load_scale",
            "model_scale",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1e9:
                raise ConfigError(f"{name}: must be greater than 0 and below 1e9, got {value}")
        if not 0 <= self.recorded_gpu_share <= 1:
            raise ConfigError(f"recorded_gpu_share: must lie between 0 and 1, got {self.recorded_gpu_share}")
        if not 1 <= self.gpu_share <= 1000:
            raise ConfigError(f"gpu_share: must lie between 1 and 1000 thousandths, got {self.gpu_share}")
        if not 0 <= self.gpu_memory_gib < 1e6:
            raise ConfigError(f"gpu_memory_gib: must be at least 0 and below 1e6, got {self.gpu_memory_gib}")
        if not 0 <= self.attempt_crash_ppm <= 1_000_000:
            raise ConfigError(f"attempt_crash_ppm: must lie between 0 and 1000000, got {self.attempt_crash_ppm}")

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as plain values; the trace by its file name, so that results compare between machines."""
        values = asdict(self)
        values["trace"] = self.trace.name if self.trace else None
        values["faults"] = [asdict(fault) for fault in self.faults]
        return values

    def digest(self) -> str:
        """Return a short hash of every field."""
        return hashlib.blake2b(json.dumps(self.to_json(), sort_keys=True).encode(), digest_size=8).hexdigest()

    def hardware(self) -> Hardware:
        """Return the cluster."""
        if self.pools:
            nodes = pooled(self.pools, self.gpus_per_node)
        else:
            nodes = cluster(self.nodes, self.gpus_per_node, self.gpu_model)
        hardware = Hardware(
            nodes,
            family=self.family,
            reference_gpu=self.reference_gpu or self._reference(),
            recorded_gpu_share=self.recorded_gpu_share,
        )
        return hardware if self.load_scale == 1 else hardware.loading(self.load_scale)

    def fault_plan(self) -> FaultPlan:
        """Return what will break."""
        return FaultPlan(
            node_mtbf_us=round((self.mtbf_hours or 0) * _HOUR_US),
            node_mttr_us=round(self.mttr_minutes * _MINUTE_US),
            gpu_mtbf_us=round((self.gpu_mtbf_hours or 0) * _HOUR_US),
            gpu_mttr_us=round(self.gpu_mttr_minutes * _MINUTE_US),
            attempt_crash_ppm=self.attempt_crash_ppm,
            faults=self.faults,
        )

    def until_us(self) -> int | None:
        """Return the end of the run, in microseconds."""
        return None if self.until_hours is None else round(self.until_hours * _HOUR_US)

    def workload(self) -> Workload:
        """Read or make the workload; raises `WorkloadError`."""
        if self.trace is None:
            workload, of_service = self._synthetic_workload(), True
        else:
            form = self._format(self.trace)
            workload, of_service = registry.read(self.trace, self._reader_options(), form.name), form.service
            workload = workload if of_service else held_to(workload, self._models())
        if of_service:
            workload = demanding(
                workload, gpu_share=self.gpu_share, gpu_memory_gib=self.gpu_memory_gib, slots=self.slots
            )
        if self.forecaster == "declared":
            workload = declared(workload, self.declared_sigma, self.seed)
        return with_models(workload, self.model_scale).scaled(self.rate_scale)

    def _format(self, trace: Path) -> registry.TraceFormat:
        return registry.format_named(self.trace_format) if self.trace_format else registry.detect(trace)

    def _models(self) -> list[str]:
        return [model for model, _ in self.pools] or [self.gpu_model]

    def _reference(self) -> str:
        """Return the GPU model that run times hold on, where nobody said."""
        batch = self.trace is not None and self._format(self.trace).batch
        return self._models()[0] if batch else "a100"

    def _reader_options(self) -> registry.ReaderOptions:
        return registry.ReaderOptions(
            limit=self.limit,
            gpus_per_node=self.gpus_per_node,
            tenants=self.tenants,
            urgent_share=self.urgent_share,
            seed=self.seed,
        )

    def _synthetic_workload(self) -> Workload:
        made = self.synthetic or SyntheticConfig(
            tasks=self.synthetic_tasks, tenants=self.tenants, urgent_share=self.urgent_share, seed=self.seed
        )
        return synthetic.make(made).limited(self.limit)
