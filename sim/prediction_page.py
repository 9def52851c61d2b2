"""The predictor's report card as one page with pictures that needs no network and no other file."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure

from predictors.figures import DRIFT_FACTOR, SLACKS, Fan, Figures, Group
from predictors.report import ReportCard
from sim.plots import STYLE, Plot

_BLUE, _RED, _GREY = "#3066be", "#d1495b", "#9aa3ae"


def write_html(card: ReportCard, figures: Figures, path: Path, more: Sequence[Plot] = ()) -> None:
    """Write the page; `more` are pictures to put after the card's own."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = resources.files("sim").joinpath("prediction.html.jinja").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        title=f"Predictions of {card.scored:,} requests from {card.cut} on",
        card=card,
        plots=[*pictures(card, figures), *more],
    )
    path.write_text(page, encoding="utf-8")


def pictures(card: ReportCard, figures: Figures) -> list[Plot]:
    """Return every picture that there are figures for."""
    with matplotlib.rc_context(STYLE):
        plots = [
            Plot(
                "Do the quantiles hold?",
                "Left: the share of requests that stayed below each quantile; on the line, the promise is kept. Right: where in "
                "their own predicted distribution the run times fell (PIT); flat at 1 is calibrated.",
                _drawn(lambda axes: _reliability(axes, figures), columns=2),
            ),
            Plot(
                "The 90% interval by day and by model",
                "Share of requests inside; the band is 88 to 92%. Models by their number of requests.",
                _drawn(lambda axes: _coverage(axes, figures), columns=2),
            ),
            Plot(
                "A model's first requests",
                "Median error and 90% coverage by how many requests of the model had finished before.",
                _drawn(lambda axes: _history(axes, figures.history), columns=2),
            ),
            Plot(
                "When everything becomes slower at once",
                f"All run times times {DRIFT_FACTOR} from one request on: the mean log error this adds, over 20 requests.",
                _drawn(lambda axes: _drift(axes[0], figures)),
            ),
            Plot(
                "Champion and challenger",
                "By what share the boosted stack's quantile loss over the last 2,000 requests lies below the online stack's. It "
                "serves where the line is solid; it is adopted at 1% and steps down at -1%.",
                _drawn(lambda axes: _standing(axes[0], figures)),
            ),
            Plot(
                "What a scheduler gains",
                "Shortest-predicted-first: its cut of FIFO's mean waiting, as a share of what the truth would cut.",
                _drawn(lambda axes: _gain(axes[0], figures)),
            ),
            Plot(
                "GPU memory: limits and slack",
                "Peaks made up around the arithmetic's, for the trace has none: how many exceed a limit of so much slack over what "
                "was expected, learned and counted only. The dot is the predictor's own P99.",
                _drawn(lambda axes: _memory(axes[0], figures)),
            ),
        ]
        if figures.fan is not None:
            fan = figures.fan
            plots.append(
                Plot(
                    "Demand of the hour to come",
                    f"Requests per hour, and what was said before: P{100 * fan.levels[0]:.0f} to P{100 * fan.levels[2]:.0f} and "
                    "the median.",
                    _drawn(lambda axes: _fan(axes[0], fan)),
                )
            )
    return plots


def _drawn(draw: Callable[[Sequence[Any]], None], columns: int = 1) -> str:
    figure = Figure(figsize=(8.6, 3.1), layout="constrained")
    draw(figure.subplots(1, columns, squeeze=False)[0])
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _reliability(axes: Sequence[Any], figures: Figures) -> None:
    axes[0].plot([0, 1], [0, 1], color=_GREY, linewidth=1)
    axes[0].plot(figures.levels, figures.below, "o-", color=_BLUE, markersize=3)
    axes[0].set_xlabel("level of the quantile")
    axes[0].set_ylabel("share below it")
    edges = [0.0, *figures.levels, 1.0]
    axes[1].stairs(figures.pit, edges, fill=True, color=_BLUE, alpha=0.55)
    axes[1].axhline(1.0, color=_GREY, linewidth=1)
    axes[1].set_ylim(0.0, max(1.5, *figures.pit))
    axes[1].set_xlabel("place of the run time in its prediction")
    axes[1].set_ylabel("density")


