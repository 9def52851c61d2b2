"""What the trace doctor says: each finding with its weight, how often, one example, and the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from engine.tasks import SECOND
from sim.readers.rows import Intake
from sim.trace_load import Burst, Tail

if TYPE_CHECKING:
    from sim.trace_doctor import LoadLine, Scan

Severity = Literal["error", "warning", "info"]
_RANK: dict[Severity, int] = {"error": 0, "warning": 1, "info": 2}
BURSTY_CV = 3.0
"""Gaps that vary more than this make formulas for Poisson arrivals useless."""
BURSTY_DISPERSION = 10.0
BUSY_LOAD = 0.9
"""Share of capacity from which queues are long and sensitive."""
HEAVY_INDEX = 2.0
HOLE_SHARE = 0.2
HOLE_US = 6 * 3600 * SECOND
COPIES_SHARE = 0.05
LACK_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know about a trace before using it."""

    severity: Severity
    """An error makes a simulation fail or answer another question; a warning bends its answer; the rest is good to know."""
    topic: str
    message: str
    count: int
    """Records, hours or tasks that it concerns."""
    example: str
    """A place in the file, where there is one."""
    remedy: str


def findings(intake: Intake, scan: Scan, burst: Burst, tail: Tail, load: Sequence[LoadLine]) -> tuple[Finding, ...]:
    """Return everything worth saying, the gravest first."""
    found = [
        *_records(intake, len(scan.at)),
        *_identities(intake, scan),
        *_clock(intake, scan),
        *_capacity(intake, scan, load),
        *_shape(burst, tail, scan),
    ]
    return tuple(sorted(found, key=lambda finding: _RANK[finding.severity]))


def _records(intake: Intake, kept: int) -> Iterator[Finding]:
    if not kept:
        yield Finding("error", "empty", "no record can be simulated", intake.records, "", "check the format (--format)")
    for kind, problem in intake.bad.items():
        negative = "negative" in kind
        topic = "clock" if negative else "missing" if "(missing)" in kind else "value"
        remedy = (
            "the end lies before the beginning or a time is below zero: drop the records, or mend the clock they were taken with"
            if negative
            else "mend or remove the records; a simulation stops at the first one"
        )
        yield Finding(
            "error", topic, f"wrong {kind}: {problem.message}", problem.count, f"{intake.unit} {problem.line}", remedy
        )
    for reason, problem in intake.skipped.items():
        remedy = (
            "nothing, if they are to be left out; `--cpu-tasks` keeps those without a GPU" if "GPU" in reason else ""
        )
        yield Finding(
            "info",
            "skipped",
            f"left out: {reason}",
            problem.count,
            f"{intake.unit} {problem.line}",
            remedy or "none needed",
        )
    for name, problem in intake.missing.items():
        grave = problem.count > LACK_SHARE * max(1, intake.records)
        yield Finding(
            "warning" if grave else "info",
            "missing",
            f"{name} is {problem.message}",
            problem.count,
            f"{intake.unit} {problem.line}",
            "fill it in, or mind that the default stands in for it",
        )


def _identities(intake: Intake, scan: Scan) -> Iterator[Finding]:
    if scan.again:
        line, first, name = scan.twice[0]
        yield Finding(
            "error",
            "duplicates",
            f"identity {name!r} stands in {intake.unit} {first} already",
            scan.again,
            f"{intake.unit} {line}",
            "give every task an identity of its own, or remove the copies; a simulation refuses them",
        )
    if scan.copies:
        share = len(scan.copies) / len(scan.at)
        yield Finding(
            "warning" if share > COPIES_SHARE else "info",
            "duplicates",
            f"{share:.1%} ask for the same at the same moment as another task",
            len(scan.copies),
            f"{intake.unit} {scan.copies[0]}",
            "keep them if they are job arrays; remove them if the log was joined twice",
        )


