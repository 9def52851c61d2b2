"""Sharing against its papers.

DRF: Ghodsi et al., "Dominant Resource Fairness", NSDI 2011, section 4.1 (the worked example of figure 3).
Themis: Mahajan et al., "Themis: Fair and Efficient GPU Cluster Scheduling", NSDI 2020, section 3 (finish-time fairness rho).
Queues: the nominal quota, borrowing and reclaim of Kueue's cohorts and the queues of KAI, by their documented definitions.
"""

from __future__ import annotations

from typing import Any

import pytest

from engine import events as ev
from engine import profiles
from engine.entities import Tenant
from engine.levels.ordering import GPUS
from engine.levels.orderings.sharing import finish_time_fairness
from engine.levels.quotas import QueueSpec, Quotas
from engine.resources import Demand

GIB = 1 << 30
PLAIN = '[ordering]\npolicy = "{}"\n[binding]\nwarm_reuse = false\n[preemption]\nreload_s = 0\nmin_run_s = 0\n'


def begun(world: Any, letter: str) -> list[float]:
    return sorted(times[0] for req_no, times in world.begun.items() if req_no.startswith(letter))


def nine_processors(world: Any) -> Any:
    """9 CPUs and 18 GB; A's tasks need 1 CPU and 4 GB, B's need 3 CPUs and 1 GB; both have many."""
    world.node(gpus=0, cpu_milli=9_000, memory_bytes=18 * GIB)
    for i in range(6):
        world.job(f"A{i}", 0, 100, tenant="A", demand=Demand(gpus=0, cpu_milli=1_000, memory_bytes=4 * GIB))
        world.job(f"B{i}", 0, 100, tenant="B", demand=Demand(gpus=0, cpu_milli=3_000, memory_bytes=1 * GIB))
    return world.run(until=50)


def test_drf_gives_three_tasks_to_one_and_two_to_the_other_as_in_the_paper(clockwork: Any) -> None:
    world = nine_processors(clockwork(PLAIN.format("drf")))
    assert (begun(world, "A"), begun(world, "B")) == ([0, 0, 0], [0, 0])
    accounts = world.engine._backlog.waiting.accounts
    tenants = world.engine.state.tenants
    shares = {name: profiles.load("drf").ordering.share(tenants[name], accounts) for name in ("A", "B")}
    assert shares == {"A": 666_666_666, "B": 666_666_666}  # both hold two thirds of their dominant resource


def test_a_weight_of_two_gives_twice_the_dominant_share(clockwork: Any) -> None:
    world = clockwork(PLAIN.format("drf"))
    world.node(gpus=9)
    world.at(0, ev.TenantConfigured("B", 2))
    for i in range(9):
        world.job(f"A{i}", 0, 100, tenant="A")
        world.job(f"B{i}", 0, 100, tenant="B")
    world.run(until=50)
    assert (len(begun(world, "A")), len(begun(world, "B"))) == (3, 6)


def test_fifo_would_give_what_came_first(clockwork: Any) -> None:
    world = clockwork(PLAIN.format("fifo"))
    world.node(gpus=0, cpu_milli=9_000, memory_bytes=18 * GIB)
    for name, demand in (
        ("A", Demand(gpus=0, cpu_milli=1_000, memory_bytes=4 * GIB)),
        ("B", Demand(gpus=0, cpu_milli=3_000, memory_bytes=1 * GIB)),
    ):
        for i in range(6):
            world.job(f"{name}{i}", 0, 100, tenant=name, demand=demand)
    world.run(until=50)
    assert (len(begun(world, "A")), len(begun(world, "B"))) == (4, 1)


def test_what_ends_goes_to_whoever_holds_least(clockwork: Any) -> None:
    world = clockwork(PLAIN.format("drf"))
    world.node(gpus=4)
    for i in range(6):
        world.job(f"a{i}", 0, 10 + i, tenant="a")
    world.job("b0", 1, 10, tenant="b")
    world.job("b1", 1, 10, tenant="b")
    world.run()
    assert begun(world, "a") == [0, 0, 0, 0, 12, 13]
    assert begun(world, "b") == [10, 11]


class Equal:
    """Holdings of a cluster of four GPUs that two tenants share."""

    def __init__(self) -> None:
        self.total = {GPUS: 4_000}
        self.tenants = 2

    def held(self, tenant: Tenant) -> dict[int, int]:
        return {}


def test_rho_is_the_time_in_the_shared_cluster_over_the_time_on_an_equal_share(clockwork: Any) -> None:
    world = clockwork(PLAIN.format("themis"))
    world.node(gpus=4)
    world.job("first", 0, 500, demand=Demand(gpus=4))
    world.job("narrow", 0, 10, demand=Demand(gpus=2))
    world.job("wide", 0, 10, demand=Demand(gpus=4))
    world.run(until=0.5)
    tasks = world.engine.state.tasks
    at = 30_000_000
    assert finish_time_fairness(tasks["narrow"], at, Equal()) == 4_000_000  # (30 + 10) / 10
    assert (
        finish_time_fairness(tasks["wide"], at, Equal()) == 2_000_000
    )  # alone on half of what it wants: (30 + 10) / 20


def test_themis_serves_whoever_is_delayed_most_for_its_size(clockwork: Any) -> None:
    """A short task that came later is further behind its own time than a long one that came first."""
    world = clockwork(PLAIN.format("themis"))
    world.node()
    world.job("running", 0, 20)
    world.job("long", 1, 100)
    world.job("short", 5, 2)
    world.run()
    assert world.begun["short"] == [20]  # rho 8.5 against 1.19
    fifo = clockwork(PLAIN.format("fifo"))
    fifo.node()
    fifo.job("running", 0, 20)
    fifo.job("long", 1, 100)
    fifo.job("short", 5, 2)
    assert fifo.run().begun["long"] == [20]


