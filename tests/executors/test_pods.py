"""Pods as real processes: what they report, how they are stopped, how their deaths are told apart, and that nothing is left."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from engine.resources import GpuSpec
from engine.tasks import FailureCause
from executors.devices import CpuPlugin
from executors.dfs import ObjectFileStore, open_store
from executors.limits import Limiter
from executors.pod_models import ModelCache
from executors.pods import LocalPodHost, WorkDirectoryInUse
from executors.ports import (
    AttemptFailed,
    AttemptFinished,
    AttemptProgressed,
    AttemptStarted,
    AttemptStopped,
    PodDown,
    PodHost,
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


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A host with the drill methods, closed at the end."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    store = open_store(f"file://{tmp_path}/files")
    others = _nurseries()
    host = LocalPodHost(CpuPlugin(2), store, tmp_path / "work", methods=DRILLS)
    try:
        yield Bench(host, store, tmp_path / "work")
    finally:
        host.close()
        assert _nurseries() - others == set()
        assert [parent for parent in host.limiter.parents.values() if parent.exists()] == []


def _nurseries() -> set[int]:
    """Nurseries below this process, others' included (a platform that other tests of the worker share)."""
    return {child.pid for child in psutil.Process().children(recursive=True) if _is_nursery(child)}


def _is_nursery(process: psutil.Process) -> bool:
    try:
        return "executors.pod_nursery" in process.cmdline()
    except psutil.Error:
        return False


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _kinds(reports: Sequence[PodReport]) -> list[str]:
    return [type(report).__name__ for report in reports]


def test_the_host_is_a_pod_host(bench: Bench) -> None:
    port: PodHost = bench.host
    assert port.pods() == []
    assert port.take() == []


def test_an_attempt_runs_from_start_to_result(bench: Bench) -> None:
    bench.up("sleep")
    assert bench.host.pods() == [1]
    bench.host.start(1, "r-1", 1, {"seconds": 0.05, "steps": 2})
    finished = bench.expect(AttemptFinished)
    assert (finished.req_no, finished.attempt) == ("r-1", 1)
    assert finished.result["files"] == []
    assert finished.run_us >= 50_000
    assert _kinds(bench.seen)[:2] == ["PodUp", "AttemptStarted"]
    assert [report for report in bench.seen if isinstance(report, AttemptProgressed)][-1].done == 2


def test_a_pod_is_a_session_of_its_own_on_its_devices(bench: Bench) -> None:
    bench.up("WhoAmI", gpus=("cpu-1",))
    bench.host.start(1, "r", 1, {})
    me = bench.expect(AttemptFinished).result["metadata"]
    assert me["pid"] == me["group"] == me["session"] != os.getpid()
    assert (me["device"], me["cuda"], me["omp"], me["core"]) == ("cpu", "", "1", 0)
    assert Path(me["output_dir"]).is_relative_to(bench.work_dir / "pods" / "1" / "r")
    sockets = [name for name in me["descriptors"] if name.startswith("socket:")]
    assert len(sockets) == 1, "a Pod holds its own channel and no other socket"


def test_results_go_into_the_file_store_and_the_attempts_directory_goes_away(bench: Bench) -> None:
    source = bench.store.put_bytes(b"the picture", "image/png")
    bench.up("Writer")
    bench.host.start(1, "r", 2, {"source": source.file_id, "outside": False})
    finished = bench.expect(AttemptFinished)
    [file] = finished.result["files"]
    assert (file["media_type"], file["role"], file["name"], file["size_bytes"]) == (
        "image/png",
        "picture",
        "picture.png",
        11,
    )
    assert b"".join(bench.store.read(file["file_id"])) == b"the picture"
    assert finished.result["metadata"] == {"made": 1}
    assert finished.peak_gpu_memory_bytes == 5
    bench.host.start(1, "r2", 1, {"source": "", "outside": False})
    bench.expect(AttemptFinished, 2)
    bench.until(
        lambda _: not list((bench.work_dir / "pods" / "1").glob("r*")), "the attempts' directories to be removed"
    )


