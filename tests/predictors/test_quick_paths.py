"""What is worked out in a quick way is what the plain formula says: for one task to the bit, for many to the microsecond."""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.tasks import SECOND
from predictors import Predictor
from predictors.challenger import ChallengerSettings
from predictors.duration import MEMORIES, DurationSettings
from predictors.features import Request, read_request
from predictors.recursive import RecursiveLeastSquares
from predictors.residuals import ResidualPool
from predictors.trees import LEAVES, Trees, fit

LEARNED = 700
NOW = (LEARNED + 1) * 20 * SECOND


def feature(rng: random.Random) -> dict[str, str | int | float]:
    return {
        "method": "text_to_image",
        "model": rng.choice(["a", "b", "c"]),
        "user": f"u{rng.randrange(9)}",
        "kind": rng.choice(["", "TXT_2_IMG"]),
        "family": rng.choice(["", "sd15", "sdxl"]),
        "images": rng.choice([1, 4, 8]),
        "steps": rng.choice([10, 30, 90]),
        "loras": rng.choice([0, 1]),
        "prompt_length": rng.choice([10, 50, 200]),
        "in_flight": rng.randrange(5),
    }


@cache
def learned(serving: bool) -> Predictor:
    challenger = ChallengerSettings(refit_every=200, trees=8, margin=9.0)
    predictor, rng = Predictor(DurationSettings(challenger=challenger)), random.Random(3)
    for i in range(LEARNED):
        features, now = feature(rng), (i + 1) * 20 * SECOND
        run_us = round(5e6 * float(features["images"]) ** 0.3 * rng.lognormvariate(0, 0.3))
        predictor.observe(
            features, now, run_us, prediction=predictor.predict(features, now), gpu_model=rng.choice(["a100", "t4"])
        )
    challenged = predictor.methods["text_to_image"].challenger
    assert challenged.trees is not None
    challenged.serving = serving
    return predictor


def requests(count: int, seed: int = 8) -> list[Request]:
    rng, made = random.Random(seed), []
    for i in range(count):
        features = feature(rng)
        if i % 7 == 0:
            features["model"], features["user"] = f"new-{i % 3}", f"nobody-{i}"
        if i % 11 == 0:
            features["declared_us"] = 3 * SECOND
        if i % 13 == 0:
            features["method"] = "dreambooth"
        made.append(read_request(features))
    return made


@pytest.mark.parametrize("serving", [False, True])
@pytest.mark.parametrize("gpu_model", ["*", "t4"])
def test_many_are_predicted_as_each_alone(serving: bool, gpu_model: str) -> None:
    predictor, asked = learned(serving), requests(200)
    found = predictor.predict_many(asked, NOW, gpu_model)
    assert found.quantiles_us.shape == (200, 14)
    for place, request in enumerate(asked):
        alone = predictor.predict(request, NOW, gpu_model)
        assert found.quantiles_us[place] == pytest.approx(alone.quantiles_us, abs=1, rel=1e-9)
        assert found.means_us[place] == pytest.approx(alone.mean_us, abs=1, rel=1e-9)
    assert len({int(us) for us in found.means_us}) > 50


def test_many_are_predicted_before_anything_was_learned_and_none_are_none() -> None:
    predictor, asked = Predictor(), requests(30)
    found = predictor.predict_many(asked, NOW)
    for place, request in enumerate(asked):
        assert found.means_us[place] == pytest.approx(predictor.predict(request, NOW).mean_us, abs=1)
    assert (np.diff(found.quantiles_us, axis=1) >= 0).all()
    assert len(predictor.predict_many([], NOW).means_us) == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(-10_000, 10_000_000))
def test_a_look_says_of_recent_residuals_what_their_tables_say(seed: int, later_s: int) -> None:
    model, now_s = learned(True).methods["text_to_image"], NOW / SECOND + later_s
    request = read_request(feature(random.Random(seed)))
    row = model.look(request, now_s).row
    tables = model.tables()
    for place, (_, strength) in enumerate(MEMORIES):
        assert row[5 + place] == tables[place].shrunk(request.memories[place], now_s, 0.0, strength)
    assert row[14] == math.log1p(tables[6].weight(request.model, now_s)) - 1.0
    assert row[19] == math.log1p(tables[0].weight(request.user, now_s)) - 2.0


def walked(trees: Trees, row: Any) -> float:
    total = trees.base
    ends = [*trees.starts[1:], len(trees.features)]
    for tree, (begin, end) in enumerate(zip(trees.starts, ends, strict=True)):
        left = (1 << LEAVES) - 1
        for split in range(begin, end):
            if row[trees.features[split]] > trees.thresholds[split]:
                left &= ~int(trees.struck[split])
        total += trees.values[tree * LEAVES + (left & -left).bit_length() - 1]
    return float(total)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31))
def test_trees_say_of_one_row_and_of_many_what_walking_them_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 6, (120, 5)).astype(np.float32)  # Few values: many lie on a threshold's side exactly.
    trees = fit(rows, rng.normal(size=120) + rows[:, 1], (1,), trees=4)
    fresh = rng.integers(-1, 7, (20, 5)) + rng.choice([0.0, 0.5], (20, 5))
    plain = [walked(trees, row) for row in fresh]
    assert [trees.predict(row) for row in fresh] == pytest.approx(plain, abs=1e-12)
    assert list(trees.predict_rows(fresh)) == pytest.approx(plain, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-8, 8), min_size=1, max_size=400),
    st.floats(-10, 10),
    st.lists(st.floats(0.001, 0.999), max_size=9),
)
def test_what_lies_beyond_is_told_for_several_levels_as_for_each(
    residuals: list[float], gone: float, levels: list[float]
) -> None:
    pool = ResidualPool(100)
    for residual in residuals:
        pool.add(residual)
        pool.quantile(0.9999)  # The tail's excess is asked for, so that keeping an old one would show.
    values = pool.state()["order"]
    assert isinstance(values, list)
    ordered = sorted(values)
    found = pool.all_beyond(gone, levels)
    assert found == [pool.beyond(gone, level) for level in levels]
    fresh = ResidualPool(100)
    state = pool.state()
    fresh.restore(**state)  # type: ignore[arg-type]
    assert fresh.all_beyond(gone, levels) == found
    rest = 1.0 - fresh.below(gone)
    for level, said in zip(levels, found, strict=True):
        if gone < ordered[-1]:
            assert said == pytest.approx(max(gone, fresh.quantile(1.0 - rest * (1.0 - level))), abs=1e-12)
        above = len(ordered) - bisect_right(ordered, said)
        assert said >= gone or above == 0


def test_least_squares_learn_what_the_plain_recursion_learns() -> None:
    rng, quick = np.random.default_rng(4), RecursiveLeastSquares([0.0] * 12, ridge=2.0, forgetting=0.998)
    weights, covariance = np.zeros(12), np.eye(12) / 2.0
    for _ in range(400):
        row, target, weight = rng.normal(size=12), rng.normal(), rng.uniform(0.2, 1.0)
        gain = covariance @ row / (0.998 / weight + row @ covariance @ row)
        weights = weights + gain * (target - row @ weights)
        covariance = covariance - np.outer(gain, covariance @ row)
        if np.trace(covariance) < 6.0:
            covariance = covariance / 0.998
        quick.learn(row, target, weight)
    assert quick.weights == pytest.approx(weights, abs=1e-9)
    assert quick.covariance == pytest.approx(covariance, abs=1e-9)
