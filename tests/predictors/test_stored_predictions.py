"""What was learned survives a restart exactly, and a damaged file is told apart."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from engine.events import NodeJoined, TaskFailed, TaskFinished, TaskStarted, TaskSubmitted
from engine.resources import GpuSpec, NodeSpec
from engine.tasks import SECOND, FailureCause, TaskSpec, TaskType
from predictors import OnlineForecaster, Predictor, stored

TASK = TaskSpec(req_no="", tenant="t", group="", task_type=TaskType.GC, method="text_to_image", model="")


def learn(forecaster: OnlineForecaster, first: int, last: int) -> None:
    """Run tasks of several users and models, on two kinds of GPU; some fail, some declare their time."""
    rng = random.Random(first)
    for i in range(first, last):
        now = i * 20 * SECOND
        spec = replace(
            TASK,
            req_no=str(i),
            model=f"m{i % 5}",
            features=(("images", i % 4), ("user", f"u{i % 9}")),
            declared_us=30 * SECOND if i % 3 == 0 else None,
        )
        run_us = round(rng.lognormvariate(2.5, 0.4) * SECOND)
        forecaster.stamp(now, [TaskSubmitted(spec), TaskStarted(str(i), 1)])
        if i % 11 == 0:
            forecaster.stamp(now + 5, [TaskFailed(str(i), 1, FailureCause.OUT_OF_MEMORY, peak_gpu_memory_bytes=2**31)])
        else:
            forecaster.stamp(now + run_us, [TaskFinished(str(i), 1, peak_gpu_memory_bytes=2**30 + i)])


def grown() -> OnlineForecaster:
    forecaster = OnlineForecaster()
    forecaster.stamp(0, [NodeJoined(NodeSpec("n", gpus=(GpuSpec("g", "a100", 2**34),)))])
    learn(forecaster, 1, 200)
    return forecaster


def test_a_restored_forecaster_goes_on_exactly_as_the_one_that_was_saved(tmp_path: Path) -> None:
    kept = grown()
    kept.save(tmp_path / "state.json")
    restored = OnlineForecaster.load(tmp_path / "state.json")
    learn(kept, 200, 260)
    learn(restored, 200, 260)
    spec = replace(TASK, req_no="x", model="m2", features=(("user", "u3"),))
    now = 6000 * SECOND
    assert restored.stamp(now, [TaskSubmitted(spec)]) == kept.stamp(now, [TaskSubmitted(spec)])
    ours, theirs = restored.predict(spec, now, "a100"), kept.predict(spec, now, "a100")
    assert (ours.mean_us, ours.quantiles_us) == (theirs.mean_us, theirs.quantiles_us)
    assert restored.tracked == kept.tracked


def test_a_task_under_way_when_the_state_was_saved_is_learned_when_it_finishes(tmp_path: Path) -> None:
    forecaster = OnlineForecaster()
    forecaster.stamp(0, [TaskSubmitted(replace(TASK, req_no="1")), TaskStarted("1", 1)])
    forecaster.save(tmp_path / "state.json")
    restored = OnlineForecaster.load(tmp_path / "state.json")
    restored.recall(300 * SECOND, [TaskFinished("1", 1)], [])
    assert restored.tracked == 0
    assert restored.predict(TASK, 301 * SECOND).p50_us > 100 * SECOND


def test_the_file_tells_its_schema_and_how_far_it_has_learned(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    forecaster = grown()
    forecaster.stamp(10**12, [])
    forecaster.save(path)
    head = json.loads(path.read_text().splitlines()[0])
    assert head["schema"] == stored.SCHEMA
    assert stored.watermark_us(path) == 10**12
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]


def test_saving_again_replaces_the_file_and_a_failed_save_leaves_it(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    stored.save(Predictor(), path)
    predictor = Predictor()
    predictor.observe({"method": "sleep"}, SECOND, SECOND)
    stored.save(predictor, path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        stored.save(predictor, path, {"unwritable": object()})
    assert path.read_bytes() == before
    assert stored.load(path)[0].watermark_us == SECOND


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace('"watermark_us":1000000', '"watermark_us":2000000', 1), "checksum"),
        (lambda text: text[:-40], "checksum"),
        (lambda text: text.replace('"schema": 2', '"schema": 99'), "schema 99"),
        (lambda text: "garbage", "not a saved predictor"),
        (lambda text: "[]\n{}", "not a saved predictor"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_with_the_remedy(tmp_path: Path, damage: object, message: str) -> None:
    path = tmp_path / "state.json"
    predictor = Predictor()
    predictor.observe({"method": "sleep"}, SECOND, SECOND)
    stored.save(predictor, path)
    path.write_text(damage(path.read_text()))  # type: ignore[operator]
    with pytest.raises(stored.StateUnusable, match=message) as refused:
        stored.load(path)
    assert "remove it to start anew" in str(refused.value)
