"""Company in a Pod is learned as what it is: neither as a task's own slowness, nor forgotten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.events import TaskFinished, TaskStarted, TaskSubmitted
from engine.tasks import SECOND, Estimate, TaskSpec, TaskType
from predictors import OnlineForecaster
from predictors.company import CompanyCost


def submitted(forecaster: OnlineForecaster, now: int, name: str, model: str = "sd") -> Estimate:
    spec = TaskSpec(name, "t", "", TaskType.GC, "text_to_image", model, features=(("height", 512), ("width", 512)))
    [event, *_] = forecaster.stamp(now, [TaskSubmitted(spec)])
    assert isinstance(event, TaskSubmitted)
    assert event.estimate is not None
    return event.estimate


def ran(forecaster: OnlineForecaster, runs: int, run_us: int, alone_us: int, company_permille: int) -> OnlineForecaster:
    """So many runs, one after the other."""
    now = 0
    for number in range(runs):
        name = f"{run_us}-{number}"
        submitted(forecaster, now, name)
        forecaster.stamp(now, [TaskStarted(name, 1)])
        now += run_us
        finished = TaskFinished(name, 1, run_us=run_us, alone_us=alone_us, company_permille=company_permille)
        forecaster.stamp(now, [finished])
    return forecaster


def test_runs_in_company_teach_the_same_run_time_as_runs_alone() -> None:
    crowded = ran(OnlineForecaster(), 60, 30 * SECOND, 10 * SECOND, 3000)
    alone = ran(OnlineForecaster(), 60, 10 * SECOND, 10 * SECOND, 0)
    later = 60 * 30 * SECOND
    ours, theirs = submitted(crowded, later, "x"), submitted(alone, later, "x")
    assert ours.duration().p50 == pytest.approx(theirs.duration().p50, rel=0.1)
    assert ours.duration().p50 == pytest.approx(10 * SECOND, rel=0.2)


def test_the_cost_of_one_more_is_stamped_on_tasks() -> None:
    forecaster = OnlineForecaster()
    assert submitted(forecaster, 0, "first").marginal_permille == 0
    ran(forecaster, 5, 30 * SECOND, 10 * SECOND, 4000)
    assert submitted(forecaster, 200 * SECOND, "next").marginal_permille == 500


def test_pods_that_say_nothing_about_company_teach_as_they_did() -> None:
    plain = ran(OnlineForecaster(), 40, 30 * SECOND, 0, 0)
    assert submitted(plain, 40 * 30 * SECOND, "x").duration().p50 == pytest.approx(30 * SECOND, rel=0.2)
    assert submitted(plain, 40 * 30 * SECOND, "y").marginal_permille == 0


def test_what_was_learned_of_company_survives_a_restart(tmp_path: Path) -> None:
    forecaster = ran(OnlineForecaster(), 5, 30 * SECOND, 10 * SECOND, 4000)
    forecaster.save(tmp_path / "state")
    again = OnlineForecaster.load(tmp_path / "state")
    assert submitted(again, 200 * SECOND, "x") == submitted(forecaster, 200 * SECOND, "x")
    assert submitted(again, 200 * SECOND, "y").marginal_permille == 500


def test_sizes_and_models_are_told_apart_and_new_ones_get_what_is_usual() -> None:
    cost = CompanyCost()
    for _ in range(20):
        cost.observe("sd", 512 * 512, 15 * SECOND, 10 * SECOND, 1000)
        cost.observe("sd", 1024 * 1024, 20 * SECOND, 10 * SECOND, 1000)
    assert (cost.marginal_permille("sd", 512 * 512), cost.marginal_permille("sd", 1024 * 1024)) == (500, 1000)
    assert cost.marginal_permille("sd", 640 * 640) == pytest.approx(750, rel=0.05)
    assert cost.marginal_permille("new", 512 * 512) == pytest.approx(750, rel=0.05)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", ""]),
            st.integers(0, 10**7),
            st.integers(-1, 10**12),
            st.integers(-1, 10**12),
            st.integers(-1, 64_000),
        ),
        max_size=30,
    )
)
def test_whatever_is_told_the_cost_is_a_number_and_comes_back_as_it_was(
    runs: list[tuple[str, int, int, int, int]],
) -> None:
    cost = CompanyCost()
    for run in runs:
        cost.observe(*run)
    again = CompanyCost()
    again.restore(json.loads(json.dumps(cost.to_json())))
    for model, pixels, *_ in runs:
        assert cost.marginal_permille(model, pixels) >= 0
        assert again.marginal_permille(model, pixels) == cost.marginal_permille(model, pixels)
