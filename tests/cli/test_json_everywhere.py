"""Every command can be read by a program: it has `--json`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer.main

from api.cli.main import app


def _commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    inner = getattr(command, "commands", None)
    if inner is None or (command.callback is not None and getattr(command, "invoke_without_command", False)):
        yield path, command
    for name, each in (inner or {}).items():
        yield from _commands(each, f"{path} {name}")


def test_every_command_has_json() -> None:
    found = dict(_commands(typer.main.get_command(app), "aigc"))
    assert {"aigc scheduler", "aigc plan", "aigc plan prices", "aigc jobs list"} <= found.keys()
    without = [
        path for path, command in found.items() if not any("--json" in parameter.opts for parameter in command.params)
    ]
    assert without == []
