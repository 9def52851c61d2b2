"""Shows results to people: a table for the terminal, JSON for programs, and one self-contained page with plots for planners."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from rich.table import Table

from sim.sketches import Spread

if TYPE_CHECKING:
    from sim.simulate import SimulationResult

Row = tuple[str, tuple[str, ...]]
Counts = Mapping[str, int]
_TENANTS_SHOWN = 12


def render_table(results: Sequence[SimulationResult]) -> Table:
    """Return a table with one column per run."""
    table = Table(title=_title(results), title_justify="left", header_style="bold")
    table.add_column("measure")
    for result in results:
        table.add_column(result.profile, justify="right")
    for heading, rows in sections(results):
        table.add_section()
        table.add_row(f"[bold]{heading}[/bold]", *("" for _ in results))
        for name, cells in rows:
            table.add_row(f"  {name}", *cells)
    return table


def write_json(results: SimulationResult | Sequence[SimulationResult], path: Path) -> None:
    """Write one run as an object, several as a list."""
    runs = list(results) if isinstance(results, Sequence) else [results]
    data = [result.to_json() for result in runs]
    text = json.dumps(data[0] if len(data) == 1 else data, indent=1, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def write_html(results: SimulationResult | Sequence[SimulationResult], path: Path) -> None:
    """Write the page; it needs no network and no other file."""
    from sim import plots

    runs = list(results) if isinstance(results, Sequence) else [results]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = resources.files("sim").joinpath("report.html.jinja").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        title=_title(runs),
        runs=runs,
        profiles=[run.profile for run in runs],
        sections=sections(runs),
        plots=plots.all_plots(runs),
        facts=_facts(runs),
    )
    path.write_text(page, encoding="utf-8")


def sections(results: Sequence[SimulationResult]) -> list[tuple[str, list[Row]]]:
    """Return the table's sections: a heading and rows of (measure, one cell per run)."""
    found = [
        ("tasks", _task_rows(results)),
        ("waiting until the first start, p50 / p90 / p99", _spread_rows(results, "waiting")),
        ("completion, p50 / p90 / p99", _spread_rows(results, "completion")),
        ("GPUs", _gpu_rows(results)),
        ("Pods and models", _pod_rows(results)),
        ("fairness and moves", _fairness_rows(results)),
    ]
    if any(result.summary.coverage.get("count") for result in results):
        found.append(("predictions", _coverage_rows(results)))
    return found


def _title(results: Sequence[SimulationResult]) -> str:
    config = results[0].config
    if config.pools:
        return f"{results[0].workload} on " + " + ".join(f"{count} {model}" for model, count in config.pools)
    return f"{results[0].workload} on {config.nodes} x {config.gpus_per_node} {config.gpu_model}"


def _facts(results: Sequence[SimulationResult]) -> list[tuple[str, str]]:
    first = results[0]
    facts = [("workload", f"{first.workload} ({first.workload_digest})"), ("seed", str(first.config.seed))]
    facts += [(f"workload: {name}", str(value)) for name, value in first.workload_notes]
    for result in results:
        facts.append((f"{result.profile}: configuration", result.config_hash))
        facts.append((f"{result.profile}: decisions", result.decisions_digest))
    return facts


def _row(name: str, results: Sequence[SimulationResult], cell: Callable[[SimulationResult], str]) -> Row:
    return name, tuple(cell(result) for result in results)


def _counted(
    name: str, results: Sequence[SimulationResult], key: str, table: Callable[[SimulationResult], Counts]
) -> Row:
    return name, tuple(f"{table(result).get(key, 0):,}" for result in results)


def _ends(result: SimulationResult) -> Counts:
    return result.summary.ends


def _failures(result: SimulationResult) -> Counts:
    return result.summary.failures


def _stops(result: SimulationResult) -> Counts:
    return result.summary.stops


def _world(result: SimulationResult) -> Counts:
    return result.world


def _gpu_share(name: str, result: SimulationResult) -> str:
    return percent(result.summary.gpu[name])


def _coverage(name: str, result: SimulationResult) -> str:
    return percent(result.summary.coverage.get(name, 0.0))


