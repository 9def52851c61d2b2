"""Backfill against its papers.

EASY: Lifka, "The ANL/IBM SP Scheduling System", JSSPP 1995; conservative and the comparison: Mu'alem and Feitelson, "Utilization,
Predictability, Workloads, and User Runtime Estimates in Scheduling the IBM SP2 with Backfilling", IEEE TPDS 12(6), 2001, section 2.
Processors are GPUs of one node here; users' estimates are the declared run times.
"""

from __future__ import annotations

from typing import Any

import pytest

from engine import profiles
from engine.resources import Demand

PLAIN = '[ordering]\npolicy = "fifo"\nbackfill = "{}"\n[binding]\nwarm_reuse = false\n'


def gpus(count: int) -> Demand:
    return Demand(gpus=count)


def starts(world: Any) -> dict[str, float]:
    return {req_no: times[0] for req_no, times in world.begun.items()}


def four_jobs(world: Any) -> Any:
    """Ten processors: A keeps six of them for 100 s; B needs eight; C and D are small, D is long."""
    world.node(gpus=10)
    world.job("A", 0, 100, demand=gpus(6))
    world.job("B", 1, 50, demand=gpus(8))
    world.job("C", 2, 90, demand=gpus(4))
    world.job("D", 3, 200, demand=gpus(2))
    return world.run()


def test_without_backfill_nobody_passes_the_first_one_that_waits(clockwork: Any) -> None:
    assert starts(four_jobs(clockwork(PLAIN.format("none")))) == {"A": 0, "B": 100, "C": 150, "D": 150}


def test_skipping_starts_whatever_fits_and_delays_the_first_one(clockwork: Any) -> None:
    assert starts(four_jobs(clockwork(PLAIN.format("skip")))) == {"A": 0, "B": 100, "C": 2, "D": 92}
    world = clockwork(PLAIN.format("skip"))
    world.node(gpus=10)
    world.job("A", 0, 100, demand=gpus(6))
    world.job("B", 1, 50, demand=gpus(8))
    world.job("C", 2, 190, demand=gpus(4))
    assert starts(world.run()) == {"A": 0, "B": 192, "C": 2}


def test_easy_lets_a_job_pass_that_ends_before_the_reservation_of_the_first_one(clockwork: Any) -> None:
    assert starts(four_jobs(clockwork(PLAIN.format("easy")))) == {"A": 0, "B": 100, "C": 2, "D": 92}


def test_easy_lets_a_long_job_pass_on_processors_that_the_first_one_leaves_over(clockwork: Any) -> None:
    """The second rule of section 2: a job may pass if it uses no more than the extra nodes, however long it is."""
    world = clockwork(PLAIN.format("easy"))
    world.node(gpus=10)
    world.job("A", 0, 100, demand=gpus(6))
    world.job("B", 1, 50, demand=gpus(8))
    world.job("too long", 2, 99, demand=gpus(3))
    world.job("extra", 3, 1000, demand=gpus(2))
    assert starts(world.run()) == {"A": 0, "B": 100, "extra": 3, "too long": 150}


def second_job_in_the_queue(world: Any) -> Any:
    """Figure 1 of the paper in small: E passes B and C under EASY, and thereby delays C, the second one in the queue."""
    world.node(gpus=10)
    world.job("A", 0, 100, demand=gpus(6))
    world.job("B", 1, 100, demand=gpus(6))
    world.job("C", 2, 100, demand=gpus(8))
    world.job("E", 3, 300, demand=gpus(4))
    return world.run()


def test_only_the_first_one_has_a_reservation_under_easy(clockwork: Any) -> None:
    """B keeps its time (100 s); C would have started at 200 s and is delayed until E ends."""
    assert starts(second_job_in_the_queue(clockwork(PLAIN.format("easy")))) == {"A": 0, "B": 100, "C": 303, "E": 3}


