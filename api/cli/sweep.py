"""`aigc sweep`: many simulations over seeds, profiles, sizes or any other field."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from api.cli.options import Json
from api.cli.output import Exit, err, fail, out, print_json, progress_bar

if TYPE_CHECKING:
    from sim.configuration import SimulationConfig


def sweep(
    trace: Annotated[
        Path | None, typer.Option(help="Workload, as for `aigc simulate`. Without: synthetic, anew for every seed.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="FIELD=VALUE[,VALUE...] of the simulation; repeat it: every combination is run."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repeat every combination with so many seeds.")] = 5,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="FIELD=VALUE: compare the others with this one, seed by seed. Repeat it for several fields."),
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes. [default: every core]")] = None,
    store: Annotated[
        Path | None, typer.Option(help="File of finished runs: a sweep that was interrupted goes on from it.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write one line per run here.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write everything as JSON here.")] = None,
    as_json: Json = False,
) -> None:
    """Run every combination of the settings with several seeds on all cores, and print means with 95% intervals.

    Example: `aigc sweep --set profile=fifo,aigc --set nodes=2,4,8 --set rate_scale=20 --baseline profile=fifo --store runs.jsonl`
    """
    import json

    from sim import sweep_table
    from sim.configuration import SimulationConfig
    from sim.sweep import grid, run_sweep

    if trace is not None and not trace.is_file():
        fail(f"--trace: {trace} does not exist; give the path of a trace, or leave it out", Exit.UNREACHABLE)
    try:
        axes = _axes(setting or [], SimulationConfig)
        compared = dict(_pair("--baseline", text) for text in baseline or [])
        axes["seed"] = list(range(first_seed, first_seed + seeds))
        configs = grid(SimulationConfig(trace=trace), axes)
        with progress_bar("sweeping") as update:
            records = run_sweep(configs, store, jobs, update)
        rows = sweep_table.rows_of(records, compared)
        values = sweep_table.json_values(records, rows) if as_json or output else {}
        if csv is not None:
            sweep_table.write(csv, sweep_table.csv_text(records))
            err.print(f"runs written to {csv}", soft_wrap=True)
        if output is not None:
            sweep_table.write(output, json.dumps(values, indent=2) + "\n")
            err.print(f"result written to {output}", soft_wrap=True)
    except ValueError as error:
        fail(str(error), Exit.USAGE)
    if as_json:
        print_json(values)
        return
    out.print(sweep_table.render(rows))
    if compared:
        out.print(sweep_table.render_differences(rows))


def _axes(settings: list[str], config: type[SimulationConfig]) -> dict[str, list[Any]]:
    kinds = get_type_hints(config)
    names = [field.name for field in fields(config)]
    axes: dict[str, list[Any]] = {}
    for text in settings:
        name, values = _pair("--set", text)
        if name == "seed":
            fail("--set: use --seeds and --first-seed for the seeds", Exit.USAGE)
        if name not in names:
            fail(f"--set: {name!r} is no field of a simulation; known are {', '.join(sorted(names))}", Exit.USAGE)
        if name in axes:
            fail(f"--set: {name!r} is given twice; list its values with commas", Exit.USAGE)
        axes[name] = [_read(name, value.strip(), kinds[name]) for value in values.split(",")]
    return axes


def _pair(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip() or not value.strip():
        fail(f"{option}: {text!r} is not FIELD=VALUE, such as profile=fifo", Exit.USAGE)
    return name.strip(), value.strip()


def _read(name: str, text: str, kind: Any) -> Any:
    """Read one value as the field's own type."""
    choices = get_args(kind) or (kind,)
    if type(None) in choices and text == "none":
        return None
    for each in choices:
        try:
            if each is bool and text in {"true", "false"}:
                return text == "true"
            if each in (int, float, str, Path):
                return each(text)
        except ValueError:
            continue
    wanted = " or ".join(getattr(each, "__name__", str(each)).replace("NoneType", "none") for each in choices)
    return fail(f"--set: {name}={text!r} cannot be read; use {wanted}", Exit.USAGE)
