"""Writes a timeline for ui.perfetto.dev and chrome://tracing: a process per node, a track per GPU, Pods with their loads and tasks
inside, counters of the queue, and arrows from a task's submission to its runs.

Big runs do not fit into a viewer. Beyond `max_slices` the file keeps a share of the nodes, drawn by name, each with everything that
happened on it, and halves the share as often as needed; when a single node is too much, it ends early. Counters always cover all.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from engine.resources import WHOLE_GPU, GpuSpec
from engine.tasks import Micros
from sim.draws import unit
from sim.timeline import PodRecord, RunRecord, TaskRecord, TimelineError

MAX_SLICES = 50_000
"""Runs and Pods that a file shows; about 30 MB of JSON."""
_MAX_POINTS = 20_000
_CLUSTER = 1
_CUSTOMERS = 2
_FIRST_NODE = 3
_ARROWS = "task"

Plain = dict[str, Any]


@dataclass(slots=True)
class Perfetto:
    """A sink that collects what a file will show; `write` writes it."""

    max_slices: int = MAX_SLICES
    share: float = 1.0
    """Share of the nodes that is still shown."""
    cut_at: Micros | None = None
    """Nothing after this is shown but counters; None: all is."""
    left_out: int = 0
    """Runs and Pods that are not shown."""
    began: Micros | None = None
    runs: list[RunRecord] = field(default_factory=list)
    pods: list[PodRecord] = field(default_factory=list)
    points: list[tuple[Micros, int, int, int]] = field(default_factory=list)
    changes: list[tuple[Micros, str, bool]] = field(default_factory=list)
    gpus: dict[str, dict[str, str]] = field(default_factory=dict)
    """Node -> GPU -> model."""
    _draws: dict[str, float] = field(default_factory=dict)
    _down: set[str] = field(default_factory=set)
    _apart: Micros = 0
    """Least distance between two points of the counters."""

    def __post_init__(self) -> None:
        """Refuse a limit that shows nothing."""
        if self.max_slices < 1:
            raise TimelineError(f"max_slices: must be at least 1, got {self.max_slices}")

    # --- taking -------------------------------------------------------------------------------------------------------

    def node(self, now: Micros, name: str, gpus: Sequence[GpuSpec], up: bool) -> None:
        """Learn a node's GPUs, and note when it came and went."""
        self._begin(now)
        known = self.gpus.get(name)
        if known is None:
            known = self.gpus[name] = {}
            self._draws[name] = unit(0, "timeline", name)
        if up == (name in self._down):
            self.changes.append((now, name, up))
        if up:
            self._down.discard(name)
        else:
            self._down.add(name)
        for gpu in gpus:
            known[gpu.uuid] = gpu.model

    def run(self, record: RunRecord) -> None:
        """Keep a run."""
        self._begin(record.submitted_at)
        if self._shown(record.node, record.ordered_at):
            self.runs.append(record)
            self._thin()
        else:
            self.left_out += 1

    def pod(self, record: PodRecord) -> None:
        """Keep a Pod."""
        self._begin(record.created_at)
        if self._shown(record.node, record.created_at):
            self.pods.append(record)
            self._thin()
        else:
            self.left_out += 1

    def task(self, record: TaskRecord) -> None:
        """Tasks are told by their runs."""

    def levels(self, now: Micros, waiting: int, running: int, pods: int) -> None:
        """Keep a point of the counters, at most one per span; spans double when there are too many."""
        self._begin(now)
        points = self.points
        if points and now - points[-1][0] < self._apart:
            points[-1] = (points[-1][0], waiting, running, pods)
            return
        points.append((now, waiting, running, pods))
        if len(points) > _MAX_POINTS:
            self._apart = max(2 * self._apart, (points[-1][0] - points[0][0]) // (_MAX_POINTS // 2), 1)
            kept: list[tuple[Micros, int, int, int]] = []
            for point in points:
                if kept and point[0] - kept[-1][0] < self._apart:
                    kept[-1] = (kept[-1][0], *point[1:])
                else:
                    kept.append(point)
            self.points = kept

    def _begin(self, now: Micros) -> None:
        if self.began is None or now < self.began:
            self.began = now

    def _shown(self, node: str, at: Micros) -> bool:
        draw = self._draws.setdefault(node, unit(0, "timeline", node))
        return draw <= self.share and (self.cut_at is None or at < self.cut_at)

    def _thin(self) -> None:
        while len(self.runs) + len(self.pods) > self.max_slices:
            seen = sorted({self._draws[each.node] for records in (self.runs, self.pods) for each in records})
            if len(seen) > 1:
                self.share = seen[(len(seen) - 1) // 2]
            else:
                moments = sorted([each.ordered_at for each in self.runs] + [each.created_at for each in self.pods])
                self.cut_at = moments[self.max_slices]
            before = len(self.runs) + len(self.pods)
            self.runs = [each for each in self.runs if self._shown(each.node, each.ordered_at)]
            self.pods = [each for each in self.pods if self._shown(each.node, each.created_at)]
            self.left_out += before - len(self.runs) - len(self.pods)

    # --- writing ------------------------------------------------------------------------------------------------------

    def write(self, path: Path, facts: dict[str, str | int | float] | None = None) -> None:
        """Write ``.json``, or ``.json.gz`` packed; `facts` go into the file's metadata. Raises `TimelineError`."""
        try:
            if path.suffix == ".gz":
                with gzip.open(path, "wb", compresslevel=5) as raw, io.TextIOWrapper(raw, encoding="utf-8") as file:
                    self._dump(file, facts or {})
            else:
                with path.open("w", encoding="utf-8") as file:
                    self._dump(file, facts or {})
        except OSError as error:
            raise TimelineError(f"timeline: cannot write {path}: {error.strerror}; check the path") from None

    def _dump(self, file: TextIO, facts: dict[str, str | int | float]) -> None:
        about = {
            **facts,
            "clock_starts_at_us": self.began or 0,
            "nodes_shown": len({each.node for each in self.runs} | {each.node for each in self.pods}),
            "nodes": len(self.gpus),
            "left_out": self.left_out,
        }
        file.write('{"displayTimeUnit":"ms","otherData":')
        json.dump(about, file)
        file.write(',"traceEvents":[\n')
        for number, event in enumerate(self.trace_events()):
            file.write(("" if number == 0 else ",\n") + json.dumps(event, separators=(",", ":")))
        file.write("\n]}\n")

    def trace_events(self) -> Iterator[Plain]:
        """Yield the events of the format: metadata first, then each track in order of time."""
        began = self.began or 0
        shown = sorted({each.node for each in self.runs} | {each.node for each in self.pods})
        processes = {name: _FIRST_NODE + number for number, name in enumerate(shown)}
        yield from _process(_CLUSTER, "cluster", 0)
        yield from _process(_CUSTOMERS, "customers", 1)
        for number, name in enumerate(shown):
            yield from _process(processes[name], name, 2 + number)
        for at, waiting, running, held in self.points:
            yield _counter("tasks", at - began, {"waiting": waiting, "running": running})
            yield _counter("Pods", at - began, {"Pods": held})
        for at, name, up in self.changes:
            yield {
                "name": f"{name} {'joined' if up else 'lost'}",
                "ph": "i",
                "s": "g",
                "ts": at - began,
                "pid": _CLUSTER,
                "tid": 0,
            }
        firsts: dict[str, RunRecord] = {}
        for record in sorted(self.runs, key=lambda each: (each.submitted_at, each.req_no, each.attempt, each.rank)):
            if not record.rank:
                firsts.setdefault(record.req_no, record)
        drawn = {each.pod for each in self.pods}
        began_in = [each for each in self.runs if each.started_at is not None and each.pod in drawn]
        last = {each.req_no: (each.pod, each.attempt) for each in began_in if not each.rank}
        arrows = {req_no: number for number, req_no in enumerate(firsts, 1) if req_no in last}
        yield from _submissions(list(firsts.values()), arrows, began)
        runs_of: dict[int, list[RunRecord]] = {}
        for record in began_in:
            runs_of.setdefault(record.pod, []).append(record)
        by_node: dict[str, list[PodRecord]] = {name: [] for name in processes}
        for pod in sorted(self.pods, key=lambda each: (each.created_at, each.pod)):
            by_node[pod.node].append(pod)
        for name, pods in by_node.items():
            tracks = _Tracks(processes[name], self.gpus.get(name, {}), arrows, last)
            for pod in pods:
                runs = sorted(runs_of.get(pod.pod, ()), key=lambda each: (each.started_at or 0, each.req_no))
                tracks.draw(pod, runs, began)
            yield from tracks.events()


def _process(pid: int, name: str, order: int) -> Iterator[Plain]:
    yield {"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "ts": 0, "args": {"name": name}}
    yield {"name": "process_sort_index", "ph": "M", "pid": pid, "tid": 0, "ts": 0, "args": {"sort_index": order}}
    if pid == _CLUSTER:
        yield {"name": "thread_name", "ph": "M", "pid": pid, "tid": 0, "ts": 0, "args": {"name": "nodes and queue"}}


def _counter(name: str, at: Micros, values: dict[str, int]) -> Plain:
    return {"name": name, "ph": "C", "ts": at, "pid": _CLUSTER, "tid": 0, "args": values}


def _submissions(firsts: Sequence[RunRecord], arrows: dict[str, int], began: Micros) -> Iterator[Plain]:
    """Yield a mark per submission on its tenant's track, with the arrow that leads to its runs."""
    tenants = sorted({each.spec.tenant for each in firsts if each.spec is not None})
    numbers = {tenant: number for number, tenant in enumerate(tenants, 1)}
    for tenant, number in numbers.items():
        yield {"name": "thread_name", "ph": "M", "pid": _CUSTOMERS, "tid": number, "ts": 0, "args": {"name": tenant}}
    for each in firsts:
        if each.spec is None:
            continue
        place = {"ts": each.submitted_at - began, "pid": _CUSTOMERS, "tid": numbers[each.spec.tenant]}
        yield {"name": each.req_no, "cat": "submitted", "ph": "X", "dur": 1, **place, "args": _asked(each)}
        if each.req_no in arrows:
            yield {"name": "task", "cat": _ARROWS, "ph": "s", "id": arrows[each.req_no], **place}


def _asked(run: RunRecord) -> Plain:
    spec = run.spec
    if spec is None:
        return {}
    return {
        "type": spec.task_type.value,
        "method": spec.method,
        "model": spec.model,
        "group": spec.group,
        "priority": spec.priority,
        "gpus": spec.demand.gpus * spec.members,
    }


class _Tracks:
    """The tracks of one node.

    Each GPU has as many lanes as Pods were on it at once, and each Pod as many rows as tasks ran in it at once.
    """

    def __init__(
        self, pid: int, gpus: dict[str, str], arrows: dict[str, int], last: dict[str, tuple[int, int]]
    ) -> None:
        self._pid = pid
        self._arrows = arrows
        self._last = last
        """Task -> (Pod, attempt) of its last run, where its arrow ends."""
        self._order = {uuid: number for number, uuid in enumerate(gpus)}
        self._models = gpus
        self._free: dict[str, list[Micros]] = {}
        """GPU -> when each of its lanes is free again."""
        self._tids: dict[tuple[str, int, int], int] = {}
        self._slices: dict[int, list[Plain]] = {}

    def draw(self, pod: PodRecord, runs: Sequence[RunRecord], began: Micros) -> None:
        """Draw a Pod, its load and its runs on each of its GPUs; Pods come in the order of their creation."""
        rows = _rows(runs)
        for number, uuid in enumerate([grant.uuid for grant in pod.grants] or [""]):
            lane = self._lane(uuid, pod)
            top = self._track(uuid, lane, 0)
            top.append(
                _slice(
                    f"Pod {pod.pod} {pod.model or pod.method}",
                    "pod",
                    pod.created_at,
                    pod.ended_at,
                    began,
                    self._about(pod),
                )
            )
            if pod.ready_at is not None and pod.ready_at > pod.created_at:
                top.append(_slice("load", "load", pod.created_at, pod.ready_at, began, {"model": pod.model}))
            for row, chosen in enumerate(rows):
                track = self._track(uuid, lane, row)
                for run in chosen:
                    start = run.started_at or run.ordered_at
                    track.append(_slice(run.req_no, "task", start, run.ended_at, began, _told(run)))
                    if number == 0 and run.rank == 0 and run.req_no in self._arrows:
                        track.append(self._arrow(run, start - began))

    def _arrow(self, run: RunRecord, at: Micros) -> Plain:
        ends = self._last.get(run.req_no) == (run.pod, run.attempt)
        arrow = {"name": "task", "cat": _ARROWS, "ph": "f" if ends else "t", "id": self._arrows[run.req_no], "ts": at}
        return {**arrow, "bp": "e"} if ends else arrow

    def events(self) -> Iterator[Plain]:
        """Yield the tracks' names and then their slices in order of time, the outer before the inner."""
        for (uuid, lane, row), tid in self._tids.items():
            model = self._models.get(uuid, "")
            name = f"{uuid} ({model})" if model else uuid or "no GPU"
            name += f" lane {lane + 1}" if lane else ""
            name += f" slot {row + 1}" if row else ""
            place = {"pid": self._pid, "tid": tid, "ts": 0}
            yield {"name": "thread_name", "ph": "M", **place, "args": {"name": name}}
            yield {"name": "thread_sort_index", "ph": "M", **place, "args": {"sort_index": tid}}
        for tid, slices in sorted(self._slices.items()):
            for each in sorted(slices, key=lambda one: (one["ts"], -one.get("dur", -1))):
                yield {**each, "pid": self._pid, "tid": tid}

    def _lane(self, uuid: str, pod: PodRecord) -> int:
        free = self._free.setdefault(uuid, [])
        for lane, since in enumerate(free):
            if since <= pod.created_at:
                free[lane] = pod.ended_at
                return lane
        free.append(pod.ended_at)
        return len(free) - 1

    def _track(self, uuid: str, lane: int, row: int) -> list[Plain]:
        key = (uuid, lane, row)
        tid = self._tids.get(key)
        if tid is None:
            base = self._order.setdefault(uuid, len(self._order))
            tid = self._tids[key] = base * 10_000 + min(lane, 99) * 100 + min(row, 99) + 1
        return self._slices.setdefault(tid, [])

    def _about(self, pod: PodRecord) -> Plain:
        return {
            "method": pod.method,
            "model": pod.model,
            "slots": pod.slots,
            "gpus": sum(grant.share for grant in pod.grants) / WHOLE_GPU,
            "runs": pod.runs,
            "went": pod.why,
        }


def _rows(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Spread runs over as few rows as keep them from overlapping."""
    rows: list[list[RunRecord]] = []
    for run in runs:
        start = run.started_at or run.ordered_at
        for row in rows:
            if row[-1].ended_at <= start:
                row.append(run)
                break
        else:
            rows.append([run])
    return rows


def _slice(name: str, kind: str, start: Micros, end: Micros, began: Micros, args: Plain) -> Plain:
    return {"name": name, "cat": kind, "ph": "X", "ts": start - began, "dur": max(0, end - start), "args": args}


def _told(run: RunRecord) -> Plain:
    told = {
        **_asked(run),
        "attempt": run.attempt,
        "outcome": run.outcome,
        "waited_s": ((run.started_at or run.ordered_at) - run.submitted_at) / 1e6,
    }
    if run.rank:
        told["rank"] = run.rank
    if run.reason:
        told["reason"] = run.reason
    if run.spec is not None:
        told["tenant"] = run.spec.tenant
    return told
