"""Shows a plan to people: tables for the terminal, and one self-contained page."""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path

import jinja2
from rich.table import Table
from rich.text import Text

from sim.planner.objectives import shown
from sim.planner.request import Pool, gpus_of, pool_text
from sim.planner.results import Plan, csv_text, money
from sim.planner.trials import Trial
from sim.prices import HOURS_PER_MONTH

Rows = list[tuple[str, ...]]


def write_json(plan: Plan, path: Path) -> None:
    """Write everything as JSON."""
    path.write_text(json.dumps(plan.to_json(), indent=1, sort_keys=True) + "\n", encoding="utf-8")


def write_csv(plan: Plan, path: Path) -> None:
    """Write one line per simulated cluster."""
    path.write_text(csv_text(plan), encoding="utf-8")


def write_html(plan: Plan, path: Path) -> None:
    """Write the page; it needs no network and no other file."""
    from sim.planner import drawings

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = resources.files("sim.planner").joinpath("plan.html.jinja").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        title=f"{plan.workload}: how many GPUs?",
        plan=plan,
        sentence=plan.sentence(),
        tables=[(heading, note, heads, rows) for heading, note, heads, rows in tables(plan) if rows],
        plots=drawings.all_drawings(plan),
        facts=_facts(plan),
    )
    path.write_text(page, encoding="utf-8")


