"""Shows a study: tables for people, plain values for programs, and a page that needs no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from rich.table import Table

from sim.configuration import ConfigError
from sim.study.gentd26 import Standing, Study, TieEffect
from sim.study.plan import OURS
from sim.sweep_table import Interval

SHOWN = (
    "p50 completion, s",
    "p99 completion, s",
    "p99 waiting of urgent, s",
    "p99 waiting of ordinary, s",
    "longest waiting of ordinary, s",
    "p99 waiting of the worst tenant, s",
    "model loads per task",
    "busy, % of GPU time",
    "Jain's index",
    "not finished",
)
Cells = list[str]


def answer(study: Study) -> str:
    """Return the study's answer in a sentence or two."""
    load = study.plan.size_load
    reference = study.references[load]
    ours, base = study.size_of(OURS), study.size_of(reference)
    if ours is None:
        return f"At {load:.0%} load the lowest p99 completion is {reference}'s; {OURS} was not asked for."
    if reference == OURS or base is None:
        return "Nothing to compare with: name a classic beside aigc."
    if ours.mean is None or ours.saving is None or base.mean is None:
        return (
            f"{OURS} does not reach the p99 completion of {reference} at {load:.0%} load with any size that was tried."
        )
    text = (
        f"For {reference}'s p99 completion at {load:.0%} load, {OURS} needs {ours.mean.mean:.1f} GPUs and {reference} "
        f"{base.mean.mean:.1f}: {_saving(ours.saving)}"
    )
    standing = study.standing(OURS, load)
    waited = next(
        (each for each in standing.differences if each.measure == "longest waiting of ordinary, s")
        if standing
        else iter(()),
        None,
    )
    if waited is not None:
        longest = waited.baseline_mean + waited.mean
        text += (
            f"; with all {study.plan.gpus}, its ordinary tasks wait {longest:.0f} s at the longest, {reference}'s "
            f"{waited.baseline_mean:.0f} s"
        )
    return text + "."


def tables(study: Study) -> list[tuple[str, Cells, list[Cells]]]:
    """Return the tables as (title, headings, rows)."""
    found = [_fit_table(study)]
    for load in sorted(study.references):
        here = [each for each in study.standings if each.load == load]
        names = [name for name in SHOWN if any(name in each.figures for each in here)]
        rows = [[each.profile, *(_shown(each.figures.get(name)) for name in names)] for each in here]
        found.append(
            (f"{load:.0%} load: means over {study.plan.seeds} seeds, with 95% intervals", ["profile", *names], rows)
        )
        if any(each.differences for each in here):
            found.append(_difference_table(load, study.references[load], here))
    if study.ties:
        found.append(_tie_table(study.ties, study.plan.size_load))
    found.append(_size_table(study))
    return found


def render(study: Study) -> list[Table]:
    """Return the tables for a terminal."""
    made = []
    for title, headings, rows in tables(study):
        table = Table(title=title, title_justify="left")
        for place, heading in enumerate(headings):
            table.add_column(heading, justify="right" if place else "left", overflow="fold", no_wrap=not place)
        for row in rows:
            table.add_row(*row)
        made.append(table)
    return made


def json_values(study: Study) -> dict[str, Any]:
    """Return the study as plain values."""
    plan = asdict(study.plan)
    plan["trace"] = study.plan.trace.name
    plan["load_times"] = study.plan.load_times.name if study.plan.load_times else None
    return {
        "schema": 1,
        "answer": answer(study),
        "plan": plan,
        "fit": {name: {"trace": own, "scaled": _interval(made)} for name, (own, made) in study.fit.items()},
        "references": {str(load): name for load, name in study.references.items()},
        "loads": [
            {
                "load": each.load,
                "profile": each.profile,
                "figures": {name: _interval(value) for name, value in each.figures.items()},
                "differences": [asdict(gap) | {"clear": gap.clear} for gap in each.differences],
            }
            for each in study.standings
        ],
        "ties": [
            {
                "profile": each.profile,
                "best": each.best,
                "worst": each.worst,
                "p99_completion_s": {tie: _interval(value) for tie, value in each.by_tie.items()},
            }
            for each in study.ties
        ],
        "ties_missing": study.ties_missing,
        "sizes": [
            {
                "profile": each.profile,
                "gpus": list(each.gpus),
                "mean": _interval(each.mean),
                "gpu_hours": each.gpu_hours,
                "saving": _interval(each.saving),
            }
            for each in study.sizes
        ],
        "runs": [
            {
                "hash": run.hash,
                "profile": run.config.profile if "\n" not in run.config.profile else "(another tie rule)",
                "seed": run.config.seed,
                "gpus": sum(count for _, count in run.config.pools),
                "workload_digest": run.workload_digest,
                "decisions_digest": run.decisions_digest,
                "wall_s": run.wall_s,
            }
            for run in study.runs
        ],
    }


