"""The simulator against queueing theory: the real engine on simulated nodes, with nothing between order and run.

Each test simulates one system whose mean is known exactly, cuts the run into batches, and asks that the known mean lie inside the
99% interval of the batch means (Student's t), and that this interval be narrow enough to mean something.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import pytest
import simpy

from engine import profiles
from engine.commands import Command
from engine.events import Event, TaskFinished, TaskStarted, TaskSubmitted
from engine.resources import Demand
from engine.scheduler import Engine
from engine.tasks import SECOND, Micros, TaskSpec, TaskType
from predictors.forecaster import OracleForecaster
from sim import theory
from sim.draws import exponential, lognormal
from sim.hardware import Hardware, cluster
from sim.workload import Arrival, Truth, Workload
from sim.world import SimWorld, run

BATCHES, WARM_UP = 20, 1_000
T99 = 2.861
"""Two-sided 99% quantile of Student's t with 19 degrees of freedom."""
SIGMA = 1.0
"""Of the lognormal service times: a squared variation of 1.72, so more uneven than exponential ones."""
SHORTEST_FIRST = """
name = "shortest-first"
[ordering]
policy = "fair"
fair_tenants = false
fair_groups = false
age_s = 0
aged_every = 0
shortest_first = true
[binding]
warm_reuse = true
"""

Draw = Callable[[int, int], float]
"""(seed, number of the task) -> service time in seconds, with mean 1."""


def exponential_service(seed: int, number: int) -> float:
    return exponential(1.0, seed, "service", number)


def lognormal_service(seed: int, number: int) -> float:
    return lognormal(SIGMA, seed, "service", number) / math.exp(SIGMA * SIGMA / 2)


def constant_service(seed: int, number: int) -> float:
    return 1.0


@dataclass
class Times:
    """Waiting and sojourn of every task, by its number, in seconds; a journal."""

    submitted: dict[str, Micros] = field(default_factory=dict)
    waited: dict[int, float] = field(default_factory=dict)
    stayed: dict[int, float] = field(default_factory=dict)

    def __call__(self, now: Micros, events: Sequence[Event], commands: Sequence[Command]) -> None:
        for event in events:
            match event:
                case TaskSubmitted(task):
                    self.submitted[task.req_no] = now
                case TaskStarted(req_no):
                    self.waited[int(req_no)] = (now - self.submitted[req_no]) / SECOND
                case TaskFinished(req_no):
                    self.stayed[int(req_no)] = (now - self.submitted[req_no]) / SECOND
                case _:
                    pass


@cache
def simulate(
    rate: float,
    service: Draw,
    *,
    servers: int = 1,
    slots: int = 1,
    marginal: float = 1.0,
    profile: str = "fifo",
    tasks: int = 21_000,
    seed: int = 1,
) -> Times:
    """Run Poisson arrivals through the engine on one node with a GPU for each server."""
    at, arrivals, truths = 0.0, [], {}
    for number in range(tasks):
        at += exponential(1 / rate, seed, "gap", number)
        work_us = max(1, round(service(seed, number) * SECOND))
        truths[str(number)] = work_us
        task = TaskSpec(str(number), "t", "", TaskType.GC, "sleep", demand=Demand(), slots=slots)
        arrivals.append(Arrival(round(at * SECOND), task, Truth(work_us)))
    hardware = Hardware(cluster(1, servers), pod_start_us=0, dispatch_us=0, pod_stop_us=0, marginal_slot=marginal)
    world = SimWorld(simpy.Environment(), hardware, Workload("theory", tuple(arrivals)), seed)
    times = Times()
    run(Engine(profiles.load(profile)), world, times, OracleForecaster(truths))
    assert len(times.stayed) == tasks, "every task is served"
    return times


def assert_mean(values: dict[int, float], expected: float, narrow: float = 0.15) -> None:
    """Ask that the expected mean lie in the 99% interval of batch means, and that the interval be narrow beside it."""
    kept = [values[number] for number in range(WARM_UP, len(values))]
    size = len(kept) // BATCHES
    means = [sum(kept[index * size : (index + 1) * size]) / size for index in range(BATCHES)]
    mean = sum(means) / BATCHES
    spread = math.sqrt(sum((each - mean) ** 2 for each in means) / (BATCHES - 1))
    half_width = T99 * spread / math.sqrt(BATCHES)
    assert half_width <= narrow * expected, f"the interval {mean:.4f} +- {half_width:.4f} is too wide to tell anything"
    assert abs(mean - expected) <= half_width, (
        f"simulated {mean:.4f} +- {half_width:.4f}, the formula says {expected:.4f}"
    )


@pytest.mark.parametrize(("servers", "load"), [(1, 0.7), (4, 0.7), (16, 0.8)])
def test_waiting_in_mmc_is_erlangs(servers: int, load: float) -> None:
    rate = load * servers
    times = simulate(rate, exponential_service, servers=servers)
    assert_mean(times.waited, theory.mmc_wait(servers, rate, 1.0), 0.3)
    late = {number: float(wait > 0) for number, wait in times.waited.items()}
    assert_mean(late, theory.erlang_c(servers, rate))
    long = theory.mmc_wait_quantile(servers, rate, 1.0, 0.9)
    assert_mean({number: float(wait > long) for number, wait in times.waited.items()}, 0.1, 0.35)


def test_waiting_in_mg1_is_pollaczeks_and_khinchines() -> None:
    times = simulate(0.6, lognormal_service)
    assert_mean(times.waited, theory.mg1_wait(0.6, theory.lognormal(1.0, SIGMA)), 0.2)


