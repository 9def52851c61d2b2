"""`aigc plan`: how many GPUs are needed, and which."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from api.cli.options import Json
from api.cli.output import Exit, err, fail, out, print_json, progress_bar

if TYPE_CHECKING:
    from sim.planner import Plan, PlanRequest
    from sim.workload import Workload

app = typer.Typer(invoke_without_command=True)
_POLICIES = "fifo,kube-default,aigc"


@app.callback()
def plan(
    ctx: typer.Context,
    slo: Annotated[
        list[str] | None,
        typer.Option(
            "--slo",
            help="What to keep, such as p99_wait<8s, urgent_p99_wait<2s or mean_slowdown[tenant=lab]<3; repeat it.",
        ),
    ] = None,
    gpu: Annotated[
        str, typer.Option(help="GPU models with prices: a100:1.8/h,h100:3.9/h; without a price: the price list's.")
    ] = "a100",
    trace: Annotated[Path | None, typer.Option(help="Workload: a trace, as for `aigc simulate`.")] = None,
    synthetic: Annotated[
        bool, typer.Option("--synthetic", help="Workload: a synthetic one, anew for every seed.")
    ] = False,
    from_live: Annotated[
        Path | None, typer.Option(help="Workload: what a platform with this state directory was asked for.")
    ] = None,
    tasks: Annotated[int, typer.Option(min=1, help="Tasks of the synthetic workload.")] = 5_000,
    rate_scale: Annotated[float, typer.Option(help="Multiply the arrival rate.")] = 1.0,
    load_scale: Annotated[float, typer.Option(help="Multiply the time that model loads take.")] = 1.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Take only the first N tasks.")] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs on a full node; the last may have fewer.")] = 8,
    profile: Annotated[str, typer.Option(help="Scheduling profile: a name, or a TOML file.")] = "aigc",
    policies: Annotated[str, typer.Option(help="Profiles to set beside it; empty: none.")] = _POLICIES,
    forecaster: Annotated[str, typer.Option(help="online, declared, oracle or none.")] = "online",
    mtbf_hours: Annotated[
        float | None, typer.Option(help="Mean time between failures of a node; without: none fails.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of the intervals that have to keep the limits.")] = 0.95,
    seeds: Annotated[int, typer.Option(min=2, help="Most repetitions of one cluster.")] = 5,
    first_seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    mixes: Annotated[int, typer.Option(min=0, help="Most mixed clusters to try.")] = 12,
    most_gpus: Annotated[int, typer.Option(min=1, help="Largest number of GPUs of one model to try.")] = 4096,
    sensitivity: Annotated[bool, typer.Option(help="Vary the assumptions at the answer.")] = True,
    prices: Annotated[Path | None, typer.Option(help="Price list; see `aigc plan prices`.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes. [default: every core]")] = None,
    store: Annotated[
        Path | None, typer.Option(help="File of finished runs: a plan that was interrupted goes on from it.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one self-contained page here.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write one line per simulated cluster here.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write everything as JSON here.")] = None,
    as_json: Json = False,
) -> None:
    """Find the fewest GPUs, or the cheapest mix of models, that keep an objective, and say how firm the answer is.

    Exit code 0: there is an answer. Exit code 1: nothing on offer keeps the objective; the output says why and what is in reach.

    Example: `aigc plan --synthetic --slo "p99_wait<60s" --gpu a100:1.8/h,h100:3.9/h --rate-scale 20 --html plan.html`
    """
    if ctx.invoked_subcommand is not None:
        return
    from sim import prices as price_lists
    from sim.configuration import SimulationConfig
    from sim.planner import PlanRequest, objectives

    workload, reference = _workload(trace, synthetic, from_live)
    try:
        if not slo:
            raise ValueError("--slo: say what is to be kept, such as --slo 'p99_wait<8s'")
        listed = price_lists.load(prices)
        offers = price_lists.parse_offers(gpu, listed)
        names = tuple(name.strip() for name in policies.split(",") if name.strip())
        base = SimulationConfig(
            trace=trace,
            synthetic_tasks=tasks,
            rate_scale=rate_scale,
            load_scale=load_scale,
            limit=limit,
            gpus_per_node=gpus_per_node,
            profile=profile,
            forecaster=forecaster,
            mtbf_hours=mtbf_hours,
            seed=first_seed,
            reference_gpu=reference or "a100",
        )
        request = PlanRequest(
            base,
            tuple(objectives.parse(text) for text in slo),
            offers,
            listed.currency,
            workload,
            confidence,
            seeds,
            tuple(name for name in names if name != profile),
            mixes,
            most_gpus,
            sensitivity,
        )
        made = _made(request, store, jobs)
    except ValueError as error:
        fail(str(error), Exit.USAGE)
    _show(made, as_json)
    _write(made, html, csv, output)
    if made.answer is None:
        raise typer.Exit(int(Exit.FAILED))


@app.command("prices")
def show_prices(
    prices: Annotated[Path | None, typer.Option(help="Price list to show instead of the one in use.")] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Put the package's list where it is looked for, to be edited.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print the GPU price list that is in use, as a file to edit.

    Example: `aigc plan prices > prices.toml`
    """
    from sim import prices as price_lists

    own = price_lists.own_path()
    try:
        if copy:
            if own.exists():
                fail(f"{own} exists already; edit it, or remove it first", Exit.FAILED)
            own.parent.mkdir(parents=True, exist_ok=True)
            own.write_text(price_lists.default_text(), encoding="utf-8")
            err.print(f"price list written to {own}", soft_wrap=True, markup=False)
            return
        listed = price_lists.load(prices)
        if as_json:
            print_json({"currency": listed.currency, "per_hour": dict(listed.per_hour), "source": listed.source})
            return
        chosen = prices or (own if own.is_file() else None)
        text = price_lists.default_text() if chosen is None else chosen.read_text(encoding="utf-8")
    except OSError as error:
        fail(f"--copy: cannot write {own}: {error.strerror}; use `aigc plan prices > prices.toml`", Exit.FAILED)
    except ValueError as error:
        fail(str(error), Exit.USAGE)
    out.print(text.rstrip(), markup=False, soft_wrap=True)


