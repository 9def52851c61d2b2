"""`aigc study`: questions that take many simulations to answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from api.cli.options import Json
from api.cli.output import Exit, fail, progress_bar
from api.cli.study_output import load_times_of, tell

app = typer.Typer(no_args_is_help=True, help="Answer a question with many simulations.")


@app.callback()
def _root() -> None:
    """Answer a question with many simulations."""


@app.command()
def gentd26(
    trace: Annotated[Path, typer.Option(help="GenTD26's lora_request_trace.csv.")],
    load_times: Annotated[
        Path | None,
        typer.Option(help="Folder of GenTD26's monitoring files. [default: the trace's, if they are there]"),
    ] = None,
    loads: Annotated[str, typer.Option(help="Work as a share of capacity, model loads not counted.")] = "0.6,0.8,1.0",
    profiles: Annotated[str, typer.Option(help="Profiles, by name or TOML file. [default: all that come along]")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Repeat everything with so many seeds.")] = 5,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the cluster.")] = 16,
    hours: Annotated[float, typer.Option(help="Hours that are simulated.")] = 6.0,
    slots: Annotated[
        int, typer.Option(min=1, help="Requests of one base model that a Pod runs at once; 1: one after the other.")
    ] = 8,
    gpu_part: Annotated[
        float, typer.Option(help="Share of a recorded run time that others in the Pod make longer: the GPU's.")
    ] = 0.23,
    first_day: Annotated[str | None, typer.Option("--from", help="First day of the trace to use.")] = None,
    last_day: Annotated[str | None, typer.Option("--to", help="Last day of the trace to use.")] = None,
    rate_method: Annotated[str, typer.Option(help="superpose (any moment) or days (whole days).")] = "superpose",
    forecaster: Annotated[str, typer.Option(help="online, declared, oracle or none.")] = "online",
    ties: Annotated[str, typer.Option(help="Tie rules to compare; none: leave it out.")] = "first,last,name,random",
    equal_at: Annotated[
        float | None, typer.Option(help="Load at which sizes are compared. [default: the middle one]")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take only the first N tasks, to try the study out.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes. [default: every core]")] = None,
    store: Annotated[
        Path | None, typer.Option(help="File of finished runs: a study that was interrupted goes on from it.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report here.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write everything as JSON here.")] = None,
    as_json: Json = False,
) -> None:
    """Compare profiles on GenTD26 over loads and seeds: times, fairness, model loads, and the GPUs each needs for the same p99.

    Example: `aigc study gentd26 --trace lora_request_trace.csv --from 2024-11-25 --store runs.jsonl --html study.html`
    """
    from engine import profiles as known
    from sim.study import report
    from sim.study.gentd26 import run_study
    from sim.study.plan import StudyPlan

    folder = load_times_of(trace, load_times)
    try:
        plan = StudyPlan(
            trace=trace,
            load_times=folder,
            loads=tuple(_number(text) for text in _list(loads)),
            profiles=_list(profiles) or tuple(known.NAMES),
            seeds=seeds,
            first_seed=first_seed,
            gpus=gpus,
            hours=hours,
            slots=slots,
            gpu_part=gpu_part,
            forecaster=forecaster,
            rate_method=rate_method,
            first_day=first_day,
            last_day=last_day,
            ties=() if ties.strip() == "none" else _list(ties),
            equal_at=equal_at,
            limit=limit,
        )
        with progress_bar("studying") as update:
            study = run_study(plan, store, jobs, update)
        missing = [f"tie rules: {study.ties_missing}"] if study.ties_missing else []
        tell(study, report, html=html, output=output, as_json=as_json, remarks=missing)
    except ValueError as error:
        fail(str(error), Exit.USAGE)


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        fail(f"--loads: {text!r} is not a number such as 0.8", Exit.USAGE)
