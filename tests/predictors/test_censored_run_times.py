"""Ends that were cut off are bounds and not data points: what is learned from them is neither too short nor too long."""

from __future__ import annotations

import math
import random

import pytest

from engine.tasks import SECOND
from predictors import Outcome, Predictor
from predictors.tobit import beyond

FEATURES: dict[str, str | int | float] = {"method": "text_to_image", "model": "m", "user": "u"}


@pytest.mark.parametrize("bound", [-6.0, -1.0, 0.0, 1.0, 3.0, 8.0, 29.9, 30.1])
def test_a_bound_says_more_the_higher_it_lies(bound: float) -> None:
    value, weight = beyond(bound)
    lower_value, lower_weight = beyond(bound - 0.5)
    assert value > max(bound, 0.0)
    assert 0.0 <= lower_weight < weight <= 1.0
    assert value > lower_value


def test_steps_of_tobit_find_the_centre_of_a_normal_that_is_cut_off_at_its_median() -> None:
    rng = random.Random(4)
    bound = 1.0
    seen = [min(rng.gauss(1.0, 1.0), bound) for _ in range(20_000)]
    centre = 0.0
    for _ in range(60):
        weights, total = 0.0, 0.0
        for value in seen:
            offset, weight = beyond(bound - centre) if value >= bound else (value - centre, 1.0)
            weights += weight
            total += weight * offset
        centre += total / weights
    assert centre == pytest.approx(1.0, abs=0.03)


def learned(limit_s: float, *, censored: bool, count: int = 600) -> tuple[float, float]:
    """Return P50 and P90 in seconds after tasks of a median of 20 s, each stopped at the limit: as bounds, or as ends."""
    predictor, rng, now = Predictor(), random.Random(8), 0
    for _ in range(count):
        now += 30 * SECOND
        run_s = rng.lognormvariate(math.log(20), 0.4)
        prediction = predictor.predict(FEATURES, now)
        stopped = run_s > limit_s
        outcome = Outcome.TIMED_OUT if stopped and censored else Outcome.FINISHED
        ended_s = min(run_s, limit_s)
        predictor.observe(FEATURES, now, round(ended_s * SECOND), outcome, prediction=prediction)
    prediction = predictor.predict(FEATURES, now)
    return prediction.p50_us / SECOND, prediction.p90_us / SECOND


@pytest.mark.parametrize("limit_s", [18.0, 22.0, 30.0])
def test_a_limit_that_stops_many_tasks_does_not_make_them_look_quick(limit_s: float) -> None:
    median_s, p90_s = learned(limit_s, censored=True)
    assert median_s == pytest.approx(20.0, rel=0.15)
    assert p90_s > 1.05 * learned(limit_s, censored=False)[1]


def test_an_out_of_memory_says_that_the_task_would_have_run_longer() -> None:
    predictor, now = Predictor(), 0
    rng = random.Random(1)
    for _ in range(300):
        now += 30 * SECOND
        predictor.observe(FEATURES, now, round(rng.lognormvariate(3.0, 0.2) * SECOND))
    before = predictor.predict(FEATURES, now).p90_us
    for _ in range(20):
        predictor.observe(FEATURES, now, 60 * SECOND, Outcome.OUT_OF_MEMORY)
    assert predictor.predict(FEATURES, now).p90_us > before


def test_tasks_stopped_at_once_teach_nothing() -> None:
    plain, stopped = Predictor(), Predictor()
    rng, now = random.Random(1), 0
    for _ in range(300):
        now += 30 * SECOND
        run_us = round(rng.lognormvariate(3.0, 0.2) * SECOND)
        plain.observe(FEATURES, now, run_us)
        stopped.observe(FEATURES, now, run_us)
        stopped.observe(FEATURES, now, SECOND, Outcome.CANCELLED)
    assert stopped.predict(FEATURES, now).quantiles_us == plain.predict(FEATURES, now).quantiles_us
