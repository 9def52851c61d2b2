"""The ends of real Pods: how their deaths are told apart, and that nothing is left of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from pod_bench import DRILLS, GENEROUS_S, SECOND_US, Bench, is_nursery, lives

from engine.tasks import FailureCause
from executors.devices import CpuPlugin
from executors.dfs import open_store
from executors.limits import Limiter
from executors.pods import LocalPodHost
from executors.ports import (
    AttemptFailed,
    AttemptFinished,
    AttemptProgressed,
    PodDown,
    PodOrder,
)


def test_a_pod_killed_from_outside_is_reported_as_crashed(bench: Bench) -> None:
    bench.up("WhoAmI")
    bench.host.start(1, "r", 1, {})
    pid = bench.expect(AttemptFinished).result["metadata"]["pid"]
    os.kill(pid, signal.SIGKILL)
    down = bench.expect(PodDown)
    assert (down.pod, down.cause, down.ordered) == (1, FailureCause.CRASHED, False)
    assert "SIGKILL" in down.detail
    assert not lives(pid)
    assert bench.host.pods() == []
    assert list((bench.work_dir / "pods").iterdir()) == []


def test_a_crash_carries_the_tail_of_the_log(bench: Bench) -> None:
    bench.up("Talker")
    bench.host.start(1, "r", 1, {"lines": 5000})
    down = bench.expect(PodDown)
    assert down.cause is FailureCause.CRASHED
    assert "exit status 3" in down.detail
    assert down.detail.endswith("the last words")
    assert "line 4999 of the log" in down.detail
    assert "line 0 of" not in down.detail
    assert len(down.detail) < 5000


def test_over_its_cgroups_memory_a_pod_is_reported_out_of_memory(bench: Bench) -> None:
    if "memory" not in bench.host.limiter.parents:
        pytest.skip(f"no memory cgroup may be made here: {bench.host.limiter.notes}")
    bench.up("Hog", memory_bytes=128 << 20)
    bench.host.start(1, "r", 1, {"bytes": 512 << 20})
    down = bench.expect(PodDown)
    assert (down.cause, down.ordered) == (FailureCause.OUT_OF_MEMORY, False)
    assert "134217728 bytes" in down.detail
    assert list(bench.host.limiter.parents["memory"].glob("1")) == []


def test_a_pod_within_its_memory_lives(bench: Bench) -> None:
    bench.up("Hog", memory_bytes=256 << 20)
    bench.host.start(1, "r", 1, {"bytes": 64 << 20})
    finished = bench.expect(AttemptFinished)
    assert finished.result["metadata"] == {"held": 64}
    assert 64 << 20 < finished.peak_host_memory_bytes < 8 << 30


def test_without_cgroups_an_allocation_over_the_limit_fails_in_the_pod(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    store = open_store(f"file://{tmp_path}/files")
    host = LocalPodHost(CpuPlugin(1), store, tmp_path / "work", methods=DRILLS, cgroups=False)
    try:
        assert host.limiter == Limiter(notes=("cgroup: switched off",))
        bench = Bench(host, store, tmp_path / "work")
        bench.up("Hog", memory_bytes=128 << 20)
        host.start(1, "r", 1, {"bytes": 512 << 20})
        assert bench.expect(AttemptFailed).cause is FailureCause.OUT_OF_MEMORY
        host.start(1, "r", 2, {"bytes": 64 << 20})
        assert bench.expect(AttemptFinished).attempt == 2
    finally:
        host.close()


def test_a_pod_whose_gpu_works_no_more_ends_after_it_reported_the_attempt(bench: Bench) -> None:
    bench.up("Broken")
    bench.host.start(1, "r", 1, {})
    down = bench.expect(PodDown)
    assert (down.cause, down.ordered) == (FailureCause.CRASHED, False)
    assert "CUDA works no more" in down.detail
    failed = bench.expect(AttemptFailed)
    assert failed.cause is FailureCause.CRASHED
    assert "device-side assert" in failed.detail


def test_a_pod_that_never_finishes_loading_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    store = open_store(f"file://{tmp_path}/files")
    host = LocalPodHost(CpuPlugin(1), store, tmp_path / "work", methods=DRILLS, load_limit_s=0.2)
    try:
        bench = Bench(host, store, tmp_path / "work")
        host.create(PodOrder(1, "SlowToLoad"))
        down = bench.expect(PodDown)
        assert (down.cause, down.ordered) == (FailureCause.TIMED_OUT, False)
        assert "not loaded in time" in down.detail
    finally:
        host.close()


@pytest.mark.parametrize(
    ("order", "cause", "detail"),
    [
        (PodOrder(1, "NoModel"), FailureCause.MODEL_MISSING, "'gone' is not here"),
        (PodOrder(1, "WhoAmI", model={"id": "nowhere"}), FailureCause.MODEL_MISSING, "'nowhere' is not on this node"),
        (PodOrder(1, "WhoAmI", gpus=("cpu-7",)), FailureCause.GPU_LOST, "cpu-7"),
    ],
)
def test_a_pod_that_cannot_be_says_why(bench: Bench, order: PodOrder, cause: FailureCause, detail: str) -> None:
    bench.host.create(order)
    down = bench.expect(PodDown)
    assert (down.cause, down.ordered) == (cause, False)
    assert detail in down.detail
    assert "Traceback" not in down.detail
    assert list((bench.work_dir / "pods").iterdir()) == []


def test_a_pod_that_cannot_be_created_at_all_is_reported_down(bench: Bench) -> None:
    (bench.work_dir / "pods").rmdir()
    (bench.work_dir / "pods").write_text("in the way")
    bench.host.create(PodOrder(1, "sleep"))
    down = bench.expect(PodDown)
    assert down.cause is FailureCause.POD_LOST
    assert "cannot be created" in down.detail


@pytest.mark.parametrize("crash", [False, True])
def test_nothing_of_a_dead_pod_lives_not_even_what_fled_its_group(bench: Bench, tmp_path: Path, crash: bool) -> None:
    note = tmp_path / "pids.json"
    bench.up("Litter")
    bench.host.start(1, "r", 1, {"crash": crash, "note": str(note)})
    if crash:
        bench.expect(PodDown)
        pids = json.loads(note.read_text())
    else:
        pids = bench.expect(AttemptFinished).result["metadata"]["pids"]
        assert all(lives(pid) for pid in pids)
        bench.host.delete(1, 30 * SECOND_US)
        bench.expect(PodDown)
    assert [pid for pid in pids if lives(pid)] == []


def test_when_the_nursery_dies_its_pods_are_reported_and_the_next_order_works(bench: Bench) -> None:
    bench.up("WhoAmI")
    bench.host.start(1, "r", 1, {})
    pid = bench.expect(AttemptFinished).result["metadata"]["pid"]
    [nursery] = [child for child in psutil.Process().children() if is_nursery(child)]
    nursery.kill()
    down = bench.expect(PodDown)
    assert (down.pod, down.cause) == (1, FailureCause.CRASHED)
    deadline = time.monotonic() + GENEROUS_S
    while lives(pid):
        assert time.monotonic() < deadline, "the Pod outlived its nursery"
    bench.up("WhoAmI", pod=2)


def test_when_the_agent_is_killed_nothing_of_its_pods_outlives_it_and_the_next_one_starts_clean(tmp_path: Path) -> None:
    program = [sys.executable, str(Path(__file__).parent / "orphaned_host.py"), str(tmp_path)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as agent:
        try:
            assert agent.stdout is not None
            pids = [int(pid) for pid in agent.stdout.readline().split()]
            assert len(pids) == 4
            assert all(lives(pid) for pid in pids)
        finally:
            agent.kill()
    store = open_store(f"file://{tmp_path}/files")
    host = LocalPodHost(CpuPlugin(1), store, tmp_path / "work", lock_wait_s=GENEROUS_S)
    assert [pid for pid in pids[:2] if lives(pid)] == [], "the lock is free only when nursery and Pod are gone"
    deadline = time.monotonic() + GENEROUS_S
    while left := [pid for pid in pids if lives(pid)]:
        assert time.monotonic() < deadline, f"outlived the agent: {left}"
    assert list((tmp_path / "work" / "pods").iterdir()) == []
    host.close()
    assert not any(parent.exists() for parent in host.limiter.parents.values())


def test_fifty_pods_come_and_go_and_leave_no_process_directory_or_cgroup(bench: Bench) -> None:
    bench.up("WhoAmI", pod=1000)
    descriptors = len(os.listdir("/proc/self/fd"))
    pids = []
    for pod in range(50):
        bench.host.create(PodOrder(pod, "WhoAmI", memory_bytes=1 << 30))
        bench.host.start(pod, f"r{pod}", 1, {})
        pids.append(bench.expect(AttemptFinished, pod + 1).result["metadata"]["pid"])
        bench.host.delete(pod, 0 if pod % 2 else 30 * SECOND_US)
        bench.expect(PodDown, pod + 1)
    assert bench.host.pods() == [1000]
    assert [pid for pid in pids if psutil.pid_exists(pid)] == []
    assert [path.name for path in (bench.work_dir / "pods").iterdir()] == ["1000"]
    assert len(os.listdir("/proc/self/fd")) == descriptors
    for parent in bench.host.limiter.parents.values():
        assert {path.name for path in parent.iterdir() if path.is_dir()} <= {"1000", "49"}
    bench.host.close()
    assert not any(parent.exists() for parent in bench.host.limiter.parents.values())


def test_close_ends_every_pod_also_one_that_listens_to_nobody(bench: Bench) -> None:
    bench.up("Litter")
    bench.host.start(1, "r", 1, {"crash": False, "note": ""})
    pids = bench.expect(AttemptFinished).result["metadata"]["pids"]
    bench.up("Stubborn", pod=2)
    bench.host.start(2, "s", 1, {})
    bench.expect(AttemptProgressed)
    bench.host.close()
    assert [pid for pid in pids if lives(pid)] == []
    assert bench.host.pods() == []
