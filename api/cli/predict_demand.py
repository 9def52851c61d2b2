"""`aigc predict demand`: how good the demand forecast is on a recorded trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from api.cli.options import Json
from api.cli.output import Exit, err, fail, out, print_json, progress_bar


def demand(
    trace: Annotated[Path, typer.Option(help="Request trace as GenTD26 publishes it (lora_request_trace.csv).")],
    last_bin: Annotated[
        bool, typer.Option("--last-bin", help="Judge the last 5 minutes of each window, not all of it.")
    ] = False,
    models: Annotated[int, typer.Option(min=0, max=64, help="Models that get a series, the most asked for.")] = 5,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the report card as JSON here.")] = None,
    as_json: Json = False,
) -> None:
    """Replay a trace bin by bin and judge the demand forecast beside those that it is made from.

    Example: `aigc predict demand --trace lora_request_trace.csv`
    """
    import json

    from predictors import demand_report

    try:
        with progress_bar("forecasting") as update:
            card = demand_report.run(trace, update, totals=not last_bin, models=models)
    except FileNotFoundError:
        fail(f"--trace: {trace} does not exist; give the path of a request trace", Exit.UNREACHABLE)
    except ValueError as error:
        fail(f"--trace: {error}", Exit.USAGE)
    if output is not None:
        try:
            output.write_text(json.dumps(card.to_json(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            fail(f"--output: cannot write {output}: {error.strerror}; name another file", Exit.USAGE)
        err.print(f"result written to {output}", soft_wrap=True)
    if as_json:
        print_json(card.to_json())
    else:
        out.print(card.table(), markup=False, soft_wrap=True)
