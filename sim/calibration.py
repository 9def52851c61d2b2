"""Measures real executors by their journal, in the simulator's terms, and simulates a workload on what was measured.

The run times come from the predictor that learned from the same journal; what is between them - orders that travel, Pods that
start, results that are written down - is measured here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from engine.commands import CreatePod, DeletePod, StartTask
from engine.events import NodeJoined, PodStarted, PodStopped, TaskFinished, TaskStarted, TaskSubmitted
from engine.resources import NodeSpec
from engine.tasks import Micros, TaskSpec, TaskType
from predictors.forecaster import OnlineForecaster
from sim.draws import choice, unit
from sim.from_journal import StepRecord
from sim.hardware import GPU_MODELS, Hardware
from sim.workload import Arrival, Truth, Workload

PodKind = tuple[str, str]
"""(method, model)."""
TaskKind = tuple[str, TaskType]
"""(method, type)."""
AttemptKey = tuple[str, int, int]
"""(reqNo, attempt, rank)."""
_ENOUGH = 20
"""Run times that are scatter enough to draw from: of one kind, else of its method, else the predictor says how they scatter."""
_POD_STOP_US = 300_000
"""Where no Pod was deleted."""
_POD_START_US = 1_500_000
"""Where no Pod was created."""
_LATER = 3
"""First runs in Pods are told from later ones where there are so many times as many of these."""


class CalibrationError(ValueError):
    """A journal holds too little to measure executors by; says what is missing."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a journal says about its executors. Spans in microseconds."""

    dispatch_us: Micros
    """Half the mean time from an order to start until the report of the start."""
    starts_us: Mapping[PodKind, tuple[Micros, ...]]
    """Every Pod's time from its order to the report that it is ready, model load included."""
    pod_stop_us: Micros
    report_us: tuple[Micros, ...]
    """By attempt: how much later its end was reported after its start than it ran, by its own clock."""
    peak_bytes: Mapping[str, int]
    """By method: the highest peak of GPU memory."""
    attempts: int
    """Finished attempts that were measured."""

    def start_us(self, method: str, model: str) -> Micros | None:
        """Return the mean time that Pods of a kind took to start; of the method where the model was never seen."""
        known = self.starts_us.get((method, model))
        if known is None:
            known = tuple(each for (kind, _), times in self.starts_us.items() if kind == method for each in times)
        return round(fmean(known)) if known else None

    def to_json(self) -> dict[str, object]:
        """Return plain values, in milliseconds."""
        return {
            "dispatch_ms": self.dispatch_us / 1000,
            "pod_start_ms": {
                "/".join(filter(None, kind)): fmean(times) / 1000 for kind, times in self.starts_us.items()
            },
            "pod_starts": sum(map(len, self.starts_us.values())),
            "pod_stop_ms": self.pod_stop_us / 1000,
            "report_ms": fmean(self.report_us) / 1000 if self.report_us else 0.0,
            "attempts": self.attempts,
        }


def measure(records: Iterable[StepRecord]) -> Calibration:
    """Read a journal and return what it says about its executors; raises CalibrationError when no attempt finished in it."""
    created: dict[int, tuple[Micros, PodKind]] = {}
    deleted: dict[int, Micros] = {}
    ordered: dict[tuple[str, int, int], Micros] = {}
    began: dict[tuple[str, int, int], Micros] = {}
    methods: dict[str, str] = {}
    starts: dict[PodKind, list[Micros]] = {}
    peaks: dict[str, int] = {}
    travel: list[Micros] = []
    stops: list[Micros] = []
    late: list[Micros] = []
    for record in records:
        now = record.now
        for event in record.events:
            match event:
                case TaskSubmitted(task):
                    methods[task.req_no] = task.method
                case PodStarted(pod) if pod in created:
                    at, kind = created.pop(pod)
                    starts.setdefault(kind, []).append(now - at)
                case PodStopped(pod):
                    created.pop(pod, None)
                    if pod in deleted:
                        stops.append(now - deleted.pop(pod))
                case TaskStarted(req_no, attempt, rank):
                    key = (req_no, attempt, rank)
                    if key in ordered:
                        travel.append(now - ordered.pop(key))
                        began[key] = now
                case TaskFinished(req_no, attempt, rank):
                    key = (req_no, attempt, rank)
                    if key in began and event.run_us:
                        late.append(now - began.pop(key) - event.run_us)
                    method = methods.get(req_no, "")
                    peaks[method] = max(peaks.get(method, 0), event.peak_gpu_memory_bytes)
                case _:
                    pass
        for command in record.commands:
            match command:
                case CreatePod(pod, _, method, model):
                    created[pod] = (now, (method, model))
                case DeletePod(pod):
                    deleted[pod] = now
                case StartTask(req_no, attempt, _, _, rank):
                    ordered[req_no, attempt, rank] = now
                case _:
                    pass
    if not travel:
        raise CalibrationError("the journal holds no attempt that was started; let the platform run some tasks first")
    return Calibration(
        dispatch_us=round(fmean(travel) / 2),
        starts_us={kind: tuple(times) for kind, times in sorted(starts.items())},
        pod_stop_us=round(fmean(stops)) if stops else _POD_STOP_US,
        report_us=tuple(late),
        peak_bytes=dict(sorted(peaks.items())),
        attempts=len(travel),
    )


