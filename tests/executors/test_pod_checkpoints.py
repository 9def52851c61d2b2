"""Checkpoints of running attempts: announced, bounded in number, never shared, removed with the result."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from executors.devices import CpuPlugin
from executors.dfs import ObjectFileStore, open_store
from executors.pod_checkpoints import KEPT, CheckpointShelf
from executors.pods import LocalPodHost
from executors.ports import (
    AttemptFailed,
    AttemptFinished,
    AttemptProgressed,
    PodOrder,
    PodReport,
    PodUp,
)

GENEROUS_S = 60.0


class Bench:
    """A Pod host with one Pod of the drill method, and what it has reported."""

    def __init__(self, host: LocalPodHost, store: ObjectFileStore) -> None:
        self.host, self.store = host, store
        self.seen: list[PodReport] = []

    def until(self, done: Callable[[], bool], why: str) -> None:
        deadline = time.monotonic() + GENEROUS_S
        while not done():
            assert time.monotonic() < deadline, f"waited in vain for {why}; seen: {self.seen}"
            poller = select.poll()
            for descriptor in self.host.filenos():
                poller.register(descriptor, select.POLLIN)
            poller.poll(20)
            self.seen.extend(self.host.take())

    def one(self, kind: type[Any]) -> Any:
        self.until(lambda: any(isinstance(report, kind) for report in self.seen), kind.__name__)
        return next(report for report in self.seen if isinstance(report, kind))

    def told(self) -> list[str]:
        """The checkpoints announced so far, each once."""
        names = [report.checkpoint for report in self.seen if isinstance(report, AttemptProgressed)]
        return list(dict.fromkeys(name for name in names if name))

    def kept(self) -> set[str]:
        return {ref.file_id for ref in self.store.files()}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    store = open_store(f"file://{tmp_path}/files")
    host = LocalPodHost(CpuPlugin(1), store, tmp_path / "work", methods={"offers": "checkpoint_drill:Offers"})
    try:
        made = Bench(host, store)
        host.create(PodOrder(1, "offers"))
        made.one(PodUp)
        yield made
    finally:
        host.close()


def test_a_running_attempt_tells_of_each_checkpoint_and_keeps_the_last_two(bench: Bench) -> None:
    bench.host.start(1, "r", 1, {"steps": 5, "hang": True})
    bench.until(lambda: len(bench.told()) == 5, "five checkpoints")
    assert bench.kept() == set(bench.told()[-KEPT:])


def test_an_attempt_that_failed_leaves_the_last_ones_and_the_next_goes_on_and_clears_them_all(bench: Bench) -> None:
    bench.host.start(1, "r", 1, {"steps": 4, "dies": True})
    bench.one(AttemptFailed)
    assert bench.kept() == set(bench.told()[-KEPT:])
    bench.host.start(1, "r", 2, {"steps": 7}, checkpoint=bench.told()[-1])
    result = bench.one(AttemptFinished).result["metadata"]
    assert result == {"began": 4, "unpacked": ["step.json"]}
    bench.until(lambda: bench.kept() == set(), "the checkpoints to be removed")


def test_a_store_that_fails_costs_the_checkpoint_not_the_run(bench: Bench, tmp_path: Path) -> None:
    for name in ("sha256", "staging"):
        blocked = tmp_path / "files" / name
        blocked.write_text("no directory")
    bench.host.start(1, "r", 1, {"steps": 2})
    assert bench.one(AttemptFinished).result["metadata"]["began"] == 0
    assert bench.told() == []


def _shelf(store: ObjectFileStore, tmp_path: Path, req_no: str, folder: str = "work") -> CheckpointShelf:
    return CheckpointShelf(store, tmp_path / folder / req_no, req_no)


def test_equal_checkpoints_of_two_requests_are_two_files_so_that_neither_removes_the_others(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/files")
    state = tmp_path / "state"
    state.mkdir()
    (state / "step.json").write_text("1")
    first, second = _shelf(store, tmp_path, "a"), _shelf(store, tmp_path, "b")
    mine, other = first.put(state), second.put(state)
    assert mine != other
    first.clear()
    assert store.stat(mine) is None
    assert store.stat(other) is not None


def test_an_attempt_on_another_node_removes_what_the_lost_one_left(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/files")
    state = tmp_path / "state"
    state.mkdir()
    lost = _shelf(store, tmp_path, "r", "first")
    ids = []
    for step in range(3):
        (state / "step.json").write_text(str(step))
        ids.append(lost.put(state))
    other = _shelf(store, tmp_path, "r", "second")
    unpacked = other.restore(ids[-1], tmp_path / "unpacked")
    assert unpacked is not None
    assert [path.name for path in unpacked.iterdir()] == ["step.json"]
    assert (unpacked / "step.json").read_text() == "2"
    assert {ref.file_id for ref in store.files()} == set(ids[1:])
    other.clear()
    assert list(store.files()) == []


def test_an_archive_that_reaches_outside_is_not_unpacked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import io
    import tarfile

    store = open_store(f"file://{tmp_path}/files")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        member = tarfile.TarInfo("../outside")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    ref = store.put_bytes(packed.getvalue())
    shelf = _shelf(store, tmp_path, "r")
    assert shelf.restore(ref.file_id, tmp_path / "a" / "unpacked") is None
    assert not (tmp_path / "a" / "outside").exists()
    assert "starting from the beginning" in capsys.readouterr().err
