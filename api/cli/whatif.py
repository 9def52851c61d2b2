"""`aigc whatif`: the future of a live platform with other nodes, another policy or another load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from api.cli.options import DEFAULT_STATE, Json
from api.cli.output import Exit, err, fail, out, print_json, progress_bar


def whatif(
    state: Annotated[
        Path, typer.Option("--state", "--state-dir", envvar="AIGC_STATE_DIR", help="State directory of the platform.")
    ] = DEFAULT_STATE,
    journal: Annotated[
        Path | None, typer.Option(help="A scheduler's journal.db, instead of the one in --state.")
    ] = None,
    add_nodes: Annotated[
        list[str] | None, typer.Option(help="Nodes that join: 2xa100, or 2xa100:8 with 8 GPUs on each. Repeatable.")
    ] = None,
    remove_nodes: Annotated[list[str] | None, typer.Option(help="Nodes that are drained: 1xa100. Repeatable.")] = None,
    profile: Annotated[str, typer.Option(help="Another scheduling profile: a name, or a TOML file.")] = "",
    from_profile: Annotated[
        str, typer.Option(help="The profile that production runs: a name, or a TOML file.")
    ] = "aigc",
    load: Annotated[float, typer.Option(help="Arrivals come so many times as fast.")] = 1.0,
    window_hours: Annotated[
        float | None, typer.Option(help="So much of the past arrives once more; without: all of it, at most 24 h.")
    ] = None,
    hours: Annotated[float | None, typer.Option(help="It arrives for so long; without: as long as the window.")] = None,
    back: Annotated[float, typer.Option(help="Begin so many seconds before the journal's end.")] = 0.0,
    seeds: Annotated[int, typer.Option(min=2, max=1000, help="Pairs of simulations.")] = 5,
    as_json: Json = False,
) -> None:
    """Fork a live journal, change nodes, policy or load, and print the difference for every tenant.

    The journal is only read; the platform may be running.

    Example: `aigc whatif --state aigc-state --add-nodes 2xa100 --load 1.5`
    """
    from pydantic import ValidationError

    from api.state_dir import StateDir
    from api.whatif import WhatIfRefused, answer
    from api.whatif_request import WhatIfRequest
    from engine import profiles
    from sim import whatif as science

    path = journal or StateDir(state).journal
    if not path.is_file():
        fail(
            f"{path} does not exist; give the state directory of a platform with --state, or its journal.db with --journal",
            Exit.UNREACHABLE,
        )
    try:
        request = WhatIfRequest(
            add_nodes=add_nodes or [],
            remove_nodes=remove_nodes or [],
            load=load,
            window_hours=window_hours,
            hours=hours,
            back_s=back,
            seeds=min(seeds, 100),
        ).model_copy(update={"seeds": seeds})
        with progress_bar("simulating") as update:
            found = answer(
                path,
                request,
                profiles.load(_text(from_profile)),
                profiles.load(_text(profile)) if profile else None,
                update,
            )
    except ValidationError as error:
        first = error.errors()[0]
        fail(f"--{str(first['loc'][0]).replace('_', '-')}: {first['msg']}", Exit.USAGE)
    except (WhatIfRefused, profiles.InvalidProfile, OSError) as error:
        fail(str(error), Exit.USAGE)
    if as_json:
        print_json(found.to_json())
        return
    out.print(science.render(found))
    if any(found.unfinished):
        err.print(
            f"tasks that found no room for ever, over all seeds: {found.unfinished[0]} as it is, {found.unfinished[1]} changed",
            soft_wrap=True,
        )


def _text(profile: str) -> str:
    path = Path(profile)
    return path.read_text(encoding="utf-8") if path.suffix == ".toml" and path.is_file() else profile
