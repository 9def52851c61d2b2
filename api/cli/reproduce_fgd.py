"""`aigc reproduce fgd`: the FGD paper's packing experiment on the openb trace."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from api.cli.options import Json
from api.cli.output import Exit, err, fail, out, print_json, progress_bar

PODS = "openb_pod_list_default.csv.gz"
NODES = "openb_node_list_gpu_node.csv.gz"


def fgd(
    pods: Annotated[Path | None, typer.Option(help=f"Pod list of openb, CSV or CSV.gz. Default: {PODS}.")] = None,
    nodes: Annotated[Path | None, typer.Option(help=f"Node list of openb. Default: {NODES} beside the pods.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Runs per policy.")] = 10,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of the seeds.")] = 42,
    policy: Annotated[
        str, typer.Option(help="Policies, with commas; without: the paper's six. Also first-fit and worst-fit.")
    ] = "",
    tie: Annotated[
        str,
        typer.Option(
            help="Which of equally good nodes: name (the smallest of names that each run draws, as the paper's simulator), first, "
            "last (of the node list), or random."
        ),
    ] = "name",
    ties: Annotated[bool, typer.Option("--ties", help="Run every tie rule and show what it moves.")] = False,
    png: Annotated[Path | None, typer.Option(help="Draw the curves here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with table and curves here.")] = None,
    as_json: Json = False,
) -> None:
    """Fill a GPU cluster with six placement policies and print what each could give away, beside the published figures.

    Example: `aigc reproduce fgd --pods openb_pod_list_default.csv.gz --nodes openb_node_list_gpu_node.csv.gz --png fgd.png`
    """
    from sim import openb, packing, packing_report

    path = pods or _find(PODS, "--pods")
    nodes_path = nodes or (path.parent / NODES if (path.parent / NODES).is_file() else _find(NODES, "--nodes"))
    for option, each in (("--pods", path), ("--nodes", nodes_path)):
        if not each.is_file():
            fail(f"{option}: {each} does not exist; give the path of a list of openb", Exit.UNREACHABLE)
    names = [name.strip() for name in policy.split(",") if name.strip()] or list(packing.PAPER_POLICIES)
    for name in names:
        if name not in packing.POLICIES:
            fail(f"--policy: {name!r} is unknown; use {', '.join(packing.POLICIES)}", Exit.USAGE)
    if tie not in packing.TIES:
        fail(f"--tie: {tie!r} is unknown; use {', '.join(packing.TIES)}", Exit.USAGE)
    try:
        experiment = packing.prepare(openb.read_nodes(nodes_path), openb.read_pods(path))
    except ValueError as error:
        fail(str(error), Exit.USAGE)
    numbers = range(first_seed, first_seed + seeds)
    wanted = [(name, rule) for rule in (packing.TIES if ties else (tie,)) for name in names]
    results = []
    with progress_bar("placing Pods") as update:
        for done, (name, rule) in enumerate(wanted):

            def part(fraction: float, note: str, done: int = done) -> None:
                update((done + fraction) / len(wanted), note)

            results.append(packing.run_policy(experiment, name, numbers, rule, part))
    shown = packing_report.list_name(path)
    if as_json:
        print_json(packing_report.as_json(results, shown, packing_report.list_name(nodes_path), numbers))
    else:
        main_rule = [result for result in results if result.tie == tie]
        out.print(packing_report.render_table(main_rule, shown, seeds))
        if ties:
            out.print(packing_report.render_ties(results))
    if png is not None:
        packing_report.write_png([result for result in results if result.tie == tie], shown, png)
        err.print(f"curves drawn into {png}", soft_wrap=True)
    if html is not None:
        packing_report.write_html(results, shown, seeds, html)
        err.print(f"page written to {html}", soft_wrap=True)


def _find(name: str, option: str) -> Path:
    """Return a list of the trace: in AIGC_TRACES, here, or in ``shared/traces`` here or further up."""
    here = Path.cwd()
    folders = [Path(os.environ["AIGC_TRACES"])] if os.environ.get("AIGC_TRACES") else []
    folders += [here, *(folder / "shared" / "traces" for folder in (here, *here.parents))]
    places = [place for folder in folders for place in (folder / name, folder / "openb" / name)]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        fail(f"{option}: no {name} here or in AIGC_TRACES; give the path of a list of openb", Exit.UNREACHABLE)
    return found
