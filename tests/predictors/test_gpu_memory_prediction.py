"""GPU memory: exact weights, analytic activations, a conformal margin, and what running out of memory teaches."""

from __future__ import annotations

import random

import pytest

from engine.tasks import SECOND
from predictors import Outcome, Predictor
from predictors.memory import GIB

SD15 = {"method": "text_to_image", "model": "sd", "family": "sd15", "width": 512, "height": 512, "images": 1}


def test_a_known_model_has_an_estimate_before_anything_ran() -> None:
    weights, activations = 2.55 * GIB, 1760 * 512 * 512
    predicted = Predictor().predict(SD15, 0).gpu_memory_bytes
    assert weights + activations < predicted < 1.25 * (weights + activations)


def test_the_weights_of_a_registered_model_are_taken_exactly() -> None:
    small, large = (Predictor().predict({**SD15, "weights_bytes": size}, 0).gpu_memory_bytes for size in (GIB, 9 * GIB))
    assert large - small == pytest.approx(8 * GIB, rel=0.2)


def test_more_and_larger_pictures_need_more() -> None:
    predictor = Predictor()
    sizes = [
        predictor.predict({**SD15, "images": n, "width": w, "height": w}, 0).gpu_memory_bytes
        for n, w in ((1, 512), (4, 512), (4, 1024))
    ]
    assert sizes == sorted(sizes)
    assert sizes[2] > 2 * sizes[0]


def test_a_model_of_unknown_size_has_none_until_it_was_measured() -> None:
    predictor = Predictor()
    unknown = {"method": "text_to_image", "model": "tiny"}
    assert predictor.predict(unknown, 0).gpu_memory_bytes == 0
    predictor.observe(unknown, SECOND, SECOND, peak_gpu_memory_bytes=64 * 2**20)
    assert 64 * 2**20 <= predictor.predict(unknown, SECOND).gpu_memory_bytes < 100 * 2**20


def test_the_margin_covers_ninety_nine_in_a_hundred_peaks() -> None:
    predictor, rng, over, now = Predictor(), random.Random(3), 0, 0
    for i in range(2000):
        now += SECOND
        features = {**SD15, "images": rng.choice([1, 2, 4])}
        peak = round((3 * GIB + 2200 * 512 * 512 * features["images"]) * rng.lognormvariate(0, 0.03))
        over += i >= 500 and peak > predictor.predict(features, now).gpu_memory_bytes
        predictor.observe(features, now, SECOND, peak_gpu_memory_bytes=peak)
    assert over / 1500 < 0.02
    predicted = predictor.predict({**SD15, "images": 1}, now).gpu_memory_bytes
    assert predicted < 1.2 * (3 * GIB + 2200 * 512 * 512)


def test_running_out_of_memory_raises_the_estimate_to_the_larger_of_a_fifth_more_and_what_was_measured() -> None:
    for measured, expected in ((0, 4.8 * GIB), (6 * GIB, 6 * GIB)):
        predictor = Predictor()
        predictor.observe(
            SD15,
            SECOND,
            SECOND,
            Outcome.OUT_OF_MEMORY,
            peak_gpu_memory_bytes=measured,
            allotted_gpu_memory_bytes=4 * GIB,
        )
        assert predictor.predict(SD15, SECOND).gpu_memory_bytes == pytest.approx(expected, rel=0.001)


def test_running_out_again_raises_it_again() -> None:
    predictor, seen = Predictor(), []
    for i in range(3):
        predictor.observe(SD15, i, SECOND, Outcome.OUT_OF_MEMORY, allotted_gpu_memory_bytes=GIB)
        seen.append(predictor.predict(SD15, i).gpu_memory_bytes)
    assert seen[1] >= 1.19 * seen[0]
    assert seen[2] >= 1.19 * seen[1]
