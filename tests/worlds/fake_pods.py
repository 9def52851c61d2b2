"""An in-memory Pod host and DevicePlugin for tests: Pods are entries in a table, attempts are timers."""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from engine.resources import GpuSpec
from engine.tasks import FailureCause
from executors import ports


class FakeDevices:
    """Devices that a test may change while the agent runs."""

    def __init__(self, count: int = 2) -> None:
        self.gpus = tuple(GpuSpec(f"cpu-{i}", "cpu", 1 << 30) for i in range(count))

    def devices(self) -> tuple[GpuSpec, ...]:
        return self.gpus

    def use(self) -> tuple[ports.DeviceUse, ...]:
        return tuple(ports.DeviceUse(gpu.uuid) for gpu in self.gpus)

    def environment(self, uuids: Sequence[str]) -> Mapping[str, str]:
        return {}


class FakePodHost:
    """Pods in a table. `sleep` attempts take `seconds`; `fail` ends them with an error, or their Pod with a crash."""

    def __init__(self) -> None:
        self.slots: dict[int, int] = {}
        self.running: dict[tuple[str, int, int], tuple[int, float, Mapping[str, Any]]] = {}
        self.started: list[tuple[str, int]] = []
        self.created: list[int] = []
        self._reports: deque[ports.PodReport] = deque()
        self._out, self._in = socket.socketpair()
        self._out.setblocking(False)
        self._in.setblocking(False)
        self._closed = threading.Event()
        self._clock = threading.Thread(target=self._tick, daemon=True)
        self._clock.start()

    def create(self, order: ports.PodOrder) -> None:
        self.created.append(order.pod)
        self.slots[order.pod] = order.slots
        self._say(ports.PodUp(order.pod, 1))

    def start(
        self,
        pod: int,
        req_no: str,
        attempt: int,
        parameters: Mapping[str, Any],
        checkpoint: str = "",
        rank: int = 0,
        terms: Mapping[str, Any] | None = None,
    ) -> None:
        self.started.append((req_no, attempt))
        self.running[(req_no, attempt, rank)] = (
            pod,
            time.monotonic() + float(parameters.get("seconds", 0)),
            parameters,
        )
        self._say(ports.AttemptStarted(req_no, attempt, rank))

    def stop(self, req_no: str, attempt: int, grace_us: int, keep_checkpoint: bool = False) -> None:
        for key in [key for key in self.running if key[:2] == (req_no, attempt)]:
            del self.running[key]
            self._say(ports.AttemptStopped(req_no, attempt, "", key[2]))

    def delete(self, pod: int, grace_us: int) -> None:
        self._end(pod, FailureCause.POD_LOST, True)

    def filenos(self) -> Sequence[int]:
        return (self._out.fileno(),)

    def next_deadline_us(self) -> int | None:
        return None

    def take(self) -> Sequence[ports.PodReport]:
        try:
            self._out.recv(4096)
        except BlockingIOError:
            pass
        now = time.monotonic()
        for key in [key for key, (_, due, _) in self.running.items() if due <= now]:
            pod, _, parameters = self.running.pop(key)
            req_no, attempt, rank = key
            failing = parameters.get("fail")
            if failing == "crash":
                self._end(pod, FailureCause.CRASHED, False)
            elif failing:
                self._say(ports.AttemptFailed(req_no, attempt, FailureCause.CRASHED, "told to fail", 0, rank))
            else:
                self._say(ports.AttemptProgressed(req_no, attempt, 1, 1, "", rank))
                self._say(ports.AttemptFinished(req_no, attempt, {"files": [], "metadata": {}}, 1, 0, rank))
        reports = list(self._reports)
        self._reports.clear()
        return reports

    def pods(self) -> Sequence[int]:
        return tuple(self.slots)

    def crash_all(self) -> None:
        for pod in list(self.slots):
            self._end(pod, FailureCause.CRASHED, False)

    def close(self) -> None:
        for pod in list(self.slots):
            self._end(pod, FailureCause.POD_LOST, True)
        self._closed.set()
        self._clock.join()
        self._out.close()
        self._in.close()

    def _end(self, pod: int, cause: FailureCause, ordered: bool) -> None:
        if self.slots.pop(pod, None) is None:
            return
        for key in [key for key, (owner, _, _) in self.running.items() if owner == pod]:
            del self.running[key]
        self._say(ports.PodDown(pod, cause, "", ordered))

    def _say(self, report: ports.PodReport) -> None:
        self._reports.append(report)
        self._nudge()

    def _nudge(self) -> None:
        try:
            self._in.send(b"\0")
        except (BlockingIOError, OSError):
            pass

    def _tick(self) -> None:
        while not self._closed.wait(0.005):
            if self.running:
                self._nudge()
