"""`aigc reproduce`: published experiments run again, their figures printed beside ours."""

from __future__ import annotations

import typer

from api.cli import reproduce_fgd

app = typer.Typer(no_args_is_help=True, help="Run published experiments again and print their figures beside ours.")


@app.callback()
def _root() -> None:
    pass


app.command()(reproduce_fgd.fgd)
