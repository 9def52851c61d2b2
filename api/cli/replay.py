"""`aigc replay`: re-decides a recorded journal and names the first difference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from api.cli.options import Json
from api.cli.output import Exit, fail, out, print_json


def replay(
    journal: Annotated[Path, typer.Argument(help="A scheduler's journal.db.")],
    profile: Annotated[str, typer.Option(help="Decide with this profile: a name, or a TOML file.")] = "aigc",
    as_json: Json = False,
) -> None:
    """Feed a journal's events to the engine again and compare its commands with the recorded ones.

    Exit code 0: the same decisions. Exit code 1: a difference, which is printed with the step it happened in.
    """
    if not journal.is_file():
        fail(f"{journal} does not exist; give the path of a journal.db", Exit.UNREACHABLE)
    from api.journal import read_journal
    from engine import profiles
    from engine.journal import replay as again

    try:
        path = Path(profile)
        wanted = profiles.load(path.read_text() if path.suffix == ".toml" and path.is_file() else profile)
        snapshot, records = read_journal(journal)
        report = again(records, wanted, snapshot=snapshot)
    except (ValueError, OSError) as error:
        fail(str(error), Exit.USAGE)
    if as_json:
        print_json(report.to_json())
    else:
        out.print(str(report), markup=False)
    if report.difference is not None:
        raise typer.Exit(int(Exit.FAILED))