def _task_rows(results: Sequence[SimulationResult]) -> list[Row]:
    rows = [_row("submitted", results, lambda result: f"{result.summary.counts.get('submitted', 0):,}")]
    for state in ("finished", "cancelled", "rejected", "dead", "open"):
        if any(result.summary.ends[state] for result in results):
            rows.append(_counted(state, results, state, _ends))
    rows.append(_row("makespan", results, lambda result: span(result.summary.makespan_s)))
    rows.append(_row("simulated tasks per second", results, lambda result: f"{result.tasks_per_s:,.0f}"))
    return rows


def _spread_rows(results: Sequence[SimulationResult], what: str) -> list[Row]:
    tables: list[dict[str, Spread]] = [getattr(result.summary, what) for result in results]
    names = sorted({name for table in tables for name in table})
    shown = [name for name in names if not name.startswith("tenant ")]
    shown += [name for name in names if name.startswith("tenant ")][:_TENANTS_SHOWN]
    rows = []
    for name in shown:
        cells = []
        for table in tables:
            spread = table.get(name)
            cells.append(" / ".join(span(value) for value in (spread.p50, spread.p90, spread.p99)) if spread else "-")
        rows.append((name, tuple(cells)))
    rows.append(("mean", tuple(span(table["all"].mean) if "all" in table else "-" for table in tables)))
    return rows


def _gpu_rows(results: Sequence[SimulationResult]) -> list[Row]:
    rows = [_row("GPU hours busy", results, lambda result: f"{result.summary.gpu['busy_hours']:,.1f}")]
    for name in ("allocated", "busy", "fragmented"):
        text = f"{name} (of free)" if name == "fragmented" else name
        rows.append(_row(text, results, partial(_gpu_share, name)))
    return rows


def _pod_rows(results: Sequence[SimulationResult]) -> list[Row]:
    rows = [
        _row("Pods created", results, lambda result: f"{result.summary.counts.get('pods_created', 0):,}"),
        _row("started in a warm Pod", results, lambda result: percent(result.summary.fairness["warm_starts"])),
    ]
    for name in ("first on node", "again on node"):
        rows.append(_row(f"load, {name}: count, p50", results, partial(_load_cell, name)))
    for source in ("remote", "disk", "memory"):
        key = f"loads_{source}"
        if any(result.world.get(key) for result in results):
            rows.append(_counted(f"loads from {source}", results, key, _world))
    return rows


def _load_cell(name: str, result: SimulationResult) -> str:
    spread = result.summary.loads[name]
    return f"{spread.count:,}, {span(spread.p50)}"


def _fairness_rows(results: Sequence[SimulationResult]) -> list[Row]:
    rows = [
        _row("Jain's index while tenants compete", results, lambda result: f"{result.summary.fairness['jain']:.3f}"),
        _row("hours of competition", results, lambda result: f"{result.summary.fairness['contended_hours']:.1f}"),
        _row("attempts started again", results, lambda result: f"{result.summary.counts.get('restarts', 0):,}"),
    ]
    for text, key in (("nodes failed", "node_failures"), ("GPUs failed", "gpu_failures")):
        if any(result.world.get(key) for result in results):
            rows.append(_counted(text, results, key, _world))
    causes = sorted({cause for result in results for cause in result.summary.failures})
    for cause in causes:
        rows.append(_counted(f"failed: {cause}", results, cause, _failures))
    reasons = sorted(
        {reason for result in results for reason in result.summary.stops if not reason.startswith("pod: ")}
    )
    for reason in reasons:
        rows.append(_counted(f"stopped: {reason}", results, reason, _stops))
    return rows


def _coverage_rows(results: Sequence[SimulationResult]) -> list[Row]:
    rows = []
    for name in ("within_p50", "within_p90", "within_p99", "median_relative_error"):
        text = name.replace("_", " ")
        rows.append(_row(text, results, partial(_coverage, name)))
    return rows


def percent(share: float) -> str:
    """Write a share for people."""
    return f"{share:.1%}"


def span(seconds: float) -> str:
    """Write a span of seconds for people."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 600:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
