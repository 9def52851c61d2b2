"""A real training in real Pods: killed half-way through, gone on with on another node, and the same model in the end."""

from __future__ import annotations

import io
import os
import select
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.tasks import FailureCause
from executors.devices import CpuPlugin
from executors.dfs import ObjectFileStore, open_store
from executors.pod_models import BUILTIN_MODELS
from executors.pods import LocalPodHost
from executors.ports import (
    AttemptFailed,
    AttemptFinished,
    AttemptProgressed,
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
    pytest.mark.slow,
    pytest.mark.skipif(
        not (BUILTIN_MODELS["tiny"] / "model_index.json").is_file(), reason="the bundled model is not in this tree"
    ),
]


class Node:
    """A Pod host with a work directory of its own; the file store is all that it shares with another."""

    def __init__(self, store: ObjectFileStore, work_dir: Path) -> None:
        self.host = LocalPodHost(CpuPlugin(2), store, work_dir)
        self.pods_up = 0

    def until(self, wanted: Callable[[PodReport], bool], why: str) -> Any:
        """Serve the host until it reports what is wanted; a failed attempt fails the test, with the Pod's log."""
        deadline = time.monotonic() + GENEROUS_S
        while True:
            assert time.monotonic() < deadline, f"waited in vain for {why}"
            poller = select.poll()
            for descriptor in self.host.filenos():
                poller.register(descriptor, select.POLLIN)
            poller.poll(50)
            reports = self.host.take()
            for report in reports:
                if wanted(report):
                    return report
            for report in reports:
                assert not isinstance(report, AttemptFailed), report

    def up(self, pod: int) -> None:
        """Create a Pod for training."""
        limits: dict[str, Any] = {"gpus": ("cpu-0",), "memory_bytes": 2 * GIB, "gpu_memory_cap_bytes": GIB}
        self.host.create(PodOrder(pod, "dreambooth", TINY, **limits))
        self.until(lambda report: isinstance(report, PodUp), "a Pod")

    def finished(self) -> AttemptFinished:
        """Wait for the result."""
        found: AttemptFinished = self.until(lambda report: isinstance(report, AttemptFinished), "a result")
        return found


@pytest.fixture
def store(tmp_path: Path) -> ObjectFileStore:
    return open_store(f"file://{tmp_path}/files")


@pytest.fixture
def new_node(tmp_path: Path, store: ObjectFileStore) -> Iterator[Callable[[str], Node]]:
    nodes: list[Node] = []

    def make(name: str) -> Node:
        nodes.append(Node(store, tmp_path / name))
        return nodes[-1]

    yield make
    for node in nodes:
        node.host.close()


def _pictures(store: ObjectFileStore) -> list[str]:
    from PIL import Image, ImageDraw

    ids = []
    for shift in range(3):
        picture = Image.new("RGB", (64, 80), (30, 90, 160))
        ImageDraw.Draw(picture).ellipse((10 + shift, 12, 44 + shift, 46), fill=(240, 200, 40))
        out = io.BytesIO()
        picture.save(out, "PNG")
        ids.append(store.put_bytes(out.getvalue(), "image/png").file_id)
    return ids


def _kill_the_pod(node: Node) -> None:
    """SIGKILL whatever works in the Pod's directory, as the kernel or a person would."""
    (directory,) = (node.host.models.cache_dir.parent / "pods").iterdir()
    victims = []
    for process in psutil.Process().children(recursive=True):
        try:
            if Path(process.cwd()) == directory:
                victims.append(process.pid)
        except psutil.Error:
            continue
    assert victims
    for pid in victims:
        os.kill(pid, signal.SIGKILL)


def _files(result: AttemptFinished) -> dict[str, str]:
    """The result's files by name; equal ids are equal bytes."""
    return {file["name"]: file["file_id"] for file in result.result["files"]}


def _checkpoints(store: ObjectFileStore) -> list[str]:
    refs = [store.stat(ref.file_id) for ref in store.files()]
    return [ref.file_id for ref in refs if ref is not None and ref.media_type == "application/x-tar"]


def _assert_that_no_checkpoint_is_left(store: ObjectFileStore) -> None:
    """The Pod removes them after it has reported the result."""
    deadline = time.monotonic() + GENEROUS_S
    while left := _checkpoints(store):
        assert time.monotonic() < deadline, f"a training that has its result leaves {left} behind"
        select.select((), (), (), 0.02)


@pytest.mark.parametrize("way", ["lora", "full"])
def test_a_training_killed_by_sigkill_goes_on_on_another_node_and_ends_with_the_same_model(
    new_node: Callable[[str], Node], store: ObjectFileStore, tmp_path: Path, way: str
) -> None:
    training = {
        "pictures": _pictures(store),
        "category": "emblem",
        "method": way,
        "steps": 12,
        "prior_pictures": 2,
        "batch": 1,
        "aspect": "buckets",
        "checkpoint_every": 4,
        "validation_prompts": ["a photo of sks emblem"],
        "validation_every": 6,
    }
    first = new_node("first")
    first.up(1)
    first.host.start(1, "undisturbed", 1, training)
    undisturbed = first.finished()
    _assert_that_no_checkpoint_is_left(store)

    first.host.start(1, "killed", 1, training)
    told = first.until(
        lambda report: isinstance(report, AttemptProgressed) and report.checkpoint != "",
        "a checkpoint of a running training",
    )
    _kill_the_pod(first)
    down = first.until(lambda report: isinstance(report, PodDown), "the Pod's death")
    assert down.cause is FailureCause.CRASHED
    assert store.stat(told.checkpoint) is not None

    second = new_node("second")
    second.up(1)
    second.host.start(1, "killed", 2, training, checkpoint=told.checkpoint)
    begun = second.until(lambda report: isinstance(report, AttemptProgressed), "progress")
    assert begun.done == told.total - 7, "the prior and the first four steps are not done again"
    resumed = second.finished()
    assert _files(resumed) == _files(undisturbed)
    assert resumed.result["metadata"] == undisturbed.result["metadata"]
    _assert_that_no_checkpoint_is_left(store)


def test_a_checkpoint_whose_bytes_have_rotted_is_noticed_and_the_training_begins_anew(
    new_node: Callable[[str], Node], store: ObjectFileStore, tmp_path: Path
) -> None:
    training = {
        "pictures": _pictures(store),
        "category": "emblem",
        "steps": 3,
        "prior_preservation": False,
        "batch": 1,
        "checkpoint_every": 1,
    }
    rotten = io.BytesIO()
    with tarfile.open(fileobj=rotten, mode="w") as tar:
        member = tarfile.TarInfo("state.safetensors")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"good"))
    ref = store.put_bytes(rotten.getvalue(), "application/x-tar")
    path = tmp_path / "files" / "sha256" / ref.file_id[:2] / ref.file_id
    path.write_bytes(path.read_bytes().replace(b"good", b"evil"))
    node = new_node("node")
    node.up(1)
    node.host.start(1, "train", 2, training, checkpoint=ref.file_id)
    assert node.until(lambda report: isinstance(report, AttemptProgressed), "progress").done == 1
    node.finished()
    log = (node.host.models.cache_dir.parent / "pods" / "1" / "pod.log").read_text()
    assert "cannot be used, starting from the beginning" in log
    assert "SHA-256" in log
