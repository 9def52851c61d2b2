"""What tests of real Pods stand on: a host with drill methods, what it has reported, and what must not be left behind."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

from executors.dfs import ObjectFileStore
from executors.pods import LocalPodHost
from executors.ports import (
    PodDown,
    PodOrder,
    PodReport,
    PodUp,
)

SECOND_US = 1_000_000
GENEROUS_S = 60.0
DRILLS = {
    name: f"drill_methods:{name}"
    for name in (
        "WhoAmI",
        "Hog",
        "Stubborn",
        "Talker",
        "Litter",
        "Writer",
        "Stepper",
        "NoModel",
        "SlowToLoad",
        "Broken",
    )
}
Report = TypeVar("Report", bound=PodReport)


class Bench:
    """A Pod host, and what it has reported so far."""

    def __init__(self, host: LocalPodHost, store: ObjectFileStore, work_dir: Path) -> None:
        self.host = host
        self.store = store
        self.work_dir = work_dir
        self.seen: list[PodReport] = []

    def until(self, done: Callable[[Sequence[PodReport]], bool], why: str) -> None:
        """Serve the host until what it reported satisfies the test."""
        deadline = time.monotonic() + GENEROUS_S
        while not done(self.seen):
            assert time.monotonic() < deadline, f"waited in vain for {why}; seen: {self.seen}"
            poller = select.poll()
            for descriptor in self.host.filenos():
                poller.register(descriptor, select.POLLIN)
            poller.poll(20)
            self.seen.extend(self.host.take())

    def expect(self, kind: type[Report], count: int = 1) -> Report:
        """Wait for the next report of a kind; returns the last of `count`."""
        self.until(lambda seen: sum(isinstance(report, kind) for report in seen) >= count, f"{count} x {kind.__name__}")
        return [report for report in self.seen if isinstance(report, kind)][count - 1]

    def up(self, method: str, pod: int = 1, **order: Any) -> None:
        """Create a Pod and wait until it is up."""
        self.host.create(PodOrder(pod, method, **order))
        self.until(
            lambda seen: any(isinstance(report, PodUp | PodDown) and report.pod == pod for report in seen), f"Pod {pod}"
        )
        assert any(isinstance(report, PodUp) and report.pod == pod for report in self.seen), self.seen


def nurseries() -> set[int]:
    """Nurseries below this process, others' included (a platform that other tests of the worker share)."""
    return {child.pid for child in psutil.Process().children(recursive=True) if is_nursery(child)}


def is_nursery(process: psutil.Process) -> bool:
    try:
        return "executors.pod_nursery" in process.cmdline()
    except psutil.Error:
        return False


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kinds(reports: Sequence[PodReport]) -> list[str]:
    return [type(report).__name__ for report in reports]
