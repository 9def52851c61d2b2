"""Keyed draws and bounded summaries."""

from __future__ import annotations

import math
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from sim.draws import choice, exponential, lognormal, normal, unit
from sim.sketches import Bins, Sketch, jain


def test_a_draw_depends_on_its_identity_and_seed_and_on_nothing_else():
    first = unit(1, "noise", "task-1", 1)
    unit(1, "noise", "task-2", 1)
    assert unit(1, "noise", "task-1", 1) == first
    assert unit(2, "noise", "task-1", 1) != first
    assert unit(1, "noise", "task-1", 2) != first


def test_draws_have_the_moments_they_promise():
    draws = [normal(3, "n", number) for number in range(4000)]
    assert abs(sum(draws) / 4000) < 0.06
    assert abs(sum(draw * draw for draw in draws) / 4000 - 1) < 0.1
    waits = [exponential(10.0, 3, "e", number) for number in range(4000)]
    assert abs(sum(waits) / 4000 - 10) < 0.6
    assert lognormal(0.0, 3, "x") == 1.0
    assert {choice(3, 3, "c", number) for number in range(100)} == {0, 1, 2}


def test_a_sketch_knows_quantiles_within_one_percent_or_so():
    source = random.Random(5)
    values = sorted(round(source.lognormvariate(15, 1.5)) for _ in range(20_000))
    sketch = Sketch()
    for value in values:
        sketch.add(value)
    for share in (0.1, 0.5, 0.9, 0.99):
        exact = values[math.ceil(share * len(values)) - 1]
        assert abs(sketch.quantile(share) / exact - 1) < 0.011
    assert sketch.spread().max == values[-1] / 1e6
    assert abs(sketch.spread().mean * 1e6 - sum(values) / len(values)) < 1e-3


def test_a_sketch_of_nothing_and_of_zeros_is_zero():
    assert Sketch().spread().p99 == 0
    sketch = Sketch()
    sketch.add(0)
    assert sketch.quantile(0.5) == 0
    assert sketch.curve()[-1] == (0.0, 1.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5_000), st.integers(0, 9)), min_size=1, max_size=60))
def test_bins_keep_the_integral_however_often_they_merge(steps):
    bins = Bins(limit=8, width_us=10)
    now, exact, value = 0, 0, 0
    for gap, new in steps:
        now += gap
        exact += value * gap
        bins.set(now, new)
        value = new
    assert math.isclose(bins.total, exact, abs_tol=1e-6)
    assert len(bins.sums()) <= 8


def test_means_of_bins_are_the_step_functions_own():
    bins = Bins(limit=10, width_us=10)
    bins.set(0, 4)
    bins.set(15, 0)
    bins.advance(30)
    assert bins.means() == [4.0, 2.0, 0.0]


def test_jains_index_is_one_for_equals_and_a_half_when_one_of_two_has_all():
    assert jain({"a": 3.0, "b": 3.0}) == 1.0
    assert jain({"a": 3.0, "b": 0.0}) == 0.5
    assert jain({"a": 3.0}) == 1.0
