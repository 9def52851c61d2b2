"""Levels 2 to 6 on small examples: who is next, where, in which Pod, at whose expense."""

from __future__ import annotations

from typing import Any

import pytest

from engine import events as ev
from engine import profiles
from engine.commands import CreatePod, DeletePod, Notify, PrefetchModel, ScaleNodes, StopTask
from engine.limits import Limits
from engine.resources import Demand
from engine.tasks import SECOND, URGENT_PRIORITY, Affinity, Estimate, Quantiles, TaskType


def estimate(seconds: float, memory: int = 0) -> Estimate:
    us = round(seconds * SECOND)
    return Estimate((("*", Quantiles(us, us, us, us)),), memory)


def run_through(d: Any, started: Any, count: int) -> list[str]:
    """Let whoever runs finish, one after the other, and return who started."""
    order: list[str] = []
    for _ in range(count):
        running = next(t.req_no for t in d.engine.state.tasks.values() if t.state == "running")
        orders = d.answer(d.finish(running, after=0.01))
        order += started(orders)
    return order


# --- ordering ---------------------------------------------------------------------------------------------------------


def test_fifo_serves_in_the_order_of_submission_whatever_the_priority(desk: Any, task: Any, started: Any) -> None:
    d = desk("fifo")
    d.node()
    d.answer(d.submit(task("t0")))
    d.submit(task("t1", priority=1), task("t2", priority=200, tenant="b"), task("t3"))
    assert run_through(d, started, 3) == ["t1", "t2", "t3"]


def test_kube_default_serves_by_priority_then_submission(desk: Any, task: Any, started: Any) -> None:
    d = desk("kube-default")
    d.node()
    d.answer(d.submit(task("t0")))
    d.submit(task("t1", priority=1), task("t2", priority=7), task("t3", priority=7), task("t4"))
    assert run_through(d, started, 4) == ["t2", "t3", "t1", "t4"]


def test_urgent_tasks_go_first_and_the_higher_priority_before_the_lower(desk: Any, task: Any, started: Any) -> None:
    d = desk("aigc")
    d.node()
    d.answer(d.submit(task("t0")))
    d.submit(task("t1"), task("u1", priority=URGENT_PRIORITY), task("u2", priority=URGENT_PRIORITY + 50))
    assert run_through(d, started, 3) == ["u2", "u1", "t1"]


def test_a_task_that_has_waited_long_goes_before_ordinary_ones_and_after_urgent_ones(
    desk: Any, task: Any, started: Any
) -> None:
    d = desk("aigc")
    d.node()
    d.answer(d.submit(task("t0")))
    d.step(ev.TaskSubmitted(task("old"), estimate(60)))
    d.step(after=601)
    d.step(ev.TaskSubmitted(task("u1", priority=URGENT_PRIORITY)), ev.TaskSubmitted(task("new"), estimate(1)))
    assert run_through(d, started, 3) == ["u1", "old", "new"]


def test_the_shortest_predicted_task_of_a_group_goes_first(desk: Any, task: Any, started: Any) -> None:
    d = desk("aigc")
    d.node()
    d.answer(d.submit(task("t0")))
    d.step(*(ev.TaskSubmitted(task(f"s{s}"), estimate(s)) for s in (9, 3, 6)))
    d.step(ev.TaskEstimated("s9", estimate(1)))
    assert run_through(d, started, 3) == ["s9", "s3", "s6"]


def test_tenants_share_by_weight(desk: Any, task: Any, started: Any) -> None:
    d = desk("aigc")
    d.node()
    d.step(ev.TenantConfigured("heavy", weight=3), ev.TenantConfigured("light", weight=1))
    d.answer(d.submit(task("t0", tenant="other")))
    for i in range(40):
        d.step(ev.TaskSubmitted(task(f"h{i}", tenant="heavy"), estimate(1)), after=0)
        d.step(ev.TaskSubmitted(task(f"l{i}", tenant="light"), estimate(1)), after=0)
    order = []
    for _ in range(40):
        running = next(t for t in d.engine.state.tasks.values() if t.state == "running")
        d.seconds += 1
        orders = d.step(ev.TaskFinished(running.req_no, running.attempt, run_us=SECOND))
        order += started(d.answer(orders))
    assert sum(1 for r in order if r.startswith("h")) == pytest.approx(30, abs=1)


def test_groups_of_a_tenant_share_alike(desk: Any, task: Any, started: Any) -> None:
    d = desk("aigc")
    d.node()
    d.answer(d.submit(task("t0")))
    d.submit(*(task(f"x{i}", group="x") for i in range(6)), *(task(f"y{i}", group="y") for i in range(3)))
    first = run_through(d, started, 6)
    assert sum(1 for r in first if r[0] == "y") == 3


