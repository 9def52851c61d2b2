"""Boosted trees beside the online stack: exported exactly, adopted only when proven better, deposed alike, deterministic."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest

from engine.tasks import SECOND
from predictors import Predictor
from predictors.challenger import Challenger, ChallengerSettings, Fit, InBackground, at_once, bounded
from predictors.duration import WIDTH, DurationSettings
from predictors.errors import Errors
from predictors.trees import Trees, fit

SMALL = ChallengerSettings(refit_every=200, window=2000, judged=400, trees=20)


def table(rows: int = 3000, columns: int = 6, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    random_ = np.random.default_rng(seed)
    x = random_.normal(size=(rows, columns)).astype(np.float32)
    y = np.where(x[:, 0] > 0.3, 0.5, -0.2) * (x[:, 1] > 0) + 0.3 * x[:, 2] + random_.normal(0, 0.1, rows)
    return x, y


def test_flat_trees_say_what_the_library_s_own_model_says() -> None:
    from sklearn.ensemble import HistGradientBoostingRegressor

    x, y = table()
    ours = fit(x, y, rising=(2,), trees=30)
    theirs = HistGradientBoostingRegressor(
        max_iter=30,
        learning_rate=4.8 / 30,
        max_leaf_nodes=16,
        min_samples_leaf=20,
        l2_regularization=5.0,
        monotonic_cst=[0, 0, 1, 0, 0, 0],
        early_stopping=False,
        random_state=0,
    ).fit(x, y)
    fresh = np.random.default_rng(7).normal(size=(1500, 6))
    np.testing.assert_allclose(ours.predict_rows(fresh), theirs.predict(fresh), atol=1e-9)
    assert [ours.predict(row) for row in fresh[:50]] == pytest.approx(list(ours.predict_rows(fresh[:50])), abs=1e-12)


def test_trees_rise_where_they_must_and_are_restored_to_the_bit() -> None:
    x, y = table()
    trees = fit(x, y, rising=(2,), trees=30)
    restored = Trees.restored(trees.state())
    row = np.zeros(6)
    found = []
    for value in np.linspace(-3, 3, 60):
        row[2] = value
        found.append(trees.predict(row))
        assert restored.predict(row) == found[-1]
    assert found == sorted(found)
    assert found[-1] > found[0] + 0.5


def test_trees_without_any_split_are_a_constant() -> None:
    trees = fit(np.zeros((50, 3), dtype=np.float32), np.full(50, 0.25), rising=())
    assert trees.predict(np.ones(3)) == pytest.approx(0.25)
    assert list(trees.predict_rows(np.ones((2, 3)))) == pytest.approx([0.25, 0.25])


def challenger(refit: Callable[[Fit], Callable[[], Trees | None]] = at_once) -> Challenger:
    return Challenger(SMALL, Errors(200, 0.9998), rising=(), refit=refit)


def test_it_serves_only_after_being_better_by_a_hundredth_and_steps_down_alike() -> None:
    one = challenger()
    for _ in range(SMALL.judged):
        one.judge(1.0, 0.995)
    assert not one.serving
    for _ in range(2 * SMALL.judged):
        one.judge(1.0, 0.98)
    assert one.serving
    assert one.advantage == pytest.approx(0.02)
    for _ in range(2 * SMALL.judged):
        one.judge(1.0, 1.005)
    assert one.serving
    for _ in range(2 * SMALL.judged):
        one.judge(1.0, 1.02)
    assert not one.serving


def test_it_cannot_serve_before_it_was_judged_on_enough_tasks() -> None:
    one = challenger()
    for _ in range(SMALL.judged - 1):
        one.judge(1.0, 0.1)
    assert not one.serving


def test_a_refit_that_fails_leaves_the_trees_that_are_there() -> None:
    def broken(_fit: Fit) -> Callable[[], Trees | None]:
        raise MemoryError

    one = challenger(broken)
    before = one.trees = fit(*table(100, WIDTH), rising=(), trees=2)
    for _ in range(3 * SMALL.refit_every):
        one.learn(np.zeros(WIDTH), 0.1)
    assert one.trees is before
    assert one.refits == 0


def test_a_refit_beside_the_path_is_taken_when_it_is_there() -> None:
    waiting: list[Fit] = []
    done: list[Trees] = []

    def later(job: Fit) -> Callable[[], Trees | None]:
        waiting.append(job)
        return lambda: done[0] if done else None

    one = challenger(later)
    random_ = np.random.default_rng(3)
    for _ in range(2 * SMALL.refit_every):
        one.learn(random_.normal(size=WIDTH), 0.1)
    assert one.trees is None
    assert len(waiting) == 1
    done.append(waiting[0]())
    one.learn(np.zeros(WIDTH), 0.1)
    assert one.trees is done[0]


def test_the_thread_fits_what_would_be_fitted_at_once() -> None:
    x, y = table(500)
    background = InBackground()
    ask = background(lambda: fit(x, y, (), trees=5))
    background.close()
    found = ask()
    assert found is not None
    assert found.state() == fit(x, y, (), trees=5).state()


def test_what_trees_add_is_bounded_and_never_nonsense() -> None:
    assert bounded(50.0) == 1.0
    assert bounded(-50.0) == -1.0
    assert bounded(math.nan) == 0.0


def stream(count: int, seed: int = 5) -> list[tuple[dict[str, str | int | float], int]]:
    """Return tasks whose time depends on prompt length and LoRA in a way that no decayed mean along the keys can express."""
    rng = random.Random(seed)
    tasks = []
    for _ in range(count):
        prompt, loras = rng.randrange(5, 400), rng.choice([0, 1, 2, 3])
        log_s = 2.0 + (0.6 if 40 < prompt < 150 else 0.0) + (0.4 if loras >= 2 and prompt > 200 else 0.0)
        features: dict[str, str | int | float] = {
            "method": "text_to_image",
            "model": rng.choice(["a", "b"]),
            "user": f"u{rng.randrange(300)}",
            "prompt_length": prompt,
            "loras": loras,
        }
        tasks.append((features, round(math.exp(log_s + rng.gauss(0, 0.1)) * SECOND)))
    return tasks


def replay(predictor: Predictor, tasks: list[tuple[dict[str, str | int | float], int]]) -> list[float]:
    errors, now = [], 0
    for features, run_us in tasks:
        now += 20 * SECOND
        prediction = predictor.predict(features, now)
        errors.append(abs(math.log(run_us / prediction.p50_us)))
        predictor.observe(features, now + run_us, run_us, prediction=prediction)
    return errors


def test_where_trees_see_what_means_cannot_they_are_adopted_and_errors_fall() -> None:
    tasks = stream(2500)
    plain = replay(Predictor(DurationSettings(challenger=ChallengerSettings(refit_every=0))), tasks)
    predictor = Predictor(DurationSettings(challenger=SMALL))
    boosted = replay(predictor, tasks)
    standing = predictor.methods["text_to_image"].challenger
    assert standing.serving
    assert standing.refits >= 10
    assert sum(boosted[1500:]) < 0.7 * sum(plain[1500:])


def test_where_there_is_nothing_to_see_the_champion_goes_on() -> None:
    rng = random.Random(2)
    tasks = [(features, round(rng.lognormvariate(2.0, 0.3) * SECOND)) for features, _ in stream(1500)]
    predictor = Predictor(DurationSettings(challenger=SMALL))
    replay(predictor, tasks)
    assert predictor.methods["text_to_image"].challenger.refits > 0
    assert not predictor.methods["text_to_image"].challenger.serving


def test_the_same_labels_give_the_same_trees_and_the_same_standing() -> None:
    tasks = stream(900)
    first, second = (Predictor(DurationSettings(challenger=SMALL)) for _ in range(2))
    assert replay(first, tasks) == replay(second, tasks)
    ours, theirs = (p.methods["text_to_image"].challenger.state() for p in (first, second))
    assert ours == theirs
