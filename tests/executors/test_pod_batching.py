"""A generation Pod with several slots runs its attempts in one batch, and each ends as it would alone."""

from __future__ import annotations

import io
import select
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
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
    AttemptStarted,
    AttemptStopped,
    PodDown,
    PodOrder,
    PodReport,
    PodUp,
)

GENEROUS_S = 240.0
TINY = {"id": "tiny", "base": "tiny", "adapter": None, "path": None}
SLOTS = 4

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(
        not (BUILTIN_MODELS["tiny"] / "model_index.json").is_file(), reason="the bundled model is not in this tree"
    ),
]


class Bench:
    """A Pod host with what it has reported so far; the Pod under test has a number of its own in each test."""

    def __init__(self, host: LocalPodHost, store: ObjectFileStore) -> None:
        self.host = host
        self.store = store
        self.seen: list[PodReport] = []
        self.pod = 0

    def until(self, done: Callable[[], bool], why: str) -> None:
        deadline = time.monotonic() + GENEROUS_S
        while not done():
            assert time.monotonic() < deadline, f"waited in vain for {why}; seen: {self.seen}"
            poller = select.poll()
            for descriptor in self.host.filenos():
                poller.register(descriptor, select.POLLIN)
            poller.poll(50)
            self.seen.extend(self.host.take())

    def of(self, kind: type[Any], req_no: str) -> list[Any]:
        return [report for report in self.seen if isinstance(report, kind) and report.req_no == req_no]

    def expect(self, kind: type[Any], req_no: str, attempt: int = 1) -> Any:
        def found() -> list[Any]:
            return [report for report in self.of(kind, req_no) if report.attempt == attempt]

        self.until(lambda: bool(found()), f"{kind.__name__} of {req_no}")
        return found()[-1]

    def up(self, slots: int) -> None:
        self.pod += 1
        self.seen.clear()
        self.host.create(PodOrder(self.pod, "text_to_image", TINY, gpus=("cpu-0",), slots=slots))
        self.until(lambda: any(isinstance(report, PodUp | PodDown) for report in self.seen), "the Pod")
        assert isinstance(self.seen[-1], PodUp), self.seen

    def start(self, req_no: str, attempt: int = 1, checkpoint: str = "", **parameters: Any) -> None:
        asked = {"prompt": "a red star", "steps": 4, "width": 64, "height": 64, **parameters}
        self.host.start(self.pod, req_no, attempt, asked, checkpoint=checkpoint)

    def down(self) -> PodDown:
        self.host.delete(self.pod, 60_000_000)
        return self.gone()

    def gone(self) -> PodDown:
        self.until(lambda: any(isinstance(report, PodDown) for report in self.seen), "the Pod's end")
        return next(report for report in self.seen if isinstance(report, PodDown))

    def pictures(self, finished: AttemptFinished) -> list[Any]:
        from PIL import Image

        contents = [b"".join(self.store.read(file["file_id"])) for file in finished.result["files"]]
        return [np.asarray(Image.open(io.BytesIO(content)), dtype=float) for content in contents]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalPodHost, ObjectFileStore]]:
    """One host for all tests here: its nursery imports torch once."""
    root = tmp_path_factory.mktemp("batching")
    store = open_store(f"file://{root}/files")
    host = LocalPodHost(CpuPlugin(2), store, root / "work")
    try:
        yield host, store
    finally:
        host.close()


@pytest.fixture(scope="module")
def bench(host: tuple[LocalPodHost, ObjectFileStore]) -> Bench:
    return Bench(*host)


JOBS: dict[str, dict[str, Any]] = {
    "short": {"seed": 1, "steps": 3},
    "pair": {"seed": 2, "steps": 5, "count": 2, "scheduler": "euler_a", "guidance": 6.0},
    "wide": {"seed": 4, "steps": 4, "width": 96, "prompt": "a blue house"},
    "unguided": {"seed": 5, "steps": 6, "guidance": 1.0, "scheduler": "unipc"},
    "queued": {"seed": 6, "steps": 2, "negative_prompt": "a star"},
}