def test_what_a_task_did_not_use_is_given_back(desk: Any, task: Any) -> None:
    d = desk("aigc")
    d.node()
    d.answer(d.step(ev.TaskSubmitted(task("t"), estimate(100))))
    tenant = d.engine.state.tenants["a"]
    charged = tenant.vtime
    d.step(ev.TaskFinished("t", 1, run_us=40 * SECOND))
    assert (charged, tenant.vtime, tenant.credit) == (100_000_000_000, 100_000_000_000, 60_000_000_000)


@pytest.mark.parametrize("profile", profiles.NAMES)
def test_a_tenant_runs_no_more_than_its_limit_and_goes_on_when_one_ends(desk: Any, task: Any, profile: str) -> None:
    d = desk(profile)
    d.node(gpus=4)
    d.step(ev.TenantConfigured("a", max_running=2))
    d.answer(d.submit(*(task(f"t{i}") for i in range(4)), task("b0", tenant="b")))
    assert [d.state(r) for r in ("t0", "t1", "t2", "t3", "b0")] == [
        "running",
        "running",
        "pending",
        "pending",
        "running",
    ]
    assert "tenant_running_quota" in [b.reason for b in d.engine.why("t2")]
    d.answer(d.finish("t0"))
    assert [d.state(r) for r in ("t2", "t3")] == ["running", "pending"]
    d.answer(d.step(ev.TenantConfigured("a")))
    assert d.state("t3") == "running"


# --- placement and binding --------------------------------------------------------------------------------------------


def test_fifo_takes_the_first_node_that_fits(desk: Any, task: Any) -> None:
    d = desk("fifo")
    for name in ("n1", "n2"):
        d.node(name, gpus=2)
    d.answer(d.submit(task("t1"), task("t2"), task("t3")))
    assert [d.where(r) for r in ("t1", "t2", "t3")] == ["n1", "n1", "n2"]


def test_kube_default_spreads(desk: Any, task: Any) -> None:
    d = desk("kube-default")
    for name in ("n1", "n2"):
        d.node(name, gpus=2)
    d.answer(d.submit(task("t1"), task("t2"), task("t3")))
    assert [d.where(r) for r in ("t1", "t2", "t3")] == ["n1", "n2", "n1"]


def test_aigc_fills_nodes_so_that_large_room_stays_whole(desk: Any, task: Any) -> None:
    d = desk("aigc")
    for name in ("n1", "n2"):
        d.node(name, gpus=4)
    d.answer(d.submit(task("t1", demand=Demand(gpus=1)), after=0.1))
    d.answer(d.submit(task("t2", model="other"), task("t3", model="third")))
    d.answer(d.submit(task("wide", demand=Demand(gpus=4), model="w")))
    assert {d.where(r) for r in ("t1", "t2", "t3")} == {"n1"}
    assert d.where("wide") == "n2"


def test_shares_of_a_gpu_are_packed_and_never_overdrawn(desk: Any, task: Any) -> None:
    d = desk("aigc")
    d.node(gpus=2, memory=80)
    half = Demand(gpu_share=500, gpu_memory_bytes=30)
    d.answer(d.submit(*(task(f"t{i}", demand=half, model=f"m{i}") for i in range(5))))
    used = [d.engine.state.pods[d.engine.state.tasks[f"t{i}"].pods[0]].grants[0].uuid for i in range(4)]
    assert used == ["n1-g0", "n1-g0", "n1-g1", "n1-g1"]
    assert d.state("t4") == "pending"


def test_predicted_memory_decides_how_many_share_a_gpu(desk: Any, task: Any) -> None:
    d = desk("aigc")
    d.node(gpus=1, memory=80 << 30)
    share = Demand(gpu_share=250, gpu_memory_bytes=10 << 30)
    d.answer(
        d.step(*(ev.TaskSubmitted(task(f"t{i}", demand=share, model=f"m{i}"), estimate(1, 35 << 30)) for i in range(3)))
    )
    assert [d.state(f"t{i}") for i in range(3)] == ["running", "running", "pending"]
    assert d.engine.state.pods[1].grants[0].memory_bytes == 36 << 30


def test_a_warm_pod_of_the_same_model_is_used_again_and_no_other(
    desk: Any, task: Any, started: Any, bound: Any
) -> None:
    d = desk("aigc")
    d.node(gpus=2)
    d.answer(d.submit(task("t1", model="m")))
    d.finish("t1")
    orders = d.answer(d.submit(task("t2", model="m"), task("t3", model="x")))
    assert bound(orders) == ["t3"]
    assert d.engine.state.tasks["t2"].pods == [1]


