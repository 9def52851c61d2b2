"""Plots of results as inline SVG. Only this file imports matplotlib, because the import alone takes a second."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure

from sim.plot_gantt import gantt_note, gantt_svg
from sim.summary import Series

if TYPE_CHECKING:
    from sim.simulate import SimulationResult

_COLOURS = ("#3066be", "#d1495b", "#2e8b57", "#b8860b", "#6a4c93", "#444b59")
STYLE: dict[str, Any] = {
    "svg.hashsalt": "aigc",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e9ed",
    "axes.axisbelow": True,
}
_NODES_SHOWN = 64


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure of the page."""

    heading: str
    note: str
    svg: str


def all_plots(results: Sequence[SimulationResult]) -> list[Plot]:
    """Return every plot that the results have data for."""
    with matplotlib.rc_context(STYLE):
        return [
            Plot(
                "How long tasks wait",
                "Share of tasks that had started within so many seconds (less than a tenth: a tenth); dashed: urgent tasks only.",
                _waiting(results),
            ),
            Plot(
                "Tasks waiting over time",
                "Mean number of tasks that wait in each span of time.",
                _over_time(results, "queue", "tasks waiting"),
            ),
            Plot(
                "GPUs over time",
                "Busy with tasks (line) and held by Pods (pale band); dotted: GPUs that were there and well.",
                _gpus(results),
            ),
            Plot("Model loads over time", "Pods created with a model, per hour.", _loads(results)),
            Plot("Use of each node", _heat_note(results), _heat(results)),
            *(
                Plot(
                    f"Schedule around the longest queue: {result.profile}",
                    gantt_note(result.gantt),
                    gantt_svg(result.gantt),
                )
                for result in results
                if result.gantt is not None and result.gantt.bars
            ),
        ]


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "aigc simulate"}, bbox_inches="tight")
    text = buffer.getvalue()
    return re.sub(r"\s+<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def _axes(rows: int = 1, columns: int = 1, height: float = 3.2) -> tuple[Figure, Any]:
    figure = Figure(figsize=(11, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _waiting(results: Sequence[SimulationResult]) -> str:
    figure, grid = _axes()
    axes = grid[0][0]
    for number, result in enumerate(results):
        for name, style in (("all", "-"), ("priority urgent", "--")):
            curve = result.summary.waiting_curve.get(name)
            if curve:
                seconds = [max(0.1, point[0]) for point in curve]
                label = result.profile if name == "all" else None
                axes.step(
                    seconds, [point[1] for point in curve], style, where="post", color=_colour(number), label=label
                )
    axes.set_xscale("log")
    axes.set_ylim(0, 1.01)
    axes.set_xlabel("seconds of waiting")
    axes.set_ylabel("share of tasks")
    axes.legend(frameon=False)
    return _svg(figure)


def _hours(series: Series) -> list[float]:
    return [(number + 0.5) * series.bin_s / 3600 for number in range(len(series.values))]


def _over_time(results: Sequence[SimulationResult], name: str, label: str) -> str:
    figure, grid = _axes()
    axes = grid[0][0]
    for number, result in enumerate(results):
        series = result.summary.series[name]
        axes.plot(_hours(series), series.values, color=_colour(number), linewidth=1.1, label=result.profile)
    axes.set_xlabel("hours")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _svg(figure)


def _gpus(results: Sequence[SimulationResult]) -> str:
    figure, grid = _axes(rows=len(results), height=2.1 * len(results) + 0.6)
    for number, result in enumerate(results):
        axes = grid[number][0]
        series = result.summary.series
        axes.fill_between(
            _hours(series["allocated"]), series["allocated"].values, color=_colour(number), alpha=0.18, linewidth=0
        )
        axes.plot(_hours(series["busy"]), series["busy"].values, color=_colour(number), linewidth=1.0)
        axes.plot(_hours(series["gpus"]), series["gpus"].values, ":", color="#444b59", linewidth=1.0)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(f"{result.profile}\nGPUs")
    grid[-1][0].set_xlabel("hours")
    return _svg(figure)


def _loads(results: Sequence[SimulationResult]) -> str:
    figure, grid = _axes()
    axes = grid[0][0]
    for number, result in enumerate(results):
        series = result.summary.series["loads"]
        rates = [value * 3600 / series.bin_s for value in series.values]
        axes.step(_hours(series), rates, where="mid", color=_colour(number), linewidth=1.0, label=result.profile)
    axes.set_xlabel("hours")
    axes.set_ylabel("loads per hour")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _svg(figure)


def _heat_note(results: Sequence[SimulationResult]) -> str:
    nodes = max(len(result.summary.heat) for result in results)
    shown = f" The first {_NODES_SHOWN} of {nodes} nodes; the JSON has all." if nodes > _NODES_SHOWN else ""
    return f"Busy share of the node's GPUs over time, dark is busy.{shown}"


def _heat(results: Sequence[SimulationResult]) -> str:
    shown = min(_NODES_SHOWN, max(len(result.summary.heat) for result in results))
    figure, grid = _axes(rows=len(results), height=max(1.2, 0.13 * shown + 0.7) * len(results))
    for number, result in enumerate(results):
        axes = grid[number][0]
        nodes = list(result.summary.heat.items())[:shown]
        length = max((len(series.values) for _, series in nodes), default=1)
        rows = [list(series.values) + [0.0] * (length - len(series.values)) for _, series in nodes]
        bin_s = nodes[0][1].bin_s if nodes else 60.0
        axes.imshow(
            rows or [[0.0]],
            aspect="auto",
            cmap="Blues",
            vmin=0,
            vmax=1,
            interpolation="nearest",
            extent=(0, length * bin_s / 3600, len(rows) or 1, 0),
        )
        axes.grid(False)
        axes.set_yticks(
            [row + 0.5 for row in range(len(nodes))],
            [name for name, _ in nodes],
            fontsize=max(3, min(7, 160 // max(1, shown))),
        )
        axes.set_title(result.profile, loc="left", fontsize=9)
    grid[-1][0].set_xlabel("hours")
    return _svg(figure)
