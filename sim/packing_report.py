"""Shows the packing experiment to people: a table beside the published figures, JSON, and the curves as PNG or one page."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from sim.packing import LEVELS, PAPER_POLICIES, PolicyResult

PUBLISHED: dict[str, dict[str, tuple[float, float, float]]] = {
    "openb_pod_list_default": {
        "random": (86.30, 0.33, 87.47),
        "dot-product": (90.62, 0.19, 90.85),
        "clustering": (91.65, 0.61, 91.88),
        "packing": (91.78, 0.53, 92.00),
        "best-fit": (92.86, 0.14, 93.08),
        "fgd": (95.23, 0.11, 95.39),
    }
}
"""Pod list -> policy -> the paper's artifact: mean and standard deviation at 100%, mean at 130%."""


def list_name(path: Path) -> str:
    """Return the name under which a pod list is published."""
    return path.name.removesuffix(".gz").removesuffix(".csv")


def as_json(results: Sequence[PolicyResult], pods: str, nodes: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Return everything as plain values."""
    published = PUBLISHED.get(pods, {})
    rows = []
    for result in results:
        known = published.get(result.policy) if result.tie == "name" else None
        row: dict[str, Any] = {"policy": result.policy, "tie": result.tie}
        for level in LEVELS:
            row[f"allocated_{level}"] = round(result.mean(level), 2)
            row[f"sd_{level}"] = round(result.deviation(level), 2)
            row[f"seeds_{level}"] = result.allocated[level]
            row[f"published_{level}"] = None if known is None else known[0 if level == LEVELS[0] else 2]
        row["curve"] = result.curve
        row["pods"] = result.pods
        row["pods_per_cpu_s"] = round(result.pods / result.cpu_s) if result.cpu_s else None
        rows.append(row)
    measured = {result.policy: result.mean(LEVELS[0]) for result in results if result.tie == "name"}
    order = [name for name in sorted(measured, key=measured.__getitem__) if name in PAPER_POLICIES]
    return {"pods": pods, "nodes": nodes, "seeds": list(seeds), "results": rows, "order": order}


def render_table(results: Sequence[PolicyResult], pods: str, seeds: int) -> Table:
    """Return one row per policy: percent of the GPUs given away, ours beside the published."""
    published = PUBLISHED.get(pods, {})
    title = f"{pods}: GPUs given away, in percent; mean (standard deviation) of {seeds} seeds"
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("policy")
    for level in LEVELS:
        table.add_column(f"at {level}%", justify="right")
        table.add_column("published", justify="right")
        table.add_column("difference", justify="right")
    table.add_column("pods/s", justify="right")
    for result in results:
        known = published.get(result.policy) if result.tie == "name" else None
        cells = []
        for level in LEVELS:
            cells.append(f"{result.mean(level):.2f} ({result.deviation(level):.2f})")
            if known is None:
                cells += ["", ""]
            elif level == LEVELS[0]:
                cells += [f"{known[0]:.2f} ({known[1]:.2f})", f"{result.mean(level) - known[0]:+.2f}"]
            else:
                cells += [f"{known[2]:.2f}", f"{result.mean(level) - known[2]:+.2f}"]
        speed = f"{result.pods / result.cpu_s:,.0f}" if result.cpu_s else ""
        table.add_row(result.policy, *cells, speed)
    return table


def render_ties(results: Sequence[PolicyResult]) -> Table:
    """Return what the tie rule moves: one row per policy, one column per rule, at 100% asked for."""
    ties = list(dict.fromkeys(result.tie for result in results))
    table = Table(title="What the tie rule moves, at 100%", title_justify="left", header_style="bold")
    table.add_column("policy")
    for tie in ties:
        table.add_column(tie, justify="right")
    table.add_column("moves", justify="right")
    for policy in dict.fromkeys(result.policy for result in results):
        by_tie = {result.tie: result.mean(LEVELS[0]) for result in results if result.policy == policy}
        cells = [f"{by_tie[tie]:.2f}" if tie in by_tie else "" for tie in ties]
        table.add_row(policy, *cells, f"{max(by_tie.values()) - min(by_tie.values()):.2f}")
    return table


def write_png(results: Sequence[PolicyResult], pods: str, path: Path) -> None:
    """Draw the curves into a PNG."""
    path.write_bytes(_drawing(results, pods, "png"))


def write_html(results: Sequence[PolicyResult], pods: str, seeds: int, path: Path) -> None:
    """Write one page with the table and the curves; it needs no network and no other file."""
    svg = _drawing(results, pods, "svg").decode()
    published = PUBLISHED.get(pods, {})
    head = "".join(
        f"<th>{html.escape(name)}</th>"
        for name in ("policy", "tie", *(f"at {level}%" for level in LEVELS), "published")
    )
    rows = []
    for result in results:
        known = published.get(result.policy) if result.tie == "name" else None
        cells = [result.policy, result.tie]
        cells += [f"{result.mean(level):.2f} ({result.deviation(level):.2f})" for level in LEVELS]
        cells.append("" if known is None else f"{known[0]:.2f} ({known[1]:.2f}), {known[2]:.2f}")
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    style = (
        "body{font:15px system-ui,sans-serif;max-width:60rem;margin:2rem auto;color:#1d2430}"
        "table{border-collapse:collapse}td,th{padding:.3rem .8rem;text-align:right;border-bottom:1px solid #e6e9ed}"
        "td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}"
    )
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(pods)}</title>'
        f"<style>{style}</style></head><body><h1>GPUs given away</h1>"
        f"<p>Pod list {html.escape(pods)}, {seeds} seeds; percent of the cluster's GPUs, mean (standard deviation).</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>{svg}</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _drawing(results: Sequence[PolicyResult], pods: str, form: str) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "aigc", "font.size": 9.0, "axes.grid": True, "grid.color": "#e6e9ed"}):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        whole, close = figure.subplots(1, 2)
        lowest = 100.0
        for result in results:
            label = result.policy if result.tie == "name" else f"{result.policy} ({result.tie})"
            for axes in (whole, close):
                axes.plot(range(len(result.curve)), result.curve, label=label, linewidth=1.3)
            lowest = min(lowest, result.curve[80])
        for axes in (whole, close):
            axes.set_xlabel("GPUs asked for, % of the cluster")
            axes.set_ylabel("GPUs given away, %")
        close.set_xlim(80, max(LEVELS))
        close.set_ylim(max(0.0, lowest - 1), 100)
        whole.set_title(pods, loc="left")
        close.legend(loc="lower right", frameon=False)
        buffer = io.BytesIO()
        metadata = {"Date": None} if form == "svg" else {"Software": None}
        figure.savefig(buffer, format=form, dpi=130, metadata=metadata)
    drawn = buffer.getvalue()
    if form == "svg":
        return re.sub(rb"\s+<metadata>.*?</metadata>", b"", drawn[drawn.index(b"<svg") :], flags=re.DOTALL)
    return drawn
