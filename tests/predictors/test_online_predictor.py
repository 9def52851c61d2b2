"""The online predictor: its quantiles, its calibration, how it starts cold, forgets, drifts and stays bounded."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.tasks import SECOND
from predictors import LEVELS, Outcome, Prediction, Predictor
from predictors.duration import DurationSettings
from predictors.predictor import LONGEST_US
from predictors.residuals import PSEUDO, ResidualPool

MODELS = {"anime": 0.4, "photo": 1.0, "sketch": -0.5, "paint": 0.1}


def stream(seed: int, count: int, sigma: float = 0.3) -> list[tuple[dict[str, str | int | float], int]]:
    """Return features and true run times: models, users and steps matter, the rest is lognormal noise."""
    rng = random.Random(seed)
    users = {f"user-{i}": rng.gauss(0, 0.2) for i in range(40)}
    tasks = []
    for _ in range(count):
        model, user, steps = rng.choice(list(MODELS)), rng.choice(list(users)), rng.choice([20, 30, 50])
        features: dict[str, str | int | float] = {
            "method": "text_to_image",
            "model": model,
            "user": user,
            "steps": steps,
            "images": rng.choice([1, 4]),
        }
        log_s = 2.5 + MODELS[model] + users[user] + 0.3 * math.log(steps / 30) + rng.gauss(0, sigma)
        tasks.append((features, round(math.exp(log_s) * SECOND)))
    return tasks


def replay(
    predictor: Predictor, tasks: list[tuple[dict[str, str | int | float], int]], now: int = 0
) -> list[Prediction]:
    predictions = []
    for features, run_us in tasks:
        now += 20 * SECOND
        prediction = predictor.predict(features, now)
        predictions.append(prediction)
        predictor.observe(features, now + run_us, run_us, prediction=prediction)
    return predictions


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(1e-4, 1e7), max_size=90), st.floats(0, 1e6), st.sampled_from(["", "m"]))
def test_quantiles_never_cross_and_never_lie_below_what_has_elapsed(
    runs_s: list[float], elapsed_s: float, model: str
) -> None:
    predictor = Predictor()
    for i, run_s in enumerate(runs_s):
        predictor.observe({"method": "sleep", "model": model}, i * SECOND, max(1, round(run_s * SECOND)))
    for elapsed_us in (0, round(elapsed_s * SECOND)):
        prediction = predictor.predict({"method": "sleep", "model": "m"}, 100 * SECOND, elapsed_us=elapsed_us)
        assert list(prediction.quantiles_us) == sorted(prediction.quantiles_us)
        assert len(prediction.quantiles_us) == len(LEVELS)
        assert prediction.quantiles_us[0] >= min(elapsed_us, LONGEST_US)
        assert prediction.mean_us >= min(elapsed_us, LONGEST_US)


def test_intervals_cover_what_they_promise_where_nothing_drifts() -> None:
    tasks = stream(seed=7, count=4000)
    predictions = replay(Predictor(), tasks)[1500:]
    truth = [run_us for _, run_us in tasks[1500:]]
    for level, tolerance in ((0.1, 0.03), (0.5, 0.03), (0.9, 0.03), (0.99, 0.01)):
        place = LEVELS.index(level)
        below = sum(run <= p.quantiles_us[place] for run, p in zip(truth, predictions, strict=True)) / len(truth)
        assert below == pytest.approx(level, abs=tolerance)


def test_errors_come_near_the_noise_that_nobody_can_predict() -> None:
    tasks = stream(seed=3, count=3000, sigma=0.2)
    predictions = replay(Predictor(), tasks)[1500:]
    errors = [math.log(run / p.p50_us) for (_, run), p in zip(tasks[1500:], predictions, strict=True)]
    assert math.sqrt(sum(e * e for e in errors) / len(errors)) < 0.2 * 1.1


def test_the_mean_is_a_mean_and_not_a_median() -> None:
    tasks = stream(seed=5, count=3000, sigma=0.6)
    predictions = replay(Predictor(), tasks)[1000:]
    truth = sum(run for _, run in tasks[1000:])
    assert sum(p.mean_us for p in predictions) / truth == pytest.approx(1.0, abs=0.05)
    assert sum(p.p50_us for p in predictions) / truth < 0.9


def test_the_same_tasks_in_the_same_order_give_the_same_predictions() -> None:
    tasks = stream(seed=11, count=300)
    first, second = (replay(Predictor(), tasks) for _ in range(2))
    assert [(p.mean_us, p.quantiles_us) for p in first] == [(p.mean_us, p.quantiles_us) for p in second]


def test_a_declared_time_is_believed_at_first_and_learned_to_be_wrong() -> None:
    predictor, now = Predictor(), 0
    features = {"method": "sleep", "declared_us": 10 * SECOND}
    assert predictor.predict(features, now).p50_us == pytest.approx(10 * SECOND, rel=0.01)
    for _ in range(60):
        now += SECOND
        predictor.observe(features, now, 25 * SECOND)
    assert predictor.predict(features, now).p50_us == pytest.approx(25 * SECOND, rel=0.05)


def test_declared_times_that_hold_are_followed_to_times_never_seen() -> None:
    predictor, now, rng = Predictor(), 0, random.Random(1)
    for _ in range(200):
        now += SECOND
        declared_us = rng.randrange(SECOND // 100, 3 * SECOND)
        features = {"method": "sleep", "declared_us": declared_us}
        predictor.observe(features, now, round(declared_us * 1.02), prediction=predictor.predict(features, now))
    prediction = predictor.predict({"method": "sleep", "declared_us": 8 * SECOND}, now)
    assert prediction.p50_us == pytest.approx(8.16 * SECOND, rel=0.05)
    assert prediction.p99_us < 9 * SECOND


def test_seconds_of_a_sleep_count_as_declared() -> None:
    assert Predictor().predict({"method": "sleep", "seconds": 0.25}, 0).p50_us == pytest.approx(250_000, rel=0.01)


def test_two_methods_do_not_learn_from_each_other() -> None:
    predictor = Predictor()
    for i in range(50):
        predictor.observe({"method": "dreambooth"}, i * SECOND, 900 * SECOND)
        predictor.observe({"method": "sleep"}, i * SECOND, SECOND // 50)
    now = 60 * SECOND
    assert predictor.predict({"method": "dreambooth"}, now).p50_us == pytest.approx(900 * SECOND, rel=0.1)
    assert predictor.predict({"method": "sleep"}, now).p50_us == pytest.approx(SECOND // 50, rel=0.1)


def test_more_steps_than_ever_seen_take_longer() -> None:
    predictor, now = Predictor(), 0
    rng = random.Random(2)
    for _ in range(400):
        now += SECOND
        steps = rng.choice([10, 20, 40])
        features = {"method": "text_to_image", "model": "m", "steps": steps}
        prediction = predictor.predict(features, now)
        predictor.observe(
            features, now, round(0.2 * steps * SECOND * rng.lognormvariate(0, 0.05)), prediction=prediction
        )
    prediction = predictor.predict({"method": "text_to_image", "model": "m", "steps": 80}, now)
    assert 10 * SECOND < prediction.p50_us < 24 * SECOND


def test_a_running_task_that_outlives_its_p90_gets_a_later_one() -> None:
    predictor = Predictor()
    tasks = stream(seed=4, count=2000)
    replay(predictor, tasks)
    kept, unconditioned, alive = 0, 0, 0
    for features, run_us in stream(seed=4, count=6000)[2000:]:
        prediction = predictor.predict(features, 40_000 * SECOND)
        elapsed_us = round(1.2 * prediction.p50_us)
        if run_us > elapsed_us:
            later = predictor.remaining(prediction, elapsed_us)
            alive += 1
            kept += run_us <= later.p90_us
            unconditioned += run_us <= prediction.p90_us
            assert later.remaining().p50 == later.p50_us - elapsed_us
    assert alive > 500
    assert kept / alive == pytest.approx(0.9, abs=0.04)
    assert unconditioned / alive < 0.75


@pytest.mark.parametrize("factor", [1.5, 1 / 1.5])
def test_when_everything_drifts_the_level_follows_within_four_hundred_tasks(factor: float) -> None:
    predictor = Predictor()
    before = stream(seed=9, count=2500)
    replay(predictor, before)
    after = [(features, round(run_us * factor)) for features, run_us in stream(seed=9, count=3000)[2500:]]
    predictions = replay(predictor, after, now=2500 * 20 * SECOND)
    late = [math.log(run / p.p50_us) for (_, run), p in zip(after[300:], predictions[300:], strict=True)]
    assert abs(sum(late) / len(late)) < 0.05
    assert predictor.methods["text_to_image"].level.alarms >= 1


def test_one_busy_user_does_not_move_the_level_of_all() -> None:
    predictor = Predictor()
    replay(predictor, stream(seed=9, count=1500))
    now = 1500 * 20 * SECOND
    for _ in range(300):
        now += 5 * SECOND
        features = {"method": "text_to_image", "model": "photo", "user": "user-3", "steps": 30, "images": 1}
        predictor.observe(features, now, 200 * SECOND, prediction=predictor.predict(features, now))
    assert predictor.methods["text_to_image"].level.alarms == 0


def test_a_slower_gpu_model_is_learned_as_a_ratio_that_serves_unseen_models() -> None:
    predictor, now, rng = Predictor(), 0, random.Random(6)
    factors = {"a100": 1.0, "h100": 0.5, "t4": 3.0}
    for _ in range(600):
        now += 10 * SECOND
        gpu = rng.choice(list(factors))
        features = {"method": "text_to_image", "model": rng.choice("xyz"), "steps": 30}
        run_us = round(6 * SECOND * factors[gpu] * rng.lognormvariate(0, 0.1))
        predictor.observe(features, now, run_us, gpu_model=gpu, prediction=predictor.predict(features, now))
    fast, slow = (predictor.predict({"method": "text_to_image", "model": "new"}, now, gpu) for gpu in ("h100", "t4"))
    assert slow.p50_us / fast.p50_us == pytest.approx(6.0, rel=0.15)
    assert predictor.on(fast, "t4", now).quantiles_us == slow.quantiles_us


def test_a_timed_out_task_lengthens_the_tail_and_an_early_cancel_says_nothing() -> None:
    early, late, plain = Predictor(), Predictor(), Predictor()
    for predictor in (early, late, plain):
        replay(predictor, stream(seed=8, count=400))
    now = 10_000 * SECOND
    features = {"method": "text_to_image", "model": "photo", "user": "user-1", "steps": 30, "images": 1}
    for i in range(20):
        early.observe(features, now + i, 1 * SECOND, Outcome.CANCELLED)
        late.observe(features, now + i, 120 * SECOND, Outcome.TIMED_OUT)
    assert early.predict(features, now + 50).quantiles_us == plain.predict(features, now + 50).quantiles_us
    assert late.predict(features, now + 50).p90_us > 1.5 * plain.predict(features, now + 50).p90_us


def test_the_chance_of_failure_is_that_of_the_model() -> None:
    predictor = Predictor()
    for i in range(200):
        predictor.observe({"method": "g", "model": "broken"}, i * SECOND, SECOND, Outcome.FAILED)
        predictor.observe({"method": "g", "model": "sound"}, i * SECOND, SECOND)
        predictor.observe({"method": "g", "model": "unlucky"}, i * SECOND, SECOND, Outcome.LOST)
    chance = {
        m: predictor.predict({"method": "g", "model": m}, 200 * SECOND).failure_chance
        for m in ("broken", "sound", "new")
    }
    assert chance["broken"] > 0.9
    assert chance["sound"] < 0.1
    assert 0.3 < chance["new"] < 0.6


def test_state_stays_bounded_whatever_comes() -> None:
    predictor = Predictor(DurationSettings(cells=200))
    for i in range(1500):
        features = {"method": f"method-{i % 100}" if i % 2 else "g", "model": f"m{i}", "user": f"u{i}", "steps": i}
        predictor.observe(features, i * SECOND, SECOND + i)
    assert len(predictor.methods) <= 64
    model = predictor.methods["g"]
    assert len(model.ladder) <= 200
    assert all(len(table) <= 200 for table in model.tables())


def test_the_pool_keeps_the_latest_residuals_only() -> None:
    pool = ResidualPool(limit=PSEUDO)
    for _ in range(PSEUDO):
        pool.add(100.0)
    for i in range(PSEUDO):
        pool.add(i / PSEUDO)
    assert pool.learned == PSEUDO
    assert pool.quantile(0.9) == pytest.approx(0.9, abs=0.05)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(-9, 9), min_size=1, max_size=200), st.floats(0.001, 0.999))
def test_the_pool_s_distribution_is_the_inverse_of_its_quantiles(residuals: list[float], level: float) -> None:
    pool = ResidualPool()
    for residual in residuals:
        pool.add(residual)
    found = pool.quantile(level)
    assert pool.quantile(max(1e-6, pool.below(found) - 1e-9)) <= found + 1e-6
    assert pool.beyond(found, level) >= found


@pytest.mark.parametrize("value", ["many", math.nan, math.inf])
def test_a_feature_that_is_no_number_is_refused_by_name(value: str | float) -> None:
    with pytest.raises(ValueError, match="steps"):
        Predictor().predict({"method": "g", "steps": value}, 0)


def test_predictions_at_the_longest_there_is_do_not_cross() -> None:
    predictor = Predictor()
    for i in range(40):
        predictor.observe({"method": "g"}, i * SECOND, LONGEST_US // (1 + i % 5))
    prediction = predictor.predict({"method": "g"}, 40 * SECOND)
    assert list(prediction.quantiles_us) == sorted(prediction.quantiles_us)
    assert prediction.quantiles_us[-1] == LONGEST_US


def test_missing_features_are_fine() -> None:
    prediction = Predictor().predict({}, 0)
    assert 0 < prediction.p50_us <= prediction.p99_us
    assert prediction.gpu_memory_bytes == 0


def test_when_one_model_becomes_slower_its_own_history_follows_and_the_others_stay() -> None:
    predictor = Predictor()
    replay(predictor, stream(seed=9, count=1500))
    after = [
        (features, round(run_us * (1.6 if features["model"] == "photo" else 1.0)))
        for features, run_us in stream(seed=9, count=2300)[1500:]
    ]
    predictions = replay(predictor, after, now=1500 * 20 * SECOND)
    off = {
        which: [
            math.log(run / p.p50_us)
            for (features, run), p in zip(after[200:], predictions[200:], strict=True)
            if (features["model"] == "photo") is which
        ]
        for which in (True, False)
    }
    assert predictor.methods["text_to_image"].shifts.alarms == 1
    assert predictor.methods["text_to_image"].level.alarms == 0
    assert all(abs(sum(errors) / len(errors)) < 0.06 for errors in off.values())


def test_when_one_gpu_model_becomes_slower_its_ratio_follows() -> None:
    predictor, now = Predictor(), 0
    for i, (features, run_us) in enumerate(stream(seed=6, count=1600)):
        now += 20 * SECOND
        gpu_model, slower = ("t4", 3.0 if i < 1200 else 6.0) if i % 2 else ("a100", 1.0)
        prediction = predictor.predict(features, now, gpu_model)
        predictor.observe(features, now, round(run_us * slower), gpu_model=gpu_model, prediction=prediction)
    assert predictor.speeds.shifts.alarms == 1
    ratio = predictor.speeds.log_ratio("text_to_image", "t4", now / SECOND)
    assert math.exp(ratio) == pytest.approx(6.0, rel=0.15)


def test_a_gpu_model_nobody_ran_on_starts_from_what_it_is_known_to_sustain() -> None:
    predictor, now = Predictor(), 0
    features = {"method": "text_to_image", "model": "m", "family": "sdxl"}
    for _ in range(40):
        now += 20 * SECOND
        predictor.observe(features, now, 4 * SECOND, gpu_model="NVIDIA A100-SXM4-80GB")
    slow = predictor.predict(features, now, "Tesla T4").p50_us
    assert 15 * SECOND < slow < 40 * SECOND
    assert predictor.predict(features, now, "unheard-of").p50_us == predictor.predict(features, now).p50_us
    for _ in range(5):
        now += 20 * SECOND
        predictor.observe(features, now, 12 * SECOND, gpu_model="Tesla T4")
    assert predictor.predict(features, now, "Tesla T4").p50_us == pytest.approx(12 * SECOND, rel=0.15)


def test_a_new_model_of_a_known_family_starts_from_its_arithmetic() -> None:
    predictor = Predictor()
    small, large = (
        predictor.predict({"method": "text_to_image", "model": "m", "family": family, "steps": 30}, 0).p50_us / SECOND
        for family in ("sd15", "sdxl")
    )
    assert large == pytest.approx(3.5, rel=0.05)
    assert 0.5 < small < 1.5
