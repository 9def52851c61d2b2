"""What the study of elasticity found, as tables, JSON and a page with pictures."""

from __future__ import annotations

import io
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure
from rich.table import Table

from engine.tasks import SECOND
from sim.configuration import ConfigError
from sim.plots import STYLE, Plot
from sim.study.elasticity import MEASURES, OURS, ElasticityStudy, Saving
from sim.study.elasticity_runs import BIN_US
from sim.sweep_table import Interval

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Elasticity on GenTD26</title>
<style>body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#1d2330}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .7em;border-bottom:1px solid #dde1e7;text-align:right}
td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}</style>
<h1>What a fleet costs, and for how long a wait</h1><p>{{ answer }}</p>
{% for title, heads, rows in tables %}<h2>{{ title }}</h2><table><tr>{% for head in heads %}<th>{{ head }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>{% endfor %}
{% for heading, svg in plots %}<h2>{{ heading }}</h2>{{ svg | safe }}{% endfor %}
<h2>How it was run</h2><table>{% for name, value in facts %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}</table>
</html>
"""
_COLOURS = {"forecast": "#2e8b57", "utilisation": "#d1495b", "queue": "#b8860b", "fixed": "#444b59"}
_Table = tuple[str, list[str], list[list[str]]]


def tables(study: ElasticityStudy) -> list[_Table]:
    """Return (title, headings, rows)."""
    rows = [[each.way, f"{each.dial:g}", *(_shown(each.figures[name]) for name in MEASURES)] for each in study.points]
    savings = [
        [f"{each.dial:g}", each.against, _percent(each.interval), f"{each.beyond} of {each.interval.count}"]
        for each in study.savings
    ]
    return [
        ("Every way at every setting, means over seeds with 95% intervals", ["way", "setting", *MEASURES], rows),
        (
            "GPU-hours that `forecast` spares at its own p99 completion, seed by seed",
            ["setting", "against", "fewer", "seeds in which the other never was that quick"],
            savings,
        ),
    ]


def render(study: ElasticityStudy) -> list[Table]:
    """Return the tables for a terminal."""
    found = []
    for title, heads, rows in tables(study):
        table = Table(title=title, title_justify="left")
        for place, head in enumerate(heads):
            table.add_column(head, justify="left" if place == 0 else "right")
        for row in rows:
            table.add_row(*row)
        found.append(table)
    return found


def best_reactive(study: ElasticityStudy, dial: float) -> Saving | None:
    """Return the saving against the best reactive way at one setting: the smallest one."""
    found = [each for each in study.savings if each.dial == dial and each.against != "fixed"]
    return min(found, key=lambda each: each.interval.mean, default=None)


def answer(study: ElasticityStudy) -> str:
    """Say in a sentence or two what was found."""
    parts = []
    for dial in study.plan.dials.get(OURS, ()):
        best = best_reactive(study, dial)
        if best is not None:
            point = next(each for each in study.points if (each.way, each.dial) == (OURS, dial))
            p99 = point.figures["p99 completion, s"].mean
            more = "fewer" if best.interval.mean >= 0 else "more"
            share = _percent(Interval(abs(best.interval.mean), best.interval.half_width, best.interval.count))
            parts.append(f"at {dial:g} (p99 {p99:.0f} s) {share} {more} than {best.against}")
    if not parts:
        return "Nothing to compare: name the way `forecast` and at least one other."
    return f"GPU-hours by forecast against the best reactive way at the same p99 completion: {'; '.join(parts)}."


def json_values(study: ElasticityStudy) -> dict[str, Any]:
    """Return everything as plain values."""
    plan = {name: value for name, value in asdict(study.plan).items() if name != "dials"}
    plan = {name: value.name if isinstance(value, Path) else value for name, value in plan.items()}
    return {
        "schema": 1,
        "plan": {**plan, "ways": {way: list(dial) for way, dial in study.plan.dials.items()}},
        "points": [
            {"way": each.way, "setting": each.dial, **{name: _interval(each.figures[name]) for name in MEASURES}}
            for each in study.points
        ],
        "savings": [
            {"setting": each.dial, "against": each.against, "share": _interval(each.interval), "beyond": each.beyond}
            for each in study.savings
        ],
        "runs": [{**asdict(each), "sizes": [list(size) for size in each.sizes]} for each in study.runs],
        "answer": answer(study),
    }


def write_html(study: ElasticityStudy, path: Path) -> None:
    """Write the page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    facts = list(json_values(study)["plan"].items())
    page = environment.from_string(_PAGE).render(
        answer=answer(study), tables=tables(study), plots=_plots(study), facts=facts
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"html: cannot write {path}: {error.strerror}; name another file") from None


def fleet_picture(study: ElasticityStudy) -> Plot:
    """Return the size of the fleets beside the GPUs in use, of the study's first seed."""
    with matplotlib.rc_context(STYLE):
        return Plot(
            "Fleet size against demand",
            "GPUs asked for by each way at its middle setting; the area is the GPUs in use, on average over five minutes.",
            _sizes(study),
        )


def _plots(study: ElasticityStudy) -> list[tuple[str, str]]:
    with matplotlib.rc_context({"svg.hashsalt": "aigc", "svg.fonttype": "none", "font.size": 9.0, "axes.grid": True}):
        return [("GPU-hours against p99 completion", _frontiers(study)), ("Fleet size against demand", _sizes(study))]


def _frontiers(study: ElasticityStudy) -> str:
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for way in study.plan.dials:
        points = [each for each in study.points if each.way == way]
        xs = [each.figures["p99 completion, s"].mean for each in points]
        ys = [each.figures["GPU-hours"].mean for each in points]
        axes.plot(xs, ys, marker="o", label=way, color=_COLOURS[way])
        for each, x, y in zip(points, xs, ys, strict=True):
            axes.annotate(f"{each.dial:g}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("p99 completion, s")
    axes.set_ylabel("GPU-hours")
    axes.set_ylim(bottom=0)
    axes.legend()
    return _svg(figure)


def _sizes(study: ElasticityStudy) -> str:
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    seed = study.plan.first_seed
    used = next(each.used for each in study.runs if each.seed == seed)
    hours = [place * BIN_US / 3600 / SECOND for place in range(len(used))]
    axes.fill_between(hours, used, step="post", color="#9aa5b1", alpha=0.5, linewidth=0, label="in use")
    for way, dials in study.plan.dials.items():
        dial = dials[len(dials) // 2]
        run = next(each for each in study.runs if (each.way, each.dial, each.seed) == (way, dial, seed))
        times = [at for at, _ in run.sizes] + [study.plan.hours]
        gpus = [study.plan.gpus_per_node * count for _, count in (*run.sizes, run.sizes[-1])]
        axes.step(times, gpus, where="post", label=f"{way} {dial:g}", color=_COLOURS[way], linewidth=1)
    axes.set_xlabel("hours")
    axes.set_ylabel("GPUs")
    axes.legend()
    return _svg(figure)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return re.sub(r"^.*?(?=<svg)", "", text.getvalue(), count=1, flags=re.DOTALL)


def _shown(each: Interval) -> str:
    digits = 0 if abs(each.mean) >= 100 else 1 if abs(each.mean) >= 10 else 2
    width = f" ±{each.half_width:.{digits}f}" if math.isfinite(each.half_width) else ""
    return f"{each.mean:.{digits}f}{width}"


def _percent(each: Interval) -> str:
    width = f" ±{100 * each.half_width:.1f}" if math.isfinite(each.half_width) else ""
    return f"{100 * each.mean:.1f}{width}%"


def _interval(each: Interval) -> dict[str, Any]:
    return {
        "mean": each.mean,
        "half_width": each.half_width if math.isfinite(each.half_width) else None,
        "seeds": each.count,
    }
