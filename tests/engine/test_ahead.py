"""Promises: positions, quantiles and their properties, on states made by hand and by Hypothesis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import events as ev
from engine import profiles
from engine.ahead.calibration import Calibration
from engine.ahead.foresight import Foresight
from engine.resources import Demand, GpuSpec, NodeSpec
from engine.scheduler import Engine
from engine.tasks import SECOND, Estimate, Quantiles, TaskSpec, TaskType


class Future:
    """An engine with a foresight beside it."""

    def __init__(self, profile: str = "fifo", gpus: int = 1) -> None:
        self.engine = Engine(profiles.load(profile))
        self.foresight = Foresight(self.engine.state, self.engine.profile)
        self.seconds = 0.0
        if gpus:
            self.step(ev.NodeJoined(NodeSpec("n1", tuple(GpuSpec(f"g{i}", "a100", 80 << 30) for i in range(gpus)))))

    def step(self, *events: ev.Event, after: float = 1.0) -> list[Any]:
        self.seconds += after
        now = round(self.seconds * SECOND)
        commands = list(self.engine.step(now, events))
        self.foresight.step(now, events, commands)
        return commands

    def submit(self, *names: str, seconds: float = 20.0, **more: Any) -> None:
        estimate = exactly(seconds)
        self.step(*(ev.TaskSubmitted(spec(name, **more), estimate) for name in names))

    def run(self, name: str) -> None:
        """Let a bound task's Pod be ready and its attempt start."""
        task = self.engine.state.tasks[name]
        if any(str(self.engine.state.pods[pod].state) == "creating" for pod in task.pods):
            self.step(*(ev.PodStarted(pod) for pod in task.pods))
        self.step(ev.TaskStarted(name, task.attempt))


def exactly(seconds: float) -> Estimate:
    value = round(seconds * SECOND)
    return Estimate((("*", Quantiles(value, value, value, value)),))


def spec(name: str, **more: Any) -> TaskSpec:
    values: dict[str, Any] = {
        "tenant": "a",
        "group": "",
        "task_type": TaskType.GC,
        "method": "sleep",
        "demand": Demand(gpus=1),
    }
    return TaskSpec(name, **{**values, **more})


@pytest.fixture
def future() -> Callable[..., Future]:
    return Future


def test_waiting_tasks_stand_in_the_order_in_which_they_will_be_served(future: Callable[..., Future]) -> None:
    ahead = future()
    ahead.submit("t1")
    ahead.run("t1")
    ahead.submit("t2")
    ahead.submit("t3", "t4")
    assert ahead.foresight.look().positions() == {"t2": 1, "t3": 2, "t4": 3}


def test_each_task_starts_when_those_before_it_have_run(future: Callable[..., Future]) -> None:
    ahead = future()
    ahead.submit("t1")
    ahead.run("t1")
    begun = ahead.engine.state.tasks["t1"].started_at
    ahead.submit("t2", "t3", "t4")
    outlook = ahead.foresight.look()
    starts = [outlook.of(name) for name in ("t2", "t3", "t4")]
    assert [round((each.start_p50 - begun) / SECOND) for each in starts if each] == [20, 40, 60]
    assert [round((each.finish_p50 - begun) / SECOND) for each in starts if each] == [40, 60, 80]


def test_two_gpus_serve_a_queue_twice_as_fast(future: Callable[..., Future]) -> None:
    ahead = future(gpus=2)
    ahead.submit("t1", "t2")
    ahead.run("t1")
    ahead.run("t2")
    begun = ahead.engine.state.tasks["t1"].started_at
    ahead.submit("t3", "t4", "t5", "t6")
    outlook = ahead.foresight.look()
    last = outlook.of("t6")
    assert last is not None
    assert 39 <= (last.start_p50 - begun) / SECOND <= 45


def test_a_running_task_has_its_true_start_and_what_is_left_of_its_run(future: Callable[..., Future]) -> None:
    ahead = future()
    ahead.submit("t1", seconds=100)
    ahead.run("t1")
    begun = ahead.engine.state.tasks["t1"].started_at
    ahead.step(after=60)
    promise = ahead.foresight.look().of("t1")
    assert promise is not None
    assert (promise.position, promise.start_p50, promise.start_p90) == (0, begun, begun)
    assert promise.finish_p50 == pytest.approx(begun + 100 * SECOND, abs=SECOND)


def test_a_run_that_outlived_its_prediction_is_never_promised_for_the_past(future: Callable[..., Future]) -> None:
    ahead = future()
    ahead.submit("t1", seconds=10)
    ahead.run("t1")
    ahead.step(after=500)
    promise = ahead.foresight.look().of("t1")
    assert promise is not None
    assert promise.finish_p50 > ahead.engine.state.now


def test_urgent_tasks_stand_before_ordinary_ones(future: Callable[..., Future]) -> None:
    ahead = future("aigc")
    ahead.submit("t1")
    ahead.run("t1")
    ahead.submit("t2", "t3")
    ahead.submit("u1", priority=200)
    positions = ahead.foresight.look().positions()
    assert positions["u1"] == 1


