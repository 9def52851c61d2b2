"""The metrics of the fast core against sums over every moment, and against a case small enough for paper."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.jobs import JobsResult, make_jobs, simulate_jobs
from sim.sketches import jain

SECOND = 1_000_000


@st.composite
def runs(draw) -> JobsResult:
    count = draw(st.integers(1, 25))
    numbers = st.integers(0, 20)
    submit = sorted(draw(st.lists(numbers, min_size=count, max_size=count)))
    run = draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    gpus = draw(st.lists(st.integers(1, 6), min_size=count, max_size=count))
    tenant = draw(st.lists(st.sampled_from("abc"), min_size=count, max_size=count))
    return simulate_jobs(make_jobs(submit, run, gpus, tenant=tenant), draw(st.integers(2, 3)), 4)


def _moments(result: JobsResult):
    """Yield for each whole second: waiting by tenant, GPUs held by tenant, free GPUs by node, sizes seen so far."""
    jobs = result.jobs
    first, last = int(jobs.submit_us.min()), int(result.end_us.max())
    for at in range(first, last, SECOND):
        waits = np.bincount(jobs.tenant[(jobs.submit_us <= at) & (result.start_us > at)], minlength=len(jobs.tenants))
        running = np.flatnonzero((result.start_us <= at) & (result.end_us > at))
        held, free = np.zeros(len(jobs.tenants)), [result.gpus_per_node] * result.nodes
        for job in running.tolist():
            held[jobs.tenant[job]] += jobs.gpus[job]
            for node, gpus in result.pieces_of(job):
                free[node] -= gpus
        yield waits, held, free, jobs.gpus[jobs.submit_us <= at]


@settings(max_examples=100, deadline=None)
@given(result=runs())
def test_every_integral_is_the_sum_over_all_moments(result: JobsResult) -> None:
    figures = result.figures()
    queue = used = lost = spare = contended = 0.0
    shared = np.zeros(len(result.jobs.tenants))
    hours = np.zeros(len(result.jobs.tenants))
    span = 0
    for waits, held, free, sizes in _moments(result):
        span += 1
        queue += waits.sum()
        used += held.sum()
        hours += held / 3600
        spare += sum(free)
        wanted = np.minimum(sizes, result.gpus_per_node)
        lost += sum(amount * float((wanted > amount).mean()) for amount in free)
        if (waits > 0).sum() >= 2:
            contended += 1
            shared += held
    there = span * result.nodes * result.gpus_per_node
    assert figures.makespan_s == span
    assert figures.gpu["allocated"] == pytest.approx(used / there)
    assert figures.gpu["capacity_hours"] == pytest.approx(there / 3600)
    assert figures.gpu["fragmented"] == pytest.approx(lost / spare if spare else 0.0)
    assert figures.fairness["contended_hours"] == pytest.approx(contended / 3600)
    assert figures.fairness["jain"] == pytest.approx(jain(dict(zip("abc", shared.tolist(), strict=False))))
    assert list(figures.tenant_gpu_hours.values()) == pytest.approx(hours.tolist())
    for name, total in (("queue", queue), ("allocated", used), ("fragmented", lost)):
        series = figures.series[name]
        assert sum(series.values) * series.bin_s == pytest.approx(total), name


def test_waiting_completion_and_slowdown_of_three_jobs() -> None:
    jobs = make_jobs([0, 0, 5], [20, 4, 5], [4, 4, 4], tenant=["a", "b", "a"])
    figures = simulate_jobs(jobs, 1, 4).figures()
    assert figures.ends == {"finished": 3, "rejected": 0, "open": 0}
    assert figures.waiting["all"].mean == pytest.approx((0 + 20 + 19) / 3)
    assert figures.completion["tenant b"].mean == 24
    assert (figures.completion["all"].p50, figures.completion["all"].max) == (24, 24)
    # Bounded slowdown: 20/20, 24/10, 24/10.
    assert figures.slowdown["all"].mean == pytest.approx((1 + 2.4 + 2.4) / 3)
    assert figures.slowdown["tenant a"].count == 2


def test_figures_are_plain_json_numbers() -> None:
    found = simulate_jobs(make_jobs([0, 1], [3, 3], [1, 2]), 1, 2).figures().to_json()
    assert found["waiting"]["all"]["count"] == 2
    assert math.isclose(sum(found["series"]["running"]["values"]) * found["series"]["running"]["bin_s"], 6.0)


def test_gpus_that_may_lie_anywhere_are_never_splinters() -> None:
    jobs = make_jobs([0, 0, 1], [9, 9, 9], [3, 3, 2])
    assert simulate_jobs(jobs, 2, 4).figures().gpu["fragmented"] > 0
    assert simulate_jobs(jobs, 2, 4, spread=True).figures().gpu["fragmented"] == 0
