"""What a task takes besides time and GPU memory: the memory of its Pod on the host, and how busy it keeps its GPUs.

Both are learned from measurements alone, by method and model. Neither is known before one was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from engine.tasks import Micros
from predictors.decay import DecayedMeans
from predictors.features import Request
from predictors.residuals import NORMAL_SPREAD, ResidualPool

_MEMORY_S = 14 * 86400.0
_STRENGTH = 0.5
"""A model starts with its method's mean, counted as so many measurements: models differ more than runs of one."""
_SIGMA = 0.1
"""Spread of log peaks around their mean that is assumed before any was seen."""
_POOL = 500
_MOST = 20.0
_GPUS = 10_000
_PODS = 100_000


class HostMemoryModel:
    """The most memory that a Pod's process held on the host, loading included: decayed means of its log, and the P99 of errors."""

    __slots__ = ("means", "pool")

    def __init__(self, cells: int = 20_000) -> None:
        self.means = DecayedMeans(_MEMORY_S, cells)
        self.pool = ResidualPool(_POOL)

    def p99_bytes(self, request: Request, now_s: float) -> int:
        """Return the P99 of the peak; 0 before any task of the method was measured."""
        if request.method not in self.means.cells:
            return 0
        margin = _SIGMA / NORMAL_SPREAD * max(0.0, self.pool.quantile(0.99))
        return round(math.exp(self._centre(request, now_s) + margin))

    def learn(self, request: Request, now_s: float, peak_bytes: int) -> None:
        """Learn a measured peak; 0 says that nothing was measured."""
        if peak_bytes <= 0:
            return
        log_bytes, own = math.log(peak_bytes), (request.method, request.model)
        if own in self.means.cells:
            off = (log_bytes - self._centre(request, now_s)) * NORMAL_SPREAD / _SIGMA
            self.pool.add(max(-_MOST, min(_MOST, off)))
        self.means.add(request.method, now_s, log_bytes)
        self.means.add(own, now_s, log_bytes)

    def _centre(self, request: Request, now_s: float) -> float:
        weight, total, _ = self.means.cells[request.method]  # Their ratio does not fade.
        of_method = total / weight
        return self.means.shrunk((request.method, request.model), now_s, of_method, _STRENGTH)


class GpuUseModel:
    """What share of its time a task keeps its GPUs busy: decayed means."""

    __slots__ = ("means",)

    def __init__(self, cells: int = 20_000) -> None:
        self.means = DecayedMeans(_MEMORY_S, cells)

    def permille(self, request: Request, now_s: float) -> int:
        """Return the expected use in thousandths; 0 before any task of the method was measured, else at least 1."""
        if request.method not in self.means.cells:
            return 0
        weight, total, _ = self.means.cells[request.method]  # Their ratio does not fade.
        of_method = total / weight
        use = self.means.shrunk((request.method, request.model), now_s, of_method, _STRENGTH)
        return min(1000, max(1, round(1000 * use)))

    def learn(self, request: Request, now_s: float, busy_permille: int) -> None:
        """Learn how busy a task kept its GPUs; below 0 says that nobody saw."""
        if busy_permille < 0:
            return
        use = min(1000, busy_permille) / 1000.0
        self.means.add(request.method, now_s, use)
        self.means.add((request.method, request.model), now_s, use)


@dataclass(slots=True)
class _Watched:
    """An attempt that was ordered onto GPUs."""

    gpus: list[str]
    alone: bool
    marks: list[tuple[Micros, float]]
    """Of each GPU when the attempt started: its last report, and the busy time up to it; empty before."""


class GpuWatch:
    """How busy attempts kept their GPUs, from what nodes report every few seconds: each report says it of the time before it.

    Nothing is said of an attempt that shared a GPU with another one, or during which no report came.
    """

    __slots__ = ("_on", "_pods", "_running", "_seen")

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Micros, float]] = {}
        self._pods: dict[int, list[str]] = {}
        self._running: dict[str, _Watched] = {}
        self._on: dict[str, set[str]] = {}
        """Which of them run on each GPU."""

    def reported(self, now: Micros, node: str, busy_permille: Iterable[tuple[str, int]]) -> None:
        """Take a node's report of its GPUs' use."""
        for uuid, busy in busy_permille:
            gpu = f"{node}/{uuid}"
            at, busy_us = self._seen.pop(gpu, (now, 0.0))
            self._seen[gpu] = (now, busy_us + max(0, now - at) * min(1000, max(0, busy)) / 1000.0)
            if len(self._seen) > _GPUS:
                del self._seen[next(iter(self._seen))]

    def placed(self, pod: int, node: str, uuids: Iterable[str]) -> None:
        """Take where a Pod is made."""
        self._pods[pod] = [f"{node}/{uuid}" for uuid in uuids]
        if len(self._pods) > _PODS:
            del self._pods[next(iter(self._pods))]

    def gone(self, pod: int) -> None:
        """Forget a Pod."""
        self._pods.pop(pod, None)

    def ordered(self, req_no: str, pod: int) -> None:
        """Take into which Pod a task is sent."""
        self._leave(req_no)
        gpus = self._pods.get(pod)
        if not gpus:
            return
        watched = self._running[req_no] = _Watched(gpus, True, [])
        for gpu in gpus:
            sharing = self._on.setdefault(gpu, set())
            for each in sharing:
                self._running[each].alone = watched.alone = False
            sharing.add(req_no)

    def _leave(self, req_no: str) -> _Watched | None:
        watched = self._running.pop(req_no, None)
        for gpu in watched.gpus if watched is not None else ():
            self._on[gpu].discard(req_no)
            if not self._on[gpu]:
                del self._on[gpu]
        return watched

    def started(self, req_no: str) -> None:
        """Begin to measure."""
        watched = self._running.get(req_no)
        if watched is not None and all(gpu in self._seen for gpu in watched.gpus):
            watched.marks = [self._seen[gpu] for gpu in watched.gpus]

    def ended(self, req_no: str) -> int:
        """Return how busy the attempt kept its GPUs on average, in thousandths; -1 when that is not known."""
        watched = self._leave(req_no)
        if watched is None or not watched.alone or not watched.marks:
            return -1
        shares = []
        for gpu, (at, busy_us) in zip(watched.gpus, watched.marks, strict=True):
            last_at, last_us = self._seen.get(gpu, (at, busy_us))
            if last_at <= at:
                return -1
            shares.append((last_us - busy_us) / (last_at - at))
        return round(1000 * sum(shares) / len(shares))

    def state(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "seen": list(self._seen.items()),
            "pods": list(self._pods.items()),
            "running": [[req_no, asdict(watched)] for req_no, watched in self._running.items()],
        }

    def restore(self, plain: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self._seen = {gpu: (at, busy_us) for gpu, (at, busy_us) in plain["seen"]}
        self._pods = {pod: list(gpus) for pod, gpus in plain["pods"]}
        for req_no, watched in plain["running"]:
            marks = [(at, busy_us) for at, busy_us in watched["marks"]]
            self._running[req_no] = _Watched(watched["gpus"], watched["alone"], marks)
            for gpu in watched["gpus"]:
                self._on.setdefault(gpu, set()).add(req_no)
