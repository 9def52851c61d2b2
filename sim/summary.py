"""What the metrics say in the end: plain numbers, ready for a table, JSON or a page."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from engine.tasks import SECOND, TaskState
from sim.sketches import Spread

if TYPE_CHECKING:
    from sim.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Series:
    """A quantity over time: means or sums per bin."""

    bin_s: float
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """Everything a run showed. Waiting counts from submission to the first start, completion to the finish, in seconds."""

    waiting: dict[str, Spread]
    completion: dict[str, Spread]
    """By ``all``, ``type TP``, ``type GC``, ``priority urgent``, ``priority ordinary``, ``tenant NAME``."""
    waiting_curve: dict[str, tuple[tuple[float, float], ...]]
    ends: dict[str, int]
    """Terminal states; ``open`` counts tasks that were never over."""
    counts: dict[str, int]
    failures: dict[str, int]
    stops: dict[str, int]
    gpu: dict[str, float]
    """GPU hours, and shares: ``allocated`` and ``busy`` of what was there, ``fragmented`` of what was free."""
    loads: dict[str, Spread]
    """Pod creation with model load: ``first on node`` and ``again on node``."""
    fairness: dict[str, float]
    tenant_gpu_hours: dict[str, float]
    coverage: dict[str, float]
    makespan_s: float
    series: dict[str, Series]
    """``queue``, ``running``, ``gpus``, ``allocated``, ``busy``, ``fragmented``, ``loads``."""
    heat: dict[str, Series]
    """By node: the busy share of its GPUs over time."""

    def to_json(self) -> dict[str, Any]:
        """Return plain dictionaries and lists."""
        return asdict(self)


def summarise(metrics: Metrics) -> Summary:
    """Put the fold's state into numbers."""
    ledger = metrics.ledger
    metrics.shares.close(metrics.last_at)
    hours = {
        name: ledger.gpu_hours(series) for name, series in (("capacity", ledger.capacity), ("granted", ledger.granted))
    }
    hours["busy"], hours["splinters"] = ledger.gpu_hours(ledger.busy), ledger.gpu_hours(ledger.splinters)
    free = hours["capacity"] - hours["granted"]
    counts = metrics.counts
    attempts = counts["attempts"]
    waiting, completion = metrics.waiting, metrics.completion
    ends = {
        state.value: metrics.ends[state.value]
        for state in (TaskState.FINISHED, TaskState.CANCELLED, TaskState.REJECTED, TaskState.DEAD)
    }
    begun = metrics.first_at or 0
    return Summary(
        waiting={name: sketch.spread() for name, sketch in sorted(waiting.items())},
        completion={name: sketch.spread() for name, sketch in sorted(completion.items())},
        waiting_curve={name: tuple(sketch.curve()) for name, sketch in sorted(waiting.items())},
        ends={**ends, "open": len(metrics.open)},
        counts=dict(sorted(counts.items())),
        failures=dict(sorted(metrics.failures.items())),
        stops=dict(sorted(metrics.stops.items())),
        gpu={
            "capacity_hours": hours["capacity"],
            "allocated_hours": hours["granted"],
            "busy_hours": hours["busy"],
            "allocated": _share(hours["granted"], hours["capacity"]),
            "busy": _share(hours["busy"], hours["capacity"]),
            "fragmented": _share(hours["splinters"], free),
        },
        loads={"first on node": metrics.loads_cold.spread(), "again on node": metrics.loads_again.spread()},
        fairness={
            "jain": metrics.shares.fairness(),
            "contended_hours": metrics.shares.contended_hours(),
            "warm_starts": _share(counts["warm_starts"], attempts),
        },
        tenant_gpu_hours=metrics.shares.gpu_hours(),
        coverage=metrics.coverage.report(),
        makespan_s=(metrics.last_end_at - begun) / SECOND,
        series=_series(metrics),
        heat={name: Series(bin_s, tuple(values)) for name, (bin_s, values) in sorted(ledger.heat().items())},
    )


def _series(metrics: Metrics) -> dict[str, Series]:
    ledger = metrics.ledger
    whole = (("queue", metrics.queue, 1), ("running", metrics.running, 1), ("gpus", ledger.capacity, 1000))
    shares = (("allocated", ledger.granted, 1000), ("busy", ledger.busy, 1000), ("fragmented", ledger.splinters, 1000))
    found = {
        name: Series(bins.width_us / SECOND, tuple(value / scale for value in bins.means()))
        for name, bins, scale in whole + shares
    }
    found["loads"] = Series(metrics.load_bins.width_us / SECOND, tuple(metrics.load_bins.sums()))
    return found


def _share(part: float, whole: float) -> float:
    return min(1.0, max(0.0, part / whole)) if whole > 0 else 0.0