def measured_hardware(calibration: Calibration, nodes: Sequence[NodeSpec]) -> Hardware:
    """Return a cluster of these nodes with the measured spans; GPU models that nobody knows run as fast as the first one."""
    models = [gpu.model for node in nodes for gpu in node.gpus] or ["cpu"]
    known = dict(GPU_MODELS)
    first = known.get(models[0], known["cpu"])
    for name in models:
        known.setdefault(name, replace(first, name=name))
    return Hardware(
        tuple(nodes),
        reference_gpu=models[0],
        pod_start_us=0,
        pod_starts=MeasuredStarts(calibration),
        dispatch_us=calibration.dispatch_us,
        pod_stop_us=calibration.pod_stop_us,
        gpu_models=known,
    )


def shared_as_measured(hardware: Hardware, records: Iterable[StepRecord]) -> Hardware:
    """Return the cluster with company in a Pod costing a run what the journal's Pods measured; as it is where none shared steps."""
    tasks: dict[str, TaskSpec] = {}
    excess = company = 0.0
    shared: TaskSpec | None = None
    for record in records:
        for event in record.events:
            if isinstance(event, TaskSubmitted):
                tasks[event.task.req_no] = event.task
            elif isinstance(event, TaskFinished) and event.company_permille and event.alone_us > 0:
                excess += max(0.0, event.run_us / event.alone_us - 1.0)
                company += event.company_permille / 1000
                shared = tasks.get(event.req_no, shared)
    if shared is None or not company:
        return hardware
    row, _ = hardware.batch_row(shared, True)
    whole = hardware.stretches(hardware.reference_gpu, [row, row])[0] - 1.0
    return replace(hardware, recorded_gpu_share=min(1.0, excess / company / whole)) if whole > 0 else hardware


@dataclass(frozen=True, slots=True)
class MeasuredStarts:
    """Pods start as those of a measured journal did: one of its times, drawn; a `sim.hardware.PodStarts`."""

    calibration: Calibration

    def draw(self, method: str, model: str, seed: int, nth: int) -> Micros:
        """Return how long a Pod takes from when its order has arrived until its report is there."""
        times = self.calibration.starts_us.get((method, model))
        if times:
            start_us = times[choice(len(times), seed, "start", method, model, nth)]
        else:
            start_us = self.calibration.start_us(method, model) or _POD_START_US
        return max(0, start_us - self.calibration.dispatch_us)


def learned(records: Iterable[StepRecord]) -> OnlineForecaster:
    """Return a forecaster that learned from a journal as the one of the platform did, but not from first runs in Pods.

    These take longer than all that follow, and a short journal holds more of them than a long one (`first_runs` measures them). Of
    methods and models that have hardly anything else, they are learned from.
    """
    records = list(records)
    first = _first_attempts(records)
    forecaster = OnlineForecaster()
    for record in records:
        events = [
            event
            for event in record.events
            if not isinstance(event, TaskStarted | TaskFinished)
            or (event.req_no, event.attempt, event.rank) not in first
        ]
        forecaster.recall(record.now, events, record.commands)
    return forecaster


def first_runs(
    records: Iterable[StepRecord], forecaster: OnlineForecaster, gpu_model: str
) -> dict[PodKind, tuple[Micros, ...]]:
    """Return by kind of Pod, for each Pod, how much longer its first run took than the forecaster expects of a later one."""
    records = list(records)
    first = _first_attempts(records)
    found: dict[PodKind, list[Micros]] = {}
    for _, key, run_us, usual_us in _runs(records, forecaster, gpu_model):
        if key in first:
            found.setdefault(first[key], []).append(max(0, run_us - usual_us))
    return {kind: tuple(spans) for kind, spans in sorted(found.items())}


def run_ratios(
    records: Iterable[StepRecord], forecaster: OnlineForecaster, gpu_model: str
) -> dict[TaskKind, tuple[float, ...]]:
    """Return by kind of task the run times over what the forecaster, now that it knows them all, expects; no first runs in Pods.

    What it expected when they were submitted scatters more: in a short journal many tasks come before the first has ended.
    """
    records = list(records)
    first = _first_attempts(records)
    found: dict[TaskKind, list[float]] = {}
    for task, key, run_us, usual_us in _runs(records, forecaster, gpu_model):
        if key not in first:
            found.setdefault((task.method, task.task_type), []).append(run_us / max(1, usual_us))
    whole: dict[str, list[float]] = {}
    for (method, _), ratios in sorted(found.items()):
        whole.setdefault(method, []).extend(ratios)
    return {
        kind: tuple(ratios if len(ratios) >= _ENOUGH else whole[kind[0]])
        for kind, ratios in sorted(found.items())
        if len(whole[kind[0]]) >= _ENOUGH
    }


