"""A study's curves as inline SVG: each figure against load, and the sizes."""

from __future__ import annotations

import io
import math
import re

import matplotlib
from matplotlib.figure import Figure

from sim.plots import STYLE
from sim.study.gentd26 import Study
from sim.study.plan import OURS
from sim.study.sizes import FREE

_COLOURS = (
    "#d1495b",
    "#2e8b57",
    "#b8860b",
    "#6a4c93",
    "#444b59",
    "#17a2b8",
    "#8d6e63",
    "#c2185b",
    "#7cb342",
    "#f57c00",
)
_CURVES = (
    "p50 completion, s",
    "p99 completion, s",
    "p99 waiting of urgent, s",
    "p99 waiting of ordinary, s",
    "longest waiting of ordinary, s",
    "model loads per task",
)


def all_plots(study: Study) -> list[tuple[str, str]]:
    """Return (heading, SVG) of every plot."""
    with matplotlib.rc_context(STYLE):
        return [("Against load", _curves(study)), ("GPUs for equal p99 completion", _sizes(study))]


def _curves(study: Study) -> str:
    figure = Figure(figsize=(11, 9), layout="constrained")
    places = figure.subplots(3, 2, squeeze=False)
    for place, name in zip(places.flat, _CURVES, strict=True):
        for profile in study.plan.profiles:
            points = [
                (each.load, each.figures[name])
                for each in study.standings
                if each.profile == profile and name in each.figures
            ]
            widths = [value.half_width if math.isfinite(value.half_width) else 0.0 for _, value in points]
            place.errorbar(
                [100 * load for load, _ in points],
                [value.mean for _, value in points],
                widths,
                label=profile,
                color=_colour(study, profile),
                linewidth=2.2 if profile == OURS else 1.1,
                marker="o",
                markersize=3,
                capsize=2,
            )
        place.set_title(name, loc="left")
        place.set_xlabel("load, %")
        if name.endswith(", s"):
            place.set_yscale("log")
    figure.legend(*places[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return _svg(figure)


def _sizes(study: Study) -> str:
    known = [(size.profile, size.mean) for size in study.sizes if size.mean is not None]
    known.sort(key=lambda pair: -pair[1].mean)
    figure = Figure(figsize=(11, 0.6 + 0.32 * max(3, len(known))), layout="constrained")
    place = figure.subplots()
    widths = [each.half_width if math.isfinite(each.half_width) else 0.0 for _, each in known]
    place.barh(
        [name for name, _ in known],
        [each.mean for _, each in known],
        xerr=widths,
        color=[_colour(study, name) for name, _ in known],
    )
    place.set_xlabel("GPUs, mean over seeds with 95% interval")
    return _svg(figure)


def _colour(study: Study, profile: str) -> str:
    if profile == OURS:
        return "#3066be"
    others = [name for name in (*study.plan.profiles, FREE) if name != OURS]
    return _COLOURS[others.index(profile) % len(_COLOURS)]


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "aigc study"}, bbox_inches="tight")
    text = buffer.getvalue()
    return re.sub(r"\s+<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
