"""Builds a simulated world for the contract suite that every world has to pass: small cluster, `sleep` tasks, faults on demand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import simpy

from engine import profiles
from engine.commands import Command, Notify
from engine.events import Event, TaskSubmitted
from engine.ports import Journal, no_journal
from engine.resources import Demand
from engine.scheduler import Engine
from engine.tasks import SECOND, TaskSpec, TaskState, TaskType
from sim.faults import FaultPlan
from sim.hardware import Hardware, cluster
from sim.workload import Workload
from sim.world import SimWorld, run

_SLICE_US = SECOND // 10


@dataclass
class SimRig:
    """An engine in a simulated world, and what it said so far."""

    engine: Engine
    world: SimWorld
    notices: list[Notify] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    journal: Journal = no_journal

    def post(self, event: Event) -> None:
        """Let an event from outside happen now."""
        self.world.post(event)

    def submit(self, req_no: str, seconds: float = 1.0, **fields: object) -> TaskSpec:
        """Submit a `sleep` task; further fields are those of `TaskSpec`."""
        spec = sleep_task(req_no, seconds, **fields)
        self.post(TaskSubmitted(spec))
        return spec

    def pump(self, until: Callable[[], bool], timeout_s: float = 600.0) -> None:
        """Let the world go on until a condition holds; AssertionError after that much simulated time."""
        end = self.world.now() + round(timeout_s * SECOND)
        while not until():
            assert self.world.now() < end, f"nothing came of it within {timeout_s} simulated seconds"
            run(self.engine, self.world, self._record, until=self.world.now() + _SLICE_US)

    def states(self, req_no: str) -> list[TaskState]:
        """Return every state that was told about a task, in order."""
        return [notice.state for notice in self.notices if notice.req_no == req_no]

    def last(self, req_no: str) -> TaskState | None:
        """Return the state that was told last."""
        states = self.states(req_no)
        return states[-1] if states else None

    def nodes(self) -> list[str]:
        """Return the nodes' names."""
        return list(self.world.nodes)

    def lose_node(self, node: str, repair_after_s: float | None = None) -> None:
        """Let a machine die now, and come back later if told."""
        repair = None if repair_after_s is None else round(repair_after_s * SECOND)
        self.world.fail_node(node, repair)

    def crash_pods(self, node: str) -> None:
        """Let every Pod of a node crash now."""
        for pod in list(self.world.nodes[node].pods):
            self.world.crash_pod(pod, "drill")

    def close(self) -> None:
        """Nothing to give back."""

    def _record(self, now: int, events: object, commands: object) -> None:
        self.journal(now, events, commands)  # type: ignore[arg-type]
        self.events.extend(events)  # type: ignore[arg-type]
        self.commands.extend(commands)  # type: ignore[arg-type]
        self.notices.extend(each for each in commands if isinstance(each, Notify))  # type: ignore[attr-defined]


def sleep_task(req_no: str, seconds: float = 1.0, **fields: object) -> TaskSpec:
    """Return a `sleep` task that takes one slot of a shared GPU.

    Pass ``fail`` ("crash", "oom" or "error") and ``fail_attempts`` to have its first attempts fail.
    """
    features: dict[str, object] = {"seconds": seconds}
    for name in ("fail", "fail_attempts", "steps"):
        if name in fields:
            features[name] = fields.pop(name)
    given: dict[str, object] = {
        "tenant": "a",
        "group": "",
        "task_type": TaskType.GC,
        "method": "sleep",
        "demand": Demand(gpus=1),
        "features": tuple(sorted(features.items())),
        **fields,
    }
    return TaskSpec(req_no=req_no, **given)  # type: ignore[arg-type]


def make_sim_rig(
    nodes: int = 1,
    gpus: int = 1,
    profile: str = "fifo",
    faults: FaultPlan | None = None,
    seed: int = 0,
    journal: Journal = no_journal,
) -> SimRig:
    """Build an engine and a simulated cluster; nothing has happened yet."""
    world = SimWorld(simpy.Environment(), Hardware(cluster(nodes, gpus)), Workload("by hand", ()), seed, faults)
    return SimRig(Engine(profiles.load(profile)), world, journal=journal)