def test_attempts_of_all_slots_run_at_once_and_end_as_they_would_alone(bench: Bench) -> None:
    bench.up(slots=1)
    for name, job in JOBS.items():
        bench.start(name, **job)
    alone = {name: bench.expect(AttemptFinished, name) for name in JOBS}
    assert bench.down().ordered

    bench.up(slots=SLOTS)
    bench.start("long", seed=9, steps=150)
    bench.expect(AttemptProgressed, "long")
    for name, job in JOBS.items():
        bench.start(name, **job)
    together = {name: bench.expect(AttemptFinished, name) for name in JOBS}
    bench.expect(AttemptStarted, "long")
    for name in JOBS:
        assert together[name].result["metadata"] == alone[name].result["metadata"]
        assert [f["name"] for f in together[name].result["files"]] == [f["name"] for f in alone[name].result["files"]]
        for mine, other in zip(bench.pictures(together[name]), bench.pictures(alone[name]), strict=True):
            assert np.abs(mine - other).max() <= 1.0
        last = bench.of(AttemptProgressed, name)[-1]
        assert last.done == last.total
    # All five went past the long one, which had come first: nothing waits for another's end.
    order = [report.req_no for report in bench.seen if isinstance(report, AttemptFinished)]
    assert "long" not in order or order[-1] == "long"
    bench.host.stop("long", 1, 60_000_000)
    bench.until(
        lambda: bool(bench.of(AttemptStopped, "long") or bench.of(AttemptFinished, "long")), "the long one's end"
    )
    bench.down()


def test_a_stopped_attempt_keeps_its_latents_and_goes_on_to_the_same_pictures(bench: Bench) -> None:
    bench.up(slots=SLOTS)
    job: dict[str, Any] = {"seed": 7, "steps": 60, "count": 2, "scheduler": "dpmpp_2m_sde"}
    bench.start("whole", **job)
    bench.start("kept", **job)
    bench.expect(AttemptProgressed, "kept")
    bench.host.stop("kept", 1, 60_000_000, keep_checkpoint=True)
    stopped = bench.expect(AttemptStopped, "kept")
    assert bench.store.stat(stopped.checkpoint) is not None
    before = bench.of(AttemptProgressed, "kept")[-1].done
    bench.start("kept", 2, checkpoint=stopped.checkpoint, **job)
    finished = bench.expect(AttemptFinished, "kept", attempt=2)
    again = [report for report in bench.of(AttemptProgressed, "kept") if report.attempt == 2]
    assert again[0].done >= before
    whole = bench.pictures(bench.expect(AttemptFinished, "whole"))
    for mine, other in zip(bench.pictures(finished), whole, strict=True):
        assert np.abs(mine - other).max() <= 1.0
    bench.down()


def test_a_drawn_seed_is_kept_with_the_latents(bench: Bench) -> None:
    bench.up(slots=SLOTS)
    bench.start("drawn", steps=80)
    bench.expect(AttemptProgressed, "drawn")
    bench.host.stop("drawn", 1, 60_000_000, keep_checkpoint=True)
    stopped = bench.expect(AttemptStopped, "drawn")
    assert stopped.checkpoint
    bench.start("drawn", 2, checkpoint=stopped.checkpoint, steps=80)
    finished = bench.expect(AttemptFinished, "drawn", attempt=2)
    bench.start("again", steps=80, seed=finished.result["metadata"]["seeds"][0])
    again = bench.expect(AttemptFinished, "again")
    assert np.abs(bench.pictures(finished)[0] - bench.pictures(again)[0]).max() <= 1.0
    bench.down()


def test_a_checkpoint_of_another_request_costs_the_work_and_not_the_task(bench: Bench) -> None:
    bench.up(slots=SLOTS)
    bench.start("first", steps=80, count=2, seed=1)
    bench.expect(AttemptProgressed, "first")
    bench.host.stop("first", 1, 60_000_000, keep_checkpoint=True)
    checkpoint = bench.expect(AttemptStopped, "first").checkpoint
    bench.start("second", steps=3, seed=2, checkpoint=checkpoint)
    bench.start("second-plain", steps=3, seed=2)
    made, plain = (bench.expect(AttemptFinished, name) for name in ("second", "second-plain"))
    assert made.result["metadata"]["seeds"] == [2]
    assert np.abs(bench.pictures(made)[0] - bench.pictures(plain)[0]).max() <= 1.0
    bench.down()


