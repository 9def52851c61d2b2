"""Differences between profiles, seed by seed."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sim.configuration import ConfigError, SimulationConfig
from sim.paired import Difference, compare_over_seeds, difference, render_differences

CONFIG = SimulationConfig(synthetic_tasks=250, nodes=1, gpus_per_node=4, rate_scale=30, forecaster="declared")


def test_an_interval_is_students_own():
    found = difference("b", "m", [(10.0, 9.0), (20.0, 18.0), (30.0, 27.0)])
    assert found.mean == pytest.approx(-2.0)
    assert found.baseline_mean == pytest.approx(20.0)
    assert found.half_width == pytest.approx(4.30 * 1.0 / 3**0.5)
    assert not found.clear
    assert Difference("b", "m", 1.0, -2.0, 1.9).clear


def test_a_profile_does_not_differ_from_itself():
    runs, differences = compare_over_seeds(CONFIG, ["fifo", "fifo"], 2)
    assert len(runs) == 4
    assert runs[0].config.seed != runs[2].config.seed
    assert all(each.mean == 0 and each.half_width == 0 and not each.clear for each in differences)


def test_urgent_tasks_wait_less_under_aigc_than_under_fifo():
    seen = []
    _, differences = compare_over_seeds(CONFIG, ["fifo", "aigc"], 4, lambda share, text: seen.append(share))
    urgent = next(each for each in differences if each.measure == "mean waiting of urgent tasks, s")
    assert urgent.mean < 0
    assert seen == sorted(seen)
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(render_differences(differences, "fifo"))
    assert "mean waiting of urgent tasks, s" in console.export_text()


def test_too_few_profiles_or_seeds_are_refused():
    with pytest.raises(ConfigError, match="compare"):
        compare_over_seeds(CONFIG, ["fifo"], 3)
    with pytest.raises(ConfigError, match="seeds"):
        compare_over_seeds(CONFIG, ["fifo", "aigc"], 1)
