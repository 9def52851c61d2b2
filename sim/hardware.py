"""The cluster's physics: how long a load, a step and a transfer take, and how much memory a task needs.

Every figure has a source. Diffusion arithmetic is counted, not fitted: floating-point operations of one UNet forward as a
polynomial of the latent pixels, divided by what a GPU sustains. What a GPU sustains (`mfu`) and its overhead per step come from
published timings; docs/simulation.md sets the model beside them. Loads follow the platform's own monitoring (GenTD26):
bimodal, warm below 6 s and cold between 20 and 45 s, which falls out of where the bytes lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from engine.resources import GpuSpec, NodeSpec
from engine.tasks import SECOND, Micros, TaskSpec
from predictors import physics, step_times
from predictors.activations import TRAINING_ROWS
from predictors.step_times import StepTimes
from sim.caches import Source
from sim.measured_loads import MeasuredLoads

GIB = 1 << 30
MIB = 1 << 20
TERA = 10**12


class HardwareError(ValueError):
    """A cluster cannot be built; the message names the field and the remedy."""


@dataclass(frozen=True, slots=True)
class GpuModel:
    """A GPU product. Sources: vendors' data sheets (memory, dense half-precision peak), published timings (the rest)."""

    name: str
    memory_bytes: int
    peak_tflops: float
    mfu: float
    """Share of the peak that a diffusion UNet sustains at large sizes."""
    step_overhead_us: int
    """Time of one denoising step that no arithmetic explains: launches, scheduler, Python."""

    @property
    def flops(self) -> float:
        """Sustained floating-point operations per second."""
        return self.peak_tflops * TERA * self.mfu


