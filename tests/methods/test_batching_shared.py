"""One batch for many threads: each gets its own pictures or its own failure, and nobody waits for ever."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from executors.batching import kept_files
from executors.batching.batch import RunningBatch
from executors.batching.requests import KeptPicture, PictureRequest
from executors.batching.shared import SharedBatch, Stopped
from executors.methods import adapters, pipelines
from executors.methods.base import Cancelled, ModelRef
from executors.methods.parameters import TextToImageParameters
from executors.methods.text_to_image import TextToImage
from executors.methods.together import SharedMethod
from executors.tiny import MODEL_DIR

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]

GENEROUS_S = 120.0


@pytest.fixture(scope="module")
def tiny() -> pipelines.LoadedPipeline:
    return pipelines.load(ModelRef("tiny", MODEL_DIR), "cpu")


class Caller(threading.Thread):
    """Calls something in a thread of its own, and remembers how that ended."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.result: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:
            self.error = error

    def ended(self) -> Any:
        self.join(GENEROUS_S)
        assert not self.is_alive(), "it waits for ever"
        if self.error is not None:
            raise self.error
        return self.result


@pytest.fixture
def shared(tiny: pipelines.LoadedPipeline) -> Iterator[SharedBatch]:
    """A batch that is served; closed at the end."""
    batch = SharedBatch(RunningBatch(tiny))
    server = Caller(batch.serve)
    try:
        yield batch
    finally:
        batch.close()
        server.join(GENEROUS_S)
        assert not server.is_alive()


def pictures(count: int = 1, **changes: Any) -> dict[int, PictureRequest]:
    base = replace(PictureRequest("", "a red star", steps=3, guidance=3.0), **changes)
    return {place: replace(base, id=str(place), seed=place, place=place) for place in range(count)}


def ignore(_done: int, _total: int, _note: str) -> None:
    pass


def never() -> bool:
    return False


def test_jobs_of_several_threads_get_their_own_pictures(shared: SharedBatch, tiny: pipelines.LoadedPipeline) -> None:
    jobs = [
        pictures(2, steps=2 + number, prompt=prompt) for number, prompt in enumerate(("a star", "a house", "a robot"))
    ]
    callers = [Caller(lambda job=job: shared.make(job, {}, ignore, never)) for job in jobs]  # type: ignore[misc]
    made = [caller.ended() for caller in callers]
    alone = SharedBatch(RunningBatch(tiny))
    Caller(alone.serve)
    for job, mine in zip(jobs, made, strict=True):
        assert sorted(mine) == [0, 1]
        expected = alone.make(job, {}, ignore, never)
        for place in mine:
            assert np.abs(np.asarray(mine[place], float) - np.asarray(expected[place], float)).max() <= 1.0
    alone.close()


def test_progress_counts_all_pictures_of_a_job_and_ends_at_its_total(shared: SharedBatch) -> None:
    seen: list[tuple[int, int, str]] = []
    shared.make(pictures(2, steps=4), {7: "made before"}, lambda *told: seen.append(told), never)
    done = [each[0] for each in seen]
    assert done == sorted(done)
    assert seen[-1] == (12, 12, "3/3")
    assert done[0] == 4 + 2


def test_a_stop_gives_back_what_is_made_and_what_is_under_way(shared: SharedBatch) -> None:
    asked = {**pictures(2), 1: pictures(2, steps=100)[1]}
    stop = threading.Event()

    def progress(_done: int, _total: int, note: str) -> None:
        if note == "1/2":
            stop.set()

    with pytest.raises(Stopped) as stopped:
        shared.make(asked, {}, progress, stop.is_set)
    assert set(stopped.value.made) == {0}
    assert set(stopped.value.kept) == {1}
    assert 1 <= stopped.value.kept[1].done < 100


def test_a_failing_picture_ends_its_job_and_no_other(shared: SharedBatch) -> None:
    other = Caller(lambda: shared.make(pictures(steps=30), {}, ignore, never))
    broken = KeptPicture(pictures()[0], 1, {"latents": torch.zeros(1, 4, 3, 3)})
    with pytest.raises(ValueError, match="kept picture"):
        shared.make({0: broken, 1: pictures(2, steps=50)[1]}, {}, ignore, never)
    assert sorted(other.ended()) == [0]


def test_a_refused_picture_ends_its_job_with_the_reason(shared: SharedBatch) -> None:
    with pytest.raises(Exception, match="width"):
        shared.make(pictures(width=60), {}, ignore, never)
    assert sorted(shared.make(pictures(), {}, ignore, never)) == [0]


def test_a_job_that_was_all_made_before_ends_at_once(shared: SharedBatch) -> None:
    assert shared.make({}, {0: "made"}, ignore, never) == {0: "made"}


