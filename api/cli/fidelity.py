"""`aigc fidelity`: how far the simulator is from real executors on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from api.cli.options import Json
from api.cli.output import Exit, err, fail, out, print_json, progress_bar


def fidelity(
    workload: Annotated[
        str, typer.Option(help="sleep: waits of 50-500 ms; tiny: pictures by the bundled model in 4-32 steps.")
    ] = "sleep",
    tasks: Annotated[int, typer.Option(min=2, max=100_000, help="Tasks of the judged run.")] = 400,
    calibration_tasks: Annotated[
        int, typer.Option(min=4, max=100_000, help="Tasks of the calibrating runs together.")
    ] = 100,
    nodes: Annotated[int, typer.Option(min=1, max=64, help="Agents with one CPU slot each.")] = 2,
    load: Annotated[float, typer.Option(help="Share of the time that the nodes are busy, below 1.")] = 0.6,
    profile: Annotated[str, typer.Option(help="Scheduling profile: a name, or a TOML file.")] = "aigc",
    seed: Annotated[int, typer.Option(min=0, help="Seed of durations and arrivals.")] = 0,
    replications: Annotated[int, typer.Option(min=2, max=10_000, help="Simulations of the judged run.")] = 20,
    html: Annotated[Path | None, typer.Option(help="Write the HTML report here.")] = None,
    as_json: Json = False,
) -> None:
    """Run one workload on real executors and in the simulator, and print how far apart they are.

    Three platforms are started on this machine, one after the other: the second run is judged, the ones before and after it
    calibrate. Exit code 0: a report was made, whether or not its aims (3% on mean, 5% on p99 completion) are met.

    Example: `aigc fidelity --workload sleep --tasks 400 --html fidelity.html`
    """
    from api.fidelity import RealRunFailed, compare_here
    from sim import fidelity as science
    from sim.calibration import CalibrationError

    try:
        with progress_bar("comparing") as update:
            report = compare_here(
                workload,
                tasks=tasks,
                calibration_tasks=calibration_tasks,
                nodes=nodes,
                load=load,
                profile=profile,
                seed=seed,
                replications=replications,
                on_progress=update,
            )
    except (science.FidelityError, CalibrationError, RealRunFailed) as error:
        fail(str(error), Exit.FAILED if isinstance(error, RealRunFailed) else Exit.USAGE)
    except ValueError as error:
        fail(str(error), Exit.USAGE)
    if as_json:
        print_json(report.to_json())
    else:
        out.print(science.render(report))
    if report.busy > report.cores + report.nodes * (workload == "tiny"):
        err.print(
            f"this machine was busy with other work (load average {report.busy:.1f} on {report.cores} cores): run it again on a "
            "quiet one before you trust the errors",
            soft_wrap=True,
        )
    if html is not None:
        from sim.fidelity_page import write_html

        write_html(report, html)
        err.print(f"report written to {html}", markup=False, soft_wrap=True)
