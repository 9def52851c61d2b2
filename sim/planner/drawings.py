"""The plan's pictures as inline SVG. Imported only where a page is written, because matplotlib takes a second to load."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from sim.planner.objectives import shown
from sim.planner.report import label
from sim.planner.results import Plan
from sim.planner.trials import Trial
from sim.plots import STYLE

_BLUE, _RED, _GREEN, _GREY = "#3066be", "#d1495b", "#2e8b57", "#8a93a0"
_ROOM = 0.05
"""Share of the picture's width that a label takes."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """One figure of the page."""

    heading: str
    note: str
    svg: str


def all_drawings(plan: Plan) -> list[Drawing]:
    """Return every picture that the plan has data for."""
    name = plan.objective.name
    found = []
    with matplotlib.rc_context(STYLE):
        if any(math.isfinite(plan.value(trial)) for trial in plan.curve):
            note = (
                "Every cluster that was simulated, with its interval; the line joins those that no other beats in both. "
                "Dashed: the limit."
            )
            found.append(Drawing(f"Cost against {name}", note, _curve(plan)))
        if plan.sways:
            note = f"{name} when one assumption changes; grey line: as assumed, dashed: the limit."
            found.append(Drawing("If the assumptions are wrong", note, _tornado(plan)))
        if plan.hours:
            note = (
                "Share of the answer's GPUs that run tasks (blue) and load models (pale); dots: the fullest such hour."
            )
            found.append(Drawing("Headroom by hour of day", note, _hours(plan)))
    return found


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "aigc plan"}, bbox_inches="tight")
    text = buffer.getvalue()
    return re.sub(r"\s+<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def _axes(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(11, height), layout="constrained")
    return figure, figure.subplots()


def _curve(plan: Plan) -> str:
    figure, axes = _axes(3.8)
    for trial in plan.curve:
        estimate, cost = trial.estimates[plan.number], plan.request.cost(trial.pool)
        if not math.isfinite(estimate.mean):
            continue
        colour = _GREEN if trial.holds else _RED
        if math.isfinite(estimate.high):
            axes.plot([cost, cost], [estimate.low, estimate.high], color=colour, alpha=0.35, linewidth=2)
        axes.plot([cost], [estimate.mean], "o", color=colour, markersize=5)
    front = [trial for trial in plan.front() if math.isfinite(plan.value(trial))]
    axes.plot(
        [plan.request.cost(trial.pool) for trial in front],
        [plan.value(trial) for trial in front],
        color=_BLUE,
        linewidth=1.2,
        drawstyle="steps-post",
    )
    for trial, bold in _labelled(plan, front):
        axes.annotate(
            label(trial.pool),
            (plan.request.cost(trial.pool), plan.value(trial)),
            xytext=(4, 5),
            textcoords="offset points",
            fontsize=9 if bold else 7,
            fontweight="bold" if bold else "normal",
        )
    axes.axhline(plan.objective.limit, linestyle="--", color=_GREY, linewidth=1)
    values = [plan.value(trial) for trial in plan.curve if math.isfinite(plan.value(trial))]
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    axes.set_xlabel(f"{plan.request.currency} per hour")
    axes.set_ylabel(f"{plan.objective.name}, {plan.objective.unit}")
    return _svg(figure)


def _labelled(plan: Plan, front: list[Trial]) -> list[tuple[Trial, bool]]:
    """Return which clusters get a label, the answer first, and others as far as there is room beside them."""
    costs = [plan.request.cost(trial.pool) for trial in plan.curve]
    room = (max(costs) - min(costs)) * _ROOM
    chosen = [] if plan.answer is None else [(plan.answer, True)]
    for trial in front:
        taken = (plan.request.cost(other.pool) for other, _ in chosen)
        if all(abs(cost - plan.request.cost(trial.pool)) > room for cost in taken):
            chosen.append((trial, False))
    return chosen


def _tornado(plan: Plan) -> str:
    sways = list(reversed(plan.sways))
    figure, axes = _axes(0.55 * len(sways) + 1.0)
    base = plan.sways[0].base
    for row, sway in enumerate(sways):
        for value, text, colour in ((sway.low, sway.low_label, _BLUE), (sway.high, sway.high_label, _RED)):
            if not math.isfinite(value):
                axes.annotate(f"{text}: never served", (base, row), fontsize=7, va="center")
                continue
            axes.barh(row, value - base, left=base, height=0.55, color=colour, alpha=0.75)
            if value != base:
                side = "left" if value >= base else "right"
                shift = 4 if value >= base else -4
                axes.annotate(
                    f"{text}: {shown(value, plan.objective.unit)}",
                    (value, row),
                    xytext=(shift, 0),
                    textcoords="offset points",
                    ha=side,
                    va="center",
                    fontsize=7,
                )
    axes.axvline(base, color=_GREY, linewidth=1)
    axes.axvline(plan.objective.limit, linestyle="--", color=_GREY, linewidth=1)
    axes.set_yticks(range(len(sways)), [sway.name for sway in sways])
    axes.margins(x=0.25)
    axes.set_xlabel(f"{plan.objective.name}, {plan.objective.unit}")
    return _svg(figure)


def _hours(plan: Plan) -> str:
    figure, axes = _axes(2.8)
    hours = [row["hour"] for row in plan.hours]
    busy = [row["busy"] for row in plan.hours]
    axes.bar(hours, busy, color=_BLUE, width=0.8)
    axes.bar(hours, [row["loading"] for row in plan.hours], bottom=busy, color=_BLUE, alpha=0.3, width=0.8)
    axes.plot(hours, [row["fullest"] for row in plan.hours], "o", color=_RED, markersize=3.5)
    axes.set_ylim(0, 1.02)
    axes.set_xticks(range(0, 24, 2))
    axes.set_xlim(-0.6, 23.6)
    axes.set_xlabel("hour of day")
    axes.set_ylabel("share of GPUs")
    return _svg(figure)