def test_a_cancel_and_a_refusal_harm_no_other_attempt(bench: Bench) -> None:
    bench.up(slots=SLOTS)
    before = {ref.file_id for ref in bench.store.files()}
    bench.start("cancelled", steps=150, count=4, seed=1)
    bench.start("good", steps=12, seed=2)
    bench.start("refused", steps=-1)
    bench.expect(AttemptProgressed, "cancelled")
    bench.host.stop("cancelled", 1, 60_000_000)
    assert bench.expect(AttemptStopped, "cancelled").checkpoint == ""
    assert bench.expect(AttemptFailed, "refused").cause is FailureCause.BAD_INPUT
    good = bench.expect(AttemptFinished, "good")
    after = {ref.file_id for ref in bench.store.files()}
    assert after - before == {file["file_id"] for file in good.result["files"]}
    bench.down()


def test_a_stop_without_grace_spares_the_pod_while_others_run_in_it(bench: Bench) -> None:
    bench.up(slots=SLOTS)
    for name in ("cancelled", "other"):
        bench.start(name, steps=100, seed=3)
        bench.expect(AttemptProgressed, name)
    bench.host.stop("cancelled", 1, 0)
    bench.expect(AttemptStopped, "cancelled")
    bench.expect(AttemptFinished, "other")
    assert not [report for report in bench.seen if isinstance(report, PodDown)]
    bench.down()


def test_a_pod_that_is_deleted_stops_all_its_attempts_within_the_grace(bench: Bench) -> None:
    bench.up(slots=2)
    for name in ("a", "b", "waits"):
        bench.start(name, steps=150, count=8)
    for name in ("a", "b"):
        bench.expect(AttemptProgressed, name)
    assert not bench.of(AttemptStarted, "waits")
    assert bench.down().ordered
    for name in ("a", "b"):
        assert bench.of(AttemptStopped, name)
        assert not bench.of(AttemptFinished, name)


def test_an_attempt_tells_how_much_memory_its_pod_held_and_it_needed(bench: Bench) -> None:
    bench.up(slots=2)
    bench.start("small", count=1)
    small = bench.expect(AttemptFinished, "small").peak_gpu_memory_bytes
    bench.start("large", width=256, height=256)
    large = bench.expect(AttemptFinished, "large").peak_gpu_memory_bytes
    assert 12 << 20 < small < large < 2 << 30, "the weights alone are 12 MiB"
    bench.down()


def _stored(bench: Bench, mode: str, colour: Any) -> str:
    from PIL import Image

    out = io.BytesIO()
    Image.new(mode, (64, 64), colour).save(out, "PNG")
    return bench.store.put_bytes(out.getvalue()).file_id


def test_uploaded_pictures_are_begun_with_in_the_shared_batch(bench: Bench) -> None:
    image, mask = _stored(bench, "RGB", (200, 30, 30)), _stored(bench, "L", 255)
    bench.up(SLOTS)
    bench.start("text", seed=1, steps=12)
    bench.start("image", seed=1, steps=12, image=image, strength=0.25)
    bench.start("mask", seed=1, steps=6, image=image, mask=mask)
    bench.start("gone", image="a" * 64)
    bench.start("control", control=[{"model": "canny", "image": image}])
    made = {name: bench.pictures(bench.expect(AttemptFinished, name))[0] for name in ("text", "image", "mask")}
    assert np.abs(made["image"] - (200, 30, 30)).mean() < np.abs(made["text"] - (200, 30, 30)).mean() / 2
    assert np.abs(made["mask"] - made["image"]).max() > 8
    for name, reason in (("gone", "is not in the file store"), ("control", "has no ControlNet 'canny'")):
        failure = bench.expect(AttemptFailed, name)
        assert failure.cause is FailureCause.BAD_INPUT
        assert reason in failure.detail
    bench.down()
