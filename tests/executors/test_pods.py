"""Pods as real processes: what they are given, what they report, and what the host refuses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pod_bench import DRILLS, Bench, kinds

from engine.resources import GpuSpec
from engine.tasks import FailureCause
from executors.devices import CpuPlugin
from executors.dfs import open_store
from executors.pod_models import ModelCache
from executors.pod_record import gpu_cap_bytes
from executors.pods import LocalPodHost, WorkDirectoryInUse
from executors.ports import (
    AttemptFailed,
    AttemptFinished,
    AttemptProgressed,
    AttemptStarted,
    PodDown,
    PodHost,
    PodOrder,
)


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
    assert kinds(bench.seen)[:2] == ["PodUp", "AttemptStarted"]
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
    assert kinds(bench.seen).count("PodUp") == 1


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


def test_a_pod_is_held_to_its_share_of_a_card_and_may_use_all_of_whole_ones() -> None:
    shared = PodOrder(1, "m", gpus=("GPU-a",), gpu_share=500, gpu_memory_cap_bytes=7)
    assert gpu_cap_bytes(shared) == 7
    assert gpu_cap_bytes(replace(shared, gpu_share=1000)) == 0, (
        "a task that ran out of memory is tried on all of a card"
    )
