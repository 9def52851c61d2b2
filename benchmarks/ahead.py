"""What looking ahead costs: ``python -m benchmarks.ahead [--waiting 10000] [--gpus 64] [--seconds 20]``.

An engine with the `aigc` profile is kept at so many waiting tasks: tasks end at the pace of simulated time, and as many come.
Beside it a `Foresight` follows every step and looks ahead as the live scheduler does: after a look that took t, not sooner than
49 t later.

Printed are the CPU time of one look, how often there is one, and the looks' share of the time of a scheduler that is busy all the
time; and the CPU time per finished task of its steps and of following them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from heapq import heappop, heappush
from pathlib import Path
from statistics import median

# This file shares its folder's name with others: the repository's root must come before its own folder.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.engine import submissions  # noqa: E402
from benchmarks.machine import machine_line  # noqa: E402
from engine import events as ev  # noqa: E402
from engine import profiles  # noqa: E402
from engine.ahead.foresight import Foresight  # noqa: E402
from engine.commands import Command, CreatePod, DeletePod, StartTask, StopTask  # noqa: E402
from engine.resources import GpuSpec, NodeSpec  # noqa: E402
from engine.scheduler import Engine  # noqa: E402

GIB = 1 << 30
SHARE = 0.02


class Bench:
    """An engine, a crude world that answers at once, and a foresight, with the CPU time of each."""

    def __init__(self, waiting: int, gpus: int) -> None:
        self.waiting = waiting
        self.engine = Engine(profiles.load("aigc"))
        self.foresight = Foresight(self.engine.state, self.engine.profile)
        self.rng = random.Random(3)
        self.coming = submissions(1)
        self.ends: list[tuple[int, str, int]] = []
        self.now = 0
        self.spent = {"steps": 0.0, "following": 0.0, "looks": 0.0}
        self.looks: list[float] = []
        self.tasks = 0
        nodes = [
            NodeSpec(f"n{number}", tuple(GpuSpec(f"n{number}-g{i}", "a100", 80 * GIB) for i in range(8)))
            for number in range(max(1, gpus // 8))
        ]
        self.step([ev.NodeJoined(node) for node in nodes])
        self.fill()

    def step(self, events: list[ev.Event]) -> None:
        """Step until nothing follows at once."""
        while True:
            began = time.process_time()
            commands = self.engine.step(self.now, events)
            decided = time.process_time()
            self.foresight.step(self.now, events, commands)
            followed = time.process_time()
            self.spent["steps"] += decided - began
            self.spent["following"] += followed - decided
            events = [event for command in commands if (event := self.answer(command)) is not None]
            if not events:
                return
            self.now += 1_000

    def answer(self, command: Command) -> ev.Event | None:
        """Return what a world without any delay says."""
        match command:
            case CreatePod():
                return ev.PodStarted(command.pod)
            case DeletePod():
                return ev.PodStopped(command.pod)
            case StopTask():
                return ev.TaskStopped(command.req_no, command.attempt)
            case StartTask():
                run_us = self.engine.state.tasks[command.req_no].predicted_us
                heappush(
                    self.ends,
                    (self.now + int(run_us * self.rng.lognormvariate(0, 0.4)), command.req_no, command.attempt),
                )
                return ev.TaskStarted(command.req_no, command.attempt)
            case _:
                return None

    def fill(self) -> None:
        """Submit until enough wait."""
        missing = self.waiting - self.engine.state.pending
        while missing > 0:
            self.step([next(self.coming) for _ in range(min(256, missing))])
            missing = self.waiting - self.engine.state.pending

    def turn(self) -> None:
        """Let the next tasks end, and others come in their place."""
        batch: list[ev.Event] = []
        while self.ends and len(batch) < 32:
            at, req_no, attempt = heappop(self.ends)
            task = self.engine.state.tasks[req_no]
            if task.attempt == attempt and not task.cancel_requested:
                batch.append(ev.TaskFinished(req_no, attempt, run_us=max(1, at - task.started_at)))
                self.now = max(self.now, at)
        self.tasks += len(batch)
        self.step(batch)
        self.fill()

    def look(self) -> float:
        """Look ahead; return the seconds that took."""
        began = time.process_time()
        self.foresight.look()
        took = time.process_time() - began
        self.looks.append(took)
        self.spent["looks"] += took
        return took


def measure(waiting: int, gpus: int, seconds: float) -> dict[str, float]:
    """Keep a scheduler busy for so many seconds of CPU time and return the figures."""
    bench = Bench(waiting, gpus)
    bench.look()
    bench.looks.clear()
    bench.spent = dict.fromkeys(bench.spent, 0.0)
    bench.tasks = 0
    began = time.process_time()
    next_look = 0.0
    while (elapsed := time.process_time() - began) < seconds:
        if elapsed >= next_look:
            took = bench.look()
            next_look = time.process_time() - began + max(0.2, took * (1 / SHARE - 1))
        bench.turn()
    spent = bench.spent
    busy = spent["steps"] + spent["following"] + spent["looks"]
    return {
        "waiting": waiting,
        "gpus": gpus,
        "tasks": bench.tasks,
        "looks": len(bench.looks),
        "look_ms": 1e3 * median(bench.looks),
        "every_s": max(0.2, median(bench.looks) / SHARE),
        "step_us_per_task": 1e6 * spent["steps"] / max(1, bench.tasks),
        "follow_us_per_task": 1e6 * spent["following"] / max(1, bench.tasks),
        "look_share": spent["looks"] / (time.process_time() - began),
        "busy_share_of_looks": spent["looks"] / busy,
        "busy_share_of_following": spent["following"] / busy,
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiting", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0, help="CPU time per measurement")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [measure(waiting, arguments.gpus, arguments.seconds) for waiting in arguments.waiting]
    if arguments.json:
        print(json.dumps({"machine": machine_line(), "rows": rows}, indent=2))
        return
    print(machine_line())
    print(
        f"{'waiting':>8} {'GPUs':>5} {'look ms':>8} {'every s':>8} {'look share':>10} {'step us':>8} {'follow us':>9}"
    )
    for row in rows:
        print(
            f"{row['waiting']:8.0f} {row['gpus']:5.0f} {row['look_ms']:8.1f} {row['every_s']:8.2f} {row['look_share']:10.1%} "
            f"{row['step_us_per_task']:8.1f} {row['follow_us_per_task']:9.1f}"
        )


if __name__ == "__main__":
    main()
