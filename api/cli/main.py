"""The root of the command line: wires the groups together and turns known errors into exit codes."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer
from rich.markup import escape

from api.cli import (
    fidelity,
    jobs,
    models,
    nodes,
    operate,
    plan,
    predict,
    predict_demand,
    replay,
    reproduce,
    reproduce_helios,
    requests,
    simulate,
    study,
    study_elasticity,
    sweep,
    trace,
    whatif,
)
from api.cli.output import Exit, err, missing_extra, out
from api.settings import ConfigurationError

app = typer.Typer(
    name="aigc",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Schedule image generation and model training on GPUs: simulate it, run it, watch it.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(operate.up)
app.command()(operate.demo)
app.command()(operate.gateway)
app.command()(operate.scheduler)
app.command()(operate.agent)
app.command()(operate.doctor)
app.command()(simulate.simulate)
app.command()(sweep.sweep)
app.add_typer(plan.app, name="plan")
app.add_typer(study.app, name="study")
app.add_typer(predict.app, name="predict")
predict.app.command()(predict_demand.demand)
study.app.command()(study_elasticity.elasticity)
app.command()(requests.generate)
app.command()(requests.train)
app.add_typer(jobs.app, name="jobs")
app.add_typer(nodes.app, name="nodes")
app.add_typer(models.app, name="models")
app.add_typer(operate.keys_app, name="keys")
app.command()(replay.replay)
app.command()(whatif.whatif)
app.command()(fidelity.fidelity)
app.add_typer(trace.app, name="trace")
reproduce.app.command()(reproduce_helios.helios)
app.add_typer(reproduce.app, name="reproduce")


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"aigc {version('aigc-platform')}")
        raise typer.Exit()


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    try:
        app(standalone_mode=True)
    except ConfigurationError as error:
        err.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(Exit.USAGE)
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] in {"api", "engine", "executors", "predictors", "sim"}:
            raise
        err.print(f"[red]error:[/red] {escape(missing_extra(error.name))}", soft_wrap=True)
        sys.exit(Exit.USAGE)
    except KeyboardInterrupt:
        sys.exit(Exit.INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(Exit.OK)