def test_a_result_outside_the_output_directory_is_refused(bench: Bench) -> None:
    bench.up("Writer")
    bench.host.start(1, "r", 1, {"source": "", "outside": True})
    failed = bench.expect(AttemptFailed)
    assert failed.cause is FailureCause.CRASHED
    assert "outside its output directory" in failed.detail


@pytest.mark.parametrize(
    ("method", "parameters", "cause", "detail"),
    [
        ("sleep", {"seconds": -1}, FailureCause.BAD_INPUT, "seconds"),
        ("sleep", {"seconds": 0, "fail": "error", "steps": 1}, FailureCause.CRASHED, "as asked for"),
        ("sleep", {"seconds": 0, "fail": "oom", "steps": 1}, FailureCause.OUT_OF_MEMORY, "MemoryError"),
        ("Writer", {"source": "0" * 64, "outside": False}, FailureCause.BAD_INPUT, "not in the file store"),
    ],
)
def test_a_failed_attempt_names_its_cause_and_leaves_the_pod_alive(
    bench: Bench, method: str, parameters: dict[str, Any], cause: FailureCause, detail: str
) -> None:
    bench.up(method)
    bench.host.start(1, "r", 1, parameters)
    failed = bench.expect(AttemptFailed)
    assert failed.cause is cause
    assert detail in failed.detail
    good = {"seconds": 0} if method == "sleep" else {"source": "", "outside": False}
    bench.host.start(1, "r", 2, good)
    assert bench.expect(AttemptFinished).attempt == 2


def test_a_pod_killed_from_outside_is_reported_as_crashed(bench: Bench) -> None:
    bench.up("WhoAmI")
    bench.host.start(1, "r", 1, {})
    pid = bench.expect(AttemptFinished).result["metadata"]["pid"]
    os.kill(pid, signal.SIGKILL)
    down = bench.expect(PodDown)
    assert (down.pod, down.cause, down.ordered) == (1, FailureCause.CRASHED, False)
    assert "SIGKILL" in down.detail
    assert not _lives(pid)
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


def test_an_attempt_stops_between_two_steps(bench: Bench) -> None:
    bench.up("Stepper")
    bench.host.start(1, "r", 1, {"steps": 100_000, "step_s": 0.005})
    bench.expect(AttemptProgressed)
    bench.host.stop("r", 1, 30 * SECOND_US)
    stopped = bench.expect(AttemptStopped)
    assert (stopped.req_no, stopped.attempt, stopped.checkpoint) == ("r", 1, "")
    assert not any(isinstance(report, AttemptFinished | PodDown) for report in bench.seen)
    assert list(bench.store.files()) == [], "nothing was to be kept"
    bench.host.start(1, "r3", 1, {"steps": 1, "step_s": 0})
    bench.expect(AttemptFinished)


def test_a_kept_checkpoint_is_where_the_next_attempt_goes_on_even_in_another_pod(bench: Bench) -> None:
    bench.up("Stepper")
    bench.host.start(1, "r", 1, {"steps": 100_000, "step_s": 0.005})
    progressed = bench.expect(AttemptProgressed)
    bench.host.stop("r", 1, 30 * SECOND_US, keep_checkpoint=True)
    stopped = bench.expect(AttemptStopped)
    assert bench.store.stat(stopped.checkpoint) is not None
    bench.up("Stepper", pod=2)
    bench.host.start(2, "r", 2, {"steps": progressed.done, "step_s": 0}, checkpoint=stopped.checkpoint)
    assert bench.expect(AttemptFinished).result["metadata"]["began"] >= progressed.done


def test_a_lost_checkpoint_costs_the_work_not_the_task(bench: Bench) -> None:
    bench.up("Stepper")
    bench.host.start(1, "r", 2, {"steps": 1, "step_s": 0}, checkpoint="0" * 64)
    assert bench.expect(AttemptFinished).result["metadata"] == {"began": 0}