def test_tenants_that_share_fairly_take_turns(future: Callable[..., Future]) -> None:
    ahead = future("fair-share")
    ahead.submit("t1")
    ahead.run("t1")
    ahead.submit("a1", "a2", "a3", tenant="a")
    ahead.submit("b1", tenant="b")
    positions = ahead.foresight.look().positions()
    assert positions["b1"] < positions["a3"]


def test_another_model_has_to_be_loaded_first(future: Callable[..., Future]) -> None:
    ahead = future()
    ahead.submit("t1", model="m1")
    ahead.run("t1")
    ahead.submit("t2", model="m1")
    ahead.submit("t3", model="m2")
    outlook = ahead.foresight.look()
    same, other = outlook.of("t2"), outlook.of("t3")
    assert same is not None and other is not None
    assert other.start_p50 - same.finish_p50 > 0.1 * SECOND


def test_without_a_node_nobody_can_say_when(future: Callable[..., Future]) -> None:
    ahead = future(gpus=0)
    ahead.submit("t1")
    outlook = ahead.foresight.look()
    assert outlook.of("t1") is None
    assert outlook.positions() == {"t1": 1}


def test_an_empty_cluster_promises_nothing(future: Callable[..., Future]) -> None:
    outlook = future().foresight.look()
    assert (len(outlook), outlook.waiting, outlook.room_at()) == (0, 0, None)


def test_a_cancelled_task_has_no_promise_and_the_next_ones_move_up(future: Callable[..., Future]) -> None:
    ahead = future()
    ahead.submit("t1")
    ahead.run("t1")
    ahead.submit("t2", "t3")
    ahead.step(ev.TaskCancelRequested("t2"))
    outlook = ahead.foresight.look()
    assert outlook.of("t2") is None
    assert outlook.positions() == {"t3": 1}


def test_a_tenant_at_its_limit_waits_for_its_own_tasks(future: Callable[..., Future]) -> None:
    ahead = future(gpus=2)
    ahead.step(ev.TenantConfigured("a", max_running=1))
    ahead.submit("t1", seconds=50)
    ahead.run("t1")
    begun = ahead.engine.state.tasks["t1"].started_at
    ahead.submit("t2", seconds=50)
    promise = ahead.foresight.look().of("t2")
    assert promise is not None
    assert (promise.start_p50 - begun) / SECOND == pytest.approx(50, abs=2)


def test_a_quote_leaves_the_state_and_the_outlook_as_they_are(future: Callable[..., Future]) -> None:
    ahead = future()
    ahead.submit("t1")
    ahead.run("t1")
    ahead.submit("t2")
    outlook, digest = ahead.foresight.look(), ahead.engine.state.digest()
    quote = ahead.foresight.quote(spec("q", tenant="new", group="g"), exactly(5))
    assert quote is not None and quote.position == 2
    assert ahead.engine.state.digest() == digest
    assert ahead.foresight.outlook is outlook
    assert "q" not in ahead.foresight.look()


def test_a_quote_is_what_the_task_is_promised_when_it_is_submitted_at_once(future: Callable[..., Future]) -> None:
    ahead = future("aigc", gpus=2)
    ahead.submit("t1", "t2")
    ahead.run("t1")
    ahead.run("t2")
    ahead.submit("t3", "t4", group="g1")
    quote = ahead.foresight.quote(spec("q", group="g2"), exactly(7))
    ahead.step(ev.TaskSubmitted(spec("q", group="g2"), exactly(7)), after=0)
    promise = ahead.foresight.look().of("q")
    assert quote is not None and promise is not None
    assert quote.position == promise.position
    # Its own arrival counts among the measured ones by then, so that it may differ a little.
    assert quote.finish_p50 == pytest.approx(promise.finish_p50, rel=0.1)


def test_looking_twice_gives_the_same_promises(future: Callable[..., Future]) -> None:
    ahead = future("aigc", gpus=2)
    ahead.submit("t1", "t2", "t3", "t4", model="m1")
    ahead.submit("t5", "t6", model="m2")
    first, second = ahead.foresight.look(), ahead.foresight.look()
    assert [first.of(f"t{i}") for i in range(1, 7)] == [second.of(f"t{i}") for i in range(1, 7)]


tasks = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from(["", "g1", "g2"]),
        st.sampled_from(["m1", "m2", "m3"]),
        st.sampled_from([0, 50, 100, 300]),
        st.floats(0.1, 500),
        st.sampled_from(["none", "preferred", "strict"]),
    ),
    max_size=15,
)