def _runs(
    records: Sequence[StepRecord], forecaster: OnlineForecaster, gpu_model: str
) -> Iterator[tuple[TaskSpec, AttemptKey, Micros, Micros]]:
    """Yield each finished attempt's task, key, run time alone in its Pod and the median that the forecaster expects.

    What company costs in a Pod of several slots is the simulated world's to add.
    """
    tasks: dict[str, TaskSpec] = {}
    now = forecaster.predictor.watermark_us
    for record in records:
        for event in record.events:
            if isinstance(event, TaskSubmitted):
                tasks[event.task.req_no] = event.task
            elif isinstance(event, TaskFinished) and event.run_us and event.req_no in tasks:
                task = tasks[event.req_no]
                usual_us = forecaster.predictor.at(forecaster.predict(task, now, gpu_model), (0.5,))[0]
                alone_us = min(event.run_us, event.alone_us or event.run_us)
                yield task, (event.req_no, event.attempt, event.rank), alone_us, usual_us


def _first_attempts(records: Sequence[StepRecord]) -> dict[AttemptKey, PodKind]:
    """Return the attempts that were the first of their Pods, of those kinds of Pods that ran several times as many others."""
    fresh: dict[int, PodKind] = {}
    kinds: dict[int, PodKind] = {}
    first: dict[AttemptKey, PodKind] = {}
    later: dict[PodKind, int] = {}
    for record in records:
        for command in record.commands:
            match command:
                case CreatePod(pod, _, method, model):
                    fresh[pod] = kinds[pod] = (method, model)
                case StartTask(req_no, attempt, pod, _, rank) if pod in fresh:
                    first[req_no, attempt, rank] = fresh.pop(pod)
                case StartTask(pod=pod) if pod in kinds:
                    later[kinds[pod]] = later.get(kinds[pod], 0) + 1
                case _:
                    pass
    firsts = Counter(first.values())
    return {key: kind for key, kind in first.items() if later.get(kind, 0) >= _LATER * firsts[kind]}


@dataclass(frozen=True, slots=True)
class MeasuredFirstRuns:
    """First runs in Pods take longer as those of a measured journal did: one of its spans, drawn; a `sim.hardware.FirstRuns`."""

    spans_us: Mapping[PodKind, tuple[Micros, ...]]

    def draw(self, method: str, model: str, seed: int, pod: int) -> Micros:
        """Return how much longer the first run in this Pod takes; 0 for kinds that were not measured."""
        spans = self.spans_us.get((method, model))
        return spans[choice(len(spans), seed, "first run", method, model, pod)] if spans else 0


@dataclass(frozen=True, slots=True)
class RunTimes:
    """Draws run times from what a predictor learned, with the measured time of reporting on top."""

    forecaster: OnlineForecaster
    calibration: Calibration
    gpu_model: str
    ratios: Mapping[TaskKind, tuple[float, ...]] = field(default_factory=dict)
    """How run times scatter around the predicted median (`run_ratios`); where it is not given, as the predictor says."""

    def truth(self, task: TaskSpec, now: Micros, seed: int) -> Truth:
        """Return what may happen to a task: a draw from its predicted distribution, the same for the same seed."""
        prediction = self.forecaster.predict(task, now, self.gpu_model)
        ratios = self.ratios.get((task.method, task.task_type))
        if ratios:
            usual_us = self.forecaster.predictor.at(prediction, (0.5,))[0]
            run_us = round(usual_us * ratios[choice(len(ratios), seed, "run", task.req_no)])
        else:
            run_us = self.forecaster.predictor.at(prediction, (unit(seed, "run", task.req_no),))[0]
        late = self.calibration.report_us
        if late:
            run_us += late[choice(len(late), seed, "report", task.req_no)]
        return Truth(max(1, run_us), peak_gpu_memory_bytes=self.calibration.peak_bytes.get(task.method, 0) or 1)

    def workload(self, submitted: Sequence[tuple[Micros, TaskSpec]], seed: int) -> Workload:
        """Return tasks that arrive at these times, with run times drawn for them."""
        now = self.forecaster.predictor.watermark_us
        return Workload("predicted", tuple(Arrival(at, task, self.truth(task, now, seed)) for at, task in submitted))


def nodes_of(records: Iterable[StepRecord]) -> tuple[NodeSpec, ...]:
    """Return the nodes that joined in a journal, as they joined last, in the order in which they came first."""
    found: dict[str, NodeSpec] = {}
    for record in records:
        for event in record.events:
            if isinstance(event, NodeJoined):
                found[event.node.name] = event.node
    return tuple(found.values())
