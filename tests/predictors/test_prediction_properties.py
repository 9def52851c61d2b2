"""What holds of every prediction, whatever was learned: order, growth with size, no double counting, no view of the future."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.tasks import SECOND
from predictors import Outcome, Prediction, Predictor, stored
from predictors.challenger import ChallengerSettings
from predictors.duration import DurationSettings
from predictors.gentd26 import FAILED, SUCCEED, Row
from predictors.replay import Replay

Features = dict[str, str | int | float]
SETTINGS = DurationSettings(challenger=ChallengerSettings(refit_every=80, judged=80, window=400, trees=8, margin=-1.0))
"""Trees soon, and serving whatever they are worth: every property must hold of them too."""

sizes = st.fixed_dictionaries(
    {
        "steps": st.integers(1, 150),
        "width": st.integers(64, 2048),
        "height": st.integers(64, 2048),
        "images": st.integers(1, 16),
    }
)
tasks = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["text_to_image", "dreambooth"]),
        "model": st.sampled_from(["a", "b", ""]),
        "user": st.sampled_from(["u", "v", "w"]),
        "kind": st.sampled_from(["", "TXT_2_IMG"]),
        "family": st.sampled_from(["", "sd15", "sdxl"]),
        "loras": st.integers(0, 3),
        "prompt_length": st.integers(0, 500),
        "guidance": st.sampled_from([0.0, 1.0, 7.5]),
    }
)
outcomes = st.sampled_from([Outcome.FINISHED] * 6 + list(Outcome))
histories = st.lists(
    st.tuples(tasks, sizes, st.floats(0.01, 1e5), outcomes, st.sampled_from(["*", "a100", "t4"])), max_size=25
)


def grown(seed: int = 1, count: int = 400, predictor: Predictor | None = None) -> Predictor:
    """Return a predictor with a past in which steps, sizes and pictures even made tasks quicker, and whose trees serve."""
    predictor, rng = predictor or Predictor(SETTINGS), random.Random(seed)
    for i in range(count):
        now = (i + 1) * 20 * SECOND
        features: Features = {
            "method": "text_to_image",
            "model": rng.choice("ab"),
            "user": rng.choice("uvw"),
            "family": rng.choice(["", "sd15", "sdxl"]),
            "steps": rng.choice([10, 30, 90]),
            "width": rng.choice([256, 512, 1024]),
            "images": rng.choice([1, 4]),
            "prompt_length": rng.randrange(300),
        }
        run_s = 900.0 / float(features["steps"]) / float(features["images"]) * rng.lognormvariate(0, 0.3)
        prediction = predictor.predict(features, now)
        predictor.observe(
            features, now, round(run_s * SECOND), prediction=prediction, gpu_model=rng.choice(["a100", "t4"])
        )
        predictor.memory.learn(prediction.request, now / SECOND, round(rng.uniform(2, 9) * 2**30))
    return predictor


def lived(history: list[tuple[Any, Any, float, Outcome, str]], predictor: Predictor, start: int = 0) -> Predictor:
    for i, (task, size, run_s, outcome, gpu_model) in enumerate(history):
        now = (start + i + 1) * 30 * SECOND
        features = {**task, **size}
        predictor.observe(
            features,
            now,
            round(run_s * SECOND),
            outcome,
            gpu_model,
            prediction=predictor.predict(features, now) if i % 3 else None,
            peak_gpu_memory_bytes=round(run_s) * 2**20,
            allotted_gpu_memory_bytes=2**31,
        )
    return predictor


def figures(prediction: Prediction) -> tuple[object, ...]:
    return (prediction.mean_us, prediction.quantiles_us, prediction.failure_chance, prediction.gpu_memory_bytes)


GROWN = grown()
NOW = 401 * 20 * SECOND


def test_the_trees_of_the_grown_predictor_serve() -> None:
    challenger = GROWN.methods["text_to_image"].challenger
    assert challenger.serving
    assert challenger.trees is not None
    assert len(challenger.trees.starts) > 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(histories, tasks, sizes, st.sampled_from(["*", "a100", "t4", "unheard-of"]))
def test_quantiles_are_positive_and_never_cross(history: Any, task: Any, size: Any, gpu_model: str) -> None:
    prediction = lived(history, Predictor(SETTINGS)).predict({**task, **size}, 10**9, gpu_model)
    assert prediction.quantiles_us[0] > 0
    assert list(prediction.quantiles_us) == sorted(prediction.quantiles_us)
    assert 0 < prediction.mean_us <= prediction.p99_us
    assert 0.0 < prediction.failure_chance < 1.0


@settings(max_examples=150, deadline=None, derandomize=True)
@given(tasks, sizes, sizes, st.sampled_from(["*", "a100", "t4"]))
def test_more_steps_pixels_or_pictures_never_lower_a_prediction(
    task: Any, one: Any, other: Any, gpu_model: str
) -> None:
    less, more = ({name: pick(one[name], other[name]) for name in one} for pick in (min, max))
    for predictor in (GROWN, Predictor(SETTINGS)):
        low, high = (predictor.predict({**task, **size}, NOW, gpu_model) for size in (less, more))
        assert all(a <= b for a, b in zip(low.quantiles_us, high.quantiles_us, strict=True))
        assert low.mean_us <= high.mean_us
        assert low.gpu_memory_bytes <= high.gpu_memory_bytes


@settings(max_examples=60, deadline=None, derandomize=True)
@given(histories, sizes, sizes)
def test_no_history_makes_larger_pictures_seem_quicker_or_smaller(history: Any, one: Any, other: Any) -> None:
    less, more = ({name: pick(one[name], other[name]) for name in one} for pick in (min, max))
    predictor = lived(history, Predictor(SETTINGS))
    task = {"method": "text_to_image", "model": "a", "user": "u", "family": "sdxl"}
    low, high = (predictor.predict({**task, **size}, 10**9) for size in (less, more))
    assert all(a <= b for a, b in zip(low.quantiles_us, high.quantiles_us, strict=True))
    assert low.gpu_memory_bytes <= high.gpu_memory_bytes


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.dictionaries(
        st.text(max_size=12) | st.sampled_from(["model", "user", "family", "kind", "style", "lora_set", "method"]),
        st.text(max_size=12),
        max_size=6,
    ),
    st.text(max_size=8),
)
def test_unknown_keys_and_names_never_raise(features: dict[str, str], gpu_model: str) -> None:
    numeric = {"images", "steps", "width", "height", "loras", "prompt_length", "declared_us", "seconds"}
    kept = {
        k: v
        for k, v in features.items()
        if k not in numeric and k not in {"in_flight", "in_flight_model", "weights_bytes"}
    }
    kept.pop("guidance", None)
    prediction = GROWN.predict(kept, NOW, gpu_model)
    assert list(prediction.quantiles_us) == sorted(prediction.quantiles_us)
    assert GROWN.remaining(GROWN.on(prediction, gpu_model + "x", NOW), SECOND).p90_us >= SECOND


@settings(max_examples=30, deadline=None, derandomize=True)
@given(histories, tasks, sizes)
def test_observing_an_attempt_twice_is_observing_it_once(history: Any, task: Any, size: Any) -> None:
    once, twice = Predictor(SETTINGS), Predictor(SETTINGS)
    for predictor, times in ((once, 1), (twice, 2)):
        for i, (of, at, run_s, outcome, gpu_model) in enumerate(history):
            for _ in range(times):
                predictor.observe(
                    {**of, **at}, (i + 1) * SECOND, round(run_s * SECOND), outcome, gpu_model, identity=f"task-{i}/1"
                )
    assert figures(once.predict({**task, **size}, 10**9)) == figures(twice.predict({**task, **size}, 10**9))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(histories, histories, tasks, sizes)
def test_saved_and_restored_is_the_same_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, before: Any, after: Any, task: Any, size: Any
) -> None:
    path = tmp_path_factory.mktemp("state") / "predictor.json"
    kept = lived(before, Predictor(SETTINGS))
    stored.save(kept, path)
    restored, _ = stored.load(path)
    again = path.with_name("again.json")
    stored.save(restored, again)
    assert again.read_bytes() == path.read_bytes()
    lived(after, kept, 100)
    lived(after, restored, 100)
    assert figures(restored.predict({**task, **size}, 10**10)) == figures(kept.predict({**task, **size}, 10**10))


def test_a_grown_predictor_with_serving_trees_is_restored_to_the_bit(tmp_path: Path) -> None:
    kept = grown(seed=3)
    stored.save(kept, tmp_path / "state.json")
    restored, _ = stored.load(tmp_path / "state.json")
    grown(seed=4, count=120, predictor=kept)
    grown(seed=4, count=120, predictor=restored)
    stored.save(kept, tmp_path / "one.json")
    stored.save(restored, tmp_path / "two.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


rows = st.lists(
    st.tuples(
        st.sampled_from("ab"), st.sampled_from("uvw"), st.floats(0.5, 4000.0), st.sampled_from([SUCCEED, FAILED])
    ),
    max_size=30,
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows, rows, rows)
def test_changing_the_future_changes_no_past_prediction(past: Any, one: Any, other: Any) -> None:
    made = []
    for future in (one, other):
        replay = Replay(0, Predictor(SETTINGS))
        replay.run(
            [
                Row((i + 1) * 30 * SECOND, round(run_s * SECOND), status, user, model, "", 1.0, 30.0, 0, 0.0)
                for i, (model, user, run_s, status) in enumerate([*past, *future])
            ]
        )
        made.append([(seen.quantiles_s, seen.mean_s, seen.failure_chance) for seen in replay.seen[: len(past)]])
    assert made[0] == made[1]
