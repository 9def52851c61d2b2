"""Promised times, scored on short simulations with the production engine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sim.configuration import ConfigError, SimulationConfig
from sim.promises import at_load, score, study, told
from sim.synthetic import SyntheticConfig

STEADY = SimulationConfig(
    synthetic=SyntheticConfig(tasks=1_400), nodes=1, gpus_per_node=4, forecaster="oracle", profile="fifo", seed=3
)


def test_the_p90_holds_for_about_nine_of_ten_tasks_of_a_short_run() -> None:
    found = score(at_load(STEADY, 0.7), 0.7)
    assert len(found.outcomes) > 700
    assert 0.8 <= found.coverage("finish_p90") <= 0.99
    assert 0.3 <= found.coverage("finish_p50") <= 0.8
    assert found.coverage("finish_p50") <= found.coverage("finish_p90")
    assert "our P90 of the finish held for" in told(found)


def test_looking_ahead_changes_no_decision() -> None:
    from sim.simulate import simulate

    config = replace(STEADY, synthetic=SyntheticConfig(tasks=150))
    plain = simulate(config).decisions_digest
    looked = []

    def beside(engine: object) -> object:
        from sim.promises import PromiseScore, Scorer

        looked.append(Scorer(engine, PromiseScore(1.0, 0), look_us=1))  # type: ignore[arg-type]
        return looked[0]

    assert simulate(config, beside=beside).decisions_digest == plain  # type: ignore[arg-type]
    assert looked[0].foresight.outlook.at > 0


def test_equal_runs_promise_the_same() -> None:
    config = replace(STEADY, synthetic=SyntheticConfig(tasks=700))
    first, second = score(config, 1.0), score(config, 1.0)
    assert [each.promise for each in first.outcomes] == [each.promise for each in second.outcomes]


def test_a_load_is_what_the_run_times_make_of_it() -> None:
    config = at_load(STEADY, 0.5)
    workload = config.workload()
    busy = sum(arrival.truth.work_us or 0 for arrival in workload.arrivals) / (4 * workload.span_us)
    assert busy == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("load", [0, -1, 3])
def test_a_load_that_is_none_is_refused(load: float) -> None:
    with pytest.raises(ConfigError, match="load"):
        at_load(STEADY, load)


def test_a_study_runs_every_load_and_seed() -> None:
    config = replace(STEADY, synthetic=SyntheticConfig(tasks=60))
    assert [(each.load, each.seed) for each in study(config, (0.5, 0.9), seeds=2)] == [
        (0.5, 0),
        (0.5, 1),
        (0.9, 0),
        (0.9, 1),
    ]
