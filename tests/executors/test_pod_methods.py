"""The real AI methods inside real Pods: train on a few pictures, stop and go on, generate with what was learnt."""

from __future__ import annotations

import io
import select
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from executors.devices import CpuPlugin
from executors.dfs import ObjectFileStore, open_store
from executors.pod_models import BUILTIN_MODELS
from executors.pods import LocalPodHost
from executors.ports import (
    AttemptFailed,
    AttemptFinished,
    AttemptProgressed,
    AttemptStopped,
    PodDown,
    PodOrder,
    PodReport,
    PodUp,
)

GENEROUS_S = 240.0
GIB = 1 << 30
TINY = {"id": "tiny", "base": "tiny", "adapter": None, "path": None}

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(
        not (BUILTIN_MODELS["tiny"] / "model_index.json").is_file(), reason="the bundled model is not in this tree"
    ),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalPodHost, ObjectFileStore]]:
    """One host for all tests here: its nursery imports torch once."""
    root = tmp_path_factory.mktemp("methods")
    store = open_store(f"file://{root}/files")
    host = LocalPodHost(CpuPlugin(2), store, root / "work")
    try:
        yield host, store
    finally:
        host.close()


def _until(host: LocalPodHost, *kinds: type[PodReport]) -> Any:
    """Serve the host until it reports one of these kinds; anything that ends the Pod or the attempt otherwise fails the test."""
    deadline = time.monotonic() + GENEROUS_S
    while True:
        assert time.monotonic() < deadline, f"waited in vain for {kinds}"
        poller = select.poll()
        for descriptor in host.filenos():
            poller.register(descriptor, select.POLLIN)
        poller.poll(50)
        reports = host.take()
        for report in reports:
            if isinstance(report, kinds):
                return report
        for report in reports:
            assert not isinstance(report, AttemptFailed | PodDown), report


def _pictures(store: ObjectFileStore) -> list[str]:
    from PIL import Image, ImageDraw

    ids = []
    for shift in range(3):
        picture = Image.new("RGB", (64, 64), (30, 90, 160))
        ImageDraw.Draw(picture).ellipse((10 + shift, 12, 44 + shift, 46), fill=(240, 200, 40))
        out = io.BytesIO()
        picture.save(out, "PNG")
        ids.append(store.put_bytes(out.getvalue(), "image/png").file_id)
    return ids


@pytest.mark.slow
def test_a_subject_is_trained_stopped_resumed_and_generated_from_pod_to_pod(
    place: tuple[LocalPodHost, ObjectFileStore],
) -> None:
    host, store = place
    limits = {"gpus": ("cpu-0",), "memory_bytes": 2 * GIB, "gpu_memory_cap_bytes": GIB}
    host.create(PodOrder(1, "dreambooth", TINY, **limits))
    _until(host, PodUp)
    training = {
        "pictures": _pictures(store),
        "category": "emblem",
        "steps": 20,
        "prior_pictures": 2,
        "batch": 1,
        "checkpoint_every": 20,
    }
    host.start(1, "train", 1, training)
    while not _until(host, AttemptProgressed).note.startswith("loss"):
        pass
    host.stop("train", 1, 60_000_000, keep_checkpoint=True)
    stopped = _until(host, AttemptStopped)
    assert store.stat(stopped.checkpoint) is not None
    host.start(1, "train", 2, training, checkpoint=stopped.checkpoint)
    trained = _until(host, AttemptFinished)
    assert trained.attempt == 2
    adapter = {file["name"]: file["file_id"] for file in trained.result["files"] if file["role"] == "adapter"}
    assert adapter
    host.delete(1, 10_000_000)
    _until(host, PodDown)

    host.create(
        PodOrder(2, "text_to_image", {"id": "mine", "base": "tiny", "adapter": adapter, "path": None}, **limits)
    )
    _until(host, PodUp)
    host.start(2, "picture", 1, {"prompt": "a photo of sks emblem", "steps": 4, "count": 2, "width": 64, "height": 64})
    made = _until(host, AttemptFinished)
    assert [(file["media_type"], file["role"]) for file in made.result["files"]] == [("image/png", "picture")] * 2
    assert made.result["metadata"]["model"] == "mine"
    for file in made.result["files"]:
        assert b"".join(store.read(file["file_id"])).startswith(b"\x89PNG")
    host.delete(2, 10_000_000)
    _until(host, PodDown)


def test_a_stopped_generation_leaves_no_picture(place: tuple[LocalPodHost, ObjectFileStore]) -> None:
    host, store = place
    before = {ref.file_id for ref in store.files()}
    host.create(PodOrder(3, "text_to_image", TINY, gpus=("cpu-0",)))
    _until(host, PodUp)
    host.start(3, "r", 1, {"prompt": "a red circle", "steps": 150, "count": 4, "width": 64, "height": 64})
    progressed = _until(host, AttemptProgressed)
    assert progressed.done < progressed.total
    host.stop("r", 1, 60_000_000)
    assert _until(host, AttemptStopped).checkpoint == ""
    assert {ref.file_id for ref in store.files()} == before
    assert not list((Path(host.models.cache_dir).parent / "pods" / "3").glob("r/*/out/*.png"))
    host.delete(3, 0)
    _until(host, PodDown)