@settings(max_examples=30, deadline=None)
@given(tasks, st.integers(0, 3), st.sampled_from(["aigc", "fifo", "priority", "sjf", "drf", "easy"]))
def test_positions_are_a_permutation_and_quantiles_are_ordered(
    wanted: list[tuple[str, str, str, int, float, str]], gpus: int, profile: str
) -> None:
    ahead = Future(profile, gpus)
    for number, (tenant, group, model, priority, seconds, affinity) in enumerate(wanted):
        ahead.submit(
            f"t{number}",
            seconds=seconds,
            tenant=tenant,
            group=group,
            model=model,
            priority=priority,
            affinity=affinity,
        )
    outlook = ahead.foresight.look()
    positions = outlook.positions()
    assert sorted(positions.values()) == list(range(1, len(positions) + 1))
    assert outlook.waiting == len(positions)
    for number in range(len(wanted)):
        promise = outlook.of(f"t{number}")
        if gpus:
            assert promise is not None
        if promise is not None:
            assert promise.start_p50 <= promise.start_p90 <= promise.finish_p90
            assert promise.start_p50 <= promise.finish_p50 <= promise.finish_p90
            assert promise.finish_p50 > ahead.engine.state.now


def test_factors_learn_until_the_promised_share_holds() -> None:
    calibration = Calibration()
    rng = np.random.default_rng(7)
    strata = np.zeros(1, dtype=np.int64)
    held = []
    for number in range(6_000):
        raw = 10.0 * SECOND
        promised = calibration.stretch("finish_p90", np.array([raw]), strata)[0]
        # What the forward run gets wrong changes; after as many outcomes as are kept, only the new way counts.
        real = raw * rng.lognormal(1.0 if number < 1_500 else 0.2, 0.6)
        held.append(bool(real <= promised))
        if held[-1]:
            calibration.came("finish_p90", 0, raw, real)
        else:
            calibration.corrected("finish_p90", 0, calibration.overdue("finish_p90", 0, raw, promised), raw, real)
    assert 0.88 <= sum(held[500:1_500]) / 1_000 <= 0.92
    assert sum(held[1_500:3_000]) / 1_500 > 0.88
    assert 0.88 <= sum(held[4_500:]) / 1_500 <= 0.92
    assert calibration.coverage().share == pytest.approx(sum(held[-1_000:]) / 1_000)


def test_outcomes_that_come_late_do_not_drive_the_factor_past_the_mark() -> None:
    calibration = Calibration()
    rng = np.random.default_rng(8)
    strata = np.zeros(1, dtype=np.int64)
    under_way: list[tuple[float, float]] = []
    held = []
    for _ in range(4_000):
        raw = 10.0 * SECOND
        promised = calibration.stretch("finish_p90", np.array([raw]), strata)[0]
        under_way.append((float(promised), raw * rng.lognormal(1.0, 0.6)))
        if len(under_way) > 300:
            due, real = under_way.pop(0)
            held.append(real <= due)
            if held[-1]:
                calibration.came("finish_p90", 0, raw, real)
            else:
                calibration.corrected("finish_p90", 0, calibration.overdue("finish_p90", 0, raw, due), raw, real)
    assert 0.87 <= sum(held[600:]) / len(held[600:]) <= 0.93


def test_a_calibration_is_the_same_after_it_was_saved() -> None:
    calibration = Calibration()
    for number in range(50):
        if number % 3:
            calibration.came("finish_p90", number % 14, 10e6, 1e6 * number)
        else:
            calibration.overdue("finish_p90", number % 14, 10e6, 20e6)
    again = Calibration.restored(calibration.saved())
    assert again.saved() == calibration.saved()
    ahead, strata = np.full(14, 5e6), np.arange(14)
    assert again.stretch("finish_p90", ahead, strata) == pytest.approx(
        calibration.stretch("finish_p90", ahead, strata), rel=1e-5
    )


@pytest.mark.parametrize("broken", [{}, {"scores": {}}, {"scores": 3, "level": {}, "recent": {}, "scored": 0}])
def test_what_is_no_calibration_is_refused_in_words(broken: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="delete the file"):
        Calibration.restored(broken)


def test_a_promise_that_is_over_counts_as_broken_before_the_task_ends(future: Callable[..., Future]) -> None:
    ahead = future()
    ahead.submit("t1", seconds=10)
    ahead.foresight.look()
    ahead.run("t1")
    ahead.step(after=5_000)
    assert ahead.foresight.coverage().count == 1
    assert ahead.foresight.coverage().held == 0


def test_a_cancelled_task_is_not_scored(future: Callable[..., Future]) -> None:
    ahead = future()
    ahead.submit("t1", seconds=1_000)
    ahead.run("t1")
    ahead.submit("t2")
    ahead.foresight.look()
    ahead.step(ev.TaskCancelRequested("t2"))
    ahead.step(after=100_000)
    assert ahead.foresight.coverage("start_p90").count == 0


def test_tasks_that_need_several_places_take_turns_with_small_ones(future: Callable[..., Future]) -> None:
    ahead = future("aigc", gpus=4)
    half = Demand(gpus=1, gpu_share=500)
    for number in range(12):
        demand = Demand(gpus=2) if number % 3 == 0 else half
        ahead.submit(f"t{number}", seconds=30, demand=demand, model=f"m{number % 4}")
    outlook = ahead.foresight.look()
    promises = [outlook.of(f"t{number}") for number in range(12)]
    assert all(promise is not None for promise in promises)
