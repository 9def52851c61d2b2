"""Examines a trace before anybody simulates it: what it asks for, what is wrong with it, and what to do about that.

Unlike a reader it does not stop at the first bad record: it counts them all and names one of each kind.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.resources import WHOLE_GPU
from engine.tasks import SECOND, Micros, TaskSpec
from sim.hardware import GPU_MODELS, cluster
from sim.readers.registry import Intake, ReaderOptions, TraceRow, detect, format_named, stamp, stream
from sim.trace_findings import Finding, findings
from sim.trace_load import Burst, Floats, Tail, burst, tail, wanted_by_hour
from sim.workload import WorkloadError

__all__ = ["Finding", "LoadLine", "Offer", "TraceReport", "examine", "parse_offers"]

_MACHINE = cluster(1, 1)[0]
"""What `aigc simulate` gives a node besides GPUs."""
_REPORT_EVERY = 5_000


@dataclass(frozen=True, slots=True)
class Offer:
    """Equal machines that a trace is held against."""

    model: str
    nodes: int
    gpus_per_node: int = 8

    @property
    def gpus(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, slots=True)
class LoadLine:
    """What tasks of one kind ask for. `gpus` figures are numbers of GPUs."""

    gpu_type: str
    """``all``, ``any`` (tasks that name no type), or the types that tasks are held to."""
    tasks: int
    gpu_hours: float
    mean_gpus: float
    """GPU time that arrives per time."""
    peak_hour_gpus: float
    """Wanted in the busiest hour, if nothing ever waited."""
    capacity: int | None
    """GPUs that these tasks may use; None without a cluster."""
    load: float | None
    """`mean_gpus` over capacity: at 1 or more the queue grows without end."""
    hours_above: float | None
    """Share of the hours in which more GPUs are wanted than there are."""


@dataclass(frozen=True, slots=True)
class TraceReport:
    """Everything the doctor found."""

    name: str
    format: str
    records: int
    kept: int
    facts: dict[str, int | float | str]
    seconds: dict[str, float]
    """Run time: p10, p50, p90, p99, max and mean."""
    gpus: dict[str, int]
    """Tasks by the GPUs they ask for in all, the twelve commonest numbers."""
    burst: Burst
    tail: Tail
    load: tuple[LoadLine, ...]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> int:
        """Findings that a simulation would fail on or be wrong by."""
        return sum(finding.severity == "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"schema": 1, **asdict(self)}


def parse_offers(text: str) -> tuple[Offer, ...]:
    """Read ``MODEL:NODESxGPUS`` several times over, such as ``a100:16x8,t4:40x2``; raises `WorkloadError`."""
    offers = []
    for part in text.split(","):
        model, _, size = part.strip().partition(":")
        nodes, _, gpus = size.partition("x")
        if not model or not nodes.isdecimal() or not gpus.isdecimal() or int(nodes) < 1 or int(gpus) < 1:
            raise WorkloadError(f"cluster: {part.strip()!r} is not MODEL:NODESxGPUS, such as a100:16x8")
        offers.append(Offer(model.lower(), int(nodes), int(gpus)))
    return tuple(offers)


@dataclass(slots=True)
class Scan:
    """What one pass over a trace keeps: a few numbers per task, and counts."""

    offers: Sequence[Offer] = ()
    line: array[int] = field(default_factory=lambda: array("q"))
    at: array[int] = field(default_factory=lambda: array("q"))
    work: array[int] = field(default_factory=lambda: array("q"))
    gpus: array[float] = field(default_factory=lambda: array("d"))
    kind: array[int] = field(default_factory=lambda: array("q"))
    """Index into `kinds`."""
    kinds: dict[tuple[str, ...], int] = field(default_factory=dict)
    tenants: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    groups: set[str] = field(default_factory=set)
    sizes: Counter[int] = field(default_factory=Counter)
    seen: dict[str, int] = field(default_factory=dict)
    twice: list[tuple[int, int, str]] = field(default_factory=list)
    """(line, line of the first, identity) of the first few identities that come again."""
    again: int = 0
    alike: dict[int, int] = field(default_factory=dict)
    copies: list[int] = field(default_factory=list)
    """Lines that ask for the same at the same moment as another."""
    back: list[int] = field(default_factory=list)
    """Lines whose moment lies before that of the record ahead of it."""
    furthest_back: Micros = 0
    impossible: dict[str, list[int]] = field(default_factory=dict)
    """Reason -> lines."""
    understated: int = 0
    """Tasks that ran longer than was declared."""
    gangs: int = 0

    def add(self, row: TraceRow) -> None:
        """Take one row in."""
        task = row.task
        if self.at and row.at < self.at[-1]:
            self.back.append(row.line)
            self.furthest_back = max(self.furthest_back, self.at[-1] - row.at)
        demand = task.demand
        gpus = task.members * demand.gpus * demand.gpu_share / WHOLE_GPU
        work = row.truth.work_us or 0
        self.line.append(row.line)
        self.at.append(row.at)
        self.work.append(work)
        self.gpus.append(gpus)
        self.kind.append(self.kinds.setdefault(demand.gpu_models, len(self.kinds)))
        self.tenants[task.tenant] += 1
        self.models[task.model] += 1
        self.groups.add(task.group)
        self.sizes[task.members * demand.gpus] += 1
        self.gangs += task.members > 1
        self.understated += task.declared_us is not None and work > task.declared_us
        first = self.seen.setdefault(task.req_no, row.line)
        if first != row.line:
            self.again += 1
            if len(self.twice) < 3:
                self.twice.append((row.line, first, task.req_no))
        alike = hash((row.at, task.tenant, task.group, work, task.members, demand, task.features))
        if self.alike.setdefault(alike, row.line) != row.line:
            self.copies.append(row.line)
        if self.offers:
            reason = obstacle(task, self.offers)
            if reason:
                self.impossible.setdefault(reason, []).append(row.line)


def obstacle(task: TaskSpec, offers: Sequence[Offer]) -> str:
    """Return why a task can never run on these machines, empty when it can."""
    demand = task.demand
    fitting = [offer for offer in offers if not demand.gpu_models or offer.model in demand.gpu_models]
    if not fitting:
        return f"held to GPU types the cluster lacks ({', '.join(demand.gpu_models)})"
    if demand.gpus > max(offer.gpus_per_node for offer in fitting):
        return "asks for more GPUs on one node than a node has"
    whole = task.members * demand.gpus * demand.gpu_share / WHOLE_GPU
    if whole > sum(offer.gpus for offer in fitting):
        return "asks for more GPUs than the cluster has"
    cards = [GPU_MODELS[offer.model].memory_bytes for offer in fitting if offer.model in GPU_MODELS]
    if len(cards) == len(fitting) and demand.gpu_memory_bytes > max(cards):
        return "asks for more GPU memory than a card has"
    if demand.cpu_milli > _MACHINE.cpu_milli:
        return f"asks for more CPU cores than a node has ({_MACHINE.cpu_milli // 1000})"
    if demand.memory_bytes > _MACHINE.memory_bytes:
        return f"asks for more memory than a node has ({_MACHINE.memory_bytes >> 30} GiB)"
    return ""


def examine(
    path: Path,
    offers: Iterable[Offer] = (),
    options: ReaderOptions | None = None,
    format_name: str = "",
    on_progress: Callable[[int], None] | None = None,
) -> TraceReport:
    """Read a trace to its end and report; raises `WorkloadError` only when no record can be read at all.

    `offers` is the cluster it is held against; without it there is no word on capacity. `on_progress` is told the number of rows.
    """
    form = format_named(format_name) if format_name else detect(path)
    intake = Intake(path, strict=False)
    scan = Scan(tuple(offers))
    for row in stream(path, intake, options or ReaderOptions(), form.name):
        scan.add(row)
        if on_progress is not None and len(scan.at) % _REPORT_EVERY == 0:
            on_progress(len(scan.at))
    at = np.array(scan.at, dtype=np.int64)
    work_s = np.array(scan.work, dtype=np.int64) / SECOND
    gpu_seconds = work_s * np.array(scan.gpus)
    bursts, tails = burst(np.sort(at)), tail(work_s, gpu_seconds)
    load = _load(scan)
    return TraceReport(
        name=path.name,
        format=form.name,
        records=intake.records,
        kept=len(at),
        facts=_facts(intake, scan),
        seconds=_seconds(work_s),
        gpus={str(size): count for size, count in scan.sizes.most_common(12)},
        burst=bursts,
        tail=tails,
        load=load,
        findings=findings(intake, scan, bursts, tails, load),
    )


def _seconds(work_s: Floats) -> dict[str, float]:
    if not len(work_s):
        return {}
    found = {f"p{q}": float(np.percentile(work_s, q)) for q in (10, 50, 90, 99)}
    return {**found, "max": float(work_s.max()), "mean": float(work_s.mean())}


def _facts(intake: Intake, scan: Scan) -> dict[str, int | float | str]:
    facts: dict[str, int | float | str] = {}
    if scan.at:
        first, last = min(scan.at), max(scan.at)
        facts.update({"first": stamp(first), "last": stamp(last), "days": round((last - first) / SECOND / 86_400, 3)})
    facts["tenants"] = len(scan.tenants)
    named = {"groups": len(scan.groups - {""}), "models": len(scan.models.keys() - {""})}
    facts.update({name: number for name, number in named.items() if number})
    facts["gangs"] = scan.gangs
    facts.update(sorted(intake.facts.items()))
    facts.update(sorted(intake.counts.items()))
    return facts


def _load(scan: Scan) -> tuple[LoadLine, ...]:
    at, work = np.array(scan.at, dtype=np.int64), np.array(scan.work, dtype=np.int64)
    gpus, kind = np.array(scan.gpus), np.array(scan.kind, dtype=np.int64)
    if not len(at):
        return ()
    span_s = max(1.0, float(at.max() - at.min()) / SECOND)

    def line(name: str, chosen: Any, models: tuple[str, ...]) -> LoadLine:
        hours = wanted_by_hour(at[chosen], work[chosen], gpus[chosen])
        seconds = float((work[chosen] / SECOND * gpus[chosen]).sum())
        capacity = None
        if scan.offers:
            capacity = sum(offer.gpus for offer in scan.offers if not models or offer.model in models)
        return LoadLine(
            gpu_type=name,
            tasks=int(chosen.sum()),
            gpu_hours=seconds / 3600,
            mean_gpus=seconds / span_s,
            peak_hour_gpus=float(hours.max()),
            capacity=capacity,
            load=seconds / span_s / capacity if capacity else None,
            hours_above=float((hours > capacity).mean()) if capacity is not None else None,
        )

    lines = [line("all", np.ones(len(at), dtype=bool), ())]
    if set(scan.kinds) != {()}:
        named = sorted(scan.kinds.items())
        lines += [line("|".join(models) or "any", kind == number, models) for models, number in named]
    return tuple(lines)