def test_a_pod_serves_as_many_tasks_as_it_has_slots(desk: Any, task: Any, bound: Any) -> None:
    d = desk("aigc")
    d.node(gpus=1)
    orders = d.answer(d.submit(*(task(f"t{i}", slots=3) for i in range(4))))
    assert bound(orders) == ["t0"]
    assert [d.state(f"t{i}") for i in range(4)] == ["running", "running", "running", "pending"]


@pytest.mark.parametrize(("affinity", "second"), [(Affinity.PREFERRED, "running"), (Affinity.STRICT, "pending")])
def test_a_group_stays_on_its_node(desk: Any, task: Any, affinity: Affinity, second: str) -> None:
    d = desk("aigc")
    for name in ("n1", "n2"):
        d.node(name, gpus=2)
    d.answer(d.submit(task("t1", group="g", affinity=affinity)))
    d.answer(
        d.submit(
            task("t2", group="g", affinity=affinity, model="x"), task("t3", group="g", affinity=affinity, model="y")
        )
    )
    assert d.where("t1") == d.where("t2") == "n1"
    assert d.state("t3") == second
    if second == "pending":
        assert "group_node" in [b.reason for b in d.engine.why("t3")]


def test_a_group_moves_when_its_node_is_drained_or_lost(desk: Any, task: Any) -> None:
    d = desk("aigc")
    for name in ("n1", "n2", "n3"):
        d.node(name, gpus=2)
    d.answer(d.submit(task("t1", group="g", affinity=Affinity.STRICT)))
    d.step(ev.NodeDrainRequested("n1"))
    d.answer(d.submit(task("t2", group="g", affinity=Affinity.STRICT)))
    assert (d.where("t1"), d.where("t2")) == ("n1", "n2")
    d.step(ev.NodeLost("n2"))
    d.answer(d.step(after=2))
    assert d.where("t2") == "n3"


def test_an_exclusive_group_has_its_node_for_itself_as_long_as_it_lives(desk: Any, task: Any) -> None:
    d = desk("aigc")
    d.node("n1", gpus=2)
    d.answer(d.submit(task("x1", group="x", affinity=Affinity.EXCLUSIVE)))
    d.submit(task("t1"), task("x2", group="x", affinity=Affinity.EXCLUSIVE))
    assert d.state("x2") != "pending"
    assert "node_exclusive" in [b.reason for b in d.engine.why("t1")]
    d.answer(d.step(*(ev.PodStarted(n) for n in d.engine.state.pods)))
    d.answer(d.finish("x1"))
    assert d.state("t1") == "pending"
    d.answer(d.finish("x2"))
    assert d.state("t1") == "running"


def test_a_gang_starts_together_or_not_at_all(desk: Any, task: Any, bound: Any) -> None:
    d = desk("aigc")
    for name in ("n1", "n2"):
        d.node(name, gpus=2)
    d.answer(d.submit(task("t1", model="m")))
    assert bound(d.submit(task("gang", members=2, demand=Demand(gpus=2)))) == []
    assert "gang_incomplete" in [b.reason for b in d.engine.why("gang")]
    d.answer(d.step(ev.TaskFinished("t1", 1)))
    assert bound(d.step(ev.PodStopped(1))) == ["gang", "gang"]
    d.step(ev.PodStarted(2))
    assert d.state("gang") == "bound"
    d.answer(d.step(ev.PodStarted(3)))
    assert d.state("gang") == "running"


def test_when_a_member_of_a_gang_fails_the_others_are_stopped_and_all_start_again(desk: Any, task: Any) -> None:
    d = desk("aigc")
    d.node("n1", gpus=2)
    d.answer(d.submit(task("gang", members=2)))
    orders = d.step(ev.TaskFailed("gang", 1, "crashed", 1))
    assert [(c.rank, c.reason) for c in orders if isinstance(c, StopTask)] == [(0, "gang_failed")]
    d.answer(orders)
    assert d.state("gang") == "backoff"
    d.answer(d.step(after=5))
    assert (d.state("gang"), d.engine.state.tasks["gang"].attempt) == ("running", 2)


def test_an_idle_pod_goes_when_another_model_needs_its_room(desk: Any, task: Any) -> None:
    d = desk("aigc")
    d.node(gpus=1)
    d.answer(d.submit(task("t1", model="m")))
    d.finish("t1")
    orders = d.submit(task("t2", model="x"))
    assert [c for c in orders if isinstance(c, DeletePod)] == [DeletePod(1, "room")]
    assert PrefetchModel("n1", "x") in orders
    assert [b.reason for b in d.engine.why("t2")] == ["room_claimed"]
    d.submit(task("t3", model="m"))
    d.answer(d.step(ev.PodStopped(1)))
    assert (d.state("t2"), d.state("t3")) == ("running", "pending")


