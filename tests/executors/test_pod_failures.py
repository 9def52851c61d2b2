"""Failures of real Pods are told apart - a hung step, a crash, numbers that are none, a lost device - with the log's tail."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pod_bench
import psutil
import pytest

from engine.tasks import FailureCause
from executors.devices.file import FilePlugin
from executors.dfs import open_store
from executors.pod_watch import Patience
from executors.pods import LocalPodHost
from executors.ports import AttemptFailed, AttemptFinished, AttemptProgressed, PodDown, PodOrder, PodUp

DRILLS = {
    name: f"failure_drills:{name}"
    for name in ("Freezes", "StoppedShort", "Unpaced", "Segfaults", "Raises", "ExitsWith")
}


class Bench(pod_bench.Bench):
    """A Pod host on GPUs of a file, and what it has reported so far."""

    def __init__(self, root: Path, patience: Patience) -> None:
        self.gpus = root / "gpus.json"
        self.have("gpu-a", "gpu-b")
        store = open_store(f"file://{root}/files")
        host = LocalPodHost(FilePlugin(self.gpus), store, root / "work", methods=DRILLS, patience=patience)
        super().__init__(host, store, root / "work")

    def have(self, *uuids: str, ill: Sequence[str] = ()) -> None:
        """Edit the inventory while the host runs."""
        gpus = [{"uuid": u, "model": "a100", "memory_bytes": 1 << 30, "healthy": u not in ill} for u in uuids]
        scratch = self.gpus.with_suffix(".new")
        scratch.write_text(json.dumps({"gpus": gpus}))
        scratch.replace(self.gpus)

    def run(self, method: str, gpu: str = "gpu-a", **parameters: Any) -> None:
        self.host.create(PodOrder(1, method, gpus=(gpu,)))
        self.expect(PodUp)
        self.host.start(1, "r", 1, parameters)


@pytest.fixture
def make_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Bench]]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    made: list[Bench] = []

    def make(**patience: float) -> Bench:
        made.append(Bench(tmp_path, Patience(**patience)))
        return made[-1]

    yield make
    for bench in made:
        bench.host.close()


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    return make_bench()


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_hung_step_is_killed_and_tells_where_it_stood(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(first_s=30.0, floor_s=0.3, factor=2.0)
    bench.run("Freezes", steps=8, hang=True)
    down = bench.expect(PodDown)
    assert (down.cause, down.ordered) == (FailureCause.HUNG, False)
    assert down.detail.startswith("no step for")
    assert "the longest of the last" in down.detail
    assert "never_returns" in down.detail, "the log's tail has the stack of the thread that hangs"
    assert bench.host.pods() == []


def test_a_stopped_process_hangs_as_well(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(first_s=30.0, floor_s=0.3, factor=2.0)
    bench.run("StoppedShort", steps=8)
    assert bench.expect(PodDown).cause is FailureCause.HUNG


def test_while_steps_are_not_known_the_first_may_take_longer(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(first_s=0.5, floor_s=0.05)
    bench.run("Freezes", steps=0, hang=True)
    down = bench.expect(PodDown)
    assert down.cause is FailureCause.HUNG
    assert "none has been seen before" in down.detail


def test_another_pod_of_the_kind_profits_from_what_was_learned(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(first_s=3600.0, floor_s=0.3, factor=2.0)
    bench.run("Freezes", steps=8, hang=False)
    bench.expect(AttemptFinished)
    bench.host.create(PodOrder(2, "Freezes", gpus=("gpu-b",)))
    bench.expect(PodUp, 2)
    bench.host.start(2, "s", 1, {"steps": 0, "hang": True})
    down = bench.expect(PodDown)
    assert (down.pod, down.cause) == (2, FailureCause.HUNG)
    assert bench.host.pods() == [1], "only the Pod that hangs is killed"


def test_a_pod_in_which_nothing_runs_does_not_hang(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(first_s=0.2, floor_s=0.2)
    bench.run("Freezes", steps=8, hang=False)
    bench.expect(AttemptFinished)
    assert bench.host.next_deadline_us() is None


def test_a_method_that_promises_no_steps_is_left_alone(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(first_s=0.01, floor_s=0.01)
    bench.run("Unpaced", steps=6)
    bench.expect(AttemptProgressed)
    assert bench.host.next_deadline_us() is None
    bench.host.stop("r", 1, 30_000_000)
    bench.expect(AttemptFinished)
    assert not any(isinstance(report, PodDown) for report in bench.seen)


def test_a_stop_is_kept_to_although_the_pod_hangs(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(first_s=3600.0)
    bench.run("Freezes", steps=1, hang=True)
    bench.expect(AttemptProgressed)
    bench.host.stop("r", 1, 100_000)
    down = bench.expect(PodDown)
    assert (down.ordered, down.cause) == (True, FailureCause.POD_LOST)


def test_a_crash_of_native_code_names_the_signal_and_where_python_stood(bench: Bench) -> None:
    bench.run("Segfaults")
    down = bench.expect(PodDown)
    assert down.cause is FailureCause.CRASHED
    assert "SIGSEGV" in down.detail
    assert "failure_drills.py" in down.detail, "the log's tail has the line of Python"


@pytest.mark.parametrize("status", [0, 7])
def test_an_exit_that_nobody_ordered_is_a_crash_with_its_status(bench: Bench, status: int) -> None:
    bench.run("ExitsWith", steps=1, status=status)
    down = bench.expect(PodDown)
    assert down.cause is FailureCause.CRASHED
    assert f"exit status {status}" in down.detail


def test_kill_9_in_the_midst_of_a_run_is_a_crash(bench: Bench) -> None:
    bench.run("Freezes", steps=1, hang=False)
    pid = bench.expect(AttemptFinished).result["metadata"]["pid"]
    bench.host.start(1, "s", 1, {"steps": 1, "hang": True})
    bench.expect(AttemptProgressed, 2)
    os.kill(pid, signal.SIGKILL)
    down = bench.expect(PodDown)
    assert down.cause is FailureCause.CRASHED
    assert "SIGKILL" in down.detail
    assert not _lives(pid)


def test_a_crash_on_a_gpu_that_is_gone_is_the_loss_of_the_gpu(bench: Bench) -> None:
    bench.run("Freezes", steps=1, hang=False)
    pid = bench.expect(AttemptFinished).result["metadata"]["pid"]
    bench.have("gpu-b")
    os.kill(pid, signal.SIGABRT)
    down = bench.expect(PodDown)
    assert down.cause is FailureCause.GPU_LOST
    assert "GPU gpu-a is not on this node any more" in down.detail
    assert "SIGABRT" in down.detail


def test_a_crash_on_a_gpu_that_is_ill_is_the_loss_of_the_gpu(bench: Bench) -> None:
    bench.run("Freezes", steps=1, hang=False)
    pid = bench.expect(AttemptFinished).result["metadata"]["pid"]
    bench.have("gpu-a", "gpu-b", ill=["gpu-a"])
    os.kill(pid, signal.SIGKILL)
    down = bench.expect(PodDown)
    assert (down.cause, "GPU gpu-a is ill" in down.detail) == (FailureCause.GPU_LOST, True)


@pytest.mark.parametrize(
    ("kind", "text", "cause", "pod_ends"),
    [
        ("not finite", "the latents are no numbers", FailureCause.NOT_FINITE, None),
        ("memory", "", FailureCause.OUT_OF_MEMORY, None),
        ("runtime", "CUDA out of memory. Tried to allocate 2.00 GiB", FailureCause.OUT_OF_MEMORY, None),
        ("runtime", "CUDA error: out of memory", FailureCause.OUT_OF_MEMORY, None),
        ("runtime", "CUDA error: uncorrectable ECC error encountered", FailureCause.GPU_LOST, FailureCause.GPU_LOST),
        ("runtime", "CUDA error: unknown error", FailureCause.GPU_LOST, FailureCause.GPU_LOST),
        (
            "runtime",
            "CUDA error: the launch timed out and was terminated",
            FailureCause.GPU_LOST,
            FailureCause.GPU_LOST,
        ),
        ("runtime", "CUDA error: device-side assert triggered", FailureCause.CRASHED, FailureCause.CRASHED),
        ("runtime", "CUDA error: an illegal memory access was encountered", FailureCause.CRASHED, FailureCause.CRASHED),
        ("runtime", "mat1 and mat2 shapes cannot be multiplied", FailureCause.CRASHED, None),
    ],
)
def test_an_error_of_the_device_is_told_from_one_of_the_program(
    bench: Bench, kind: str, text: str, cause: FailureCause, pod_ends: FailureCause | None
) -> None:
    bench.run("Raises", kind=kind, text=text)
    failed = bench.expect(AttemptFailed)
    assert failed.cause is cause
    assert "failure_drills.py" in failed.detail, "the log's tail comes along"
    if pod_ends is None:
        bench.host.start(1, "next", 1, {"kind": kind, "text": text})
        assert bench.expect(AttemptFailed, 2).req_no == "next", "the Pod lives on"
    else:
        down = bench.expect(PodDown)
        assert (down.cause, down.ordered) == (pod_ends, False)


@pytest.mark.parametrize("field", ["first_s", "floor_s", "factor"])
def test_patience_of_nothing_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"Patience.{field}"):
        Patience(**{field: 0.0})
