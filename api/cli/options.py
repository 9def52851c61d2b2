"""Options that several commands share, spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ReadyJson = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one line of JSON to stdout when it is ready: its addresses. Logs stay on stderr."
    ),
]
Config = Annotated[
    Path | None, typer.Option("--config", "-c", help="TOML file; default: AIGC_CONFIG, or aigc.toml here.")
]
StateDir = Annotated[
    Path | None, typer.Option("--state-dir", help="Where everything durable lies. [default: aigc-state]")
]
Url = Annotated[
    str, typer.Option("--url", help="Gateway; default: AIGC_URL, or what `aigc up` left in the state directory.")
]
Key = Annotated[
    str, typer.Option("--key", help="API key; default: AIGC_API_KEY, or what `aigc up` left in the state directory.")
]
State = Annotated[Path, typer.Option("--state-dir", envvar="AIGC_STATE_DIR", help="State directory of `aigc up`.")]
DEFAULT_STATE = Path("aigc-state")
