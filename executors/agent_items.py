"""Between the Pod host's words and the protocol's: orders one way, reports the other, with their sizes kept in bounds."""

from __future__ import annotations

import json

from engine.protocol import messages as m
from engine.tasks import FailureCause
from executors import ports

DETAIL_CHARS = 4096
RESULT_BYTES = 48 * 1024
NOTE_CHARS = 200


def pod_order(order: m.CreatePod) -> ports.PodOrder:
    """Return an order as the Pod host takes it."""
    return ports.PodOrder(
        order.pod,
        order.method,
        order.model,
        order.gpus,
        order.gpu_share,
        order.gpu_memory_cap_bytes,
        order.cpu_milli,
        order.memory_bytes,
        order.slots,
    )


def item_of(report: ports.PodReport) -> m.Report:
    """Return a host's report as an item of the stream; progress is none."""
    match report:
        case ports.PodUp():
            return m.PodUp(report.pod, report.load_us)
        case ports.PodDown():
            return m.PodDown(report.pod, report.cause.value, tail(report.detail))
        case ports.AttemptStarted():
            return m.Started(report.req_no, report.attempt, report.rank)
        case ports.AttemptFinished():
            return _done(report)
        case ports.AttemptFailed():
            return m.Failed(
                report.req_no,
                report.attempt,
                report.rank,
                report.cause.value,
                tail(report.detail),
                report.peak_gpu_memory_bytes,
            )
        case ports.AttemptStopped():
            return m.Stopped(report.req_no, report.attempt, report.rank, report.checkpoint)
        case ports.AttemptProgressed():
            raise AssertionError("progress is no item of the stream")


def progress_of(report: ports.AttemptProgressed) -> m.Progress:
    """Return an attempt's progress as the machine takes it."""
    return m.Progress(
        session=0,
        req_no=report.req_no,
        attempt=report.attempt,
        rank=report.rank,
        done=report.done,
        total=report.total,
        checkpoint=report.checkpoint,
        note=report.note[:NOTE_CHARS],
        preview=report.preview,
    )


def _done(report: ports.AttemptFinished) -> m.Done | m.Failed:
    try:
        result = json.dumps(report.result, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        detail = f"the result's description is no JSON: {error}"
        return m.Failed(report.req_no, report.attempt, report.rank, FailureCause.BAD_INPUT, detail)
    if len(result) > RESULT_BYTES:
        detail = f"the result's description has {len(result)} characters, the limit is {RESULT_BYTES}; put content into files"
        return m.Failed(report.req_no, report.attempt, report.rank, FailureCause.BAD_INPUT, detail)
    return m.Done(
        report.req_no,
        report.attempt,
        report.rank,
        result,
        report.run_us,
        report.peak_gpu_memory_bytes,
        report.alone_us,
        report.company_permille,
        report.peak_host_memory_bytes,
    )


def tail(text: str) -> str:
    """Return the end of a long text, which says why."""
    return text[-DETAIL_CHARS:]