GPU_MODELS: dict[str, GpuModel] = {
    gpu.name: gpu
    for gpu in (
        GpuModel("a100", 80 * GIB, 312.0, 0.45, 18_000),
        GpuModel("h100", 80 * GIB, 989.0, 0.30, 15_000),
        GpuModel("h200", 141 * GIB, 989.0, 0.30, 15_000),
        GpuModel("a10", 24 * GIB, 125.0, 0.40, 18_000),
        GpuModel("l4", 24 * GIB, 121.0, 0.30, 18_000),
        GpuModel("v100", 16 * GIB, 125.0, 0.35, 16_400),
        GpuModel("t4", 16 * GIB, 65.0, 0.30, 20_000),
        GpuModel("cpu", 4 * GIB, 0.1, 0.50, 1_000),
    )
}


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models. One UNet forward of n latent pixels costs ``quadratic n^2 + linear n + constant`` operations."""

    name: str
    weight_bytes: int
    quadratic: float
    linear: float
    constant: float
    decode_per_pixel: float
    """Operations of the image decoder per picture pixel."""
    native_size: int
    counted: physics.Family
    """The family's memory, from the one source that plans and predictions rest on."""

    def forward(self, width: int, height: int) -> float:
        """Operations of one UNet forward for one row."""
        pixels = (width // 8) * (height // 8)
        return self.quadratic * pixels * pixels + self.linear * pixels + self.constant


FAMILIES: dict[str, Family] = {
    "sd15": Family("sd15", int(2.55 * GIB), 7.30e3, 1.655e8, 3.0e9, 2.5e12 / 512**2, 512, physics.SD15),
    "sdxl": Family("sdxl", int(6.46 * GIB), 2.80e3, 3.636e8, 5.25e10, 10.5e12 / 1024**2, 1024, physics.SDXL),
}


@dataclass(frozen=True, slots=True)
class BatchRow:
    """What one task brings into a running batch."""

    family: str
    width: int
    height: int
    rows: float

    @property
    def bucket(self) -> tuple[str, int, int]:
        """What it has in common with those that go through the network together with it."""
        return self.family, self.width, self.height


class FirstRuns(Protocol):
    """What the first run in a Pod took beyond what it would have taken later, as measured."""

    def draw(self, method: str, model: str, seed: int, pod: int) -> Micros:
        """Return how much longer the first run in this Pod takes."""
        ...


class PodStarts(Protocol):
    """Times to start a Pod that were measured."""

    def draw(self, method: str, model: str, seed: int, nth: int) -> Micros:
        """Return how long the `nth` Pod of a kind takes."""
        ...


@dataclass(frozen=True, slots=True)
class Hardware:
    """A cluster and its constants. Speeds are bytes per second, spans microseconds."""

    nodes: tuple[NodeSpec, ...]
    reference_gpu: str = "a100"
    """Durations that a trace brings hold on this GPU; other models are faster or slower by their sustained operations."""
    family: str = "sdxl"
    """What a model is taken for when nothing else is known of it."""
    model_families: tuple[tuple[str, str], ...] = ()
    """Family by model name, for those that are known."""
    remote_bytes_per_s: int = 270_000_000
    disk_bytes_per_s: int = 2_000_000_000
    memory_bytes_per_s: int = 10_000_000_000
    pod_start_us: Micros = 1_500_000
    """Process, imports (forked from a warm one) and GPU context."""
    load_sigma: float = 0.25
    lora_load_us: Micros = 4_400_000
    """Cold load of one adapter; a Pod that holds it already pays nothing."""
    lora_sigma: float = 0.30
    noise_sigma: float = 0.05
    """Lognormal noise on run times that the model works out; times that a trace brings are taken as they are."""
    memory_sigma: float = 0.02
    dispatch_us: Micros = 500
    """Order to executor; reports take as long back."""
    pod_stop_us: Micros = 300_000
    result_bytes_per_picture: int = 2 * MIB
    network_bytes_per_s: int = 1_250_000_000
    marginal_slot: float | None = None
    """Share of a step's time that every further task in a Pod adds, whatever it is; None: `steps` and the arithmetic say."""
    steps: tuple[StepTimes, ...] = field(default_factory=step_times.read)
    """Steps of running batches as measured; where nothing fits, they are worked out."""
    recorded_gpu_share: float = 1.0
    """Share of a run time that a trace brings in which the GPU computes; only that part gets slower with others in the Pod."""
    default_steps: int = 30
    batch_rows: int = 4
    """Pictures denoised together; more are done in turns."""
    disk_cache_share: float = 0.05
    """Share of a node's disk that keeps models: about 30 SDXL models at the default size, of the service's 86."""
    memory_cache_share: float = 0.0625
    """Share of a node's memory that keeps models' files: about 10 SDXL models."""
    detect_us: Micros = 15 * SECOND
    """Silence after which a node counts as lost."""
    progress_reports: int = 0
    """TaskProgressed events per attempt of a training task."""
    running_checkpoints: bool = False
    """Whether each of them names a checkpoint that a later attempt goes on from."""
    gpu_models: dict[str, GpuModel] = field(default_factory=lambda: dict(GPU_MODELS))
    measured: MeasuredLoads | None = None
    """Load times as a service measured them, GPU by GPU; they replace those worked out from bytes and bandwidths."""
    pod_starts: PodStarts | None = None
    """What Pods of this very platform took to start beyond `pod_start_us`, loads included (`sim.calibration`); goes before all."""
    first_runs: FirstRuns | None = None
    """What the first run in a Pod takes longer (`sim.calibration`): what is loaded and set up only when it is needed."""

    def __post_init__(self) -> None:
        if not self.nodes:
            raise HardwareError("nodes: a cluster needs at least one node")
        self.gpu(self.reference_gpu, "reference_gpu")
        if self.marginal_slot is not None and not 0 <= self.marginal_slot <= 1:
            raise HardwareError(f"marginal_slot: must lie between 0 and 1, got {self.marginal_slot}")
        if not 0 <= self.recorded_gpu_share <= 1:
            raise HardwareError(f"recorded_gpu_share: must lie between 0 and 1, got {self.recorded_gpu_share}")
        if self.family not in FAMILIES:
            raise HardwareError(f"family: unknown {self.family!r}; known are {', '.join(sorted(FAMILIES))}")

    def gpu(self, name: str, field_name: str = "gpu_model") -> GpuModel:
        """Return a GPU model by its name."""
        found = self.gpu_models.get(name)
        if found is None:
            known = ", ".join(sorted(self.gpu_models))
            raise HardwareError(
                f"{field_name}: unknown GPU model {name!r}; known are {known}, or add one to Hardware.gpu_models"
            )
        return found

    def family_of(self, model: str) -> Family:
        """Return what family a model belongs to."""
        for name, family in self.model_families:
            if name == model:
                return FAMILIES[family]
        return FAMILIES[self.family]

    def model_bytes(self, method: str, model: str) -> int:
        """Bytes that a Pod of this method must bring to its GPU; 0 when it holds no model."""
        return 0 if method == "sleep" or not model else self.family_of(model).weight_bytes

    def fetch_us(self, size_bytes: int) -> Micros:
        """Median time from the model store to a node's disk."""
        return size_bytes * SECOND // self.remote_bytes_per_s

    def load_us(self, size_bytes: int, source: Source) -> Micros:
        """Median time from where the bytes lie to the GPU."""
        total = size_bytes * SECOND // self.memory_bytes_per_s
        if source is not Source.MEMORY:
            total += size_bytes * SECOND // self.disk_bytes_per_s
        if source is Source.REMOTE:
            total += self.fetch_us(size_bytes)
        return total

    def loading(self, scale: float) -> Hardware:
        """Return the same cluster with loads of models and adapters that take `scale` times as long."""
        return replace(
            self,
            remote_bytes_per_s=max(1, round(self.remote_bytes_per_s / scale)),
            disk_bytes_per_s=max(1, round(self.disk_bytes_per_s / scale)),
            memory_bytes_per_s=max(1, round(self.memory_bytes_per_s / scale)),
            lora_load_us=round(self.lora_load_us * scale),
            measured=self.measured.scaled(scale) if self.measured is not None else None,
        )

    def speed(self, gpu_model: str) -> float:
        """How many times as fast as the reference GPU."""
        if gpu_model == self.reference_gpu or gpu_model not in self.gpu_models:
            return 1.0
        return self.gpu_models[gpu_model].flops / self.gpu_models[self.reference_gpu].flops

    def transfer_us(self, pictures: int) -> Micros:
        """Time to bring the results of a task to the file store."""
        return pictures * self.result_bytes_per_picture * SECOND // self.network_bytes_per_s

    def run_us(self, task: TaskSpec, gpu_model: str, share: int = 1000) -> Micros:
        """Run time of a task that brings no duration of its own, without noise and transfer.

        ``sleep`` sleeps; training does a forward and a backward pass (three forwards) of a subject row and a prior row per step;
        generation does two forwards (guidance) per step and row, then decodes. A share of a GPU is that share of its arithmetic.
        """
        features = dict(task.features)
        if task.method == "sleep":
            return round(_number(features, "seconds", 1.0) * SECOND)
        gpu = self.gpu_models.get(gpu_model, self.gpu_models[self.reference_gpu])
        family = self.family_of(task.model)
        width = round(_number(features, "width", family.native_size))
        height = round(_number(features, "height", family.native_size))
        steps = _number(features, "steps", 400 if task.method == "dreambooth" else self.default_steps)
        images = max(1.0, _number(features, "images", 1.0))
        flops = gpu.flops * max(1, share) / 1000
        forward = family.forward(width, height)
        if task.method == "dreambooth":
            return round(steps * (2 * gpu.step_overhead_us + 2 * 3 * forward / flops * SECOND))
        turns = -(-images // self.batch_rows)
        denoise = steps * (turns * gpu.step_overhead_us + images * 2 * forward / flops * SECOND)
        return round(denoise + images * family.decode_per_pixel * width * height / flops * SECOND)

    def batch_row(self, task: TaskSpec, recorded: bool) -> tuple[BatchRow, float]:
        """Return what a task brings into the running batch of its Pod, and the share of its time that others there slow down.

        A recorded run time holds all its pictures and says nothing of their size: it counts as one row of the native size.
        ``sleep`` shares nothing with anybody.
        """
        family = self.family_of(task.model)
        row = BatchRow(family.name, family.native_size, family.native_size, 1.0)
        if recorded:
            return row, self.recorded_gpu_share
        if task.method == "sleep":
            return row, 0.0
        features = dict(task.features)
        rows = min(float(self.batch_rows), max(1.0, _number(features, "images", 1.0)))
        width = round(_number(features, "width", family.native_size))
        height = round(_number(features, "height", family.native_size))
        return BatchRow(family.name, width, height, 2.0 if task.method == "dreambooth" else rows), 1.0

    def step(self, gpu_model: str, family: str, width: int, height: int, rows: float) -> float:
        """Return the time of a step of a running batch over that of one row, as measured or worked out."""
        found = step_times.find(self.steps, gpu_model, family, width * height)
        if found is not None:
            return found.step(rows)
        gpu = self.gpu_models.get(gpu_model, self.gpu_models[self.reference_gpu])
        row_us = 2 * FAMILIES[family].forward(width, height) / gpu.flops * SECOND
        return (gpu.step_overhead_us + rows * row_us) / (gpu.step_overhead_us + row_us)

    def step_us(self, gpu_model: str, family: str, width: int, height: int, rows: float) -> float:
        """Return the time of a step of a running batch, in microseconds: measured shape, worked out size."""
        gpu = self.gpu_models.get(gpu_model, self.gpu_models[self.reference_gpu])
        one_us = gpu.step_overhead_us + 2 * FAMILIES[family].forward(width, height) / gpu.flops * SECOND
        return one_us * self.step(gpu_model, family, width, height, rows)

    def stretches(self, gpu_model: str, batch: Sequence[BatchRow]) -> list[float]:
        """Return how many times as long as alone each member of a Pod's running batch takes for a step.

        Pictures of one size go through the network together, other sizes one batch after the other: everybody waits for all.
        """
        if self.marginal_slot is not None:
            return [1.0 + self.marginal_slot * (len(batch) - 1)] * len(batch)
        if len(batch) == 1:
            return [1.0]
        together: dict[tuple[str, int, int], float] = {}
        for member in batch:
            together[member.bucket] = together.get(member.bucket, 0.0) + member.rows
        whole_us = sum(self.step_us(gpu_model, *bucket, rows) for bucket, rows in together.items())
        return [max(1.0, whole_us / self.step_us(gpu_model, *member.bucket, member.rows)) for member in batch]

    def shared_gain(self, gpu_model: str, slots: int) -> float:
        """Return how many times as many tasks a Pod with all its slots taken ends than one that takes them one by one."""
        family = FAMILIES[self.family]
        row = BatchRow(family.name, family.native_size, family.native_size, 1.0)
        stretch = self.stretches(gpu_model, [row] * slots)[0]
        return slots / (1.0 + self.recorded_gpu_share * (stretch - 1.0))

    def peak_memory_bytes(self, task: TaskSpec) -> int:
        """Peak memory per GPU, without noise: weights plus activations, and Adam's state for a full fine-tuning."""
        if task.method == "sleep":
            return 0
        features = dict(task.features)
        family = self.family_of(task.model)
        pixels = _number(features, "width", family.native_size) * _number(features, "height", family.native_size)
        rows = min(self.batch_rows, max(1, round(_number(features, "images", 1.0))))
        if task.method == "dreambooth":
            counted = family.counted
            full = "full" in (features.get("kind"), features.get("method"))
            return physics.peak_bytes(
                counted,
                weights_bytes=family.weight_bytes,
                pixels=pixels,
                rows=_number(features, "rows", TRAINING_ROWS),
                training=True,
                trained_parameters=counted.unet_parameters + counted.text_parameters if full else 0,
                frugal=bool(features.get("frugal")),
            )
        return physics.peak_bytes(family.counted, weights_bytes=family.weight_bytes, pixels=pixels, rows=rows)


PEAK_FEATURES = frozenset(("frugal", "height", "images", "kind", "method", "rows", "width"))
"""The features by which `Hardware.peak_memory_bytes` differs."""


def _number(features: dict[str, str | int | float], name: str, default: float) -> float:
    value = features.get(name, default)
    return float(value) if isinstance(value, int | float) else default


def cluster(
    nodes: int,
    gpus_per_node: int,
    gpu_model: str = "a100",
    *,
    cpu_cores: int = 96,
    memory_bytes: int = 1024 * GIB,
    disk_bytes: int = 4096 * GIB,
) -> tuple[NodeSpec, ...]:
    """Describe `nodes` equal machines; names sort in the order of their numbers."""
    if nodes < 1:
        raise HardwareError(f"nodes: must be at least 1, got {nodes}")
    if gpus_per_node < 0:
        raise HardwareError(f"gpus_per_node: must not be negative, got {gpus_per_node}")
    if gpu_model not in GPU_MODELS:
        raise HardwareError(f"gpu_model: unknown {gpu_model!r}; known are {', '.join(sorted(GPU_MODELS))}")
    gpu = GPU_MODELS[gpu_model]
    width = len(str(nodes - 1))
    made = []
    for number in range(nodes):
        name = f"node-{number:0{width}d}"
        gpus = tuple(GpuSpec(f"{name}-gpu-{index}", gpu.name, gpu.memory_bytes) for index in range(gpus_per_node))
        made.append(NodeSpec(name, gpus, cpu_cores * 1000, memory_bytes, disk_bytes, network_bps=10_000_000_000))
    return tuple(made)


def pooled(pools: Sequence[tuple[str, int]], gpus_per_node: int) -> tuple[NodeSpec, ...]:
    """Describe a mixed cluster from (GPU model, number of GPUs) pairs, in machines of up to `gpus_per_node` GPUs.

    The last machine of a pool takes the GPUs that are left. Every GPU brings an eighth of what `cluster` gives a machine of eight.
    """
    if gpus_per_node < 1:
        raise HardwareError(f"gpus_per_node: must be at least 1, got {gpus_per_node}")
    made = []
    for model, count in pools:
        if model not in GPU_MODELS:
            raise HardwareError(f"pools: unknown GPU model {model!r}; known are {', '.join(sorted(GPU_MODELS))}")
        nodes = -(-count // gpus_per_node)
        width = max(3, len(str(nodes)))
        for number in range(nodes):
            here = min(gpus_per_node, count - number * gpus_per_node)
            name = f"{model}-{number:0{width}d}"
            gpus = tuple(GpuSpec(f"{name}-gpu-{index}", model, GPU_MODELS[model].memory_bytes) for index in range(here))
            made.append(
                NodeSpec(
                    name, gpus, here * 12_000, here * 128 * GIB, here * 512 * GIB, network_bps=here * 1_250_000_000
                )
            )
    return tuple(made)