def _clock(intake: Intake, scan: Scan) -> Iterator[Finding]:
    if scan.back:
        yield Finding(
            "warning",
            "clock",
            f"not in order of time; the furthest step back is {scan.furthest_back / SECOND:,.0f} s",
            len(scan.back),
            f"{intake.unit} {scan.back[0]}",
            "readers sort; mend the clocks if the file was meant to be in order",
        )
    if len(scan.at) < 3:
        return
    at, line = np.array(scan.at), np.array(scan.line)
    order = np.argsort(at, kind="stable")
    gaps = np.diff(at[order])
    widest, span = int(gaps.max()), int(at.max() - at.min())
    if widest > HOLE_US and widest > HOLE_SHARE * span:
        yield Finding(
            "warning",
            "clock",
            f"nothing arrives for {widest / SECOND / 3600:,.1f} h, {widest / span:.0%} of the whole span",
            1,
            f"{intake.unit} {line[order][int(gaps.argmax()) + 1]}",
            "cut the trace there, or mend clocks that count from different origins",
        )
    work = np.array(scan.work)
    longer = np.flatnonzero(work > span)
    if len(longer):
        yield Finding(
            "info",
            "clock",
            "run longer than the whole trace: the log was cut, or it is a service",
            len(longer),
            f"{intake.unit} {line[longer[0]]}",
            "stop the simulation with until_hours, or leave them out",
        )
    zero = np.flatnonzero(work < SECOND // 1000)
    if len(zero):
        yield Finding(
            "info",
            "value",
            "run for no time at all (rounded down, or never really ran)",
            len(zero),
            f"{intake.unit} {line[zero[0]]}",
            "none needed; they count in means of waiting, so leave them out where those are compared",
        )
    if not (at % SECOND).any() and (gaps == 0).mean() > 0.01:
        yield Finding(
            "info",
            "clock",
            f"whole seconds only, and {(gaps == 0).mean():.1%} arrive in the same second as another",
            int((gaps == 0).sum()),
            "",
            "ties are played in the order of the file; compare policies over several seeds",
        )


def _capacity(intake: Intake, scan: Scan, load: Sequence[LoadLine]) -> Iterator[Finding]:
    for reason, lines in scan.impossible.items():
        yield Finding(
            "error",
            "impossible",
            f"can never run: {reason}",
            len(lines),
            f"{intake.unit} {lines[0]}",
            "enlarge the cluster or its nodes, split the gangs (--gpus-per-node), or leave them out",
        )
    for each in load:
        name = "" if each.gpu_type == "all" else f" of type {each.gpu_type}"
        if each.load is None or each.capacity is None or each.hours_above is None:
            continue
        asked = f"{each.mean_gpus:,.1f} GPUs{name} asked for on average, {each.capacity:,} there ({each.load:.0%})"
        if each.load >= 1:
            remedy = (
                f"at least {int(each.mean_gpus / BUSY_LOAD) + 1:,} GPUs, or a lower rate_scale: the queue never ends"
            )
            yield Finding("error", "load", asked, each.tasks, "", remedy)
        elif each.load >= BUSY_LOAD:
            remedy = "queues are long and small changes show much: use several seeds, or more GPUs"
            yield Finding("warning", "load", asked, each.tasks, "", remedy)
        if each.hours_above and each.load < 1:
            yield Finding(
                "info",
                "load",
                f"{each.hours_above:.1%} of the hours want more than the {each.capacity:,} GPUs{name}; the busiest wants "
                f"{each.peak_hour_gpus:,.0f}",
                each.tasks,
                "",
                "expect queues in these hours; size for the peak only if nobody may wait",
            )


def _shape(burst: Burst, tail: Tail, scan: Scan) -> Iterator[Finding]:
    uneven = max(burst.dispersion.values(), default=1.0) > BURSTY_DISPERSION
    if burst.gap_cv is not None and (burst.gap_cv > BURSTY_CV or uneven):
        shown = ", ".join(f"{value:.1f} at {name}" for name, value in burst.dispersion.items())
        yield Finding(
            "warning",
            "burstiness",
            f"arrivals are bursty: variation of gaps {burst.gap_cv:.1f}, index of dispersion {shown or 'unknown'} (Poisson: 1)",
            len(scan.at),
            "",
            "do not trust Erlang's formulas or synthetic Poisson arrivals; scale the rate by time, which keeps bursts",
        )
    if tail.index is not None and tail.index < HEAVY_INDEX:
        yield Finding(
            "warning",
            "heavy tail",
            f"run times have a heavy tail (index {tail.index:.2f}); 1% of the tasks take {tail.top_share:.0%} of the GPU time",
            len(scan.at),
            "",
            "compare medians and quantiles rather than means, and over long stretches",
        )
    if scan.understated:
        yield Finding(
            "info",
            "value",
            "ran longer than declared",
            scan.understated,
            "",
            "none needed; backfill plans with the declared time and will be surprised by these",
        )
