"""A scheduler small enough to be right by inspection, for tests of the world that must not depend on the real one."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path

import pytest
import simpy

from engine.commands import Command, CreatePod, Notify, StartTask
from engine.events import Event, NodeJoined, PodStarted, TaskFailed, TaskFinished, TaskSubmitted
from engine.resources import GpuGrant
from engine.tasks import Micros, TaskSpec, TaskState
from sim.faults import FaultPlan
from sim.hardware import Hardware, cluster
from sim.metrics import Metrics
from sim.workload import Workload
from sim.world import SimWorld, run

TRACE = Path(__file__).resolve().parents[3] / "shared" / "traces" / "gentd26" / "lora_request_trace.csv"


class TinyEngine:
    """First come, first served on one everlasting Pod per GPU, whatever the model. Fails nothing over, retries nothing."""

    wakeup_at: Micros | None = None

    def __init__(self) -> None:
        self.waiting: deque[TaskSpec] = deque()
        self.idle: deque[tuple[int, str]] = deque()
        self.running: dict[str, tuple[int, str]] = {}
        self.nodes: dict[int, str] = {}

    def step(self, now: Micros, events: Sequence[Event]) -> Sequence[Command]:
        orders: list[Command] = []
        for event in events:
            match event:
                case NodeJoined(spec):
                    for gpu in spec.gpus:
                        number = len(self.nodes) + 1
                        self.nodes[number] = spec.name
                        grant = GpuGrant(gpu.uuid, 1000, gpu.memory_bytes)
                        orders.append(CreatePod(number, spec.name, "any", "", (grant,), TaskSpecs.demand))
                case PodStarted(pod):
                    self.idle.append((pod, self.nodes[pod]))
                case TaskSubmitted(task):
                    self.waiting.append(task)
                case TaskFinished(req_no) | TaskFailed(req_no):
                    self.idle.append(self.running.pop(req_no))
                    done = isinstance(event, TaskFinished)
                    orders.append(Notify(req_no, TaskState.FINISHED if done else TaskState.DEAD, 1, at=now))
                case _:
                    pass
        while self.waiting and self.idle:
            task = self.waiting.popleft()
            self.running[task.req_no] = self.idle.popleft()
            orders.append(StartTask(task.req_no, 1, *self.running[task.req_no]))
        return orders


class TaskSpecs:
    demand = TaskSpec("x", "t", "", "GC", "sleep").demand  # type: ignore[arg-type]


@pytest.fixture
def tiny_engine() -> TinyEngine:
    return TinyEngine()


@pytest.fixture
def play():
    """Run a workload under an engine; return the metrics and the world."""

    def _play(
        engine,
        workload: Workload,
        *,
        hardware: Hardware | None = None,
        nodes: int = 1,
        gpus: int = 1,
        seed: int = 0,
        faults: FaultPlan | None = None,
        until: Micros | None = None,
        forecaster=None,
    ) -> tuple[Metrics, SimWorld]:
        world = SimWorld(simpy.Environment(), hardware or Hardware(cluster(nodes, gpus)), workload, seed, faults)
        metrics = Metrics()
        run(engine, world, metrics, forecaster, until)
        return metrics, world

    return _play


@pytest.fixture
def gentd26_path() -> Path:
    if not TRACE.exists():
        pytest.skip("the GenTD26 trace is not at shared/traces/gentd26 beside the repository")
    return TRACE
