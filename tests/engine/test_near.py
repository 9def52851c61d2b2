"""Models brought ahead of need: deployed ones stay where their Pods are, those of the next tasks go where room comes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engine import events as ev
from engine import profiles
from engine.commands import DeletePod, PrefetchModel, ReleaseModel
from engine.levels.near import MOST_ORDERS
from engine.profile import Profile
from engine.resources import Demand, ResidentModel
from engine.tasks import SECOND, Estimate, Quantiles

LATER = 5.0


def ahead(tasks: int = 4) -> Profile:
    return replace(profiles.load("kube-default"), reclaim_idle=False, prefetch_ahead=tasks)


def estimate(seconds: float) -> Estimate:
    us = round(seconds * SECOND)
    return Estimate((("*", Quantiles(us, us, us, us)),))


def prefetched(orders: Any) -> list[tuple[str, str]]:
    return [(c.node, c.model) for c in orders if isinstance(c, PrefetchModel)]


def busy(d: Any, task: Any, *seconds: float) -> None:
    """A node with one GPU for each of these run times, all taken by tasks of as many models."""
    for number, run in enumerate(seconds, start=1):
        d.node(f"n{number}")
        d.answer(d.step(ev.TaskSubmitted(task(f"busy{number}", model=f"busy{number}"), estimate(run))))


def test_the_model_of_the_next_task_goes_where_room_comes_soonest(desk: Any, task: Any) -> None:
    d = desk(ahead())
    busy(d, task, 500, 100, 300)
    orders = [*d.step(ev.TaskSubmitted(task("next", model="m"), estimate(10))), *d.step(after=LATER)]
    assert prefetched(orders) == [("n2", "m")]
    assert prefetched(d.step(after=LATER)) == [], "it was told already"


def test_tasks_that_wait_together_are_expected_at_as_many_places(desk: Any, task: Any) -> None:
    d = desk(ahead())
    busy(d, task, 300, 100, 200)
    waiting = [ev.TaskSubmitted(task(name, model=name), estimate(10)) for name in ("x", "y")]
    assert prefetched(d.step(*waiting)) == [("n2", "x"), ("n3", "y")]


def test_where_many_wait_for_each_pod_nothing_is_brought_for_the_last_ones(desk: Any, task: Any) -> None:
    d = desk(ahead(2))
    busy(d, task, 300)
    names = [f"x{number}" for number in range(5)]
    brought = [prefetched(d.step(ev.TaskSubmitted(task(name, model=name), estimate(10)))) for name in names]
    assert brought == [[("n1", "x0")], [("n1", "x1")], [], [], []]


def test_a_node_that_says_it_holds_the_model_is_not_told_to_fetch_it(desk: Any, task: Any) -> None:
    d = desk(ahead())
    busy(d, task, 100)
    node = d.engine.state.cluster.by_name["n1"]
    d.step(ev.NodeReported("n1", node.spec.gpus, resident=(ResidentModel("m"),)))
    orders = [*d.step(ev.TaskSubmitted(task("next", model="m"), estimate(10))), *d.step(after=LATER)]
    assert prefetched(orders) == []


def test_a_card_that_is_too_small_for_the_task_gets_no_model(desk: Any, task: Any) -> None:
    d = desk(ahead())
    d.node("small", memory=16)
    d.answer(d.step(ev.TaskSubmitted(task("a", model="a"), estimate(10))))
    d.node("large", memory=80)
    large = Demand(gpus=1, gpu_memory_bytes=40)
    d.answer(d.step(ev.TaskSubmitted(task("b", model="b", demand=large), estimate(100))))
    orders = [*d.step(ev.TaskSubmitted(task("next", model="m", demand=large), estimate(10))), *d.step(after=LATER)]
    assert prefetched(orders) == [("large", "m")]


@pytest.mark.parametrize("name", ["fifo", "kube-default"])
def test_profiles_that_do_not_ask_for_it_bring_nothing_ahead(desk: Any, task: Any, name: str) -> None:
    d = desk(replace(profiles.load(name), reclaim_idle=False))
    busy(d, task, 100)
    orders = [*d.step(ev.TaskSubmitted(task("next", model="m"), estimate(10))), *d.step(after=LATER)]
    assert prefetched(orders) == []


def deploy(adapter: str) -> ev.ModelDeployed:
    return ev.ModelDeployed("base", "text_to_image", Demand(gpus=1), slots=4, pods=1, adapter=adapter)


def test_a_deployed_personalised_model_is_pinned_where_its_bases_pods_are_and_released_after(desk: Any) -> None:
    d = desk("aigc")
    d.node("n1")
    d.node("n2")
    orders = d.answer(d.step(deploy("cat"), deploy("dog")))
    orders += d.answer(d.step(after=LATER))
    pinned = [c for c in orders if isinstance(c, PrefetchModel)]
    assert [(c.node, c.model, c.pin) for c in pinned] == [("n1", "cat", True), ("n1", "dog", True)]
    assert [c for c in d.step(after=LATER) if isinstance(c, PrefetchModel | ReleaseModel)] == []
    orders = d.step(ev.ModelUndeployed("base", "text_to_image", "cat"))
    assert [c for c in orders if isinstance(c, ReleaseModel)] == [ReleaseModel("n1", "cat")]
    assert list(d.engine.state.cluster.by_name["n1"].pins) == ["dog"]


def test_a_pin_that_a_node_reports_and_nobody_deploys_is_released(desk: Any) -> None:
    d = desk("aigc")
    d.node("n1")
    node = d.engine.state.cluster.by_name["n1"]
    orders = d.step(ev.NodeReported("n1", node.spec.gpus, resident=(ResidentModel("old", pinned=True),)), after=LATER)
    assert [c for c in orders if isinstance(c, ReleaseModel)] == [ReleaseModel("n1", "old")]


def test_one_look_gives_no_more_orders_than_its_bound_and_the_next_goes_on(desk: Any) -> None:
    d = desk("aigc")
    d.node("n1")
    d.answer(d.step(*(deploy(f"m{number}") for number in range(MOST_ORDERS + 5))))
    first = d.step(after=LATER)
    second = d.step(after=LATER)
    counts = [sum(isinstance(c, PrefetchModel) for c in orders) for orders in (d.orders, first, second)]
    assert max(counts[1:]) <= MOST_ORDERS
    assert counts[0] == MOST_ORDERS + 5
    assert len(d.engine.state.cluster.by_name["n1"].pins) == MOST_ORDERS + 5


def test_an_operator_takes_a_model_off_a_node_but_not_from_under_anybody(desk: Any, task: Any) -> None:
    d = desk("aigc")
    d.node("n1", gpus=3)
    d.answer(d.submit(task("idle", model="m"), task("busy", model="k")))
    d.answer(d.finish("idle"))
    orders = d.step(ev.ModelUnloadRequested("n1", "m"))
    [pod] = [pod.number for pod in d.engine.state.pods.values() if pod.model == "m"]
    assert [c.pod for c in orders if isinstance(c, DeletePod)] == [pod]
    assert [c for c in orders if isinstance(c, ReleaseModel)] == [ReleaseModel("n1", "m", drop=True)]
    d.answer(orders)
    orders = d.step(ev.ModelUnloadRequested("n1", "k"))
    assert [c for c in orders if isinstance(c, DeletePod)] == []
    assert "k" in d.engine.state.cluster.by_name["n1"].models


def test_a_deployed_models_pods_stay_when_it_is_unloaded(desk: Any) -> None:
    d = desk("aigc")
    d.node("n1")
    d.answer(d.step(ev.ModelDeployed("m", "sleep", Demand(gpus=1))))
    assert [c for c in d.step(ev.ModelUnloadRequested("n1", "m")) if isinstance(c, DeletePod)] == []


def test_unloading_from_a_node_that_is_not_there_changes_nothing(desk: Any) -> None:
    d = desk("aigc")
    assert list(d.step(ev.ModelUnloadRequested("nowhere", "m"))) == []
    assert d.engine.state.ignored["ModelUnloadRequested"] == 1
