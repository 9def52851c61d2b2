"""`aigc study elasticity`: what each way to size a fleet costs, for how long a wait."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from api.cli.options import Json
from api.cli.output import Exit, fail, progress_bar
from api.cli.study_output import load_times_of, tell


def elasticity(
    trace: Annotated[Path, typer.Option(help="GenTD26's lora_request_trace.csv.")],
    load_times: Annotated[
        Path | None,
        typer.Option(help="Folder of GenTD26's monitoring files. [default: the trace's, if they are there]"),
    ] = None,
    ways: Annotated[
        str, typer.Option(help="Ways and their settings, such as forecast=1.5,2.0;queue=0.6. [default: all]")
    ] = "",
    busy_gpus: Annotated[float, typer.Option(help="GPUs that the work keeps busy on average.")] = 6.0,
    hours: Annotated[float, typer.Option(help="Hours that are simulated.")] = 24.0,
    warm_days: Annotated[int, typer.Option(min=1, help="Days before them that the forecast has seen.")] = 3,
    seeds: Annotated[int, typer.Option(min=1, help="Repeat everything with so many seeds.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 2,
    nodes_max: Annotated[int, typer.Option(min=1, help="Most nodes.")] = 48,
    start_s: Annotated[float, typer.Option(help="Seconds a node takes to start.")] = 120.0,
    cool_down_s: Annotated[
        float, typer.Option(help="Seconds that less must have been in use before nodes go.")
    ] = 300.0,
    price: Annotated[float, typer.Option(help="Price of a GPU hour.")] = 2.0,
    settle_s: Annotated[
        float | None,
        typer.Option(help="Seconds at the beginning that are not judged. [default: a tenth, at most half an hour]"),
    ] = None,
    first_day: Annotated[str | None, typer.Option("--from", help="First day of the trace to use.")] = None,
    last_day: Annotated[str | None, typer.Option("--to", help="Last day of the trace to use.")] = None,
    rate_method: Annotated[str, typer.Option(help="days (whole days: peaks stay) or superpose (any moment).")] = "days",
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    store: Annotated[Path | None, typer.Option(help="Keep finished runs in this file and go on from it.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report here.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write everything as JSON here.")] = None,
    as_json: Json = False,
) -> None:
    """Compare ways to size a fleet on GenTD26: fixed, by utilisation, by queue length, and by forecast.

    Example: `aigc study elasticity --trace lora_request_trace.csv --from 2024-11-20 --hours 6 --html elasticity.html`
    """
    from sim.study import elasticity_report as report
    from sim.study.elasticity import DIALS, ElasticityPlan, run_elasticity

    folder = load_times_of(trace, load_times)
    try:
        plan = ElasticityPlan(
            trace=trace,
            load_times=folder,
            busy_gpus=busy_gpus,
            hours=hours,
            warm_days=warm_days,
            seeds=seeds,
            first_seed=first_seed,
            gpus_per_node=gpus_per_node,
            nodes_max=nodes_max,
            start_s=start_s,
            cool_down_s=cool_down_s,
            settle_s=settle_s,
            price_per_gpu_hour=price,
            first_day=first_day,
            last_day=last_day,
            rate_method=rate_method,
            dials=_ways(ways) if ways else dict(DIALS),
        )
        with progress_bar("studying") as update:
            study = run_elasticity(plan, jobs, update, store)
        tell(study, report, html=html, output=output, as_json=as_json)
    except ValueError as error:
        fail(str(error), Exit.USAGE)


def _ways(text: str) -> dict[str, tuple[float, ...]]:
    found: dict[str, tuple[float, ...]] = {}
    for part in text.split(";"):
        way, separator, settings = part.strip().partition("=")
        try:
            found[way] = tuple(float(each) for each in settings.split(","))
        except ValueError:
            separator = ""
        if not separator:
            fail(f"--ways: {part!r} is no way with settings; use for example queue=0.6,0.8", Exit.USAGE)
    return found
