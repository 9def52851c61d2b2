"""Different customers' personalised models in one Pod: each run brings its own along, and what is wrong with one harms it alone."""

from __future__ import annotations

import hashlib
import io
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path
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
    PodDown,
    PodOrder,
    PodReport,
    PodUp,
)
from executors.terms import AdapterTerms, Terms

GENEROUS_S = 240.0
TINY = {"id": "tiny", "base": "tiny", "adapter": None, "path": None}

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(
        not (BUILTIN_MODELS["tiny"] / "model_index.json").is_file(), reason="the bundled model is not in this tree"
    ),
]


class Bench:
    """A Pod host, its store, and what it has reported."""

    def __init__(self, root: Path) -> None:
        self.store: ObjectFileStore = open_store(f"file://{root}/files")
        self.host = LocalPodHost(CpuPlugin(2), self.store, root / "work")
        self.seen: list[PodReport] = []
        self.pod = 0

    def until(self, done: Callable[[], Any], why: str) -> Any:
        deadline = time.monotonic() + GENEROUS_S
        while not (found := done()):
            assert time.monotonic() < deadline, f"waited in vain for {why}; seen: {self.seen}"
            poller = select.poll()
            for descriptor in self.host.filenos():
                poller.register(descriptor, select.POLLIN)
            poller.poll(50)
            self.seen.extend(self.host.take())
        return found

    def of(self, kind: type[Any], req_no: str) -> list[Any]:
        return [report for report in self.seen if isinstance(report, kind) and report.req_no == req_no]

    def expect(self, kind: type[Any], req_no: str) -> Any:
        return self.until(lambda: self.of(kind, req_no), f"{kind.__name__} of {req_no}")[-1]

    def up(self, model: dict[str, Any], slots: int = 4) -> None:
        self.pod += 1
        self.seen.clear()
        self.host.create(PodOrder(self.pod, "text_to_image", model, gpus=("cpu-0",), slots=slots))
        self.until(lambda: [each for each in self.seen if isinstance(each, PodUp | PodDown)], "the Pod")
        assert isinstance(self.seen[-1], PodUp), self.seen

    def down(self) -> None:
        self.host.delete(self.pod, 60_000_000)
        self.until(lambda: [each for each in self.seen if isinstance(each, PodDown)], "the Pod's end")

    def start(self, req_no: str, *adapters: AdapterTerms, priority: int = 0, model: str = "", **asked: Any) -> None:
        asked = {"prompt": "a red star", "steps": 4, "seed": 3, **asked}
        terms = Terms(adapters, priority, model).to_json()
        self.host.start(self.pod, req_no, 1, asked, terms=terms)

    def picture(self, req_no: str) -> np.ndarray[Any, Any]:
        from PIL import Image

        finished = self.expect(AttemptFinished, req_no)
        content = b"".join(self.store.read(finished.result["files"][0]["file_id"]))
        return np.asarray(Image.open(io.BytesIO(content)), dtype=float)

    def adapter(self, root: Path, seed: int, model: str = "") -> AdapterTerms:
        """An adapter as a training stores it."""
        import torch

        from executors.methods import adapters, pipelines
        from executors.methods.base import ModelRef

        loaded = pipelines.load(ModelRef("tiny", BUILTIN_MODELS["tiny"]), "cpu")
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, layer in loaded.parts["unet"].named_modules():
            if isinstance(layer, torch.nn.Linear):
                key = adapters.weight_key("unet", name)
                tensors[f"{key}.lora_A.weight"] = torch.randn((4, layer.in_features), generator=generator) * 0.05
                tensors[f"{key}.lora_B.weight"] = torch.randn((layer.out_features, 4), generator=generator) * 0.05
        folder = root / f"adapter-{seed}"
        folder.mkdir()
        files = adapters.write(folder, tensors, {"kind": "lora", "base_model": "tiny"})
        stored = {path.name: self.store.put_path(path).file_id for path in files}
        return AdapterTerms(model or f"lora-{seed}", stored, base="tiny")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("adapters"))
    try:
        yield bench
    finally:
        bench.host.close()


@pytest.fixture(scope="module")
def loras(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterTerms]:
    root = tmp_path_factory.mktemp("made")
    return [bench.adapter(root, seed) for seed in (1, 2)]