def write_html(study: Study, path: Path) -> None:
    """Write the page."""
    from sim.study import plots

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = resources.files("sim.study").joinpath("study.html.jinja").read_text(encoding="utf-8")
    facts = [(name, value) for name, value in json_values(study)["plan"].items() if value is not None]
    page = environment.from_string(template).render(
        answer=answer(study), tables=tables(study), plots=plots.all_plots(study), facts=facts
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"html: cannot write {path}: {error.strerror}; name another file") from None


def _fit_table(study: Study) -> tuple[str, Cells, list[Cells]]:
    rows = [[name, f"{own:.2f}", _shown(made)] for name, (own, made) in study.fit.items()]
    return (
        f"How like the trace the scaled workload is ({study.plan.rate_method}, {study.plan.size_load:.0%} load)",
        ["statistic", "trace, these days", "scaled, mean over seeds"],
        rows,
    )


def _difference_table(load: float, reference: str, here: Sequence[Standing]) -> tuple[str, Cells, list[Cells]]:
    names = [name for name in SHOWN if any(gap.measure == name for each in here for gap in each.differences)]
    rows = []
    for each in here:
        gaps = {gap.measure: gap for gap in each.differences}
        if gaps:
            cells = [
                f"{gap.mean:+.{_digits(gap.mean)}f} ±{gap.half_width:.{_digits(gap.mean)}f}{'' if gap.clear else ' ?'}"
                if (gap := gaps.get(name))
                else "-"
                for name in names
            ]
            rows.append([each.profile, *cells])
    title = f"{load:.0%} load: differences from {reference}, the best classic here, seed by seed (?: may be luck)"
    return title, ["profile", *names], rows


def _tie_table(ties: Sequence[TieEffect], load: float) -> tuple[str, Cells, list[Cells]]:
    rules = list(ties[0].by_tie)
    rows = [[each.profile, *(_shown(each.by_tie[rule]) for rule in rules), each.best, each.worst] for each in ties]
    return f"What the tie rule moves: p99 completion at {load:.0%} load, s", ["profile", *rules, "best", "worst"], rows


def _size_table(study: Study) -> tuple[str, Cells, list[Cells]]:
    load = study.plan.size_load
    rows = []
    for each in study.sizes:
        by_seed = " ".join("-" if size is None else str(size) for size in each.gpus)
        hours = "-" if each.gpu_hours is None else f"{each.gpu_hours:.0f}"
        saving = "-" if each.saving is None else _percent(each.saving)
        rows.append([each.profile, _shown(each.mean), by_seed, hours, saving])
    title = f"Fewest GPUs that hold the p99 completion of {study.references[load]} with {study.plan.gpus} at {load:.0%} load"
    return title, ["profile", "GPUs", "by seed", "GPU-hours", "fewer"], rows


def _saving(each: Interval) -> str:
    width = f" ±{100 * each.half_width:.1f}" if math.isfinite(each.half_width) else ""
    return f"{100 * abs(each.mean):.1f}{width}% {'fewer' if each.mean >= 0 else 'more'}"


def _percent(each: Interval) -> str:
    width = f" ±{100 * each.half_width:.1f}" if math.isfinite(each.half_width) else ""
    return f"{100 * each.mean:.1f}{width}%"


def _digits(value: float) -> int:
    return 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 3


def _shown(each: Interval | None) -> str:
    if each is None:
        return "-"
    digits = _digits(each.mean)
    return f"{each.mean:.{digits}f}" + (f" ±{each.half_width:.{digits}f}" if math.isfinite(each.half_width) else "")


def _interval(each: Interval | None) -> dict[str, Any] | None:
    if each is None:
        return None
    return {
        "mean": each.mean,
        "half_width": each.half_width if math.isfinite(each.half_width) else None,
        "seeds": each.count,
    }
