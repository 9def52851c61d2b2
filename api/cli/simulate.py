"""`aigc simulate`: the production engine over a simulated cluster."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from api.cli.options import Json
from api.cli.output import Exit, err, fail, out, print_json, progress_bar


def simulate(
    trace: Annotated[
        Path | None,
        typer.Option(help="Workload: GenTD26, Philly, Helios, PAI, SWF or your own CSV/JSONL. Without: synthetic."),
    ] = None,
    trace_format: Annotated[str, typer.Option(help="Format of --trace; default: told by the file.")] = "",
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 8,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs on each node.")] = 8,
    gpu_model: Annotated[str, typer.Option(help="GPU model of every node.")] = "a100",
    reference_gpu: Annotated[
        str, typer.Option(help="GPU model that run times hold on; default: a100, or for batch traces --gpu-model.")
    ] = "",
    profile: Annotated[str, typer.Option(help="Scheduling profile: a name, or a TOML file.")] = "aigc",
    compare: Annotated[str, typer.Option(help="Profiles to run side by side: fifo,kube-default,aigc")] = "",
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
    seeds: Annotated[
        int, typer.Option(min=1, help="With --compare: repeat over so many seeds; differences get intervals.")
    ] = 1,
    forecaster: Annotated[str, typer.Option(help="online, declared or oracle.")] = "online",
    rate_scale: Annotated[float, typer.Option(help="Multiply the arrival rate.")] = 1.0,
    step_ms: Annotated[
        float, typer.Option(help="Decide at most once in so many milliseconds, for speed; 0: at every instant.")
    ] = 0.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Take only the first N tasks.")] = None,
    tasks: Annotated[int, typer.Option(min=1, help="Tasks of the synthetic workload.")] = 10_000,
    mtbf_hours: Annotated[
        float | None, typer.Option(help="Mean time between failures of a node; without: none fails.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the result as JSON here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the HTML report here.")] = None,
    timeline: Annotated[
        Path | None, typer.Option(help="Write what happened when: .json or .json.gz for Perfetto, .parquet for tables.")
    ] = None,
    timeline_slices: Annotated[
        int, typer.Option(min=1, help="Most runs and Pods that a Perfetto file shows.")
    ] = 50_000,
    as_json: Json = False,
) -> None:
    """Run the engine over a trace on a simulated cluster and print what customers would have seen.

    Example: `aigc simulate --trace lora_request_trace.csv --nodes 8 --compare fifo,kube-default,aigc --html report.html`
    """
    from sim import paired
    from sim import simulate as simulation
    from sim.timeline_files import Recorder

    if trace is not None and not trace.is_file():
        fail(
            f"--trace: {trace} does not exist; give the path of a trace, or leave it out for a synthetic workload",
            Exit.UNREACHABLE,
        )
    try:
        config = simulation.SimulationConfig(
            trace=trace,
            trace_format=trace_format,
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            gpu_model=gpu_model,
            reference_gpu=reference_gpu,
            profile=profile,
            seed=seed,
            forecaster=forecaster,
            rate_scale=rate_scale,
            step_ms=step_ms,
            limit=limit,
            synthetic_tasks=tasks,
            mtbf_hours=mtbf_hours,
        )
        names = [name.strip() for name in compare.split(",") if name.strip()]
        if seeds > 1 and len(names) < 2:
            fail("--seeds: intervals are of differences; name two profiles or more with --compare", Exit.USAGE)
        if timeline is not None and names:
            fail("--timeline: shows one run; name one with --profile instead of --compare", Exit.USAGE)
        facts: dict[str, str | int | float] = {"profile": profile, "seed": seed, "config": config.digest()}
        recorder = Recorder(timeline, facts, timeline_slices) if timeline is not None else None
        with progress_bar("simulating") as update:
            if seeds > 1:
                results, differences = paired.compare_over_seeds(config, names, seeds, update)
            elif names:
                results, differences = simulation.compare(config, names, update, gantt=html is not None), []
            else:
                run = simulation.simulate(config, update, journal=recorder, gantt=html is not None)
                results, differences = [run], []
            told = recorder.finish() if recorder is not None else []
    except FileNotFoundError as error:
        fail(str(error), Exit.UNREACHABLE)
    except ValueError as error:
        fail(str(error), Exit.USAGE)
    if as_json and differences:
        print_json({"runs": [run.to_json() for run in results], "differences": [asdict(each) for each in differences]})
    elif as_json:
        print_json([result.to_json() for result in results] if names else results[0].to_json())
    else:
        out.print(simulation.render_table(results[: len(names) or 1]))
        if differences:
            out.print(paired.render_differences(differences, names[0]))
    for line in told:
        err.print(line, markup=False, soft_wrap=True)
    if output is not None:
        simulation.write_json(results, output)
        err.print(f"result written to {output}")
    if html is not None:
        simulation.write_html(results[: len(names) or 1], html)
        err.print(f"report written to {html}")