def _workload(trace: Path | None, synthetic: bool, from_live: Path | None) -> tuple[Workload | None, str | None]:
    """Return the workload that only a journal holds, and the GPU model its run times hold on; check the choice."""
    if (trace is not None) + synthetic + (from_live is not None) > 1:
        fail("--trace, --synthetic, --from-live: give one of the three", Exit.USAGE)
    if trace is not None and not trace.is_file():
        fail(f"--trace: {trace} does not exist; give the path of a trace, or use --synthetic", Exit.UNREACHABLE)
    if from_live is None:
        return None, None
    from api.sm.journal import JournalCorrupt, read_journal
    from engine.events import NodeJoined
    from sim.from_journal import workload_from_records
    from sim.hardware import GPU_MODELS

    path = from_live / "journal.db" if from_live.is_dir() else from_live
    if not path.is_file():
        fail(f"--from-live: {path} does not exist; give the state directory of `aigc up`", Exit.UNREACHABLE)
    try:
        _, records = read_journal(path, from_start=True)
        workload = workload_from_records(records, f"{from_live.name} as recorded")
    except (OSError, ValueError, JournalCorrupt) as error:
        fail(f"--from-live: {path} cannot be read: {error}", Exit.USAGE)
    if not workload.arrivals:
        fail(f"--from-live: {path} holds no submission yet; use --trace or --synthetic", Exit.USAGE)
    models: Counter[str] = Counter()
    for record in records:
        for event in record.events:
            if isinstance(event, NodeJoined):
                models.update(gpu.model for gpu in event.node.gpus)
    known = [model for model, _ in models.most_common() if model in GPU_MODELS]
    if not known:
        seen = ", ".join(models) or "none"
        err.print(
            f"the journal's GPU models ({seen}) are not known to the simulator: run times are taken as those of an a100",
            markup=False,
            soft_wrap=True,
        )
    return workload, known[0] if known else None


def _made(request: PlanRequest, store: Path | None, jobs: int | None) -> Plan:
    from sim.planner import plan as make

    try:
        with progress_bar("planning") as update:
            return make(request, update, store=store, jobs=jobs)
    except KeyboardInterrupt:
        keep = (
            f"the finished runs are in {store}: the same command goes on"
            if store
            else "with --store FILE it could go on"
        )
        err.print(f"interrupted; {keep}", markup=False, soft_wrap=True)
        raise typer.Exit(int(Exit.INTERRUPTED)) from None


def _show(made: Plan, as_json: bool) -> None:
    from sim.planner import report

    if as_json:
        print_json(made.to_json())
        return
    out.print(made.sentence(), markup=False, soft_wrap=True)
    for warning in made.warnings:
        out.print(f"[yellow]-[/yellow] {escape(warning)}", soft_wrap=True)
    for table in report.render(made):
        out.print(table)
    if made.theory is not None:
        for reason in made.theory.reasons:
            out.print(f"- {escape(reason)}", soft_wrap=True)
    load = "" if math.isinf(made.load) else f", offered load {made.load:.1%}"
    facts: tuple[Any, ...] = (made.runs, made.reused, made.request.digest(), made.workload_digest)
    out.print(
        "{} simulations ({} from the store), configuration {}, workload {}{}".format(*facts, load), soft_wrap=True
    )


def _write(made: Plan, html: Path | None, csv: Path | None, output: Path | None) -> None:
    from sim.planner import report

    for option, path, write in (
        ("--html", html, report.write_html),
        ("--csv", csv, report.write_csv),
        ("--output", output, report.write_json),
    ):
        if path is None:
            continue
        try:
            write(made, path)
        except OSError as error:
            fail(
                f"{option}: cannot write {path}: {error.strerror}; name a file in a directory that exists", Exit.FAILED
            )
        err.print(f"written to {path}", markup=False, soft_wrap=True)
