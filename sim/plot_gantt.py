"""Draws a piece of a schedule: GPUs as rows, Pods, loads and tasks as bars, and the queue below on the same axis."""

from __future__ import annotations

import io
import re
from collections import Counter
from typing import Any

import matplotlib
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sim.gantt import Bar, Gantt

_MODEL_COLOURS = ("#3066be", "#d1495b", "#2e8b57", "#b8860b", "#6a4c93", "#0f8b8d")
_OTHERS = "#7d8597"
_POD = "#e3e7ee"
_LOAD = "#b9c0cc"
_LOST = "#111111"
_POINTS_DRAWN = 800
_GAP = 0.12
"""Share of a row that stays empty between GPUs."""


def gantt_note(chart: Gantt) -> str:
    """Say what the picture shows."""
    which = f"The first {len(chart.gpus)} of {chart.all_gpus} GPUs" if chart.all_gpus > len(chart.gpus) else "All GPUs"
    return (
        f"{which} around the moment when most tasks waited. Coloured: tasks by model; grey: loading; pale: a Pod without a task; "
        "black: attempts that gave no result. Below: tasks waiting."
    )


def gantt_svg(chart: Gantt) -> str:
    """Return the picture as inline SVG, the same for the same chart."""
    rows = max(1, len(chart.gpus))
    unit, name = (3600.0, "hours") if chart.end_s - chart.begin_s > 3 * 3600 else (60.0, "minutes")
    figure = Figure(figsize=(11, min(9.0, 0.16 * rows + 1.0) + 1.4), layout="constrained")
    grid: Any = figure.subplots(2, 1, sharex=True, height_ratios=(min(9.0, 0.16 * rows + 1.0), 1.2))
    axes, below = grid
    colours = _colours(chart)
    for colour, bars in _by_colour(chart, colours).items():
        edge = 0.0 if colour in {_POD, _LOAD} else 0.4
        corners = [_corners(bar, unit) for bar in bars]
        axes.add_collection(PolyCollection(corners, facecolors=colour, edgecolors="white", linewidths=edge))
    axes.set_ylim(rows, 0)
    axes.set_yticks([row + 0.5 for row in range(rows)], chart.gpus, fontsize=max(3.0, min(7.0, 220 / rows)))
    axes.grid(False, axis="y")
    axes.legend(handles=_legend(colours), frameon=False, ncols=5, fontsize=7, loc="lower left", bbox_to_anchor=(0, 1.0))
    if chart.queue:
        points = chart.queue[:: 1 + len(chart.queue) // _POINTS_DRAWN]
        at = [point[0] / unit for point in points] + [chart.end_s / unit]
        waiting = [point[1] for point in points] + [chart.queue[-1][1]]
        below.fill_between(at, waiting, step="post", color="#444b59", alpha=0.35, linewidth=0)
        below.step(at, waiting, where="post", color="#444b59", linewidth=0.9)
    below.set_ylim(bottom=0)
    below.set_xlim(chart.begin_s / unit, chart.end_s / unit)
    below.set_ylabel("waiting")
    below.set_xlabel(name)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "aigc", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "aigc simulate"}, bbox_inches="tight")
    text = buffer.getvalue()
    return re.sub(r"\s+<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def _colours(chart: Gantt) -> dict[str, str]:
    used = Counter(bar.model for bar in chart.bars if bar.kind == "run" and bar.model)
    names = sorted(used, key=lambda name: (-used[name], name))[: len(_MODEL_COLOURS)]
    return dict(zip(names, _MODEL_COLOURS, strict=False))


def _by_colour(chart: Gantt, colours: dict[str, str]) -> dict[str, list[Bar]]:
    """Group bars by colour, in the order in which the groups are painted over each other."""
    found: dict[str, list[Bar]] = {_POD: [], _LOAD: [], _OTHERS: []}
    found.update({colour: [] for colour in colours.values()})
    found[_LOST] = []
    for bar in chart.bars:
        plain = {"pod": _POD, "load": _LOAD, "lost": _LOST}.get(bar.kind)
        found[plain or colours.get(bar.model, _OTHERS)].append(bar)
    return {colour: bars for colour, bars in found.items() if bars}


def _corners(bar: Bar, unit: float) -> list[tuple[float, float]]:
    low = bar.row + _GAP / 2 + bar.low * (1 - _GAP)
    high = low + bar.height * (1 - _GAP)
    left, right = bar.start_s / unit, bar.end_s / unit
    return [(left, low), (right, low), (right, high), (left, high)]


def _legend(colours: dict[str, str]) -> list[Patch]:
    named = list(colours.items())
    rest = [("other tasks", _OTHERS), ("loading", _LOAD), ("Pod without a task", _POD), ("no result", _LOST)]
    return [Patch(facecolor=colour, label=name) for name, colour in named + rest]
