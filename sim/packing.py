"""The packing experiment of the FGD paper: how much of a GPU cluster each placement policy can give away.

Weng et al., "Beware of Fragmentation", USENIX ATC 2023, section 6: the Pods of a list arrive in an order drawn by the seed,
followed by Pods drawn from the list until 1.3 times the GPUs are asked for; nothing departs, and a Pod that fits nowhere is
dropped. Measured is the part of the GPUs that is given away when 100% and 130% of the cluster have been asked for.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.levels.scoring.fragmentation import Fragmentation, Typical, most_popular
from engine.resources import WHOLE_GPU
from sim.openb import NodeRow, PodRow
from sim.packing_core import Draws, run_in_lockstep
from sim.packing_policies import (
    BestFit,
    Clustering,
    DotProduct,
    Fgd,
    FirstFit,
    Ints,
    Nodes,
    Packing,
    Policy,
    Random,
    Shapes,
    WorstFit,
)
from sim.workload import WorkloadError

PAPER_POLICIES = ("random", "dot-product", "clustering", "packing", "best-fit", "fgd")
"""The six that the paper compares, the worst first."""
POLICIES = (*PAPER_POLICIES, "first-fit", "worst-fit")
TIES = ("name", "first", "last", "random")
"""Which of several best nodes is taken: the smallest name, where every run names the nodes anew (as the paper's simulator does);
the first or the last of the node list; any, drawn for every Pod."""
LEVELS = (100, 130)
"""Percent of the cluster's GPUs that have been asked for when the figures are taken."""
MOST_CPU_MILLI = 4_000_000
"""Thousandths of a core of one node or Pod."""
MOST_PODS = 1_000_000
"""Pods of one run."""
TOGETHER = 10
"""Runs in lockstep: more no longer pay, and their scores would not stay in the cache."""

Progress = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class Experiment:
    """A pod list on a cluster, ready to run."""

    nodes: Nodes
    models: tuple[str, ...]
    shapes: Shapes
    kinds: Ints
    """The shape of each Pod of the list."""
    typical: tuple[Typical, ...]
    capacity: int
    """Thousandths of GPUs."""


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """What one policy gave away under one tie rule; percent of the cluster's GPUs."""

    policy: str
    tie: str
    allocated: dict[int, list[float]]
    """Level -> one figure per seed."""
    curve: list[float]
    """Mean over the seeds at 0, 1, 2 ... 130% asked for."""
    pods: int
    cpu_s: float

    def mean(self, level: int) -> float:
        """Return the mean over the seeds."""
        return float(np.mean(self.allocated[level]))

    def deviation(self, level: int) -> float:
        """Return the standard deviation over the seeds; 0 for a single one."""
        values = self.allocated[level]
        return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def prepare(nodes: Sequence[NodeRow], pods: Sequence[PodRow]) -> Experiment:
    """Turn lists into columns; raises `WorkloadError` when there is nothing to measure."""
    models = tuple(dict.fromkeys(node.model for node in nodes))
    width = max((node.gpus for node in nodes), default=0)
    if not width:
        raise WorkloadError("nodes: none of them has a GPU; give a node list with GPUs")
    if not any(pod.gpus for pod in pods):
        raise WorkloadError("pods: none of them asks for a GPU; give a pod list with GPUs")
    most = max(max(node.cpu_milli for node in nodes), max(pod.cpu_milli for pod in pods))
    if most > MOST_CPU_MILLI:
        raise WorkloadError(
            f"cpu_milli: {most} is more than a machine has; use thousandths of a core, up to {MOST_CPU_MILLI}"
        )
    keys = Counter((pod.cpu_milli, pod.memory_mib, pod.gpus, pod.gpu_milli, pod.gpu_models) for pod in pods)
    ordered = sorted(keys, key=lambda key: not (key[2] == 1 and key[3] < WHOLE_GPU))
    at = {key: row for row, key in enumerate(ordered)}
    tags = {
        kind: 1 << bit for bit, kind in enumerate(dict.fromkeys(_kind(key[2], key[3]) for key in ordered if key[2]))
    }
    gpus = _column(key[2] for key in ordered)
    shapes = Shapes(
        shared=sum(key[2] == 1 and key[3] < WHOLE_GPU for key in ordered),
        cpu=_column(key[0] for key in ordered),
        memory=_column(key[1] for key in ordered),
        gpus=gpus,
        share=_column(key[3] for key in ordered),
        slot=width - np.clip(gpus, 1, width),
        tag=_column(tags[_kind(key[2], key[3])] if key[2] else 0 for key in ordered),
        access=np.array([[(not key[4] or model in key[4]) and key[2] <= width for key in ordered] for model in models]),
    )
    columns = Nodes(
        cpu=_column(node.cpu_milli for node in nodes),
        memory=_column(node.memory_mib for node in nodes),
        left=np.array([[WHOLE_GPU] * node.gpus + [0] * (width - node.gpus) for node in nodes], dtype=np.int64),
        gpus=_column(node.gpus for node in nodes),
        model=_column(models.index(node.model) for node in nodes),
        tags=np.zeros(len(nodes), dtype=np.int64),
    )
    kinds = _column(at[pod.cpu_milli, pod.memory_mib, pod.gpus, pod.gpu_milli, pod.gpu_models] for pod in pods)
    return Experiment(columns, models, shapes, kinds, typical_shapes(pods), int(columns.left.sum()))


def typical_shapes(pods: Sequence[PodRow], percent: int = 95) -> tuple[Typical, ...]:
    """Return the most frequent shapes of a list (CPU-only ones too; memory does not tell them apart)."""
    counts = Counter((pod.cpu_milli, pod.gpus, pod.gpu_milli or WHOLE_GPU, pod.gpu_models) for pod in pods)
    return most_popular((Typical(count, *key) for key, count in counts.items()), percent)


def sequences(experiment: Experiment, seeds: Sequence[int], percent: int = 130) -> Ints:
    """Return int64[seed, step]: the shapes in the order in which they arrive; -1 after the end of a run.

    A list that asks for more than `percent` of the cluster loses Pods that are drawn; one that asks for less gets some more.
    """
    share = experiment.shapes.gpus * experiment.shapes.share
    target = experiment.capacity * percent // 100
    found = []
    for seed in seeds:
        draw = np.random.default_rng([seed, 1])
        kinds: list[int] = draw.permutation(experiment.kinds).tolist()
        asked = int(share[kinds].sum())
        tuned_down = asked > target
        while asked > target:
            asked -= int(share[kinds.pop(int(draw.integers(len(kinds))))])
        while not tuned_down:
            kind = int(experiment.kinds[draw.integers(len(experiment.kinds))])
            if asked + int(experiment.shapes.share[kind]) > target:
                break
            asked += int(share[kind])
            kinds.append(kind)
            if len(kinds) > MOST_PODS:
                raise WorkloadError(f"pods: {MOST_PODS} of them do not ask for the cluster's GPUs; give fewer nodes")
        found.append(kinds)
    longest = max(map(len, found))
    return np.array([kinds + [-1] * (longest - len(kinds)) for kinds in found], dtype=np.int64)


def node_order(count: int, seeds: Sequence[int], tie: str) -> Ints:
    """Return int64[seed, node]: the rows of the node list in the order in which a tie takes the first."""
    rows = np.arange(count)
    if tie == "name":
        return np.array([np.random.default_rng([seed, 2]).permutation(count) for seed in seeds])
    return np.array([rows[::-1] if tie == "last" else rows for _ in seeds])


def policy_of(name: str, experiment: Experiment) -> Policy:
    """Return a policy of `POLICIES`."""
    if name == "fgd":
        measure = Fragmentation(experiment.typical)
        return Fgd(measure, list(experiment.models), experiment.nodes, experiment.shapes)
    plain: dict[str, type[FirstFit]] = {
        "random": Random,
        "first-fit": FirstFit,
        "dot-product": DotProduct,
        "clustering": Clustering,
        "packing": Packing,
        "best-fit": BestFit,
        "worst-fit": WorstFit,
    }
    if name not in plain:
        raise WorkloadError(f"policy: {name!r} is unknown; use {', '.join(POLICIES)}")
    return plain[name]()


def placements(
    experiment: Experiment, name: str, offered: Ints, seeds: Sequence[int], tie: str, progress: Progress
) -> Ints:
    """Return int64[seed, step]: the row of the node that took each Pod, or -1."""
    if tie not in TIES:
        raise WorkloadError(f"tie: {tie!r} is unknown; use {', '.join(TIES)}")
    policy = policy_of(name, experiment)
    order = node_order(len(experiment.nodes), seeds, tie)
    parts = []
    for start in range(0, len(seeds), TOGETHER):
        part = slice(start, start + TOGETHER)
        draws = _draws(seeds[part], offered.shape[1]) if name == "random" or tie == "random" else None

        def update(fraction: float, start: int = start) -> None:
            done = start + fraction * min(TOGETHER, len(seeds) - start)
            progress(done / len(seeds), name)

        parts.append(
            run_in_lockstep(experiment.nodes, experiment.shapes, policy, order[part], offered[part], draws, update)
        )
    return np.concatenate(parts)


def run_policy(
    experiment: Experiment, name: str, seeds: Sequence[int], tie: str = "name", progress: Progress = lambda *_: None
) -> PolicyResult:
    """Run one policy over the seeds; the same seed offers every policy the same Pods in the same order."""
    offered = sequences(experiment, seeds)
    began = time.process_time()
    placed = placements(experiment, name, offered, seeds, tie, progress)
    cpu_s = time.process_time() - began
    asks = np.append(experiment.shapes.gpus * experiment.shapes.share, 0)[offered]
    arrived = np.cumsum(asks, axis=1) * 100 / experiment.capacity
    used = np.cumsum(np.where(placed >= 0, asks, 0), axis=1) * 100 / experiment.capacity
    curves = np.array([_curve(arrived[run], used[run], offered[run] >= 0) for run in range(len(seeds))])
    return PolicyResult(
        name,
        tie,
        {level: [round(float(value), 4) for value in curves[:, level]] for level in LEVELS},
        [round(float(value), 4) for value in curves.mean(axis=0)],
        int((offered >= 0).sum()),
        cpu_s,
    )


def _curve(arrived: npt.NDArray[np.float64], used: npt.NDArray[np.float64], real: npt.NDArray[np.bool_]) -> list[float]:
    """Return what is given away at each whole percent asked for: the mean over the Pods that arrived at about that percent."""
    level = np.rint(arrived[real]).astype(np.int64)
    last = max(LEVELS)
    count = np.bincount(level, minlength=last + 1)[: last + 1]
    total = np.bincount(level, weights=used[real], minlength=last + 1)[: last + 1]
    known = count > 0
    percent = np.arange(last + 1)
    filled = np.interp(percent, percent[known], total[known] / count[known])
    return [float(value) for value in filled]


def _draws(seeds: Sequence[int], steps: int) -> Draws:
    return np.stack([np.random.default_rng([seed, 3]).random((steps, 2)) for seed in seeds])


def _kind(gpus: int, share: int) -> int:
    return -1 if gpus == 1 and share < WHOLE_GPU else gpus


def _column(values: Iterable[int]) -> Ints:
    return np.array(list(values), dtype=np.int64)