@pytest.mark.parametrize("service", ["exponential", "lognormal"])
def test_waiting_in_mg1_shortest_first_is_phippss(service: str) -> None:
    draw, known = {
        "exponential": (exponential_service, theory.exponential(1.0)),
        "lognormal": (lognormal_service, theory.lognormal(1.0, SIGMA)),
    }[service]
    times = simulate(0.7, draw, profile=SHORTEST_FIRST)
    expected = theory.mg1_shortest_first_wait(0.7, known)
    assert expected < 0.75 * theory.mg1_wait(0.7, known), "the order matters at this load"
    assert_mean(times.waited, expected, 0.2)


@pytest.mark.parametrize("servers", [1, 4])
def test_waiting_with_constant_service_is_crommelins(servers: int) -> None:
    rate = 0.8 * servers
    times = simulate(rate, constant_service, servers=servers)
    assert_mean(times.waited, theory.mdc_wait(servers, rate, 1.0), 0.2)


@pytest.mark.parametrize("draw", [exponential_service, lognormal_service, constant_service])
def test_a_pod_that_shares_itself_is_a_processor_sharing_queue_whatever_the_service_times(draw: Draw) -> None:
    times = simulate(0.6, draw, slots=60)
    assert_mean(times.stayed, theory.processor_sharing_sojourn(0.6, 1.0))


def test_a_batching_pod_whose_tasks_slow_each_other_partly_is_generalised_processor_sharing() -> None:
    times = simulate(1.0, lognormal_service, slots=60, marginal=0.69)
    assert_mean(times.stayed, theory.shared_sojourn(1.0, 1.0, 0.69))


def test_the_interval_refuses_a_wrong_formula() -> None:
    times = simulate(0.6, lognormal_service)
    with pytest.raises(AssertionError, match="the formula says"):
        assert_mean(times.waited, theory.mmc_wait(1, 0.6, 1.0), 0.5)


# --- the formulas themselves ----------------------------------------------------------------------------------------


def test_erlangs_tables_are_met() -> None:
    assert theory.erlang_b(10, 5.0) == pytest.approx(0.018385, abs=1e-6)
    assert theory.erlang_c(10, 8.0) == pytest.approx(0.409180, abs=1e-6)
    assert theory.erlang_c(1, 0.3) == pytest.approx(0.3)
    assert theory.erlang_c(2, 2.0) == 1.0


def test_general_formulas_contain_the_special_ones() -> None:
    assert theory.mg1_wait(0.8, theory.exponential(1.0)) == pytest.approx(theory.mmc_wait(1, 0.8, 1.0))
    assert theory.mdc_wait(1, 0.8, 1.0) == pytest.approx(theory.mg1_wait(0.8, theory.constant(1.0)))
    assert theory.mg1_shortest_first_wait(0.8, theory.constant(1.0)) == theory.mg1_wait(0.8, theory.constant(1.0))
    assert theory.shared_sojourn(0.8, 1.0, 1.0) == pytest.approx(theory.processor_sharing_sojourn(0.8, 1.0))
    assert theory.shared_sojourn(5.0, 1.0, 0.0) == pytest.approx(1.0)
    assert theory.allen_cunneen_wait(3, 2.0, 1.0, 1.0, 1.0) == theory.mmc_wait(3, 2.0, 1.0)


def test_constant_service_halves_the_waiting_of_exponential_service_near_saturation() -> None:
    ratio = theory.mdc_wait(10, 9.9, 1.0) / theory.mmc_wait(10, 9.9, 1.0)
    assert ratio == pytest.approx(0.5, abs=0.01)


def test_quantile_and_tail_are_inverse() -> None:
    wait = theory.mmc_wait_quantile(12, 10.0, 1.0, 0.99)
    assert theory.mmc_wait_above(12, 10.0, 1.0, wait) == pytest.approx(0.01)
    servers = theory.erlang_c_servers(10.0, 1.0, 0.99, wait)
    assert servers == 12, "one server less would make the last percent wait longer"


def test_systems_that_cannot_keep_up_wait_for_ever() -> None:
    assert theory.mmc_wait(2, 2.0, 1.0) == math.inf
    assert theory.mdc_wait(2, 2.5, 1.0) == math.inf
    assert theory.mg1_wait(1.0, theory.exponential(1.0)) == math.inf
    assert theory.processor_sharing_sojourn(1.5, 1.0) == math.inf
    assert theory.mmc_wait_quantile(2, 3.0, 1.0, 0.5) == math.inf


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: theory.erlang_b(0, 1.0), "servers"),
        (lambda: theory.erlang_c(1, -1.0), "offered"),
        (lambda: theory.mmc_wait(1, 0.0, 1.0), "rate"),
        (lambda: theory.mmc_wait(1, 1.0, math.inf), "mean"),
        (lambda: theory.mmc_wait_quantile(1, 0.5, 1.0, 1.0), "share"),
        (lambda: theory.lognormal(1.0, 0.0), "sigma"),
        (lambda: theory.Service(1.0, -1.0), "scv"),
        (lambda: theory.mg1_shortest_first_wait(0.5, theory.Service(1.0, 1.0)), "lorenz"),
        (lambda: theory.shared_sojourn(0.5, 1.0, 2.0), "marginal"),
        (lambda: theory.allen_cunneen_wait(1, 0.5, 1.0, -1.0, 1.0), "arrival_scv"),
        (lambda: theory.erlang_c_servers(10.0, 1.0, 0.99, 0.0, most=11), "most"),
    ],
)
def test_impossible_questions_name_their_parameter(call: Callable[[], float], named: str) -> None:
    with pytest.raises(theory.TheoryError, match=named):
        call()