def render(plan: Plan) -> list[Table]:
    """Return the tables for the terminal."""
    found = []
    for heading, _, heads, rows in tables(plan):
        if not rows:
            continue
        table = Table(title=heading, title_justify="left", header_style="bold")
        for number, head in enumerate(heads):
            table.add_column(Text(head), justify="left" if number == 0 or not head else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        found.append(table)
    return found


def tables(plan: Plan) -> list[tuple[str, str, tuple[str, ...], Rows]]:
    """Return every table: heading, note, column heads and rows; a table without rows has nothing to say."""
    name = plan.objective.name
    return [
        (
            "What it costs",
            "The fewest GPUs of each model, and the mixes that hold; load: offered work as a share of the cluster's time.",
            ("cluster", "GPUs", "per hour", "per month", name, f"{plan.request.confidence:.0%} interval", "busy", ""),
            _cost_rows(plan),
        ),
        (
            f"Cost against {name}",
            "The simulated clusters that no other beats in both.",
            ("cluster", "per hour", name, f"{plan.request.confidence:.0%} interval", ""),
            _front_rows(plan),
        ),
        (
            "Add a GPU, or change the policy",
            f"What else could be done, and what {name} is then.",
            ("instead", "GPUs", "per hour", name, ""),
            _choice_rows(plan),
        ),
        (
            "If the assumptions are wrong",
            f"{name} on the answer's cluster when one assumption changes, with the same seeds; the widest first.",
            ("assumption", "lower", name, "higher", name, ""),
            _sway_rows(plan),
        ),
        (
            "By hour of day",
            "Means over days and seeds; fullest: the fullest such hour.",
            ("hour", "tasks per hour", "running", "loading", "free", "fullest", "p99 wait"),
            _hour_rows(plan),
        ),
        (
            "The textbook's answer",
            "Erlang C, for the cheapest model: Poisson arrivals, exponential run times, first come first served.",
            ("formula", "tasks per s", "service", "Erlang", "GPUs"),
            _theory_rows(plan),
        ),
    ]


def _cost_rows(plan: Plan) -> Rows:
    rows: Rows = []
    for each in plan.pure:
        if each.trial is None:
            rows.append((each.model, "-", "-", "-", "-", "-", "-", each.why.partition(": ")[2].partition(";")[0]))
        else:
            rows.append(_cost_row(plan, each.trial))
    rows += [
        _cost_row(plan, trial) for trial in sorted(plan.mixes, key=lambda trial: plan.request.cost(trial.pool))[:3]
    ]
    return rows


def _cost_row(plan: Plan, trial: Trial) -> tuple[str, ...]:
    estimate, unit = trial.estimates[plan.number], plan.objective.unit
    cost = plan.request.cost(trial.pool)
    chosen = plan.answer is not None and trial.pool == plan.answer.pool
    return (
        pool_text(trial.pool),
        str(gpus_of(trial.pool)),
        money(cost, plan.request.currency),
        money(cost * HOURS_PER_MONTH, plan.request.currency),
        shown(estimate.mean, unit),
        f"{shown(estimate.low, unit)} .. {shown(estimate.high, unit)}",
        f"{trial.mean('busy'):.0%}",
        "the answer" if chosen else "",
    )


def _front_rows(plan: Plan) -> Rows:
    unit = plan.objective.unit
    rows: Rows = []
    for trial in plan.front():
        estimate = trial.estimates[plan.number]
        between = f"{shown(estimate.low, unit)} .. {shown(estimate.high, unit)}" if trial.seeds > 1 else "one seed"
        cost = money(plan.request.cost(trial.pool), plan.request.currency)
        rows.append((pool_text(trial.pool), cost, shown(estimate.mean, unit), between, trial.verdict.value))
    return rows


def _choice_rows(plan: Plan) -> Rows:
    if plan.answer is None:
        return []
    unit, currency = plan.objective.unit, plan.request.currency
    base = plan.request.cost(plan.answer.pool)
    rows: Rows = [
        (
            f"as planned, {plan.answer.profile}",
            str(gpus_of(plan.answer.pool)),
            money(base, currency),
            shown(plan.value(plan.answer), unit),
            "",
        )
    ]
    for text, trial in (("one GPU more", plan.above), ("one GPU less", plan.below)):
        if trial is not None:
            cost = plan.request.cost(trial.pool)
            change = f"{cost - base:+,.2f} {currency}/h; {trial.verdict.value}"
            rows.append((text, str(gpus_of(trial.pool)), money(cost, currency), shown(plan.value(trial), unit), change))
    for row in plan.policies:
        on_answer = f"on the answer's cluster {shown(row.value, unit)}{'' if row.kept else ', not surely kept'}"
        if row.gpus is None or row.cost is None:
            rows.append((f"policy {row.profile}", "-", "-", "-", f"no number of GPUs is enough; {on_answer}"))
        else:
            note = f"{row.cost - base:+,.2f} {currency}/h; {on_answer}"
            rows.append((f"policy {row.profile}", str(row.gpus), money(row.cost, currency), "kept", note))
    return rows


def _sway_rows(plan: Plan) -> Rows:
    unit = plan.objective.unit
    rows: Rows = []
    for sway in plan.sways:
        kept = {(True, True): "", (True, False): "higher breaks it", (False, True): "lower breaks it"}
        note = kept.get((sway.low_kept, sway.high_kept), "both break it")
        rows.append((sway.name, sway.low_label, shown(sway.low, unit), sway.high_label, shown(sway.high, unit), note))
    return rows


def _hour_rows(plan: Plan) -> Rows:
    return [
        (
            f"{row['hour']:02.0f}:00",
            f"{row['tasks']:.1f}",
            f"{row['busy']:.0%}",
            f"{row['loading']:.0%}",
            f"{row['free']:.0%}",
            f"{row['fullest']:.0%}",
            shown(row["p99_wait"]),
        )
        for row in plan.hours
    ]


def _theory_rows(plan: Plan) -> Rows:
    if plan.theory is None:
        return []
    rows: Rows = [
        (f"no scheduler could do with fewer {each.model}", "-", "-", "-", str(each.bound)) for each in plan.pure
    ]
    rows += [
        (
            formula.name,
            f"{formula.rate_per_s:.3g}",
            shown(formula.service_s),
            f"{formula.erlangs:.3g}",
            "-" if formula.gpus is None else str(formula.gpus),
        )
        for formula in plan.theory.formulas
    ]
    return rows


def _facts(plan: Plan) -> list[tuple[str, str]]:
    request = plan.request
    base = request.base
    seeds = f"{base.seed} to {base.seed + request.seeds - 1}"
    load = "" if math.isinf(plan.load) else f"{plan.load:.1%}"
    return [
        ("workload", f"{plan.workload} ({plan.workload_digest})"),
        ("objectives", ", ".join(str(each) for each in request.objectives)),
        ("prices", ", ".join(f"{offer.gpu_model} {offer.per_hour:g} {request.currency}/h" for offer in request.offers)),
        ("profile", base.profile),
        ("forecaster", base.forecaster),
        ("GPUs per node", str(base.gpus_per_node)),
        ("arrivals", f"{base.rate_scale:g} times as fast"),
        ("offered load of the answer", load),
        ("seeds", seeds),
        ("simulations", str(plan.runs)),
        ("configuration", request.digest()),
    ]


def label(pool: Pool) -> str:
    """Write a cluster for a picture."""
    return "+".join(f"{count} {model}" for model, count in pool)
