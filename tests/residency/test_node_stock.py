"""What a node tells of its models and does with orders about them: the kernel's word on memory, bounded orders, pins that last."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.protocol import messages as m
from engine.protocol.link import Link
from engine.protocol.reports import event_of
from engine.resources import ResidentModel, Tier
from executors import wire
from executors.agent import _StockNews
from executors.dfs import ObjectFileStore, open_store
from executors.pod_models import ModelCache
from executors.residency import pages, stock
from executors.residency.stock import MAX_REPORTED, NodeStock

SIZE = 64 << 10


def weights(letter: str, size: int = SIZE) -> bytes:
    room = size - 8 - 96
    header = json.dumps({"w": {"dtype": "U8", "shape": [room], "data_offsets": [0, room]}}).encode().ljust(96)
    return len(header).to_bytes(8, "little") + header + letter.encode() * room


@pytest.fixture
def store(tmp_path: Path) -> ObjectFileStore:
    return open_store(f"file://{tmp_path}/files")


@pytest.fixture
def models(tmp_path: Path, store: ObjectFileStore) -> ModelCache:
    for name in ("sd15", "org/name"):
        folder = tmp_path / "bases" / name
        folder.mkdir(parents=True)
        (folder / "model_index.json").write_text("{}")
        (folder / "unet.safetensors").write_bytes(weights("u"))
    return ModelCache(tmp_path / "cache", store.url, tmp_path / "bases", cache_max_bytes=3 * SIZE)


def order(store: ObjectFileStore, letter: str, **more: object) -> dict[str, object]:
    files = {"adapter.safetensors": store.put_bytes(weights(letter)).file_id}
    return {"id": letter, "base": "sd15", "adapter": files, **more}


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def looked(node: NodeStock) -> dict[str, ResidentModel]:
    node._seen_at = -1e9
    return {each.model: each for each in node.resident()}


def test_base_models_and_fetched_ones_are_told_with_sizes_and_pins_first(
    models: ModelCache, store: ObjectFileStore
) -> None:
    node = NodeStock(models)
    for letter, pin in (("a", False), ("b", True), ("c", False)):
        node.bring(order(store, letter, pin=pin))
    until(lambda: {"a", "b", "c"} <= set(looked(node)))
    node.close()
    found = looked(node)
    assert list(found)[-3:] == ["b", "c", "a"]
    assert {name: found[name].size_bytes for name in ("sd15", "org/name", "b")} == dict.fromkeys(
        ("sd15", "org/name", "b"), SIZE
    )
    assert [name for name, each in found.items() if each.pinned] == ["b"]
    assert dict(node.counts())["disk_bytes"] == 3 * SIZE


def test_the_tier_is_what_the_kernel_says(models: ModelCache, store: ObjectFileStore) -> None:
    folder = models.base_dir("sd15")
    (folder / "unet.safetensors").read_bytes()
    if not pages.in_memory(folder):
        pytest.skip("this system does not tell what its page cache holds")
    assert looked(NodeStock(models))["sd15"].tier is Tier.MEMORY
    with (folder / "unet.safetensors").open("rb+") as file:
        os.fsync(file.fileno())
    pages.let_go(folder)
    if pages.resident_bytes(folder / "unet.safetensors"):
        pytest.skip("this file system keeps its pages")
    assert looked(NodeStock(models))["sd15"].tier is Tier.DISK
    pages.bring(folder)
    until(lambda: looked(NodeStock(models))["sd15"].tier is Tier.MEMORY)


def test_a_released_model_may_go_and_a_dropped_one_is_gone(models: ModelCache, store: ObjectFileStore) -> None:
    node = NodeStock(models)
    node.bring(order(store, "a", pin=True))
    until(lambda: "a" in looked(node))
    node.release("a")
    until(lambda: not looked(node)["a"].pinned)
    node.release("a", drop=True)
    until(lambda: "a" not in looked(node))
    node.close()


def test_what_waits_already_is_not_ordered_twice_and_failures_are_counted_not_raised(
    models: ModelCache, store: ObjectFileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[object] = []
    gate = threading.Event()

    def prefetch(cache: ModelCache, model: dict[str, object]) -> None:
        assert gate.wait(30)
        done.append(model["id"])
        raise RuntimeError("the store is away")

    monkeypatch.setattr(ModelCache, "prefetch", prefetch)
    node = NodeStock(models)
    for _ in range(5):
        node.bring({"id": "a"})
        node.bring({"id": "b"})
    gate.set()
    until(lambda: dict(node.counts())["orders_failed"] == 2)
    node.close()
    assert done == ["a", "b"]


def test_more_orders_than_may_wait_are_dropped_and_none_is_taken_after_the_end(
    models: ModelCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate, began = threading.Event(), threading.Event()
    done: list[object] = []

    def prefetch(cache: ModelCache, model: dict[str, object]) -> None:
        began.set()
        assert gate.wait(30)
        done.append(model["id"])

    monkeypatch.setattr(ModelCache, "prefetch", prefetch)
    monkeypatch.setattr(stock, "MAX_WAITING", 2)
    node = NodeStock(models)
    node._waiting.maxsize = 2
    node.bring({"id": 0})
    assert began.wait(30)
    for number in range(1, 6):
        node.bring({"id": number})
    assert "was dropped" in caplog.text
    node.close()
    node.bring({"id": 99})
    gate.set()
    thread = node._thread
    assert thread is not None
    thread.join(30)
    assert done == [0]


def test_a_report_is_capped_and_fits_a_message(models: ModelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {f"{'m' * 190}{number}": models.base_dir("sd15") for number in range(MAX_REPORTED + 50)}
    monkeypatch.setattr(ModelCache, "base_models", lambda cache: names)
    resident = NodeStock(models).resident()
    assert len(resident) == MAX_REPORTED
    item = m.Devices((), (), (), resident, (("disk_hits", 1),))
    link = Link("n1")
    event = event_of(link, wire.decode_report(wire.encode_item(item)))
    assert event is not None
    assert (event.resident, event.cache_counts) == (resident, (("disk_hits", 1),))  # type: ignore[union-attr]


def test_models_are_told_at_once_when_they_change_and_a_cache_that_cannot_be_read_is_not_spoken_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Changing:
        def __init__(self) -> None:
            self.here: tuple[ResidentModel, ...] = (ResidentModel("a"),)
            self.broken = False

        def bring(self, model: object) -> None: ...

        def release(self, model_id: str, drop: bool = False) -> None: ...

        def resident(self) -> tuple[ResidentModel, ...]:
            if self.broken:
                raise OSError("the disk is gone")
            return self.here

        def counts(self) -> tuple[tuple[str, int], ...]:
            return (("disk_hits", 1),)

    changing = Changing()
    news = _StockNews(changing)
    assert news.news() == ((ResidentModel("a"),), (("disk_hits", 1),))
    assert news.news() == (None, (("disk_hits", 1),))
    changing.here = ()
    assert news.news() == ((), (("disk_hits", 1),))
    changing.broken = True
    assert news.news() == (None, ())
    assert "could not be looked at" in caplog.text
    assert _StockNews(None).news() == (None, ())
