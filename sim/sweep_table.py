"""Turns the records of a sweep into what people read: means with intervals, differences from a baseline, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from sim.configuration import ConfigError
from sim.paired import Difference, difference, student_95
from sim.sweep import RunRecord

Values = Mapping[str, Any]
Measure = Callable[[Values, Values], float]
"""From a run's summary and world counts to a figure; raises KeyError where there is none."""

MEASURES: dict[str, Measure] = {
    "mean completion, s": lambda summary, _: summary["completion"]["all"]["mean"],
    "p50 completion, s": lambda summary, _: summary["completion"]["all"]["p50"],
    "p99 completion, s": lambda summary, _: summary["completion"]["all"]["p99"],
    "mean waiting, s": lambda summary, _: summary["waiting"]["all"]["mean"],
    "p99 waiting, s": lambda summary, _: summary["waiting"]["all"]["p99"],
    "p99 waiting of urgent, s": lambda summary, _: summary["waiting"]["priority urgent"]["p99"],
    "p99 waiting of ordinary, s": lambda summary, _: summary["waiting"]["priority ordinary"]["p99"],
    "p99 waiting of the worst tenant, s": lambda summary, _: max(
        each["p99"] for name, each in summary["waiting"].items() if name.startswith("tenant ")
    ),
    "longest waiting of ordinary, s": lambda summary, _: summary["waiting"]["priority ordinary"]["max"],
    "model loads per task": lambda summary, world: model_loads(world) / summary["counts"]["submitted"],
    "busy, % of GPU time": lambda summary, _: 100 * summary["gpu"]["busy"],
    "Jain's index": lambda summary, _: summary["fairness"]["jain"],
    "not finished": lambda summary, _: float(summary["counts"]["submitted"] - summary["ends"]["finished"]),
}


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds with its 95% interval."""

    mean: float
    half_width: float
    """By Student's t; infinite for a single run."""
    count: int


@dataclass(frozen=True, slots=True)
class Row:
    """All seeds of one point of the grid."""

    point: tuple[tuple[str, str], ...]
    """(field, value) of what varies, the seed left out."""
    figures: dict[str, Interval]
    differences: tuple[Difference, ...]
    """From the baseline point, seed by seed; empty for the baseline and where there is none."""


def model_loads(world: Values) -> int:
    """Return how many times a model was brought to a GPU, wherever its bytes lay."""
    return sum(int(count) for name, count in world.items() if name.startswith("loads_"))


