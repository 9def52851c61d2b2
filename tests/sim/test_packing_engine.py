"""The engine under a placement profile puts every Pod where the packing experiment puts it, device by device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine import events as ev
from engine import profiles
from engine.commands import CreatePod
from engine.resources import Demand, GpuSpec, NodeSpec
from engine.scheduler import Engine
from engine.tasks import SECOND, TaskSpec, TaskType
from sim import packing
from sim.draws import choice
from sim.openb import NodeRow, PodRow, read_nodes, read_pods
from sim.packing_core import place
from sim.packing_policies import Nodes

TRACE = Path(__file__).parents[2].parent / "shared" / "traces" / "openb"
PROFILES = {
    "fgd": "fgd",
    "packing": "packing",
    "clustering": "clustering",
    "dot-product": "dot-product",
    "best-fit": "best-fit",
    "worst-fit": "worst-fit",
    "first-fit": "first-fit",
}
MIB = 1 << 20


def by_engine(profile: str, experiment: packing.Experiment, nodes: list[NodeRow], pods: list[PodRow]) -> list[str]:
    """Submit the Pods one by one; one that finds no room is cancelled. Return "node: devices" for each, empty for none."""
    engine = Engine(replace(profiles.load(profile), tie="first", typical=experiment.typical))
    now = SECOND
    joined = [
        ev.NodeJoined(
            NodeSpec(
                node.name,
                tuple(GpuSpec(f"{at}", node.model, 1) for at in range(node.gpus)),
                cpu_milli=node.cpu_milli,
                memory_bytes=node.memory_mib * MIB,
            )
        )
        for node in nodes
    ]
    engine.step(now, joined)
    found = []
    for at, pod in enumerate(pods):
        demand = Demand(
            gpus=pod.gpus,
            gpu_share=pod.gpu_milli or 1000,
            gpu_models=pod.gpu_models,
            cpu_milli=pod.cpu_milli,
            memory_bytes=pod.memory_mib * MIB,
        )
        task = TaskSpec(f"t{at}", "a", "", TaskType.GC, "sleep", model=f"m{at}", demand=demand)
        now += SECOND
        made = [c for c in engine.step(now, [ev.TaskSubmitted(task)]) if isinstance(c, CreatePod)]
        if made:
            found.append(f"{made[0].node}: {','.join(grant.uuid for grant in made[0].grants)}")
        else:
            found.append("")
            now += SECOND
            engine.step(now, [ev.TaskCancelRequested(task.req_no)])
    return found


def by_experiment(name: str, experiment: packing.Experiment, nodes: list[NodeRow]) -> list[str]:
    """Place the same Pods in the same order; the devices are told from what is free before and after."""
    offered = experiment.kinds[None, :]
    placed = packing.placements(experiment, name, offered, [0], "first", lambda *_: None)[0]
    policy, state = packing.policy_of(name, experiment), experiment.nodes.take(np.arange(len(nodes)))
    found = []
    for kind, row in zip(experiment.kinds.tolist(), placed.tolist(), strict=True):
        if row < 0:
            found.append("")
            continue
        touched: Nodes = state.take(np.array([row]))
        before = touched.left[0].copy()
        place(policy, touched, experiment.shapes, np.array([kind]))
        for column in ("cpu", "memory", "left", "tags"):
            getattr(state, column)[row] = getattr(touched, column)[0]
        devices = np.flatnonzero(before != touched.left[0])
        found.append(f"{nodes[row].name}: {','.join(map(str, devices))}")
    return found


def drawn_lists() -> tuple[list[NodeRow], list[PodRow]]:
    """Return a small mixed cluster and more Pods than it holds."""
    kinds = [("T4", 2, 32_000), ("P100", 4, 64_000), ("G2", 8, 96_000), ("", 0, 16_000)]
    nodes = []
    for at in range(12):
        model, gpus, cpu = kinds[choice(len(kinds), 5, "node", at)]
        nodes.append(NodeRow(f"n{at:02}", cpu, cpu * 4, gpus, model))
    shapes = [(1, 130), (1, 300), (1, 470), (1, 650), (1, 1000), (1, 1000), (2, 1000), (4, 1000), (0, 0)]
    pods = []
    for at in range(220):
        gpus, share = shapes[choice(len(shapes), 5, "shape", at)]
        models: tuple[str, ...] = ((), (), ("T4",), ("G2", "P100"))[choice(4, 5, "model", at)] if gpus else ()
        cpu = (2_000, 4_000, 6_000, 11_000)[choice(4, 5, "cpu", at)]
        pods.append(PodRow(f"p{at}", cpu, cpu * (1 + choice(4, 5, "memory", at)), gpus, share, models))
    return nodes, pods


@pytest.mark.parametrize("name", PROFILES)
def test_engine_and_experiment_place_alike(name: str) -> None:
    nodes, pods = drawn_lists()
    experiment = packing.prepare(nodes, pods)
    ours = by_engine(PROFILES[name], experiment, nodes, pods)
    assert ours == by_experiment(name, experiment, nodes)
    assert ours.count("") > 50
    assert len(ours) - ours.count("") > 50


@pytest.mark.skipif(not TRACE.is_dir(), reason="the trace openb is not at ../shared/traces/openb")
@pytest.mark.parametrize("name", ["fgd", "packing"])
def test_engine_and_experiment_place_a_slice_of_openb_alike(name: str) -> None:
    nodes = list(read_nodes(TRACE / "openb_node_list_all_node.csv.gz"))[::30]
    pods = list(read_pods(TRACE / "openb_pod_list_gpuspec10.csv.gz"))[::20]
    experiment = packing.prepare(nodes, pods)
    ours = by_engine(name, experiment, nodes, pods)
    assert ours == by_experiment(name, experiment, nodes)
    assert len(ours) - ours.count("") > 200