def test_every_one_has_a_reservation_under_conservative_backfill(clockwork: Any) -> None:
    """E would delay C, so it waits for its own time, at 300 s."""
    assert starts(second_job_in_the_queue(clockwork(PLAIN.format("conservative")))) == {
        "A": 0,
        "B": 100,
        "C": 200,
        "E": 300,
    }


@pytest.mark.parametrize("mode", ["easy", "conservative"])
def test_a_job_that_ends_early_lets_the_others_move_forward(clockwork: Any, mode: str) -> None:
    world = clockwork(PLAIN.format(mode))
    world.node(gpus=10)
    world.job("A", 0, 40, believed=100, demand=gpus(6))
    world.job("B", 1, 50, demand=gpus(8))
    world.job("D", 3, 98, demand=gpus(4))
    assert starts(world.run()) == {"A": 0, "B": 40, "D": 90}


def test_a_job_that_outlives_its_estimate_pushes_the_reservation_forward_and_blocks_nobody_for_ever(
    clockwork: Any,
) -> None:
    world = clockwork(PLAIN.format("easy"))
    world.node(gpus=10)
    world.job("A", 0, 300, believed=100, demand=gpus(6))
    world.job("B", 1, 50, demand=gpus(8))
    world.job("early", 150, 40, demand=gpus(4))
    world.job("late", 151, 1000, demand=gpus(4))
    begun = starts(world.run())
    assert begun["early"] == 150  # A has overrun by 50 s, and is expected to need 50 s more
    assert begun["B"] == 300
    assert begun["late"] == 350


def test_a_gang_has_a_reservation_over_several_nodes(clockwork: Any) -> None:
    world = clockwork(PLAIN.format("easy"))
    for name in ("n1", "n2", "n3"):
        world.node(name, gpus=2)
    world.job("A", 0, 100, demand=gpus(2))
    world.job("B", 0, 60, demand=gpus(2))
    world.job("gang", 1, 10, demand=gpus(2), members=3)
    world.job("short", 2, 90, demand=gpus(2))
    world.job("long", 3, 99, demand=gpus(2))
    assert starts(world.run()) == {"A": 0, "B": 0, "gang": 100, "short": 2, "long": 110}


def test_idle_pods_are_sent_away_for_a_gang(clockwork: Any) -> None:
    world = clockwork('[ordering]\npolicy = "fifo"\nbackfill = "easy"\n[binding]\nwarm_reuse = true\n')
    for name in ("n1", "n2"):
        world.node(name, gpus=1)
    world.job("a", 0, 10, model="x")
    world.job("b", 0, 10, model="y")
    world.job("gang", 11, 10, model="z", members=2)
    assert starts(world.run()) == {"a": 0, "b": 0, "gang": 11}


def test_why_names_the_task_that_the_room_is_reserved_for(clockwork: Any) -> None:
    world = clockwork(PLAIN.format("easy"))
    world.node(gpus=10)
    world.job("A", 0, 100, demand=gpus(6))
    world.job("B", 1, 50, demand=gpus(8))
    world.job("D", 3, 200, demand=gpus(4))
    world.run(until=50)
    found = {blocker.reason: blocker.detail for blocker in world.engine.why("D")}
    assert "kept for B" in found["reserved_for_other"]
    strict = clockwork(PLAIN.format("none"))
    strict.node(gpus=10)
    strict.job("A", 0, 100, demand=gpus(6))
    strict.job("B", 1, 50, demand=gpus(8))
    strict.job("D", 3, 200, demand=gpus(4))
    strict.run(until=50)
    assert "reserved_for_other" in [blocker.reason for blocker in strict.engine.why("D")]
    assert "reserved_for_other" not in [blocker.reason for blocker in strict.engine.why("B")]


def test_the_profiles_of_backfill_say_so() -> None:
    assert [profiles.load(name).backfill for name in ("fifo-strict", "fifo", "easy", "conservative")] == [
        "none",
        "skip",
        "easy",
        "conservative",
    ]
