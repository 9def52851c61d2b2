"""Orderings in corners: warm Pods under preemption, shared GPUs under backfill, ageing, groups and gangs together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engine import events as ev
from engine import profiles
from engine.commands import CreatePod, DeletePod, StartTask, StopTask
from engine.limits import Limits
from engine.resources import Demand
from engine.tasks import SECOND, Affinity

LAS = '[ordering]\npolicy = "las"\nqueues_gpu_s = [10]\n[binding]\nwarm_reuse = true\n[preemption]\nmin_run_s = 0\nreload_s = 0\n'
ALONE = LAS.replace("warm_reuse = true", "warm_reuse = false")


def of(kind: type, orders: Any) -> list[Any]:
    return [order for order in orders if isinstance(order, kind)]


def running(d: Any, task: Any, *names: str, **more: Any) -> None:
    d.answer(d.submit(*(task(name, **more) for name in names)))
    assert [d.state(name) for name in names] == ["running"] * len(names)


# --- preemption -------------------------------------------------------------------------------------------------------


def test_a_task_of_the_same_model_takes_the_slot_and_the_pod_is_used_on(desk: Any, task: Any) -> None:
    d = desk(LAS)
    d.node()
    running(d, task, "old", model="m")
    orders = d.submit(task("new", model="m"), after=20)
    assert [order.req_no for order in of(StopTask, orders)] == ["old"]
    assert of(DeletePod, orders) == []
    orders = d.answer(orders)
    assert [order.req_no for order in of(StartTask, orders)] == ["new"]
    assert of(CreatePod, orders) == []


def test_a_slot_that_is_being_freed_is_counted_once(desk: Any, task: Any) -> None:
    d = desk(LAS)
    d.node(gpus=2)
    running(d, task, "old0", "old1", model="m")
    first = d.submit(task("new0", model="m"), after=20)
    assert len(of(StopTask, first)) == 1
    assert of(StopTask, d.step()) == []  # one is going already
    assert len(of(StopTask, d.submit(task("new1", model="m")))) == 1


def test_room_of_another_model_is_claimed_when_its_task_is_stopped(desk: Any, task: Any) -> None:
    d = desk(LAS)
    d.node()
    running(d, task, "old", model="m")
    orders = d.submit(task("new", model="other"), after=20)
    assert [order.req_no for order in of(StopTask, orders)] == ["old"]
    assert "room_claimed" in [blocker.reason for blocker in d.engine.why("new")]
    d.answer(orders)
    assert (d.state("new"), d.state("old")) == ("running", "pending")


def test_a_claim_that_reached_its_bound_stops_nobody(desk: Any, task: Any) -> None:
    d = desk(LAS, Limits(claims=1))
    d.node(gpus=2)
    running(d, task, "old0", "old1", model="m")
    orders = d.submit(task("new0", model="x"), task("new1", model="y"), after=20)
    assert len(of(StopTask, orders)) == 1


def test_no_more_are_stopped_in_a_step_than_its_bound_says_and_the_next_goes_on(desk: Any, task: Any) -> None:
    d = desk(LAS, Limits(preemptions_per_step=1))
    d.node(gpus=2)
    running(d, task, "old0", "old1", model="m")
    orders = d.submit(task("new0", model="x"), task("new1", model="y"), after=20)
    assert len(of(StopTask, orders)) == 1
    assert d.engine.wakeup_at == d.engine.state.now + d.engine.state.limits.wakeup_us
    assert len(of(StopTask, d.step(after=0.01))) == 1


def test_a_task_is_stopped_no_more_often_than_its_bound_says(clockwork: Any) -> None:
    world = clockwork(ALONE + "most_per_task = 1\n")
    world.node()
    world.job("old", 0, 100)
    world.job("new", 20, 5)
    world.job("newer", 40, 5)
    world.run()
    assert [who for _, who in world.stops] == ["old"]
    assert world.begun["newer"] == [105]


def test_a_gang_that_must_stay_together_makes_room_on_one_node(clockwork: Any) -> None:
    world = clockwork(ALONE)
    world.node("n1", gpus=2)
    world.node("n2", gpus=2)
    for i in range(4):
        world.job(f"old{i}", i / 10, 100)
    world.job("gang", 50, 5, members=2, group="g", affinity=Affinity.STRICT)
    world.run()
    assert world.begun["gang"] == [50]
    assert sorted(who for _, who in world.stops) == ["old2", "old3"]


def test_a_gang_that_would_need_someone_who_may_not_go_stops_nobody(clockwork: Any) -> None:
    world = clockwork(ALONE)
    world.node(gpus=2)
    world.job("old", 0, 100)
    world.job("stays", 0, 100, preemptible=False)
    world.job("gang", 50, 5, members=2)
    assert world.run().stops == []


def test_two_tasks_in_one_pod_are_not_stopped_for_room(desk: Any, task: Any) -> None:
    """Whoever needs the whole device waits until the Pod has one task left."""
    d = desk(LAS)
    d.node()
    running(d, task, "a", "b", model="m", slots=2)
    assert of(StopTask, d.submit(task("new", model="other"), after=20)) == []


# --- backfill ---------------------------------------------------------------------------------------------------------

EASY = '[ordering]\npolicy = "fifo"\nbackfill = "{}"\n[binding]\nwarm_reuse = false\n'


@pytest.mark.parametrize("mode", ["easy", "conservative"])
def test_reservations_know_the_devices_of_shared_gpus(clockwork: Any, mode: str) -> None:
    """Half of each GPU is taken; a whole one is free at 100 s. A half-GPU task may use the other device for ever, not that one."""
    half = Demand(gpu_share=500)
    world = clockwork(EASY.format(mode))
    world.node(gpus=2)
    world.job("a", 0, 100, demand=half)
    world.job("b", 0, 300, demand=Demand(gpu_share=600))
    world.job("whole", 1, 50, demand=Demand())
    world.job("long", 2, 1_000, demand=half)
    world.job("small", 3, 1_000, demand=Demand(gpu_share=400))
    world.job("short", 4, 90, demand=half)
    begun = {name: times[0] for name, times in world.run().begun.items()}
    assert begun["whole"] == 100
    assert begun["small"] == 3  # beside b
    assert begun["short"] == 4  # beside a, and gone before 100 s
    assert begun["long"] == 150


def test_easy_reserves_processors_and_memory_as_well(clockwork: Any) -> None:
    world = clockwork(EASY.format("easy"))
    world.node(gpus=8, cpu_milli=10_000)
    world.job("a", 0, 100, demand=Demand(gpus=1, cpu_milli=6_000))
    world.job("b", 1, 50, demand=Demand(gpus=1, cpu_milli=8_000))
    world.job("c", 2, 1_000, demand=Demand(gpus=1, cpu_milli=3_000))
    world.job("d", 3, 1_000, demand=Demand(gpus=4, cpu_milli=2_000))
    begun = {name: times[0] for name, times in world.run().begun.items()}
    assert begun == {"a": 0, "b": 100, "c": 150, "d": 3}


def test_a_warm_slot_is_not_taken_for_longer_than_the_reservation_allows(clockwork: Any) -> None:
    world = clockwork(
        EASY.format("easy").replace("false", "true") + "reclaim_idle = false\n", Limits(idle_ttl_us=SECOND)
    )
    world.node(gpus=2)
    world.job("a", 0, 10, model="m")
    world.job("b", 0, 100, model="m")
    world.job("both", 5, 10, model="n", demand=Demand(gpus=2))
    world.job("long", 6, 500, model="m")
    world.job("short", 7, 50, model="m")
    begun = {name: times[0] for name, times in world.run().begun.items()}
    assert begun["short"] == pytest.approx(10, abs=1.1)
    assert begun["both"] == pytest.approx(101, abs=1.1)
    assert begun["long"] > begun["both"]


def test_a_group_that_wants_a_node_for_itself_has_an_empty_one_reserved(clockwork: Any) -> None:
    world = clockwork(EASY.format("easy"))
    world.node(gpus=2)
    world.job("a", 0, 100)
    world.job("alone", 1, 10, group="g", affinity=Affinity.EXCLUSIVE)
    world.job("long", 2, 300)
    world.job("short", 3, 50)
    begun = {name: times[0] for name, times in world.run().begun.items()}
    assert begun == {"a": 0, "alone": 100, "long": 110, "short": 3}


def test_a_gang_and_singles_keep_their_reservations_under_conservative_backfill(clockwork: Any) -> None:
    world = clockwork(EASY.format("conservative"))
    for name in ("n1", "n2"):
        world.node(name, gpus=2)
    world.job("a", 0, 100, demand=Demand(gpus=2))
    world.job("b", 0, 50)
    world.job("gang", 1, 20, demand=Demand(gpus=2), members=2)
    world.job("next", 2, 30, demand=Demand(gpus=2))
    world.job("gang2", 3, 20, demand=Demand(gpus=1), members=4)
    world.job("too long", 4, 60)
    world.job("filler", 5, 40)
    begun = {name: times[0] for name, times in world.run().begun.items()}
    assert begun == {"a": 0, "b": 0, "gang": 100, "next": 50, "gang2": 120, "too long": 140, "filler": 5}


def test_a_run_limit_bounds_what_is_believed(clockwork: Any) -> None:
    world = clockwork(EASY.format("easy"))
    world.node(gpus=2)
    world.job("a", 0, 100, believed=1_000, run_limit_us=150 * SECOND)
    world.job("both", 1, 10, demand=Demand(gpus=2))
    world.job("limited", 2, 40, believed=1_000, run_limit_us=140 * SECOND)
    world.job("not", 3, 40, believed=1_000)
    begun = {name: times[0] for name, times in world.run().begun.items()}
    assert begun["limited"] == 2
    assert begun["not"] == 110


# --- ageing and fair shares in exact order ------------------------------------------------------------------------------


def test_whoever_has_waited_long_enough_goes_before_the_shorter_ones(clockwork: Any) -> None:
    text = '[ordering]\npolicy = "sjf"\nage_s = 30\nbackfill = "easy"\n[binding]\nwarm_reuse = false\n'
    world = clockwork(text)
    world.node()
    world.job("running", 0, 50)
    world.job("long", 1, 40)
    for i in range(5):
        world.job(f"short{i}", 40 + i, 5)
    world.run()
    assert world.begun["long"] == [50]
    ageless = clockwork(text.replace("age_s = 30", "age_s = 0"))
    ageless.node()
    ageless.job("running", 0, 50)
    ageless.job("long", 1, 40)
    for i in range(5):
        ageless.job(f"short{i}", 40 + i, 5)
    assert ageless.run().begun["long"] == [75]


def test_fair_shares_hold_under_backfill(clockwork: Any) -> None:
    world = clockwork('[ordering]\npolicy = "fair"\nage_s = 0\nbackfill = "easy"\n[binding]\nwarm_reuse = false\n')
    world.node(gpus=1)
    world.at(0, ev.TenantConfigured("b", 2))
    for i in range(8):
        world.job(f"a{i}", 0, 10, tenant="a", group=f"a{i}")
        world.job(f"b{i}", 0, 10, tenant="b", group=f"b{i}")
    world.run(until=59)
    assert sum(1 for name in world.begun if name.startswith("b")) == 4
    assert sum(1 for name in world.begun if name.startswith("a")) == 2


def test_a_profile_that_needs_no_exact_order_keeps_none() -> None:
    assert not profiles.load("aigc").in_order
    assert not profiles.load("sjf").in_order
    assert replace(profiles.load("sjf"), backfill="easy").in_order


# --- start deadlines ----------------------------------------------------------------------------------------------------


def test_a_task_that_started_in_time_and_was_stopped_may_start_again_after_its_start_deadline(clockwork: Any) -> None:
    world = clockwork(ALONE)
    world.node()
    world.job("old", 0, 50, start_deadline=15 * SECOND)
    world.job("new", 12, 10)
    world.run()
    assert world.begun["old"] == [0, 22]
    assert world.ended["old"] == 60


def test_an_attempt_that_never_came_to_run_does_not_outlive_the_start_deadline(desk: Any, task: Any) -> None:
    d = desk("fifo")
    d.node()
    d.answer(d.submit(task("t", start_deadline=10 * SECOND)), start=False)
    assert d.state("t") == "starting"
    d.step(after=20)
    assert d.state("t") == "starting"
    d.step(ev.PodStopped(1))
    assert d.state("t") == "dead"
