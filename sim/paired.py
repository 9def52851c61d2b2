"""Is one profile better than another, or was it luck? Runs both over several seeds and takes the differences seed by seed.

In one seed all profiles meet the same arrivals, run times and failures, so what differs is their decisions: the interval of the
paired difference is much narrower than the intervals of the two means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rich.table import Table

from sim.configuration import ConfigError, SimulationConfig
from sim.simulate import Progress, SimulationResult, compare
from sim.summary import Summary

# Two-sided 95% quantiles of Student's t by degrees of freedom; beyond 30 the normal one is near enough.
_T95: tuple[float, ...] = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
_T95 += (2.12, 2.11, 2.10, 2.09, 2.09, 2.08, 2.07, 2.07, 2.06, 2.06, 2.06, 2.05, 2.05, 2.05, 2.04)

MEASURES: dict[str, Callable[[Summary], float]] = {
    "mean waiting, s": lambda summary: summary.waiting["all"].mean,
    "p99 waiting, s": lambda summary: summary.waiting["all"].p99,
    "mean waiting of urgent tasks, s": lambda summary: summary.waiting["priority urgent"].mean,
    "p99 waiting of urgent tasks, s": lambda summary: summary.waiting["priority urgent"].p99,
    "mean completion, s": lambda summary: summary.completion["all"].mean,
    "started in a warm Pod, %": lambda summary: 100 * summary.fairness["warm_starts"],
    "Jain's index": lambda summary: summary.fairness["jain"],
}


@dataclass(frozen=True, slots=True)
class Difference:
    """Profile minus baseline, over seeds."""

    profile: str
    measure: str
    baseline_mean: float
    mean: float
    half_width: float
    """Of the 95% interval of the mean difference, by Student's t over the seeds."""

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return abs(self.mean) > self.half_width


def compare_over_seeds(
    config: SimulationConfig, profiles: Sequence[str], seeds: int, on_progress: Progress | None = None
) -> tuple[list[SimulationResult], list[Difference]]:
    """Compare profiles with the first one over `seeds` seeds from the configuration's own on.

    Returns every run, and every profile's differences from the first. Measures that a run has no data for are left out.
    """
    if len(profiles) < 2:
        raise ConfigError("compare: name at least two profiles, the baseline first, such as fifo,aigc")
    if seeds < 2:
        raise ConfigError(f"seeds: an interval needs at least 2, got {seeds}")
    runs: list[SimulationResult] = []
    for number in range(seeds):
        step = _part(on_progress, number, seeds)
        runs += compare(replace(config, seed=config.seed + number), profiles, step)
    found = []
    for column, profile in enumerate(profiles[1:], 1):
        for name, measure in MEASURES.items():
            try:
                pairs = [
                    (measure(runs[row].summary), measure(runs[row + column].summary))
                    for row in range(0, len(runs), len(profiles))
                ]
            except KeyError:
                continue
            found.append(difference(profile, name, pairs))
    return runs, found


def render_differences(differences: Sequence[Difference], baseline: str) -> Table:
    """Return the differences as a table for people."""
    table = Table(title=f"Differences from {baseline}, 95% intervals over seeds", title_justify="left")
    for heading in ("profile", "measure", baseline, "difference", "interval", ""):
        table.add_column(heading, justify="left" if heading in {"profile", "measure", ""} else "right")
    for each in differences:
        low, high = each.mean - each.half_width, each.mean + each.half_width
        verdict = "clear" if each.clear else "may be luck"
        cells = (f"{each.baseline_mean:.2f}", f"{each.mean:+.2f}", f"{low:+.2f} .. {high:+.2f}", verdict)
        table.add_row(each.profile, each.measure, *cells)
    return table


def student_95(degrees: int) -> float:
    """Return the two-sided 95% quantile of Student's t; `degrees` of freedom, at least 1."""
    return _T95[degrees - 1] if degrees <= len(_T95) else 1.96


def difference(profile: str, name: str, pairs: Sequence[tuple[float, float]]) -> Difference:
    """Return the mean of the differences of (baseline, profile) pairs, one per seed and at least two, with its interval."""
    count = len(pairs)
    gaps = [other - base for base, other in pairs]
    mean = sum(gaps) / count
    spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / (count - 1))
    half_width = student_95(count - 1) * spread / math.sqrt(count)
    return Difference(profile, name, sum(base for base, _ in pairs) / count, mean, half_width)


def _part(on_progress: Progress | None, number: int, count: int) -> Progress | None:
    if on_progress is None:
        return None
    report = on_progress

    def part(share: float, text: str) -> None:
        report((number + share) / count, f"seed {number + 1} of {count}, {text}")

    return part
