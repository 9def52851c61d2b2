"""Simulation speed: a whole trace through the real engine, beside a bare SimPy loop that only waits as many timeouts.

Run from the repository root: ``python -m benchmarks.simulate``. Each row runs in a process of its own, because peak memory is one
figure per process. The bare loop is what no SimPy program can beat: as many callbacks, and nothing done in them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.machine import machine_line

TRACE = Path(__file__).resolve().parents[2] / "shared" / "traces" / "gentd26" / "lora_request_trace.csv"


def peak_mib() -> float:
    """Return this process's peak resident memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_simulation(arguments: argparse.Namespace) -> dict[str, float | str]:
    """Simulate and measure; reading the workload is timed apart."""
    import simpy

    from sim.simulate import SimulationConfig, simulate
    from sim.synthetic import SyntheticConfig

    class CountingEnvironment(simpy.Environment):
        """Counts the events that SimPy handles."""

        made = 0

        def schedule(self, *args: object, **kwargs: object) -> None:
            CountingEnvironment.made += 1
            super().schedule(*args, **kwargs)  # type: ignore[arg-type]

    trace = TRACE if TRACE.exists() and not arguments.synthetic else None
    made = SyntheticConfig(tasks=arguments.synthetic or 20_000, models=arguments.models)
    config = SimulationConfig(
        trace=trace,
        synthetic=None if trace else made,
        step_ms=arguments.step_ms,
        nodes=arguments.nodes,
        gpus_per_node=8,
        profile=arguments.profile,
        forecaster=arguments.forecaster,
        rate_scale=arguments.rate_scale,
    )
    began = time.process_time()
    workload = config.workload()
    read_s = time.process_time() - began
    idle_mib = peak_mib()
    wall, began = time.perf_counter(), time.process_time()
    result = simulate(config, workload=workload)
    cpu_s, wall_s = time.process_time() - began, time.perf_counter() - wall
    measured_mib = peak_mib()
    tasks = len(workload.arrivals)
    if tasks <= 100_000:
        simpy.Environment = CountingEnvironment  # type: ignore[misc]
        simulate(config, workload=workload)
    return {
        "row": f"{arguments.profile}, {arguments.forecaster}",
        "workload": workload.name,
        "tasks": tasks,
        "events": CountingEnvironment.made,
        "read_s": read_s,
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "tasks_per_cpu_s": tasks / cpu_s,
        "peak_mib": measured_mib,
        "before_mib": idle_mib,
        "waiting_p50_s": result.summary.waiting["all"].p50,
        "waiting_p99_s": result.summary.waiting["all"].p99,
        "finished": result.summary.ends["finished"],
    }


def run_bare(arguments: argparse.Namespace) -> dict[str, float | str]:
    """Wait for the same number of timeouts by callback, 64 of them at a time, with nothing to do."""
    import simpy

    env = simpy.Environment()
    left = arguments.bare - 64

    def again(_event: object) -> None:
        nonlocal left
        if left > 0:
            left -= 1
            env.timeout(1 + left % 977).callbacks.append(again)

    wall, began = time.perf_counter(), time.process_time()
    for _ in range(64):
        env.timeout(1).callbacks.append(again)
    env.run()
    cpu_s = time.process_time() - began
    return {
        "row": "bare SimPy",
        "tasks": arguments.tasks,
        "events": arguments.bare,
        "cpu_s": cpu_s,
        "wall_s": time.perf_counter() - wall,
        "tasks_per_cpu_s": arguments.tasks / cpu_s,
        "peak_mib": peak_mib(),
    }


def row_in_own_process(*options: str) -> dict[str, float | str]:
    """Run one row in a fresh interpreter and return what it measured."""
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-P", str(Path(__file__).resolve()), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float | str] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print the table, or one row when told by the parent process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=8, help="nodes of 8 GPUs (default 8: 64 GPUs)")
    parser.add_argument("--rate-scale", type=float, default=1.0, help="how many times as fast the tasks arrive")
    parser.add_argument("--synthetic", type=int, default=0, help="this many synthetic tasks instead of the trace")
    parser.add_argument("--models", type=int, default=86, help="models of the synthetic workload")
    parser.add_argument("--step-ms", type=float, default=0.0, help="the scheduler decides once in so many milliseconds")
    parser.add_argument("--profile", default="", help="one profile only")
    parser.add_argument("--forecaster", default="online")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--bare", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--tasks", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        print(json.dumps(run_bare(arguments)))
        return
    if arguments.row:
        print(json.dumps(run_simulation(arguments)))
        return
    size = [
        "--nodes",
        str(arguments.nodes),
        "--rate-scale",
        str(arguments.rate_scale),
        "--synthetic",
        str(arguments.synthetic),
        "--models",
        str(arguments.models),
        "--step-ms",
        str(arguments.step_ms),
    ]
    wanted = (
        [(arguments.profile, arguments.forecaster)]
        if arguments.profile
        else [
            ("fifo", "none"),
            ("aigc", "none"),
            ("aigc", "online"),
        ]
    )
    print(machine_line())
    if not TRACE.exists() and not arguments.synthetic:
        print(f"{TRACE} is absent: a synthetic workload of 20,000 tasks takes its place")
    print(f"{arguments.nodes * 8} GPUs, rate x{arguments.rate_scale:g}")
    print(
        f"{'':24s}{'tasks':>9s}{'events':>9s}{'CPU s':>8s}{'wall s':>8s}{'tasks/CPU-s':>13s}{'peak MiB':>10s}"
        f"{'wait p50/p99 s':>18s}"
    )
    last: dict[str, float | str] = {}
    for profile, forecaster in wanted:
        last = row_in_own_process("--row", "--profile", profile, "--forecaster", forecaster, *size)
        show(last)
    if not last["events"]:
        return
    bare = row_in_own_process("--bare", str(last["events"]), "--tasks", str(last["tasks"]))
    show(bare)
    factor = float(bare["tasks_per_cpu_s"]) / float(last["tasks_per_cpu_s"])
    print(
        f"The last simulation takes {factor:.1f} times as long as SimPy alone takes to wait for the same number of timeouts."
    )


def show(row: dict[str, float | str]) -> None:
    """Print one row."""
    waiting = f"{row['waiting_p50_s']:.2f} / {row['waiting_p99_s']:.1f}" if "waiting_p50_s" in row else ""
    print(
        f"{row['row']:24s}{row['tasks']:>9,}{row['events']:>9,}{row['cpu_s']:>8.2f}{row['wall_s']:>8.2f}"
        f"{row['tasks_per_cpu_s']:>13,.0f}{row['peak_mib']:>10.0f}{waiting:>18s}"
    )


if __name__ == "__main__":
    main()
