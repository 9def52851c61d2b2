"""`aigc trace`: looks at traces before they are simulated, and turns them into tasks of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from api.cli.options import Json
from api.cli.output import Exit, err, fail, out, print_facts, print_json, progress_bar

if TYPE_CHECKING:
    from sim.trace_doctor import Offer, TraceReport

app = typer.Typer(no_args_is_help=True, help="Traces: check, describe and convert them.")
File = Annotated[
    Path, typer.Argument(help="A trace: GenTD26, Philly, openb, Helios, PAI, SWF, or your own CSV/JSONL; .gz too.")
]
Format = Annotated[str, typer.Option("--format", help="The trace's format; default: told by the file.")]
CpuTasks = Annotated[bool, typer.Option(help="Keep tasks that ask for no GPU.")]
PerNode = Annotated[int, typer.Option(min=1, help="GPUs on each node; larger jobs are split into gangs.")]
_TYPES_SHOWN = 13
_COLOURS = {"error": "red", "warning": "yellow", "info": "cyan"}


@app.command()
def check(
    file: File,
    nodes: Annotated[int | None, typer.Option(min=1, help="Hold the trace against so many nodes.")] = None,
    gpus_per_node: PerNode = 8,
    gpu_model: Annotated[str, typer.Option(help="GPU model of the nodes.")] = "a100",
    cluster: Annotated[str, typer.Option(help="Several GPU types: MODEL:NODESxGPUS, as in a100:16x8,t4:40x2.")] = "",
    trace_format: Format = "",
    cpu_tasks: CpuTasks = False,
    as_json: Json = False,
) -> None:
    """Find what is wrong with a trace and what it asks for: bad records, clocks, impossible jobs, load, bursts, tails.

    Exit code 0: nothing that a simulation would fail on or be wrong by. Exit code 1: there is, and it is printed.

    Example: `aigc trace check cluster_log.csv --nodes 143 --gpus-per-node 8 --gpu-model v100`
    """
    from sim.trace_doctor import Offer, parse_offers

    if cluster and nodes is not None:
        fail("--cluster, --nodes: give one of the two", Exit.USAGE)
    try:
        offers: tuple[Offer, ...] = parse_offers(cluster) if cluster else ()
        if nodes is not None:
            offers = (Offer(gpu_model.lower(), nodes, gpus_per_node),)
    except ValueError as error:
        fail(f"--{error}", Exit.USAGE)
    report = _examine(file, trace_format, gpus_per_node, cpu_tasks, offers)
    if as_json:
        print_json(report.to_json())
    else:
        _show_load(report)
        _show_findings(report)
    if report.errors:
        raise typer.Exit(int(Exit.FAILED))


@app.command()
def info(
    file: File,
    trace_format: Format = "",
    gpus_per_node: PerNode = 8,
    cpu_tasks: CpuTasks = False,
    as_json: Json = False,
) -> None:
    """Say what a trace holds: its format, span, tasks, run times, GPUs and bursts.

    Example: `aigc trace info lora_request_trace.csv`
    """
    report = _examine(file, trace_format, gpus_per_node, cpu_tasks, ())
    facts = {
        "name": report.name,
        "format": report.format,
        "records": report.records,
        "tasks": report.kept,
        **report.facts,
        "gpu_hours": round(report.load[0].gpu_hours, 1) if report.load else 0.0,
        "mean_gpus_wanted": round(report.load[0].mean_gpus, 2) if report.load else 0.0,
        "busiest_hour_wants": round(report.load[0].peak_hour_gpus, 2) if report.load else 0.0,
        "run_seconds": {name: round(value, 1) for name, value in report.seconds.items()},
        "tasks_by_gpus": report.gpus,
        "variation_of_gaps": None if report.burst.gap_cv is None else round(report.burst.gap_cv, 2),
        "index_of_dispersion": {name: round(value, 2) for name, value in report.burst.dispersion.items()},
        "peak_to_mean": {name: round(value, 1) for name, value in report.burst.peak_to_mean.items()},
        "tail_index": None if report.tail.index is None else round(report.tail.index, 2),
        "gpu_time_of_top_percent": round(report.tail.top_share, 3),
    }
    print_facts(facts, as_json)


@app.command()
def convert(
    file: File,
    output: Annotated[Path, typer.Argument(help="Where to write: .csv or .jsonl, with .gz behind it to pack.")],
    trace_format: Format = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Take only the first N tasks.")] = None,
    gpus_per_node: PerNode = 8,
    cpu_tasks: CpuTasks = False,
    as_json: Json = False,
) -> None:
    """Write a trace as tasks of your own, one row each, to read, edit and simulate.

    Example: `aigc trace convert log.swf.gz tasks.csv --limit 10000`
    """
    from sim.readers import convert as writer
    from sim.readers import registry

    _must_exist(file)
    try:
        with progress_bar("converting") as update:
            update(0.1, "reading")
            options = registry.ReaderOptions(limit=limit, gpus_per_node=gpus_per_node, cpu_tasks=cpu_tasks)
            workload = registry.read(file, options, trace_format or None)
            update(0.7, "writing")
            lost = writer.write(workload, output)
    except ValueError as error:
        fail(str(error), Exit.USAGE)
    if as_json:
        print_json(
            {"output": str(output), "tasks": len(workload.arrivals), "notes": dict(workload.notes), "left_out": lost}
        )
        return
    out.print(f"{len(workload.arrivals):,} tasks written to {output}", markup=False, soft_wrap=True)
    for what, count in lost.items():
        err.print(f"left out: {what} ({count:,} tasks)", markup=False, soft_wrap=True)


def _must_exist(file: Path) -> None:
    if not file.exists():
        fail(f"{file} does not exist; give the path of a trace", Exit.UNREACHABLE)


def _examine(
    file: Path, trace_format: str, gpus_per_node: int, cpu_tasks: bool, offers: tuple[Offer, ...]
) -> TraceReport:
    from sim import trace_doctor
    from sim.readers.registry import ReaderOptions

    _must_exist(file)
    try:
        with progress_bar("reading") as update:
            return trace_doctor.examine(
                file,
                offers,
                ReaderOptions(gpus_per_node=gpus_per_node, cpu_tasks=cpu_tasks),
                trace_format,
                lambda rows: update(0.0, f"{rows:,} tasks"),
            )
    except ValueError as error:
        fail(str(error), Exit.USAGE)


def _show_load(report: TraceReport) -> None:
    title = f"{report.name} ({report.format}): {report.kept:,} tasks of {report.records:,} records"
    table = Table(title=escape(title), title_justify="left")
    for heading in ("GPU type", "tasks", "GPU hours", "GPUs wanted, mean", "in the busiest hour", "GPUs there", "load"):
        table.add_column(heading, justify="left" if heading == "GPU type" else "right")
    shown = sorted(report.load, key=lambda line: (line.gpu_type != "all", -line.gpu_hours))[:_TYPES_SHOWN]
    for line in shown:
        table.add_row(
            line.gpu_type,
            f"{line.tasks:,}",
            f"{line.gpu_hours:,.1f}",
            f"{line.mean_gpus:,.2f}",
            f"{line.peak_hour_gpus:,.2f}",
            "-" if line.capacity is None else f"{line.capacity:,}",
            "-" if line.load is None else f"{line.load:.1%}",
        )
    out.print(table)
    if len(report.load) > len(shown):
        out.print(f"and {len(report.load) - len(shown)} kinds more with fewer GPU hours; --json has all", style="dim")


def _show_findings(report: TraceReport) -> None:
    if not report.findings:
        out.print("nothing to remark")
        return
    for finding in report.findings:
        colour = _COLOURS[finding.severity]
        place = f", {finding.example}" if finding.example else ""
        message = escape(f"{finding.topic}: {finding.message} ({finding.count:,}{place})")
        out.print(f"[{colour}]{finding.severity:<7}[/{colour}] {message}", soft_wrap=True, emoji=False)
        if finding.remedy not in ("", "none needed"):
            out.print(f"        {escape(finding.remedy)}", style="dim", soft_wrap=True, emoji=False)