def test_an_idle_pod_goes_after_its_time(desk: Any, task: Any) -> None:
    d = desk("aigc", Limits(idle_ttl_us=10 * SECOND))
    d.node()
    d.answer(d.submit(task("t1")))
    d.finish("t1")
    assert d.engine.wakeup_at is not None
    d.step(after=5)
    assert DeletePod(1, "idle") in d.step(after=6)


# --- preemption -------------------------------------------------------------------------------------------------------


def test_a_long_training_is_stopped_for_an_urgent_task_and_keeps_its_checkpoint(desk: Any, task: Any) -> None:
    d = desk("aigc")
    d.node()
    d.answer(d.step(ev.TaskSubmitted(task("train", task_type=TaskType.TP, model="m"), estimate(3600))))
    d.submit(task("u", priority=URGENT_PRIORITY, model="x"))
    assert d.state("train") == "running"
    orders = d.step(after=6)
    (stop,) = [c for c in orders if isinstance(c, StopTask)]
    assert (stop.req_no, stop.keep_checkpoint, stop.reason) == ("train", True, "preempted")
    d.answer(orders)
    assert (d.state("u"), d.state("train")) == ("running", "pending")
    train = d.engine.state.tasks["train"]
    assert (train.failures, train.preemptions, train.checkpoint) == (0, 1, "ckpt")
    d.answer(d.finish("u"))
    assert d.state("train") == "running"


def test_a_task_that_is_nearly_done_is_not_stopped(desk: Any, task: Any) -> None:
    d = desk("aigc")
    d.node()
    d.answer(d.step(ev.TaskSubmitted(task("short", model="m"), estimate(10))))
    d.submit(task("u", priority=URGENT_PRIORITY, model="x"))
    assert not [c for c in d.step(after=8) if isinstance(c, StopTask)]


@pytest.mark.parametrize("change", [{"preemptible": False}, {"priority": URGENT_PRIORITY}])
def test_urgent_and_protected_tasks_are_never_stopped(desk: Any, task: Any, change: dict[str, Any]) -> None:
    d = desk("aigc")
    d.node()
    d.answer(d.step(ev.TaskSubmitted(task("train", task_type=TaskType.TP, **change), estimate(3600))))
    d.submit(task("u", priority=URGENT_PRIORITY, model="x"))
    assert not [c for c in d.step(after=60) if isinstance(c, StopTask)]


def test_for_the_same_model_only_the_task_is_stopped_and_the_pod_stays(desk: Any, task: Any) -> None:
    d = desk("aigc")
    d.node()
    d.answer(d.step(ev.TaskSubmitted(task("train", task_type=TaskType.TP, model="m"), estimate(3600))))
    d.submit(task("u", priority=URGENT_PRIORITY, model="m"))
    d.answer(d.step(after=6))
    assert (d.state("u"), d.engine.state.tasks["u"].pods) == ("running", [1])


def test_kube_default_and_fifo_never_preempt(desk: Any, task: Any) -> None:
    for profile in ("fifo", "kube-default"):
        d = desk(profile)
        d.node()
        d.answer(d.step(ev.TaskSubmitted(task("train", task_type=TaskType.TP), estimate(3600))))
        d.submit(task("u", priority=URGENT_PRIORITY, model="x"))
        assert not [c for c in d.step(after=60) if isinstance(c, StopTask)]


# --- elasticity -------------------------------------------------------------------------------------------------------


def test_a_deployed_model_keeps_its_pods_warm(desk: Any, task: Any, started: Any) -> None:
    d = desk("aigc", Limits(idle_ttl_us=10 * SECOND))
    d.node(gpus=3)
    orders = d.answer(d.step(ev.ModelDeployed("m", "sleep", Demand(), pods=2)))
    assert [c.model for c in orders if isinstance(c, CreatePod)] == ["m", "m"]
    assert not [c for c in d.step(after=30) if isinstance(c, DeletePod)]
    assert started(d.submit(task("t", model="m"))) == ["t"]
    d.answer(d.step(ev.PodStopped(1)))
    assert sum(1 for p in d.engine.state.pods.values() if p.model == "m") == 2
    orders = d.step(ev.ModelUndeployed("m", "sleep"), after=30)
    assert [c.reason for c in orders if isinstance(c, DeletePod)] == ["idle", "idle"]


