"""`aigc predict`: how good the predictions are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from api.cli.options import Json
from api.cli.output import Exit, fail, out, print_json, progress_bar

app = typer.Typer(no_args_is_help=True, help="Container resource prediction.")


@app.callback()
def _root() -> None:
    """Container resource prediction."""


@app.command()
def report(
    trace: Annotated[Path, typer.Option(help="Request trace as GenTD26 publishes it (lora_request_trace.csv).")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the report card as JSON here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the card with pictures as one page here.")] = None,
    as_json: Json = False,
) -> None:
    """Replay a trace in time order and print the predictor's report card beside the baselines."""
    from predictors import report as card_of

    try:
        with progress_bar("predicting") as update:
            if html is None:
                card = card_of.run(trace, update)
            else:
                from sim.prediction_page import write_html

                card, figures = card_of.run_with_figures(trace, update)
                write_html(card, figures, html)
    except FileNotFoundError:
        fail(f"--trace: {trace} does not exist; give the path of a request trace", Exit.UNREACHABLE)
    except ValueError as error:
        fail(f"--trace: {error}", Exit.USAGE)
    if output is not None:
        import json

        output.write_text(json.dumps(card.to_json(), indent=2) + "\n")
    if as_json:
        print_json(card.to_json())
    else:
        out.print(card.table(), markup=False)