def _coverage(axes: Sequence[Any], figures: Figures) -> None:
    for axis, groups in zip(axes, (figures.days, figures.models), strict=True):
        axis.axhspan(88, 92, color=_GREY, alpha=0.25, linewidth=0)
        axis.plot([group.within_90 for group in groups], "o", color=_BLUE, markersize=4)
        axis.set_xticks(range(len(groups)), [group.name for group in groups], rotation=60, ha="right")
        axis.set_ylim(min(70.0, *(group.within_90 for group in groups)), 100)
        axis.set_ylabel("inside, %")


def _history(axes: Sequence[Any], groups: Sequence[Group]) -> None:
    known = [group for group in groups if group.requests and math.isfinite(group.medape)]
    names = [f"{group.name}\n({group.requests})" for group in known]
    axes[0].bar(names, [group.medape for group in known], color=_BLUE, width=0.6)
    axes[0].set_ylabel("median error, %")
    axes[1].axhspan(88, 92, color=_GREY, alpha=0.25, linewidth=0)
    axes[1].plot(names, [group.within_90 for group in known], "o", color=_BLUE)
    axes[1].set_ylim(70, 100)
    axes[1].set_ylabel("inside the 90% interval, %")
    for axis in axes:
        axis.tick_params(axis="x", labelsize=7)


def _drift(axis: Any, figures: Figures) -> None:
    axis.axhspan(-0.05, 0.05, color=_GREY, alpha=0.25, linewidth=0)
    axis.plot([place for place, _ in figures.drift], [added for _, added in figures.drift], color=_BLUE)
    axis.axhline(math.log(DRIFT_FACTOR), color=_RED, linewidth=1, linestyle="--")
    axis.set_xlabel("requests since then (dashed: the shift itself)")
    axis.set_ylabel("log error added")


def _standing(axis: Any, figures: Figures) -> None:
    axis.axhline(0.0, color=_GREY, linewidth=1)
    for level in (-1.0, 1.0):
        axis.axhline(level, color=_GREY, linewidth=1, linestyle=":")
    places = [place for place, _, _ in figures.advantage]
    shares = [100 * advantage for _, advantage, _ in figures.advantage]
    served = [share if serving else math.nan for share, (_, _, serving) in zip(shares, figures.advantage, strict=True)]
    axis.plot(places, shares, color=_BLUE, linewidth=1, linestyle="--")
    axis.plot(places, served, color=_BLUE, linewidth=2)
    axis.set_xlabel("requests")
    axis.set_ylabel("loss below the champion's, %")


def _gain(axis: Any, figures: Figures) -> None:
    names = [name for name, _ in figures.sjf]
    gains = [gain if math.isfinite(gain) else 0.0 for _, gain in figures.sjf]
    colours = [_GREY] * (len(gains) - 3) + [_BLUE, _RED, _RED]
    axis.barh(names, gains, color=colours[-len(gains) :], height=0.6)
    axis.invert_yaxis()
    for place, gain in enumerate(gains):
        axis.text(gain + 0.5, place, f"{gain:.1f}", va="center")
    axis.set_xlabel("% of the truth's gain")


def _memory(axis: Any, figures: Figures) -> None:
    curve = figures.memory
    floor = 0.01
    slack = [100 * share for share in SLACKS]
    axis.plot(slack, [max(floor, share) for share in curve.exceed], color=_BLUE, label="learned")
    axis.plot(slack, [max(floor, share) for share in curve.exceed_unlearned], color=_GREY, label="counted only")
    axis.plot([curve.chosen_slack], [max(floor, curve.chosen_exceed)], "o", color=_RED, label="the predictor's P99")
    axis.set_yscale("log")
    axis.set_xlabel("slack, %")
    axis.set_ylabel("exceed their limit, %")
    axis.legend(frameon=False)


def _fan(axis: Any, fan: Fan) -> None:
    axis.fill_between(fan.hours, fan.low, fan.high, color=_BLUE, alpha=0.2, linewidth=0)
    axis.plot(fan.hours, fan.middle, color=_BLUE, linewidth=1)
    axis.plot(fan.hours, fan.came, "o", color=_RED, markersize=3)
    axis.set_xlabel("hours")
    axis.set_ylabel("requests in the hour")