def interval(values: Sequence[float]) -> Interval:
    """Return the mean and its 95% interval."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return Interval(mean, math.inf, count)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    return Interval(mean, student_95(count - 1) * spread / math.sqrt(count), count)


def rows_of(records: Sequence[RunRecord], baseline: Mapping[str, str] | None = None) -> list[Row]:
    """Group the records by all that varies but the seed, and compare each point with the one that differs in `baseline` alone.

    With ``baseline={"profile": "fifo"}`` and an axis of nodes, each profile is compared with fifo on as many nodes.
    """
    names = varying(records)
    for name in baseline or {}:
        if name not in names:
            raise ConfigError(
                f"baseline: {name!r} does not vary in this sweep; what does: {', '.join(names) or 'nothing'}"
            )
    groups: dict[tuple[tuple[str, str], ...], dict[int, RunRecord]] = {}
    for record in records:
        groups.setdefault(_point(record, names), {})[record.config.seed] = record
    found = []
    for point, runs in groups.items():
        figures = {}
        for name, measure in MEASURES.items():
            values = _values(runs.values(), measure)
            if values is not None:
                figures[name] = interval(values)
        found.append(Row(point, figures, _differences(point, runs, groups, baseline)))
    return found


def varying(records: Sequence[RunRecord]) -> list[str]:
    """Return the fields in which the records differ, the seed left out."""
    plain = [record.config.to_json() for record in records]
    return [
        name
        for name in (plain[0] if plain else {})
        if name != "seed" and len({_text(each[name]) for each in plain}) > 1
    ]


def csv_text(records: Sequence[RunRecord]) -> str:
    """Return one line per run: what varies, the seed, every measure, the hashes."""
    names = varying(records)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*names, "seed", *MEASURES, "hash", "decisions_digest", "wall_s"])
    for record in records:
        figures = [_figure(record, measure) for measure in MEASURES.values()]
        point = [value for _, value in _point(record, names)]
        writer.writerow(
            [*point, record.config.seed, *figures, record.hash, record.decisions_digest, round(record.wall_s, 3)]
        )
    return out.getvalue()


def json_values(records: Sequence[RunRecord], rows: Sequence[Row]) -> dict[str, Any]:
    """Return the sweep as plain values."""
    runs = [
        {
            "config": record.config.to_json(),
            "hash": record.hash,
            "figures": {
                name: value for name, measure in MEASURES.items() if (value := _figure(record, measure)) is not None
            },
            "decisions_digest": record.decisions_digest,
            "workload_digest": record.workload_digest,
            "wall_s": record.wall_s,
            "reused": record.reused,
        }
        for record in records
    ]
    points = [
        {
            "point": dict(row.point),
            "figures": {
                name: {"mean": each.mean, "half_width": _finite(each.half_width), "seeds": each.count}
                for name, each in row.figures.items()
            },
            "differences": [asdict(each) | {"clear": each.clear} for each in row.differences],
        }
        for row in rows
    ]
    return {"schema": 1, "points": points, "runs": runs}


def render(rows: Sequence[Row], measures: Sequence[str] = ()) -> Table:
    """Return the rows as a table for people."""
    shown = list(measures) or [
        "p50 completion, s",
        "p99 completion, s",
        "p99 waiting of urgent, s",
        "p99 waiting of ordinary, s",
        "model loads per task",
        "busy, % of GPU time",
    ]
    table = Table(title="Means over seeds, with 95% intervals", title_justify="left")
    for name, _ in rows[0].point if rows else ():
        table.add_column(name, overflow="fold")
    table.add_column("seeds", justify="right")
    for name in shown:
        table.add_column(name, justify="right")
    for row in rows:
        seeds = max((each.count for each in row.figures.values()), default=0)
        table.add_row(
            *(value for _, value in row.point), str(seeds), *(_shown(row.figures.get(name)) for name in shown)
        )
    return table


def render_differences(rows: Sequence[Row]) -> Table:
    """Return what differs from the baseline, seed by seed."""
    table = Table(title="Differences from the baseline, seed by seed", title_justify="left")
    for name, _ in rows[0].point if rows else ():
        table.add_column(name, overflow="fold")
    for heading in ("measure", "baseline", "difference", "95% interval", ""):
        table.add_column(heading, justify="left" if heading in {"measure", ""} else "right")
    for row in rows:
        for each in row.differences:
            low, high = each.mean - each.half_width, each.mean + each.half_width
            verdict = "clear" if each.clear else "may be luck"
            cells = (
                each.measure,
                f"{each.baseline_mean:.2f}",
                f"{each.mean:+.2f}",
                f"{low:+.2f} .. {high:+.2f}",
                verdict,
            )
            table.add_row(*(value for _, value in row.point), *cells)
    return table


def _differences(
    point: tuple[tuple[str, str], ...],
    runs: Mapping[int, RunRecord],
    groups: Mapping[tuple[tuple[str, str], ...], Mapping[int, RunRecord]],
    baseline: Mapping[str, str] | None,
) -> tuple[Difference, ...]:
    if not baseline:
        return ()
    other = tuple((name, baseline.get(name, value)) for name, value in point)
    base = groups.get(other)
    if base is None:
        shown = ", ".join(f"{name}={value}" for name, value in other)
        raise ConfigError(f"baseline: no run of {shown}; name values that the sweep goes through")
    seeds = [seed for seed in runs if seed in base]
    if other == point or len(seeds) < 2:
        return ()
    found = []
    for name, measure in MEASURES.items():
        ours = _values((runs[seed] for seed in seeds), measure)
        theirs = _values((base[seed] for seed in seeds), measure)
        if ours is not None and theirs is not None:
            label = ", ".join(value for _, value in point)
            found.append(difference(label, name, list(zip(theirs, ours, strict=True))))
    return tuple(found)


def _values(records: Iterable[RunRecord], measure: Measure) -> list[float] | None:
    found = [_figure(record, measure) for record in records]
    return None if not found or None in found else [value for value in found if value is not None]


def _figure(record: RunRecord, measure: Measure) -> float | None:
    try:
        return float(measure(record.summary, record.world))
    except (KeyError, ZeroDivisionError, ValueError):
        return None


def _point(record: RunRecord, names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    plain = record.config.to_json()
    return tuple((name, _text(plain[name])) for name in names)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _shown(each: Interval | None) -> str:
    if each is None:
        return "-"
    digits = 1 if abs(each.mean) >= 10 else 3
    return f"{each.mean:.{digits}f}" + (f" ±{each.half_width:.{digits}f}" if math.isfinite(each.half_width) else "")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write(path: Path, text: str) -> None:
    """Write a text; raises `ConfigError` naming the file."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; name another file") from None
