"""Measures a workload: the statistics that a synthetic one is fitted to, computed the same way for both.

``python -m sim.likeness [lora_request_trace.csv]`` prints how near the generator comes.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.tasks import SECOND
from sim.workload import Arrival, Workload

GENTD26: dict[str, float] = {
    "gap_cv": 12.0,
    "dispersion_1min": 3.8,
    "dispersion_10min": 27.0,
    "dispersion_1h": 140.0,
    "peak_to_mean_1h": 9.0,
    "seconds_p10": 13.0,
    "seconds_p50": 23.0,
    "seconds_p90": 53.0,
    "seconds_p99": 106.0,
    "lora_0_median_s": 21.0,
    "lora_1_median_s": 48.0,
    "images_8_to_1": 29.0 / 20.0,
    "model_top_1": 0.307,
    "model_top_10": 0.866,
    "group_top_1_percent": 0.277,
    "lru_1": 0.25,
    "lru_4": 0.66,
    "lru_16": 0.95,
}
"""The published trace's own figures (whole file; all but the last three rows of models and groups over all requests)."""


def measure(workload: Workload) -> dict[str, float]:
    """Return the statistics by the names of `GENTD26`; figures that the workload cannot give are absent."""
    arrivals = workload.arrivals
    at = np.array([arrival.at for arrival in arrivals], dtype=np.float64) / SECOND
    gaps = np.diff(at)
    found: dict[str, float] = {}
    if len(gaps) > 1 and gaps.mean() > 0:
        found["gap_cv"] = float(gaps.std() / gaps.mean())
    for name, window_s in (("1min", 60), ("10min", 600), ("1h", 3600)):
        counts = np.bincount((at // window_s).astype(np.int64))
        found[f"dispersion_{name}"] = float(counts.var() / counts.mean())
        found[f"peak_to_mean_{name}"] = float(counts.max() / counts.mean())
    done = [arrival for arrival in arrivals if arrival.truth.work_us is not None and arrival.truth.fails_with is None]
    if done:
        found.update(_seconds(done))
    models = Counter(arrival.task.model for arrival in arrivals)
    groups = Counter(arrival.task.group for arrival in arrivals)
    shares = [count / len(arrivals) for _, count in models.most_common()]
    found["model_top_1"] = shares[0]
    found["model_top_10"] = sum(shares[:10])
    top = max(1, len(groups) // 100)
    found["group_top_1_percent"] = sum(count for _, count in groups.most_common(top)) / len(arrivals)
    for size in (1, 4, 16):
        found[f"lru_{size}"] = _hit_rate([arrival.task.model for arrival in arrivals], size)
    return found


def _seconds(done: Sequence[Arrival]) -> dict[str, float]:
    seconds = np.array([(arrival.truth.work_us or 0) / SECOND for arrival in done])
    features = [dict(arrival.task.features) for arrival in done]
    found = {f"seconds_p{q}": float(np.percentile(seconds, q)) for q in (10, 50, 90, 99)}
    for count in (0, 1):
        chosen = seconds[[each.get("loras", 0) == count for each in features]]
        if len(chosen):
            found[f"lora_{count}_median_s"] = float(np.median(chosen))
    one, eight = (seconds[[each.get("images", 1) == count for each in features]] for count in (1, 8))
    if len(one) and len(eight):
        found["images_8_to_1"] = float(np.median(eight) / np.median(one))
    return found


def _hit_rate(names: list[str], size: int) -> float:
    """Return how often the next model is among the `size` models used last."""
    held: OrderedDict[str, None] = OrderedDict()
    hits = 0
    for name in names:
        if name in held:
            hits += 1
            held.move_to_end(name)
        else:
            held[name] = None
            if len(held) > size:
                held.popitem(last=False)
    return hits / len(names)


def table(trace: Path | None, seeds: int = 9) -> str:
    """Return the published figures, those of a file at hand, and the median and range over synthetic workloads, as Markdown."""
    from sim import gentd26, synthetic

    here = measure(gentd26.read(trace)) if trace else {}
    runs = [measure(synthetic.make(synthetic.SyntheticConfig(seed=seed))) for seed in range(seeds)]
    lines = ["| figure | published | file at hand | synthetic, median | range |", "|---|---|---|---|---|"]
    for name, published in GENTD26.items():
        found = sorted(run[name] for run in runs)
        held = f"{here[name]:.2f}" if name in here else "-"
        lines.append(
            f"| {name} | {published:.2f} | {held} | {found[seeds // 2]:.2f} | {found[0]:.2f} - {found[-1]:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