def test_a_step_that_breaks_leaves_nobody_waiting(
    tiny: pipelines.LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = RunningBatch(tiny)
    shared = SharedBatch(batch)
    steps = iter([RuntimeError("broken")])
    step = batch.step

    def breaks() -> Any:
        error = next(steps, None)
        if error is not None:
            raise error
        return step()

    monkeypatch.setattr(batch, "step", breaks)
    server = Caller(shared.serve)
    with pytest.raises(RuntimeError, match="broken"):
        shared.make(pictures(2), {}, ignore, never)
    assert sorted(shared.make(pictures(), {}, ignore, never)) == [0]
    shared.close()
    server.ended()


def test_closing_fails_what_is_under_way_and_what_comes_later(tiny: pipelines.LoadedPipeline) -> None:
    shared = SharedBatch(RunningBatch(tiny))
    began = threading.Event()
    caller = Caller(lambda: shared.make(pictures(steps=150), {}, lambda *_: began.set(), never))
    server = Caller(shared.serve)
    assert began.wait(GENEROUS_S)
    shared.close()
    with pytest.raises(RuntimeError, match="closed"):
        caller.ended()
    server.ended()
    with pytest.raises(RuntimeError, match="closed"):
        shared.make(pictures(), {}, ignore, never)


# --- the method -----------------------------------------------------------------------------------------------------


def parameters(**changes: Any) -> TextToImageParameters:
    asked = {"prompt": "a red star", "steps": 6, "seed": 11, "width": 64, "height": 64, **changes}
    return TextToImageParameters.model_validate(asked)


@pytest.fixture
def method() -> Iterator[TextToImage]:
    made = TextToImage()
    made.load(ModelRef("tiny", MODEL_DIR), "cpu")
    assert made.share(4)
    server = Caller(made.serve)
    try:
        yield made
    finally:
        made.leave()
        server.ended()


def test_generation_is_a_shared_method_where_it_has_a_step_loop(model_ref: Callable[..., ModelRef]) -> None:
    other = TextToImage()
    assert isinstance(other, SharedMethod)
    other.load(model_ref("pag"), "cpu")
    assert not other.share(4)


def test_a_stop_keeps_the_pictures_and_their_drawn_seed(method: TextToImage, new_context: Callable[..., Any]) -> None:
    with pytest.raises(Cancelled) as cancelled:
        method.run(parameters(seed=None, count=2, steps=20), new_context(stop_at=8))
    folder = cancelled.value.checkpoint
    assert folder is not None
    seed = kept_files.read_seed(folder)
    resumed = method.run(parameters(seed=None, count=2, steps=20), new_context(checkpoint=folder))
    assert resumed.metadata["seeds"] == [seed, seed + 1]
    whole = method.run(parameters(seed=seed, count=2, steps=20), new_context())
    assert resumed.metadata == whole.metadata


@pytest.mark.parametrize("damage", ["facts", "format", "tensors", "absent", "other", "seed"])
def test_a_damaged_checkpoint_starts_from_the_beginning(
    method: TextToImage,
    new_context: Callable[..., Any],
    tmp_path: Path,
    damage: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    request = pictures()[0]
    kept_files.write(folder, kept_files.KeptJob(11, {0: KeptPicture(request)}, {}))
    facts = folder / "pictures.json"
    match damage:
        case "facts":
            facts.write_text("{")
        case "format":
            facts.write_text(json.dumps({**json.loads(facts.read_text()), "format": 99}))
        case "tensors":
            (folder / "pictures.safetensors").write_bytes(b"no tensors")
        case "absent":
            (folder / "pictures.safetensors").unlink()
        case "seed":
            kept_files.write(folder, kept_files.KeptJob(12, {0: KeptPicture(request)}, {}))
        case "other":
            kept_files.write(folder, kept_files.KeptJob(11, {5: KeptPicture(request)}, {}))
    made = method.run(parameters(steps=2), new_context(checkpoint=folder))
    assert made.metadata["seeds"] == [11]
    assert "starting from the beginning" in capfd.readouterr().err


def test_strengths_of_the_models_own_adapter_differ_within_one_batch(
    new_context: Callable[..., Any], tmp_path: Path, tiny: pipelines.LoadedPipeline
) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, module in tiny.pipe.unet.named_modules():
        if isinstance(module, torch.nn.Linear):
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn((4, module.in_features), generator=generator) * 0.2
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn((module.out_features, 4), generator=generator) * 0.05
    adapters.write(tmp_path, tensors, {})
    ref = ModelRef("mine", MODEL_DIR, tmp_path)
    single, shared = TextToImage(), TextToImage()
    single.load(ref, "cpu")
    shared.load(ref, "cpu")
    assert shared.share(3)
    server = Caller(shared.serve)
    asked = [parameters(adapter_scale=scale) for scale in (1.0, 0.0, 0.5)]
    callers = [Caller(lambda each=each: shared.run(each, new_context())) for each in asked]  # type: ignore[misc]
    seen = []
    for each, caller in zip(asked, callers, strict=True):
        mine, alone = caller.ended(), single.run(each, new_context())
        assert mine.metadata == alone.metadata
        a, b = (np.asarray(Image.open(made.files[0].path), float) for made in (mine, alone))
        assert np.abs(a - b).max() <= 1.0
        seen.append(a)
    assert min(np.abs(seen[0] - seen[1]).max(), np.abs(seen[0] - seen[2]).max()) > 8.0
    shared.leave()
    server.ended()