def test_an_attempt_that_does_not_stop_is_killed_with_its_pod_after_the_grace(bench: Bench) -> None:
    bench.up("Stubborn")
    bench.host.start(1, "r", 1, {})
    bench.expect(AttemptProgressed)
    bench.host.stop("r", 1, SECOND_US // 10)
    deadline = bench.host.next_deadline_us()
    assert deadline is not None
    assert deadline <= SECOND_US // 10
    down = bench.expect(PodDown)
    assert down.ordered
    assert "did not stop within its grace" in down.detail
    assert _kinds(bench.seen)[-2:] == ["AttemptStopped", "PodDown"]


def test_attempts_beyond_the_first_queue_inside_the_pod_and_can_be_stopped_there(bench: Bench) -> None:
    bench.up("Stepper", slots=3)
    bench.host.start(1, "first", 1, {"steps": 100_000, "step_s": 0.005})
    bench.expect(AttemptStarted)
    bench.host.start(1, "second", 1, {"steps": 1, "step_s": 0})
    bench.host.start(1, "third", 1, {"steps": 1, "step_s": 0})
    bench.host.stop("second", 1, 30 * SECOND_US)
    assert bench.expect(AttemptStopped).req_no == "second"
    assert [report.req_no for report in bench.seen if isinstance(report, AttemptStarted)] == ["first"]
    bench.host.stop("first", 1, 30 * SECOND_US)
    assert bench.expect(AttemptFinished).req_no == "third"


def test_a_deleted_pod_stops_its_attempt_and_ends_within_the_grace(bench: Bench) -> None:
    bench.up("Stepper")
    bench.host.start(1, "r", 1, {"steps": 100_000, "step_s": 0.005})
    bench.expect(AttemptProgressed)
    bench.host.delete(1, 30 * SECOND_US)
    down = bench.expect(PodDown)
    assert (down.ordered, down.cause) == (True, FailureCause.POD_LOST)
    assert _kinds(bench.seen)[-2:] == ["AttemptStopped", "PodDown"]


@pytest.mark.parametrize("grace_us", [0, SECOND_US // 10])
def test_a_deleted_pod_is_killed_when_the_grace_is_over(bench: Bench, grace_us: int) -> None:
    bench.up("Stubborn")
    bench.host.start(1, "r", 1, {})
    bench.expect(AttemptProgressed)
    bench.host.delete(1, grace_us)
    assert bench.expect(PodDown).ordered


def test_a_pod_can_be_deleted_while_it_loads(bench: Bench) -> None:
    bench.host.create(PodOrder(1, "SlowToLoad"))
    bench.host.delete(1, 0)
    assert bench.expect(PodDown).ordered
    assert not any(isinstance(report, PodUp) for report in bench.seen)


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
        assert all(_lives(pid) for pid in pids)
        bench.host.delete(1, 30 * SECOND_US)
        bench.expect(PodDown)
    assert [pid for pid in pids if _lives(pid)] == []


def test_when_the_nursery_dies_its_pods_are_reported_and_the_next_order_works(bench: Bench) -> None:
    bench.up("WhoAmI")
    bench.host.start(1, "r", 1, {})
    pid = bench.expect(AttemptFinished).result["metadata"]["pid"]
    [nursery] = [child for child in psutil.Process().children() if _is_nursery(child)]
    nursery.kill()
    down = bench.expect(PodDown)
    assert (down.pod, down.cause) == (1, FailureCause.CRASHED)
    deadline = time.monotonic() + GENEROUS_S
    while _lives(pid):
        assert time.monotonic() < deadline, "the Pod outlived its nursery"
    bench.up("WhoAmI", pod=2)


def test_when_the_agent_is_killed_nothing_of_its_pods_outlives_it_and_the_next_one_starts_clean(tmp_path: Path) -> None:
    program = [sys.executable, str(Path(__file__).parent / "orphaned_host.py"), str(tmp_path)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as agent:
        try:
            assert agent.stdout is not None
            pids = [int(pid) for pid in agent.stdout.readline().split()]
            assert len(pids) == 4
            assert all(_lives(pid) for pid in pids)
        finally:
            agent.kill()
    store = open_store(f"file://{tmp_path}/files")
    host = LocalPodHost(CpuPlugin(1), store, tmp_path / "work", lock_wait_s=GENEROUS_S)
    assert [pid for pid in pids[:2] if _lives(pid)] == [], "the lock is free only when nursery and Pod are gone"
    deadline = time.monotonic() + GENEROUS_S
    while left := [pid for pid in pids if _lives(pid)]:
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
    assert [pid for pid in pids if _lives(pid)] == []
    assert bench.host.pods() == []


def test_orders_for_what_is_not_here_are_answered_or_harmless(bench: Bench) -> None:
    bench.host.start(7, "r", 1, {})
    down = bench.expect(PodDown)
    assert (down.pod, down.cause, down.ordered) == (7, FailureCause.POD_LOST, False)
    bench.host.delete(8, 0)
    assert bench.expect(PodDown, 2).ordered
    bench.host.stop("nobody", 1, 0)
    assert bench.host.take() == []


def test_ordering_twice_is_ordering_once(bench: Bench) -> None:
    bench.up("Stepper")
    bench.host.create(PodOrder(1, "Stepper"))
    for _ in range(2):
        bench.host.start(1, "r", 1, {"steps": 20, "step_s": 0.01})
    bench.expect(AttemptFinished)
    bench.host.start(1, "last", 1, {"steps": 1, "step_s": 0})
    bench.expect(AttemptFinished, 2)
    assert [report.req_no for report in bench.seen if isinstance(report, AttemptStarted)] == ["r", "last"]
    assert _kinds(bench.seen).count("PodUp") == 1


def test_a_req_no_that_is_no_plain_name_is_refused(bench: Bench) -> None:
    bench.up("sleep")
    for bad in ("", "../up", "a/b", "x" * 81):
        with pytest.raises(ValueError, match="req_no"):
            bench.host.start(1, bad, 1, {})


def test_a_work_directory_serves_one_host_and_is_cleared_of_an_earlier_one(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/files")
    left = tmp_path / "work" / "pods" / "3" / "req"
    left.mkdir(parents=True)
    host = LocalPodHost(CpuPlugin(1), store, tmp_path / "work")
    try:
        assert not left.exists()
        with pytest.raises(WorkDirectoryInUse, match="give each agent its own"):
            LocalPodHost(CpuPlugin(1), store, tmp_path / "work", lock_wait_s=0)
    finally:
        host.close()
    LocalPodHost(CpuPlugin(1), store, tmp_path / "work").close()


def test_a_store_that_other_processes_cannot_see_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="file:///dir"):
        LocalPodHost(CpuPlugin(1), open_store("memory://"), tmp_path / "work")


def test_a_model_reaches_the_method_as_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    store = open_store(f"file://{tmp_path}/files")
    base = tmp_path / "bases" / "sd15"
    base.mkdir(parents=True)
    (base / "model_index.json").write_text("{}")
    models = ModelCache(tmp_path / "cache", store.url, tmp_path / "bases")
    host = LocalPodHost(CpuPlugin(1), store, tmp_path / "work", models, methods=DRILLS)
    try:
        bench = Bench(host, store, tmp_path / "work")
        adapter = {"adapter.json": store.put_bytes(b"{}").file_id}
        bench.up("WhoAmI", model={"id": "my-dog", "base": "sd15", "adapter": adapter, "path": None})
        host.start(1, "r", 1, {})
        model_id, base_dir, adapter_dir = bench.expect(AttemptFinished).result["metadata"]["model"]
        assert (model_id, base_dir) == ("my-dog", str(base))
        assert (Path(adapter_dir) / "adapter.json").read_bytes() == b"{}"
    finally:
        host.close()


class _TwoGpus:
    def devices(self) -> tuple[GpuSpec, ...]:
        return tuple(GpuSpec(f"GPU-{name}", "a100", 80 << 30) for name in "ab")

    def use(self) -> tuple[()]:
        return ()

    def environment(self, uuids: Sequence[str]) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": ",".join(uuids)}


def test_a_pod_sees_just_the_gpus_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    store = open_store(f"file://{tmp_path}/files")
    host = LocalPodHost(_TwoGpus(), store, tmp_path / "work", methods=DRILLS, cgroups=False)
    try:
        bench = Bench(host, store, tmp_path / "work")
        bench.up("WhoAmI", gpus=("GPU-b",), memory_bytes=1 << 30)
        host.start(1, "r", 1, {})
        me = bench.expect(AttemptFinished).result["metadata"]
        assert (me["device"], me["cuda"]) == ("cuda", "GPU-b")
        assert me["data"] == -1, "CUDA reserves more than it uses: RLIMIT_DATA would forbid it"
    finally:
        host.close()
