"""`aigc predict`: how good the predictions are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from api.cli.options import Json
from api.cli.output import Exit, fail, out, print_json, progress_bar

if TYPE_CHECKING:
    from sim.plots import Plot
    from sim.promises import PromiseScore

app = typer.Typer(no_args_is_help=True, help="Container resource prediction.")


@app.callback()
def _root() -> None:
    """Container resource prediction."""


@app.command()
def report(
    trace: Annotated[Path, typer.Option(help="Request trace as GenTD26 publishes it (lora_request_trace.csv).")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the report card as JSON here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the card with pictures as one page here.")] = None,
    fleet: Annotated[
        bool,
        typer.Option("--fleet", help="Draw as well how a fleet sized by forecast follows a day's demand (a minute)."),
    ] = False,
    when: Annotated[
        bool,
        typer.Option("--when", help="Say as well how often promised times held, on a simulated cluster (minutes)."),
    ] = False,
    when_tasks: Annotated[int, typer.Option(min=600, help="Tasks of the trace that --when plays.")] = 3_000,
    when_gpus: Annotated[int, typer.Option(min=1, help="GPUs of the simulated cluster of --when.")] = 8,
    as_json: Json = False,
) -> None:
    """Replay a trace in time order and print the predictor's report card beside the baselines."""
    from predictors import report as card_of

    if fleet and html is None:
        fail("--fleet: it is a picture on the page; give --html as well", Exit.USAGE)
    try:
        with progress_bar("predicting") as update:
            if html is None:
                card = card_of.run(trace, update)
            else:
                from sim.prediction_page import write_html

                card, figures = card_of.run_with_figures(trace, update)
                write_html(card, figures, html, _fleet(trace) if fleet else ())
    except FileNotFoundError:
        fail(f"--trace: {trace} does not exist; give the path of a request trace", Exit.UNREACHABLE)
    except ValueError as error:
        fail(f"--trace: {error}", Exit.USAGE)
    found = card.to_json()
    held: list[str] = []
    if when:
        from sim.promises import told

        with progress_bar("looking ahead") as update:
            scores = _promises(trace, when_tasks, when_gpus, update)
        found = {**found, "promises": [each.to_json() for each in scores]}
        held = [told(each) for each in scores]
    if output is not None:
        import json

        output.write_text(json.dumps(found, indent=2) + "\n")
    if as_json:
        print_json(found)
    else:
        out.print(card.table(), markup=False)
        for line in held:
            out.print(line, markup=False)


def _fleet(trace: Path) -> list[Plot]:
    """Draw the size of a fleet against its demand."""
    from sim import measured_loads
    from sim.study.elasticity import follow
    from sim.study.elasticity_report import fleet_picture

    return [fleet_picture(follow(trace, trace.parent if measured_loads.present(trace.parent) else None))]


def _promises(trace: Path, tasks: int, gpus: int, update: Callable[[float, str], None]) -> list[PromiseScore]:
    """Score promised times at three loads."""
    from sim.configuration import SimulationConfig
    from sim.promises import study

    config = SimulationConfig(trace=trace, limit=tasks, nodes=1, gpus_per_node=gpus)
    return study(config, (0.6, 0.8, 1.0), seeds=1, on_progress=update)
