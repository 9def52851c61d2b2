"""How the command line speaks: data to stdout (a table, or JSON with ``--json``), everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

EXECUTOR_MODULES = frozenset(
    {"torch", "diffusers", "transformers", "accelerate", "safetensors", "tokenizers", "peft", "pynvml"}
)
"""Modules that only the extra `executors` brings; every other optional one comes with `api` too."""
PIPED_COLUMNS = 160
"""Width of tables that go to a file or another program, where nobody said how wide it is."""


def _console(stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED_COLUMNS
    return console


out = _console(stderr=False)
err = _console(stderr=True)


class Exit(IntEnum):
    """Exit codes of `aigc`."""

    OK = 0
    FAILED = 1
    """The command ran, and what it was asked to do failed (a job died, a check found a difference)."""
    USAGE = 2
    """Bad arguments, configuration or input."""
    UNREACHABLE = 3
    """A server or file that is needed is not there."""
    REFUSED = 4
    """The server refused: not allowed, not found, over a limit."""
    INTERRUPTED = 130


def fail(message: str, code: Exit = Exit.FAILED) -> NoReturn:
    """Say what is wrong on stderr and exit."""
    err.print(f"[red]error:[/red] {escape(message)}", soft_wrap=True)
    raise typer.Exit(int(code))


def missing_extra(module: str) -> str:
    """Return what to install for a module that is not there."""
    top = module.partition(".")[0]
    extra = "executors" if top in EXECUTOR_MODULES else "api"
    return f"this command needs {top}, which comes with the extra `{extra}`: pip install 'aigc-platform[{extra}]'"


def print_json(value: Any) -> None:
    """Write one JSON document to stdout."""
    json.dump(value, sys.stdout, indent=2, default=str, ensure_ascii=False)
    sys.stdout.write("\n")


def announce(part: str, **facts: Any) -> None:
    """Write one line of JSON to stdout and flush it: this part is ready, and this is where it is to be found."""
    sys.stdout.write(json.dumps({"part": part, **facts}, default=str, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_rows(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], as_json: bool, title: str = "") -> None:
    """Print rows as a table of the named columns, or all of them as JSON."""
    if as_json:
        print_json(list(rows))
        return
    table = Table(title=title or None, title_justify="left")
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*("" if row.get(column) is None else str(row.get(column)) for column in columns))
    out.print(table)


def print_facts(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print one object as name-value lines, or as JSON."""
    if as_json:
        print_json(dict(facts))
        return
    width = max((len(name) for name in facts), default=0)
    for name, value in facts.items():
        if value not in (None, "", {}, []):
            shown = json.dumps(value, default=str, ensure_ascii=False) if isinstance(value, dict | list) else value
            out.print(f"{name.replace('_', ' '):<{width}}  {shown}", markup=False, soft_wrap=True)


@contextmanager
def progress_bar(description: str) -> Iterator[Any]:
    """Show a progress bar on stderr; yields ``update(fraction, note)``."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=err, transient=not err.is_terminal) as bar:
        task = bar.add_task(description, total=1.0, note="")

        def update(fraction: float, note: str = "") -> None:
            bar.update(task, completed=min(max(fraction, 0.0), 1.0), note=note)

        yield update
        update(1.0)
