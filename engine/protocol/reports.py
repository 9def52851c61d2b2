"""What a node's report means to the engine, given what was ordered there."""

from __future__ import annotations

from engine import events as e
from engine.protocol import messages as m
from engine.protocol.link import Link
from engine.tasks import FailureCause


def event_of(link: Link, item: m.Report) -> e.Event | None:
    """Return what a report means to the engine; None when what it speaks of has already ended."""
    match item:
        case m.Started():
            if m.attempt_key(item) in link.attempts:
                return e.TaskStarted(item.req_no, item.attempt, item.rank)
        case m.Done():
            if link.attempts.pop(m.attempt_key(item), None) is not None:
                return e.TaskFinished(
                    item.req_no,
                    item.attempt,
                    item.rank,
                    item.result,
                    item.run_us,
                    item.peak_gpu_memory_bytes,
                    item.alone_us,
                    item.company_permille,
                    item.peak_host_memory_bytes,
                )
        case m.Failed():
            if link.attempts.pop(m.attempt_key(item), None) is not None:
                cause = _cause(item.cause)
                return e.TaskFailed(
                    item.req_no, item.attempt, cause, item.rank, item.detail, item.peak_gpu_memory_bytes
                )
        case m.Stopped():
            if link.attempts.pop(m.attempt_key(item), None) is not None:
                return e.TaskStopped(item.req_no, item.attempt, item.rank, item.checkpoint)
        case m.PodUp():
            pod = link.pods.get(item.pod)
            if pod is not None and not pod.started:
                pod.started = True
                return e.PodStarted(item.pod)
        case m.PodDown():
            if link.forget_pod(item.pod):
                return e.PodStopped(item.pod, _cause(item.cause), item.detail)
        case m.Devices():
            return e.NodeReported(
                link.name, item.gpus, item.memory_used, item.busy_permille, item.resident, item.cache_counts
            )
        case m.UnknownItem():
            pass
    return None


def _cause(text: str) -> FailureCause:
    """Read a cause; one that a newer agent invented counts as a crash."""
    try:
        return FailureCause(text)
    except ValueError:
        return FailureCause.CRASHED