def test_models_of_one_base_share_a_pod_and_draw_what_each_draws_in_its_own(
    bench: Bench, loras: list[AdapterTerms]
) -> None:
    alone = {}
    for lora in loras:
        bench.up({"id": lora.model, "base": "tiny", "adapter": dict(lora.files), "path": None}, slots=1)
        bench.start("alone", lora)  # It holds this model itself: the terms name it, and it is not added twice.
        alone[lora.model] = bench.picture("alone")
        assert "adapters" not in bench.of(AttemptFinished, "alone")[0].result["metadata"]
        bench.down()
    bench.up(TINY)
    bench.start("long", steps=150)
    bench.expect(AttemptProgressed, "long")
    for lora in loras:
        bench.start(lora.model, lora, model=lora.model)
    bench.start("plain")
    for lora in loras:
        assert np.abs(bench.picture(lora.model) - alone[lora.model]).max() <= 1.0
        facts = bench.of(AttemptFinished, lora.model)[0].result["metadata"]
        assert (facts["model"], facts["base_model"]) == (lora.model, "tiny")
    plain = bench.picture("plain")
    assert all(np.abs(plain - picture).max() > 2.0 for picture in alone.values())
    shared = bench.of(AttemptFinished, "plain")[0]
    assert 0 < shared.alone_us <= shared.run_us
    assert shared.company_permille >= 1000  # The long one was there at least.
    bench.host.stop("long", 1, 60_000_000)
    bench.down()


def test_an_adapter_that_is_missing_corrupt_foreign_or_malicious_fails_its_own_request_alone(
    bench: Bench, loras: list[AdapterTerms]
) -> None:
    def stored(content: bytes, name: str = "adapter.safetensors") -> dict[str, str]:
        return {name: bench.store.put_bytes(content).file_id}

    good = b"".join(bench.store.read(loras[0].files["adapter.safetensors"]))
    broken = {
        "missing": ({"adapter.safetensors": hashlib.sha256(b"nowhere").hexdigest()}, FailureCause.MODEL_MISSING),
        "cut-off": (stored(good[: len(good) // 2]), FailureCause.MODEL_MISSING),
        "pickle": (stored(b"\x80\x04cos\nsystem\n(S'true'\ntR.", "adapter.bin"), FailureCause.MODEL_MISSING),
        "escapes": ({"../adapter.safetensors": "0" * 64}, FailureCause.MODEL_MISSING),
    }
    bench.up(TINY)
    bench.start("good", loras[0], steps=40)
    for name, (files, _) in broken.items():
        bench.start(name, AdapterTerms(f"lora-{name}", files, base="tiny"))
    bench.start("wrong-base", AdapterTerms("lora-x", dict(loras[1].files), base="other"))
    for name, (_, cause) in broken.items():
        failed = bench.expect(AttemptFailed, name)
        assert (failed.cause, f"lora-{name}" in failed.detail) == (cause, True), failed
    refused = bench.expect(AttemptFailed, "wrong-base")
    assert refused.cause is FailureCause.BAD_INPUT
    assert "was trained on other, this Pod holds tiny" in refused.detail
    bench.expect(AttemptFinished, "good")
    assert not [report for report in bench.seen if isinstance(report, PodDown)]
    bench.down()


def test_an_urgent_attempt_runs_beside_those_that_fill_the_slots(bench: Bench) -> None:
    bench.up(TINY, slots=2)
    for name in ("a", "b"):
        bench.start(name, steps=150, count=8)
        bench.expect(AttemptProgressed, name)
    bench.start("ordinary")
    bench.start("urgent", priority=100)
    bench.expect(AttemptFinished, "urgent")
    assert not bench.of(AttemptStarted, "ordinary")
    assert not [report for name in ("a", "b") for report in bench.of(AttemptFinished, name)]
    bench.down()


def test_previews_are_files_while_the_attempt_runs_and_gone_after_it(bench: Bench) -> None:
    from PIL import Image

    bench.up(TINY)
    bench.start("seen", steps=60, preview_every=5)
    preview = bench.until(
        lambda: [each.preview for each in bench.of(AttemptProgressed, "seen") if each.preview], "a preview"
    )
    finished = bench.expect(AttemptFinished, "seen")
    kept = {file["file_id"] for file in finished.result["files"]}
    shown = {each.preview for each in bench.of(AttemptProgressed, "seen") if each.preview}
    assert preview[0] in shown
    bench.start("next")  # Its end is reported after the first one's files were cleared away.
    bench.expect(AttemptFinished, "next")
    bench.down()
    assert [bench.store.stat(file_id) for file_id in shown] == [None] * len(shown)
    assert all(bench.store.stat(file_id) for file_id in kept)
    content = b"".join(bench.store.read(next(iter(kept))))
    assert Image.open(io.BytesIO(content)).size == (64, 64)
