"""`aigc reproduce helios`: Helios' scheduling of virtual clusters on the Philly trace."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from api.cli.options import Json
from api.cli.output import Exit, fail, print_json, print_rows, progress_bar

TRACE = "philly_2017-10_2017-11.csv.gz"
CLUSTERS = "philly_vc.csv"


def helios(
    policy: Annotated[str, typer.Option(help="Who goes first: fifo, or sjf (true run times).")] = "fifo",
    trace: Annotated[
        Path | None,
        typer.Option(help=f"Trace with virtual clusters: a Philly slice, Philly's or Helios' log. Default: {TRACE}."),
    ] = None,
    clusters: Annotated[
        Path | None, typer.Option(help=f"CSV with the columns vc and node num. Default: {CLUSTERS} beside the trace.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run each virtual cluster of a trace by itself and print its jobs' mean completion and waiting.

    Example: `aigc reproduce helios --policy sjf --trace philly_2017-10_2017-11.csv.gz --clusters philly_vc.csv`
    """
    from sim.jobs.helios import HELIOS_POLICIES, read_clusters, reproduce
    from sim.jobs.philly import read_philly

    if policy not in HELIOS_POLICIES:
        fail(f"--policy: unknown {policy!r}; known are {', '.join(HELIOS_POLICIES)}", Exit.USAGE)
    path = trace or _find()
    if not path.is_file():
        fail(f"--trace: {path} does not exist; give the path of a trace with virtual clusters", Exit.UNREACHABLE)
    sizes = clusters or path.parent / CLUSTERS
    if not sizes.is_file():
        fail(f"--clusters: {sizes} does not exist; give a CSV with the columns vc and node num", Exit.UNREACHABLE)
    try:
        with progress_bar("reading the trace") as update:
            nodes = read_clusters(sizes)
            jobs = read_philly(path)
        with progress_bar("simulating") as update:
            rows = reproduce(jobs, nodes, policy, update)
    except ValueError as error:
        fail(str(error), Exit.USAGE)
    if as_json:
        print_json({"policy": policy, "trace": path.name, "clusters": [row.to_json() for row in rows]})
        return
    shown = [
        {
            **row.to_json(),
            "mean_completion_s": f"{row.mean_completion_s:.1f}",
            "mean_waiting_s": f"{row.mean_waiting_s:.1f}",
            "allocated": f"{row.allocated:.1%}",
        }
        for row in rows
    ]
    columns = ["vc", "nodes", "jobs", "refused", "mean_completion_s", "mean_waiting_s", "waited", "allocated"]
    print_rows(shown, columns, False, title=f"Helios' semantics, {policy}: means over the jobs of each virtual cluster")


def _find() -> Path:
    """Return the Philly slice: in AIGC_TRACES, here, or in ``shared/traces`` here or further up."""
    here = Path.cwd()
    folders = [Path(os.environ["AIGC_TRACES"])] if os.environ.get("AIGC_TRACES") else []
    folders += [here, *(folder / "shared" / "traces" for folder in (here, *here.parents))]
    places = [place for folder in folders for place in (folder / TRACE, folder / "philly" / TRACE)]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        remedy = "give the path of a trace with virtual clusters"
        fail(f"--trace: no {TRACE} here or in AIGC_TRACES; {remedy}", Exit.UNREACHABLE)
    return found
