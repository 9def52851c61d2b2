"""What the host of Pods knows of one: from its order to its grave, what it may take, and what its messages and its end mean."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.resources import WHOLE_GPU
from engine.tasks import FailureCause
from executors.limits import Box, PodLimits
from executors.pod_main import Key
from executors.pod_nursery import Nursery
from executors.pod_wire import Channel
from executors.ports import (
    AttemptFailed,
    AttemptFinished,
    AttemptProgressed,
    AttemptStarted,
    AttemptStopped,
    PodOrder,
    PodReport,
)


@dataclass(slots=True)
class HostedPod:
    """A Pod as the host knows it, from order to grave."""

    order: PodOrder
    nursery: Nursery
    channel: Channel
    box: Box
    limits: PodLimits
    directory: Path
    kill_at: float | None
    """When to kill it: the limit on loading, or a grace."""
    why: FailureCause = FailureCause.TIMED_OUT
    """Cause to report when `kill_at` comes."""
    why_detail: str = "its model was not loaded in time"
    up: bool = False
    ordered: bool = False
    """Its end is our order, not its failure."""
    pid: int = 0
    killed: bool = False
    told: tuple[FailureCause, str] | None = None
    """What the Pod itself said about its end."""
    begun: set[Key] = field(default_factory=set)
    """Attempts that run; others wait for their turn."""
    attempts: dict[Key, float | None] = field(default_factory=dict)
    """Attempts it has -> when the grace of a stop ends; None while no stop is ordered."""


def limits_of(order: PodOrder, device: str) -> PodLimits:
    """Return what a Pod may take of the host.

    On a CPU slot the model lies in the host's memory, so that what the Pod was granted on the device counts there too.
    """
    memory_bytes = order.memory_bytes
    if memory_bytes and device == "cpu":
        memory_bytes += order.gpu_memory_cap_bytes * len(order.gpus)
    return PodLimits(memory_bytes, order.cpu_milli)


def gpu_cap_bytes(order: PodOrder) -> int:
    """Return what a Pod may allocate on each of its GPUs; 0 where that is all there is.

    Nobody else is on whole GPUs, so that there is nobody to protect, and what was asked for may have been too little.
    """
    return order.gpu_memory_cap_bytes if order.gpu_share < WHOLE_GPU else 0


def attempt_report(pod: HostedPod, message: Mapping[str, Any]) -> PodReport:
    """Return what a Pod's message says of an attempt; one that has ended is forgotten. Raises ValueError for an unknown message."""
    req_no, attempt, rank = message["key"]
    op = message["op"]
    if op in ("finished", "failed", "stopped"):
        pod.attempts.pop((req_no, attempt, rank), None)
    match op:
        case "started":
            return AttemptStarted(req_no, attempt, rank)
        case "progress":
            return AttemptProgressed(
                req_no,
                attempt,
                message["done"],
                message["total"],
                message["note"],
                rank,
                message.get("checkpoint", ""),
                message.get("preview", ""),
            )
        case "finished":
            return AttemptFinished(
                req_no,
                attempt,
                message["result"],
                message["run_us"],
                message["peak"],
                rank,
                message.get("alone_us", 0),
                message.get("company_permille", 0),
                message.get("host_peak", 0),
            )
        case "failed":
            return AttemptFailed(
                req_no, attempt, FailureCause(message["cause"]), message["detail"], message["peak"], rank
            )
        case "stopped":
            return AttemptStopped(req_no, attempt, message["checkpoint"], rank)
        case _:
            raise ValueError(f"Pod {pod.order.pod} sent the unknown message {op!r}")


def cause_of_death(pod: HostedPod, status: int | None) -> tuple[FailureCause, str]:
    """Return why a Pod ended, and in words; `status` is its exit status, None when nobody knows it."""
    if pod.ordered:
        return FailureCause.POD_LOST, pod.why_detail if pod.why is FailureCause.POD_LOST else "deleted, as ordered"
    kills = pod.box.out_of_memory_kills()
    if kills:
        return (
            FailureCause.OUT_OF_MEMORY,
            f"killed by the kernel: over its limit of {pod.limits.memory_bytes} bytes of memory",
        )
    if pod.told is not None:
        return pod.told
    if pod.killed:
        return pod.why, pod.why_detail
    if status is None:
        return FailureCause.CRASHED, "ended, nobody knows how"
    if status < 0:
        return FailureCause.CRASHED, f"killed by {signal.Signals(-status).name}"
    return FailureCause.CRASHED, f"ended by itself with exit status {status}"