QUEUES = (
    PLAIN.format("fifo")
    + """
[quotas.research]
guaranteed_gpus = 6
tenants = ["r"]
[quotas.service]
guaranteed_gpus = 2
limit_gpus = 4
tenants = ["s"]
"""
)


def test_a_queue_borrows_what_others_leave_up_to_its_limit(clockwork: Any) -> None:
    world = clockwork(QUEUES)
    world.node(gpus=8)
    for i in range(6):
        world.job(f"s{i}", 0, 100, tenant="s")
    world.run(until=50)
    assert begun(world, "s") == [0, 0, 0, 0]
    why = {blocker.reason: blocker for blocker in world.engine.why("s5")}
    assert why["queue_quota"].missing == 1_000


def test_a_queue_takes_back_its_guarantee_from_those_who_borrowed_it_and_no_more(clockwork: Any) -> None:
    world = clockwork(QUEUES)
    world.node(gpus=8)
    for i in range(4):
        world.job(f"s{i}", 0, 1_000, tenant="s")
    for i in range(8):
        world.job(f"r{i}", 10, 50, tenant="r")
    world.run(until=30)
    assert begun(world, "r") == [10] * 6
    assert sorted(who for _, who in world.stops) == ["s2", "s3"]
    world.run(until=2_000)
    assert len(world.ended) == 12
    assert len(world.stops) == 2


def test_whoever_is_within_its_guarantee_goes_before_those_who_borrow(clockwork: Any) -> None:
    world = clockwork(QUEUES)
    world.node(gpus=8)
    for i in range(7):
        world.job(f"r{i}", 0, 10, tenant="r")
    world.job("s0", 0, 20, tenant="s")
    world.job("r7", 1, 10, tenant="r")
    world.job("s1", 2, 10, tenant="s")
    world.run()
    assert world.begun["s1"] == [2]  # reclaims what r borrowed
    assert [who for _, who in world.stops] == ["r6"]


def test_of_two_that_borrow_the_one_that_holds_less_for_its_weight_is_next(clockwork: Any) -> None:
    text = PLAIN.format("fifo") + '[quotas.a]\nweight = 3\ntenants = ["a"]\n[quotas.b]\nweight = 1\ntenants = ["*"]\n'
    world = clockwork(text)
    world.node(gpus=8)
    for i in range(10):
        world.job(f"b{i}", 0, 100, tenant="b")
    for i in range(10):
        world.job(f"a{i}", 0, 100, tenant="a")
    world.run(until=50)
    assert (len(begun(world, "a")), len(begun(world, "b"))) == (6, 2)


def test_a_tree_shares_at_every_level(clockwork: Any) -> None:
    """Two departments share equally however many teams each has; the teams of one share its part."""
    text = PLAIN.format("fifo") + "".join(
        f'[quotas.{name}]\nparent = "{parent}"\ntenants = {tenants}\n'
        for name, parent, tenants in (
            ("east", "", []),
            ("west", "", []),
            ("e1", "east", ["e1"]),
            ("e2", "east", ["e2"]),
            ("w1", "west", ["w1"]),
        )
    )
    world = clockwork(text)
    world.node(gpus=8)
    for tenant in ("e1", "e2", "w1"):
        for i in range(8):
            world.job(f"{tenant}-{i}", 0, 100, tenant=tenant)
    world.run(until=50)
    assert [len(begun(world, t)) for t in ("e1", "e2", "w1")] == [2, 2, 4]


def test_a_gang_reclaims_its_guarantee_over_several_nodes(clockwork: Any) -> None:
    world = clockwork(QUEUES)
    for name in ("n1", "n2"):
        world.node(name, gpus=4)
    for i in range(4):
        world.job(f"s{i}", 0, 1_000, tenant="s")
    world.job("r0", 1, 1_000, tenant="r", demand=Demand(gpus=2), members=3)
    world.run(until=100)
    assert begun(world, "r") == [1]
    assert len(world.stops) == 2


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('name = "a"\n[quotas]\n', "use a table per queue"),
        ("[quotas.a]\nguaranteed_gpus = -1\n", "quotas.a.guaranteed_gpus: -1 is wrong; use a number of GPUs"),
        ("[quotas.a]\nguaranteed_gpus = 4\nlimit_gpus = 2\n", "quotas.a: the limit is below the guarantee"),
        ("[quotas.a]\nweight = 0\n", "quotas.a.weight: 0 is out of range"),
        ('[quotas.a]\nparent = "b"\n', "quotas.a.parent: there is no queue 'b'"),
        ('[quotas.a]\nparent = "b"\n[quotas.b]\nparent = "a"\n', "its own ancestor"),
        ('[quotas.a]\ntenants = ["x"]\n[quotas.b]\ntenants = ["x"]\n', "'x' belongs to another queue"),
        ('[quotas.a]\nguaranteed_gpus = 1\n[quotas.b]\nparent = "a"\nguaranteed_gpus = 2\n', "have 2 together"),
        ("[quotas.a]\nluck = 1\n", "quotas.a.luck: there is no such key"),
        ("[quotas.a]\ntenants = 1\n", "use a list of texts"),
    ],
)
def test_what_is_wrong_in_quotas_is_named(table: str, message: str) -> None:
    with pytest.raises(profiles.InvalidProfile, match=message):
        profiles.load(table)


def test_two_queues_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two queues of this name"):
        Quotas((QueueSpec("a"), QueueSpec("a")))
