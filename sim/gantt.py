"""Keeps a piece of a run's schedule for the report: what the first GPUs did around the moment when most tasks waited.

A whole run is too much to look at. The chart shows so many bars as a page can, before and after the longest queue.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from engine.resources import WHOLE_GPU, GpuSpec
from engine.tasks import SECOND, Micros
from sim.timeline import PodRecord, RunRecord, TaskRecord

Kind = Literal["pod", "load", "run", "lost"]
GPUS_SHOWN = 48
BARS_SHOWN = 1_200
_DEPTH = {"pod": 0, "load": 1, "run": 2, "lost": 2}
_BARS_KEPT = 200_000
_POINTS_KEPT = 20_000


@dataclass(frozen=True, slots=True)
class Bar:
    """One stretch of one GPU; `low` and `height` are shares of it. Times are seconds from the run's beginning."""

    row: int
    low: float
    height: float
    start_s: float
    end_s: float
    kind: Kind
    """A Pod without a task, its load, a task, or a task whose attempt gave no result."""
    model: str


@dataclass(frozen=True, slots=True)
class Gantt:
    """A piece of a schedule, and the queue beside it."""

    gpus: tuple[str, ...]
    bars: tuple[Bar, ...]
    """In order of their beginning; a Pod's bar lies behind those of its load and tasks."""
    queue: tuple[tuple[float, int], ...]
    """(second, tasks waiting from then on)."""
    begin_s: float
    end_s: float
    all_gpus: int
    """GPUs there were; `gpus` are the first of them."""


class GanttSink:
    """A sink of `sim.timeline.Follower`; read it with `chart`."""

    def __init__(self, gpus: int = GPUS_SHOWN, bars: int = BARS_SHOWN) -> None:
        self._limit = gpus
        self._shown = bars
        self._rows: dict[str, int] = {}
        self._all: dict[str, None] = {}
        self._bars: list[tuple[Micros, Micros, int, int, Kind, str]] = []
        """(start, end, row, Pod, kind, model)."""
        self._held: dict[int, list[tuple[Micros, Micros, int, int]]] = {}
        """Row -> (created, gone, Pod, share in thousandths)."""
        self._points: list[tuple[Micros, int]] = []
        self._apart: Micros = 0
        self._most = (0, 0)
        """(tasks waiting, when)."""
        self._began: Micros | None = None

    def node(self, now: Micros, name: str, gpus: Sequence[GpuSpec], up: bool) -> None:
        """Give the first GPUs a row each."""
        self._began = now if self._began is None else self._began
        for gpu in gpus:
            self._all[gpu.uuid] = None
            if len(self._rows) < self._limit:
                self._rows.setdefault(gpu.uuid, len(self._rows))

    def run(self, record: RunRecord) -> None:
        """Draw a run on its GPUs."""
        if record.started_at is None:
            return
        kind: Kind = "run" if record.outcome in {"finished", "open"} else "lost"
        model = record.spec.model if record.spec is not None else ""
        for grant in record.grants:
            if grant.uuid in self._rows and len(self._bars) < _BARS_KEPT:
                row = self._rows[grant.uuid]
                self._bars.append((record.started_at, record.ended_at, row, record.pod, kind, model))

    def pod(self, record: PodRecord) -> None:
        """Draw a Pod and its load on its GPUs."""
        for grant in record.grants:
            row = self._rows.get(grant.uuid)
            if row is None:
                continue
            self._held.setdefault(row, []).append((record.created_at, record.ended_at, record.pod, grant.share))
            if len(self._bars) < _BARS_KEPT:
                self._bars.append((record.created_at, record.ended_at, row, record.pod, "pod", record.model))
                loaded = record.ready_at if record.ready_at is not None else record.ended_at
                if loaded > record.created_at:
                    self._bars.append((record.created_at, loaded, row, record.pod, "load", record.model))

    def task(self, record: TaskRecord) -> None:
        """Tasks are told by their runs."""

    def levels(self, now: Micros, waiting: int, running: int, pods: int) -> None:
        """Follow the queue; where there are too many points, spans of time keep their last one."""
        if waiting > self._most[0]:
            self._most = (waiting, now)
        points = self._points
        if points and now - points[-1][0] < self._apart:
            points[-1] = (points[-1][0], waiting)
            return
        points.append((now, waiting))
        if len(points) > _POINTS_KEPT:
            self._apart = max(2 * self._apart, 2 * (now - points[0][0]) // _POINTS_KEPT, 1)
            self._points = points[::2]

    def _places(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Return by row and Pod the part of the row, in thousandths, that the Pod has to itself: (low, height)."""
        places = {}
        for row, pods in self._held.items():
            there: list[tuple[int, int, Micros]] = []
            for created, gone, pod, share in sorted(pods):
                there = sorted(each for each in there if each[2] > created)
                low = 0
                for begin, height, _ in there:
                    if begin - low >= share:
                        break
                    low = max(low, begin + height)
                there.append((low, share, gone))
                places[row, pod] = (min(low, WHOLE_GPU - share), share)
        return places

    def chart(self) -> Gantt:
        """Return the piece around the longest queue."""
        bars = sorted(self._bars, key=lambda bar: (bar[0], -bar[1], bar[2], _DEPTH[bar[4]], bar[3]))
        middle = bisect_left([bar[0] for bar in bars], self._most[1])
        first = max(0, min(middle - self._shown // 2, len(bars) - self._shown))
        chosen = bars[first : first + self._shown]
        began = self._began or 0
        begin = chosen[0][0] if chosen else began
        end = max((bar[0] for bar in chosen), default=began + SECOND)
        whole = len(chosen) == len(bars)
        if whole:
            end = max((bar[1] for bar in chosen), default=end)
        before = [point for point in self._points if point[0] <= begin][-1:]
        queue = before + [point for point in self._points if begin < point[0] <= end]
        places = self._places()
        drawn = [bar for bar in bars[: first + self._shown] if bar[1] > begin and bar[0] <= end]
        return Gantt(
            gpus=tuple(self._rows),
            bars=tuple(
                Bar(
                    row,
                    places.get((row, pod), (0, WHOLE_GPU))[0] / WHOLE_GPU,
                    places.get((row, pod), (0, WHOLE_GPU))[1] / WHOLE_GPU,
                    (max(start, begin) - began) / SECOND,
                    (min(stop, end) - began) / SECOND,
                    kind,
                    model,
                )
                for start, stop, row, pod, kind, model in drawn
            ),
            queue=tuple(((max(at, begin) - began) / SECOND, waiting) for at, waiting in queue),
            begin_s=(begin - began) / SECOND,
            end_s=(end - began) / SECOND,
            all_gpus=len(self._all),
        )
