"""A world in memory for drills: nodes that run `sleep` tasks in real time inside the scheduler's process, without sockets or Pods.

It shows SS, queue, journal and engine at work where no agent is wanted: in tests, in examples, in a dry run of an installation.
Its nodes die with the process, as a real one's Pods would on a machine that lost power.
"""

from __future__ import annotations

import heapq
import itertools
import json
import threading
from collections import deque
from collections.abc import Sequence

from engine.commands import Command, CreatePod, DeletePod, StartTask, StopTask
from engine.events import (
    Event,
    NodeJoined,
    PodStarted,
    PodStopped,
    TaskFailed,
    TaskFinished,
    TaskProgressed,
    TaskStarted,
    TaskStopped,
)
from engine.protocol.controller import PayloadRefused, Payloads
from engine.resources import GpuSpec, NodeSpec
from engine.tasks import SECOND, FailureCause, Micros
from executors.zmq_world import SteadyClock

GIB = 1 << 30


class DrillWorld:
    """Runs what the engine orders, by the clock. ``fail`` in a task's parameters is obeyed: crash, oom, error."""

    def __init__(self, payloads: Payloads, *, nodes: int = 1, gpus: int = 4, not_before: Micros = 0) -> None:
        self._payloads = payloads
        self._clock = SteadyClock(not_before)
        self._bell = threading.Event()
        self._posted: deque[Event] = deque()
        self._due: list[tuple[Micros, int, Event]] = []
        self._order = itertools.count()
        self._running: dict[tuple[str, int, int], int] = {}
        self.performed: deque[Command] = deque(maxlen=100_000)
        """What was ordered, for tests to look at."""
        for n in range(nodes):
            devices = tuple(GpuSpec(f"drill-{n}-{k}", "drill", 80 * GIB) for k in range(gpus))
            self.post(NodeJoined(NodeSpec(f"drill-{n}", devices, 64_000, 256 * GIB, 1024 * GIB)))

    def now(self) -> Micros:
        """Return the time."""
        return self._clock.now()

    def take(self) -> Sequence[Event]:
        """Return what was posted and what came due."""
        self._bell.clear()
        events: list[Event] = []
        while self._posted:
            events.append(self._posted.popleft())
        now = self.now()
        while self._due and self._due[0][0] <= now:
            event = heapq.heappop(self._due)[2]
            if self._still_true(event):
                events.append(event)
        return events

    def _still_true(self, event: Event) -> bool:
        match event:
            case TaskFinished() | TaskFailed():
                return self._running.pop((event.req_no, event.attempt, event.rank), None) is not None
            case TaskStarted() | TaskProgressed():
                return (event.req_no, event.attempt, event.rank) in self._running
            case PodStopped():
                self._running = {key: pod for key, pod in self._running.items() if pod != event.pod}
        return True

    def perform(self, command: Command) -> None:
        """Carry an order out."""
        self.performed.append(command)
        match command:
            case CreatePod(pod=pod):
                try:
                    self._payloads.pod(command)
                    self._later(0, PodStarted(pod))
                except PayloadRefused as refused:
                    self._later(0, PodStopped(pod, refused.cause, refused.detail))
            case DeletePod(pod=pod):
                self._later(0, PodStopped(pod))
            case StartTask():
                self._start(command)
            case StopTask():
                if self._running.pop((command.req_no, command.attempt, command.rank), None) is not None:
                    self._later(0, TaskStopped(command.req_no, command.attempt, command.rank))
            case _:
                pass

    def _start(self, command: StartTask) -> None:
        key = (command.req_no, command.attempt, command.rank)
        self._running[key] = command.pod
        try:
            parameters = self._payloads.task(command)
        except PayloadRefused as refused:
            self._later(0, TaskFailed(*key[:2], refused.cause, command.rank, refused.detail))
            return
        seconds = parameters.get("seconds", 0.0)
        run_us = int(seconds * SECOND) if isinstance(seconds, int | float) else 0
        self._later(0, TaskStarted(*key))
        self._later(run_us // 2, TaskProgressed(command.req_no, command.attempt, 1, 2, command.rank))
        match parameters.get("fail"):
            case "crash":
                self._later(run_us, PodStopped(command.pod, FailureCause.CRASHED, "the drill crashed as asked"))
            case "oom":
                self._later(
                    run_us, TaskFailed(*key[:2], FailureCause.OUT_OF_MEMORY, command.rank, "out of memory as asked")
                )
            case "error":
                self._later(run_us, TaskFailed(*key[:2], FailureCause.BAD_INPUT, command.rank, "an error as asked"))
            case _:
                result = json.dumps({"files": [], "metadata": {"node": command.node}}, separators=(",", ":"))
                self._later(run_us, TaskFinished(*key, result, run_us))

    def _later(self, delay_us: Micros, event: Event) -> None:
        heapq.heappush(self._due, (self.now() + delay_us, next(self._order), event))

    def wait(self, until: Micros | None) -> None:
        """Return at `until`, when something comes due, or when somebody posts."""
        times = [time for time in (until, self._due[0][0] if self._due else None) if time is not None]
        self._bell.wait(max(0, min(times) - self.now()) / SECOND if times else None)

    def post(self, event: Event) -> None:
        """Hand in an event from outside; from any thread."""
        self._posted.append(event)
        self._bell.set()

    def wake(self) -> None:
        """End a `wait` early; from any thread."""
        self._bell.set()

    def close(self) -> None:
        """Forget everything."""
        self._running.clear()
        self._due.clear()
