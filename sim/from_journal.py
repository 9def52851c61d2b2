"""Reads a journal, simulated or from production: as figures, or as a workload that can be run again under another profile."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from engine.commands import Command
from engine.events import Event, TaskCancelRequested, TaskFailed, TaskFinished, TaskSubmitted
from engine.tasks import NOT_RETRYABLE, Micros
from sim.metrics import Metrics
from sim.summary import Summary
from sim.workload import Arrival, Truth, Workload


class StepRecord(Protocol):
    """One step as a journal keeps it (`engine.journal.Record`)."""

    @property
    def now(self) -> Micros:
        """When the step was made."""
        ...

    @property
    def events(self) -> Sequence[Event]:
        """What it was told."""
        ...

    @property
    def commands(self) -> Sequence[Command]:
        """What it ordered."""
        ...


def summarise_records(records: Iterable[StepRecord]) -> Summary:
    """Return the figures of a whole journal, read once from front to back."""
    metrics = Metrics()
    for record in records:
        metrics(record.now, record.events, record.commands)
    return metrics.summary()


def workload_from_records(records: Iterable[StepRecord], name: str = "journal") -> Workload:
    """Return what the customers of a journal asked for, as a workload; time counts from its first record.

    True run times are those of the attempts that finished. Tasks without one have none: the hardware model works it out; those that
    failed for good fail again. Times hold on the GPUs that they ran on, so simulate the same GPU model.
    """
    began: Micros | None = None
    submitted: dict[str, tuple[Micros, TaskSubmitted]] = {}
    truths: dict[str, Truth] = {}
    cancelled: dict[str, Micros] = {}
    for record in records:
        began = record.now if began is None else began
        for event in record.events:
            match event:
                case TaskSubmitted(task):
                    submitted.setdefault(task.req_no, (record.now - began, event))
                case TaskFinished(req_no) if req_no in submitted and event.run_us:
                    # The simulated Pod makes company cost its time again.
                    alone_us = event.alone_us or event.run_us
                    truths[req_no] = Truth(alone_us, peak_gpu_memory_bytes=event.peak_gpu_memory_bytes)
                case TaskFailed(req_no, _, cause) if req_no in submitted and cause in NOT_RETRYABLE:
                    truths[req_no] = Truth(fails_with=cause)
                case TaskCancelRequested(req_no) if req_no in submitted:
                    cancelled.setdefault(req_no, record.now - began - submitted[req_no][0])
                case _:
                    pass
    arrivals = [_arrival(at, event, truths, cancelled, began or 0) for at, event in submitted.values()]
    known = sum(req_no in truths for req_no in submitted)
    return Workload(name, tuple(arrivals), (("tasks", len(arrivals)), ("with a known end", known)))


def _arrival(
    at: Micros, event: TaskSubmitted, truths: dict[str, Truth], cancelled: dict[str, Micros], began: Micros
) -> Arrival:
    task = event.task
    if task.start_deadline is not None:
        task = replace(task, start_deadline=task.start_deadline - began)
    truth = truths.get(task.req_no, Truth())
    return Arrival(at, task, replace(truth, cancel_after_us=cancelled.get(task.req_no)))