def test_a_kept_pod_is_not_reclaimed(desk: Any, task: Any) -> None:
    d = desk("aigc")
    d.node(gpus=1)
    d.answer(d.step(ev.ModelDeployed("m", "sleep", Demand())))
    d.submit(task("t", model="x"))
    assert not [c for c in d.step(after=60) if isinstance(c, DeletePod)]
    d.step(ev.ModelUndeployed("m", "sleep"))
    assert d.state("t") == "pending"
    assert [b.reason for b in d.engine.why("t")] == ["room_claimed"]


def test_a_deployment_takes_the_room_of_idle_pods(desk: Any, task: Any) -> None:
    d = desk("aigc")
    d.node(gpus=1)
    d.answer(d.submit(task("t", model="x")))
    d.finish("t")
    d.answer(d.step(ev.ModelDeployed("m", "sleep", Demand())))
    assert [p.model for p in d.engine.state.pods.values()] == ["m"]


def test_more_nodes_are_asked_for_when_work_waits_long_and_fewer_when_none_is_left(desk: Any, task: Any) -> None:
    d = desk("aigc")
    for name in ("n1", "n2"):
        d.node(name)
    d.answer(d.submit(*(task(f"t{i}", model="m") for i in range(5))))
    assert not [c for c in d.step(after=60) if isinstance(c, ScaleNodes)]
    assert [c.nodes for c in d.step(after=100) if isinstance(c, ScaleNodes)] == [5]
    for i in range(5):
        d.answer(d.finish(f"t{i}"))
    orders = d.answer(d.step(after=700))
    assert [c.nodes for c in orders if isinstance(c, ScaleNodes)] == [1]


def test_notifications_tell_every_visible_change(desk: Any, task: Any) -> None:
    d = desk("aigc")
    d.node()
    d.answer(d.submit(task("t")))
    d.finish("t")
    news = [(str(c.state), c.node, c.result) for c in d.orders if isinstance(c, Notify)]
    assert news == [("pending", "", ""), ("bound", "n1", ""), ("running", "n1", ""), ("finished", "", "out")]


def test_an_urgent_task_takes_the_slot_that_an_ordinary_one_waited_for(desk: Any, task: Any, started: Any) -> None:
    d = desk("aigc")
    d.node()
    create = d.submit(task("slow"))
    d.submit(task("other", model="x", priority=URGENT_PRIORITY), task("urgent", priority=URGENT_PRIORITY), after=9)
    pod = next(c.pod for c in create if isinstance(c, CreatePod))
    orders = d.step(ev.PodStarted(pod))
    assert started(orders) == ["urgent"]
    assert not [c for c in orders if isinstance(c, StopTask)]
    slow = d.engine.state.tasks["slow"]
    assert (slow.state, slow.failures, slow.preemptions) == ("pending", 0, 0)


@pytest.mark.parametrize("profile", ["fifo", "kube-default"])
def test_a_profile_without_bands_hands_no_slot_over(desk: Any, task: Any, started: Any, profile: str) -> None:
    d = desk(profile)
    d.node()
    create = d.submit(task("slow"))
    d.submit(task("urgent", priority=URGENT_PRIORITY))
    assert started(d.step(ev.PodStarted(next(c.pod for c in create if isinstance(c, CreatePod))))) == ["slow"]


def test_an_aged_task_keeps_the_slot_it_waited_for(desk: Any, task: Any, started: Any) -> None:
    d = desk("aigc")
    d.node()
    create = d.submit(task("slow"))
    d.submit(task("urgent", priority=URGENT_PRIORITY))
    d.step(after=600)
    assert started(d.step(ev.PodStarted(next(c.pod for c in create if isinstance(c, CreatePod))))) == ["slow"]


def test_no_attempt_is_stopped_for_others_before_it_has_run_a_little(desk: Any, task: Any) -> None:
    d = desk("aigc")
    d.node()
    create = d.step(ev.TaskSubmitted(task("slow"), estimate(600)))
    d.answer(create, start=False)
    d.step(ev.TaskSubmitted(task("urgent", priority=URGENT_PRIORITY), estimate(20)), after=0.1)
    d.step(ev.TaskStarted("slow", 1), after=2)
    begun = d.seconds
    while not (stops := [c for c in d.orders if isinstance(c, StopTask)]):
        assert d.engine.wakeup_at is not None
        assert d.engine.wakeup_at <= (begun + 5) * SECOND
        d.step(after=max(d.engine.wakeup_at / SECOND - d.seconds, 0.001))
    assert d.seconds == pytest.approx(begun + 5)
    assert [c.req_no for c in stops] == ["slow"]
