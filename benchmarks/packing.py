"""How fast Pods are placed on the openb cluster: ``python -m benchmarks.packing [--pods FILE --nodes FILE] [--repeat 3]``.

1,213 nodes, some 10,800 Pods per run, one core; placements per CPU second, the best of so many repetitions. Measured are one run
alone, ten in lockstep (what `aigc reproduce fgd` does), and the whole engine under the profile of the same policy, one Pod per
step, without a journal. The experiment and the engine place alike: a test compares them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.machine import machine_line
from engine import profiles
from engine.commands import CreatePod
from engine.events import NodeJoined, TaskCancelRequested, TaskSubmitted
from engine.resources import Demand, GpuSpec, NodeSpec
from engine.scheduler import Engine
from engine.tasks import SECOND, TaskSpec, TaskType
from sim import openb, packing

TRACE = Path(__file__).resolve().parents[2] / "shared" / "traces" / "openb"
SEED = 42


def alone(experiment: packing.Experiment, policy: str, seeds: int, repeat: int) -> tuple[float, float]:
    """Return placements per CPU second, and what was given away at 100%."""
    runs = [packing.run_policy(experiment, policy, range(SEED, SEED + seeds)) for _ in range(repeat)]
    return max(run.pods / run.cpu_s for run in runs), runs[0].mean(100)


def through_engine(
    experiment: packing.Experiment, policy: str, nodes: tuple[openb.NodeRow, ...], pods: tuple[openb.PodRow, ...]
) -> float:
    """Return Pods per CPU second of the engine: every Pod of the list once; one that finds no room is cancelled."""
    engine = Engine(replace(profiles.load(policy), tie="first", typical=experiment.typical))
    engine.step(
        SECOND,
        [
            NodeJoined(
                NodeSpec(
                    node.name,
                    tuple(GpuSpec(str(at), node.model, 1) for at in range(node.gpus)),
                    node.cpu_milli,
                    node.memory_mib << 20,
                )
            )
            for node in nodes
        ],
    )
    tasks = [
        TaskSpec(
            pod.name,
            "a",
            "",
            TaskType.GC,
            "sleep",
            model=pod.name,
            demand=Demand(
                gpus=pod.gpus,
                gpu_share=pod.gpu_milli or 1000,
                gpu_models=pod.gpu_models,
                cpu_milli=pod.cpu_milli,
                memory_bytes=pod.memory_mib << 20,
            ),
        )
        for pod in pods
    ]
    began = time.process_time()
    for at, task in enumerate(tasks):
        commands = engine.step((2 + at) * SECOND, [TaskSubmitted(task)])
        if not any(isinstance(command, CreatePod) for command in commands):
            engine.step((2 + at) * SECOND, [TaskCancelRequested(task.req_no)])
    return len(tasks) / (time.process_time() - began)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pods", type=Path, default=TRACE / "openb_pod_list_default.csv.gz")
    parser.add_argument("--nodes", type=Path, default=TRACE / "openb_node_list_gpu_node.csv.gz")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--no-engine", action="store_true", help="leave the engine out (it takes half a minute)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for path in (options.pods, options.nodes):
        if not path.is_file():
            sys.exit(f"{path} does not exist; give --pods and --nodes of the trace openb")
    nodes, pods = openb.read_nodes(options.nodes), openb.read_pods(options.pods)
    experiment = packing.prepare(nodes, pods)
    rows = []
    for policy in packing.POLICIES:
        one, allocated = alone(experiment, policy, 1, options.repeat)
        ten, _ = alone(experiment, policy, 10, options.repeat)
        engine = None if options.no_engine else through_engine(experiment, policy, nodes, pods)
        rows.append({"policy": policy, "alone": one, "ten": ten, "engine": engine, "allocated": allocated})
    machine = machine_line()
    if options.json:
        print(json.dumps({"machine": machine, "nodes": len(nodes), "rows": rows}, indent=2))
        return
    print(f"{options.pods.name} on {len(nodes):,} nodes; placements per CPU second ({machine})\n")
    print("| policy | one run alone | ten in lockstep | the whole engine | given away at 100% |\n|---|---|---|---|---|")
    for row in rows:
        speed = "" if row["engine"] is None else f"{row['engine']:,.0f}"
        print(f"| {row['policy']} | {row['alone']:,.0f} | {row['ten']:,.0f} | {speed} | {row['allocated']:.2f} |")


if __name__ == "__main__":
    main()
