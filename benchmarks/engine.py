"""How fast the engine decides: ``python -m benchmarks.engine [--seconds 5]``.

Two figures, both over the whole life of tasks (submitted, admitted, placed, started, finished, told), in CPU time of one core spent
inside `Engine.step` (and in wall time beside it), with the `aigc` profile and a queue that is kept full. Each measurement is cut
into windows: the median of the windows says what is usual, the mean what it came to in all.

1. placements a second on 1,000 nodes x 8 GPUs with 20,000 tasks waiting;
2. the cost of a decision on 10,000 nodes against that on 100 nodes.

The load has the shape of a picture service: 86 models by a Zipf law (1.43), 4,247 groups (0.81), 20 tenants, one task in ten
urgent, whole GPUs and half GPUs. Two mixes: `warm` keeps a model's Pods for the next task of that model, so that hardly a Pod is
created; `cold` gives every task a new Pod (its Pod is stopped after it), the most expensive way. As a long-lived process should,
it freezes what was there before the measurement out of Python's garbage collector and lets that run once per 200,000 allocations.

On a machine that does other work as well, CPU time per task grows with the neighbours' use of caches and sibling threads; the cost
of the cheapest tenth of the steps (`quiet`) says what a quiet core would do.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from statistics import median

# This file shares its name with the package it measures: the repository's root must come before its own folder.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine_line  # noqa: E402
from engine import events as ev  # noqa: E402
from engine import profiles  # noqa: E402
from engine.commands import CreatePod, DeletePod, StartTask  # noqa: E402
from engine.resources import Demand, GpuSpec, NodeSpec  # noqa: E402
from engine.scheduler import Engine  # noqa: E402
from engine.tasks import SECOND, Estimate, Quantiles, TaskSpec, TaskType  # noqa: E402

GIB = 1 << 30
WINDOWS = 9
BATCH = 256
"""Tasks that finish between two steps."""


def zipf(count: int, exponent: float) -> list[float]:
    """Return cumulative weights of a Zipf law."""
    return list(accumulate((i + 1) ** -exponent for i in range(count)))


def submissions(seed: int) -> Iterator[ev.TaskSubmitted]:
    """Yield new requests for ever."""
    rng = random.Random(seed)
    models, groups = [f"model{i}" for i in range(86)], [f"group{i}" for i in range(4247)]
    by_model, by_group = zipf(86, 1.43), zipf(4247, 0.81)
    demands = (Demand(gpus=1, gpu_memory_bytes=16 * GIB), Demand(gpus=1, gpu_share=500, gpu_memory_bytes=20 * GIB))
    number = 0
    while True:
        number += 1
        us = int(rng.lognormvariate(3.1, 0.6) * SECOND)
        model = rng.choices(range(86), cum_weights=by_model)[0]
        group = rng.choices(range(4247), cum_weights=by_group)[0]
        spec = TaskSpec(
            f"req-{number}",
            f"tenant{group % 20}",
            groups[group],
            TaskType.GC,
            "text_to_image",
            models[model],
            priority=100 if rng.random() < 0.1 else 0,
            demand=demands[model % 2],
        )
        yield ev.TaskSubmitted(spec, Estimate((("*", Quantiles(us, us, 2 * us, 3 * us)),)))


class Load:
    """A world that answers every order at once, and keeps the queue at its length."""

    def __init__(self, nodes: int, pending: int, cold: bool, profile: str = "aigc") -> None:
        self.engine = Engine(profiles.load(profile))
        self.rng = random.Random(1)
        self.source = submissions(2)
        self.cold = cold
        self.running: list[tuple[str, int, int]] = []
        self.outbox: list[ev.Event] = []
        self.now = 1
        self.placements = self.pods = self.spent_ns = self.wall_ns = self.steps = 0
        self.costs: list[float] = []
        """Microseconds per placement of each step."""
        gpus = tuple(GpuSpec(f"gpu{i}", "a100", 80 * GIB) for i in range(8))
        self.step([ev.NodeJoined(NodeSpec(f"node{i:05}", gpus, 128_000, 1024 * GIB)) for i in range(nodes)])
        while self.engine.state.pending < pending:
            self.step([*self.drain_outbox(), *(next(self.source) for _ in range(2_000))])

    def drain_outbox(self) -> list[ev.Event]:
        events, self.outbox = self.outbox, []
        return events

    def step(self, events: list[ev.Event]) -> None:
        self.now += SECOND // 100
        begin_wall, begin = time.perf_counter_ns(), time.process_time_ns()
        commands = self.engine.step(self.now, events)
        spent = time.process_time_ns() - begin
        self.wall_ns += time.perf_counter_ns() - begin_wall
        self.spent_ns += spent
        self.steps += 1
        placed = self.placements
        for command in commands:
            match command:
                case StartTask():
                    self.placements += 1
                    self.outbox.append(ev.TaskStarted(command.req_no, command.attempt))
                    self.running.append((command.req_no, command.attempt, command.pod))
                case CreatePod():
                    self.pods += 1
                    self.outbox.append(ev.PodStarted(command.pod))
                case DeletePod():
                    self.outbox.append(ev.PodStopped(command.pod))
                case _:
                    pass

        if self.placements > placed:
            self.costs.append(spent / 1e3 / (self.placements - placed))

    def turn(self) -> None:
        """Let a batch finish and as many come."""
        events = self.drain_outbox()
        for _ in range(min(BATCH, len(self.running))):
            at = self.rng.randrange(len(self.running))
            self.running[at], self.running[-1] = self.running[-1], self.running[at]
            req_no, attempt, pod = self.running.pop()
            events.append(ev.TaskFinished(req_no, attempt, run_us=20 * SECOND))
            if self.cold:
                events.append(ev.PodStopped(pod))
            events.append(next(self.source))
        self.step(events)

    def measure(self, seconds: float) -> dict[str, float]:
        for _ in range(20):
            self.turn()
        gc.collect()
        gc.freeze()
        self.placements = self.pods = self.spent_ns = self.wall_ns = self.steps = 0
        self.costs.clear()
        rates: list[tuple[float, float]] = []
        for _ in range(WINDOWS):
            before = self.placements, self.spent_ns, self.wall_ns
            until = time.monotonic() + seconds / WINDOWS
            while time.monotonic() < until or self.placements == before[0]:
                self.turn()
            placed = (self.placements - before[0]) * 1e9
            rates.append((placed / (self.spent_ns - before[1]), placed / (self.wall_ns - before[2])))
        return {
            "placements_per_s": round(self.placements * 1e9 / self.spent_ns),
            "median_per_s": round(median(cpu for cpu, _ in rates)),
            "wall_per_s": round(self.placements * 1e9 / self.wall_ns),
            "wall_median_per_s": round(median(wall for _, wall in rates)),
            "us_per_placement": round(self.spent_ns / 1e3 / self.placements, 2),
            "quiet_us": round(sorted(self.costs)[len(self.costs) // 10], 2),
            "placements": self.placements,
            "pods_created": self.pods,
            "pending": self.engine.state.pending,
            "running": len(self.running),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="wall time per measurement")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    gc.set_threshold(200_000, 50, 1_000)
    results: dict[str, dict[str, float]] = {}
    for nodes, pending in ((1_000, 20_000), (100, 20_000), (10_000, 20_000)):
        for cold in (False, True):
            load = Load(nodes, pending, cold)
            results[f"{nodes} nodes, {'cold' if cold else 'warm'}"] = load.measure(arguments.seconds)
            if not arguments.json:
                key = f"{nodes} nodes, {'cold' if cold else 'warm'}"
                print(f"{key:22} {results[key]}", file=sys.stderr)
    ratios = {
        mix: round(
            results[f"10000 nodes, {mix}"]["us_per_placement"] / results[f"100 nodes, {mix}"]["us_per_placement"], 2
        )
        for mix in ("warm", "cold")
    }
    if arguments.json:
        print(json.dumps({"machine": machine_line(), "results": results, "cost_10000_over_100": ratios}))
        return
    print(f"machine: {machine_line()}; placements a second of one core inside Engine.step, {WINDOWS} windows each")
    print(
        f"{'load':18} {'CPU median':>10} {'CPU mean':>9} {'wall median':>11} {'wall mean':>9} {'us each':>8} {'quiet':>7}"
        f" {'new Pods':>9} {'waiting':>8} {'running':>8}"
    )
    for name, r in results.items():
        print(
            f"{name:18} {r['median_per_s']:10,} {r['placements_per_s']:9,} {r['wall_median_per_s']:11,}"
            f" {r['wall_per_s']:9,} {r['us_per_placement']:8} {r['quiet_us']:7}"
            f" {r['pods_created'] / r['placements']:9.1%} {r['pending']:8,} {r['running']:8,}"
        )
    print(
        f"cost of a decision, 10,000 nodes over 100: warm {ratios['warm']}x, cold {ratios['cold']}x (aim: at most 3x)"
    )


if __name__ == "__main__":
    main()
