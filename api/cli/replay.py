"""`aigc replay`: re-decides a recorded journal and names the first difference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from api.cli.options import Json
from api.cli.output import Exit, err, fail, out, print_json


def replay(
    journal: Annotated[Path, typer.Argument(help="A scheduler's journal.db.")],
    profile: Annotated[str, typer.Option(help="Decide with this profile: a name, or a TOML file.")] = "aigc",
    from_start: Annotated[bool, typer.Option(help="Begin with the first step instead of the newest snapshot.")] = False,
    timeline: Annotated[
        Path | None, typer.Option(help="Write what happened when: .json or .json.gz for Perfetto, .parquet for tables.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Feed a journal's events to the engine again and compare its orders with the recorded ones.

    Exit code 0: the same decisions. Exit code 1: a difference, which is printed with the step it happened in.

    Example: `aigc replay aigc-state/journal.db --from-start`
    """
    from api.sm.journal import JournalCorrupt, read_journal
    from api.sm.process import LIMITS
    from engine import profiles
    from engine.replay import replay as decide_again
    from engine.snapshot import restore
    from sim.timeline_files import Recorder

    if not journal.is_file():
        fail(f"{journal} does not exist; give the path of a journal.db", Exit.UNREACHABLE)
    path = Path(profile)
    try:
        wanted = profiles.load(path.read_text() if path.suffix == ".toml" and path.is_file() else profile)
        snapshot, records = read_journal(journal, from_start=from_start)
    except (ValueError, OSError, JournalCorrupt) as error:
        fail(str(error), Exit.USAGE)
    if timeline is not None:
        try:
            recorder = Recorder(timeline, {"journal": journal.name})
            base, history = read_journal(journal, from_start=True)
            if base is not None:
                recorder.begin_from(restore(base))
            for record in history:
                recorder(record.now, record.events, record.commands)
            for line in recorder.finish():
                err.print(line, markup=False, soft_wrap=True)
        except ValueError as error:
            fail(str(error), Exit.USAGE)
    report = decide_again(records, wanted, snapshot, LIMITS)
    if as_json:
        difference = None if report.difference is None else str(report.difference)
        print_json({"steps": report.steps, "orders": report.orders, "same": report.same, "difference": difference})
    elif report.same:
        out.print(f"{report.steps} steps, {report.orders} orders: decided as recorded")
    else:
        out.print(str(report.difference), markup=False, soft_wrap=True)
    if not report.same:
        raise typer.Exit(int(Exit.FAILED))
