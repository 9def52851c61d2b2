"""What nodes say they hold: it replaces what was guessed, survives recovery, and draws new Pods to where loads are short."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engine import events as ev
from engine import replay
from engine.cluster import place_code
from engine.commands import CreatePod, PrefetchModel, ReleaseModel
from engine.limits import Limits
from engine.profiles import load
from engine.resources import ResidentModel, Tier
from engine.stock import FETCH_US, spared_permille
from engine.tasks import SECOND


def report(d: Any, node: str, *resident: ResidentModel, after: float = 1.0) -> Any:
    """Let a node say what it holds, its GPUs as they were."""
    spec = d.engine.state.cluster.by_name[node].spec
    return d.step(ev.NodeReported(node, spec.gpus, resident=resident), after=after)


def held(d: Any, node: str) -> dict[str, int]:
    known = d.engine.state.cluster.by_name[node]
    return {model: place_code(known, model) for model in known.models}


def placed(orders: Any) -> list[str]:
    return [c.node for c in orders if isinstance(c, CreatePod)]


def test_a_new_pod_goes_where_its_model_lies_in_memory_before_a_disk_before_nowhere(desk: Any, task: Any) -> None:
    d = desk("aigc")
    for name in ("n1", "n2", "n3"):
        d.node(name)
    report(d, "n2", ResidentModel("m", Tier.DISK))
    report(d, "n3", ResidentModel("m", Tier.MEMORY))
    assert placed(d.submit(task("a", model="m"))) == ["n3"]
    assert placed(d.submit(task("b", model="m"))) == ["n2"]
    assert placed(d.submit(task("c", model="m"))) == ["n1"]


def test_what_a_place_is_worth_is_what_loads_from_there_were_measured_to_spare(desk: Any, task: Any) -> None:
    d = desk("aigc")
    d.node("n1", gpus=8)
    assert spared_permille(d.engine.state) == (0, 1000, 800, 950)
    for number, (tier, seconds) in enumerate([(None, 40), (Tier.DISK, 30), (Tier.MEMORY, 4)]):
        model = f"m{number}"
        report(d, "n1", *([ResidentModel(model, tier)] if tier else []))
        orders = d.submit(task(f"t{number}", model=model))
        [pod] = [c.pod for c in orders if isinstance(c, CreatePod)]
        d.answer(d.step(ev.PodStarted(pod), after=seconds))
    assert spared_permille(d.engine.state) == (0, 1000, 250, 900)


def test_a_disk_that_is_no_faster_than_the_store_draws_nobody(desk: Any, task: Any) -> None:
    d = desk("aigc")
    for name in ("n1", "n2"):
        d.node(name)
    d.engine.state.loads_us[:] = [30 * SECOND, 30 * SECOND, 10 * SECOND]
    report(d, "n1")
    report(d, "n2", ResidentModel("m", Tier.DISK))
    assert placed(d.submit(task("a", model="m"))) == ["n1"]


def test_a_report_replaces_guesses_once_they_are_old(desk: Any, task: Any) -> None:
    d = desk("aigc")
    d.node("n1")
    d.answer(d.submit(task("a", model="m")))
    d.answer(d.finish("a"))
    report(d, "n1", ResidentModel("other"))
    assert held(d, "n1") == {"other": 2, "m": 2}, "the Pod that holds it lives, whatever the report says"
    d.answer(d.step(after=700))
    report(d, "n1", ResidentModel("other"), after=FETCH_US / SECOND)
    assert held(d, "n1") == {"other": 2}


def test_a_node_that_never_reports_is_believed_as_before(desk: Any, task: Any) -> None:
    d = desk("aigc")
    d.node("n1", gpus=2)
    d.answer(d.submit(task("a", model="m")))
    assert held(d, "n1") == {"m": 1}


def test_a_lost_node_holds_nothing_until_it_reports_again(desk: Any) -> None:
    d = desk("aigc")
    d.node("n1")
    report(d, "n1", ResidentModel("m", pinned=True))
    d.step(ev.NodeLost("n1"))
    node = d.engine.state.cluster.by_name["n1"]
    assert (dict(node.models), node.tiers, dict(node.pins)) == ({}, None, {})
    assert d.engine.state.cluster.cached == {}


def test_more_models_than_are_remembered_are_cut_off_from_the_end(desk: Any) -> None:
    d = desk("aigc", Limits(models_per_node=3))
    d.node("n1")
    report(d, "n1", *(ResidentModel(f"m{number}") for number in range(9)))
    assert set(held(d, "n1")) == {"m0", "m1", "m2"}
    assert set(d.engine.state.cluster.cached) == {"m0", "m1", "m2"}


@pytest.mark.parametrize("drop", [False, True])
def test_a_released_model_is_pinned_no_more_and_a_dropped_one_is_gone(desk: Any, drop: bool) -> None:
    d = desk(replace(load("aigc"), keep_deployed=False))
    d.node("n1")
    report(d, "n1", ResidentModel("m", pinned=True))
    state = d.engine.state
    assert list(state.cluster.by_name["n1"].pins) == ["m"]
    state.apply_command(state.now, ReleaseModel("n1", "m", drop))
    assert list(state.cluster.by_name["n1"].pins) == []
    assert ("m" in held(d, "n1")) is not drop


def test_a_snapshot_keeps_what_nodes_hold_and_a_replay_decides_the_same(desk: Any, task: Any) -> None:
    d = desk("aigc")
    for name in ("n1", "n2"):
        d.node(name, gpus=2)
    report(d, "n1", ResidentModel("m", Tier.MEMORY, 5, True), ResidentModel("k"))
    d.answer(d.submit(task("a", model="m")))
    d.engine.state.apply_command(d.engine.state.now, PrefetchModel("n1", "p", True))
    before = d.engine.state
    engine = replay.recover(d.engine.snapshot(), (), load("aigc"))
    after = engine.state
    assert after.digest() == before.digest()
    for name in ("n1", "n2"):
        one, other = before.cluster.by_name[name], after.cluster.by_name[name]
        assert (one.tiers, one.expected, one.pins, list(one.models)) == (
            other.tiers,
            other.expected,
            other.pins,
            list(other.models),
        )
    assert list(after.cluster.places("m")) == list(before.cluster.places("m")) == [3, 0]
    assert after.loads_us == before.loads_us
    events = [ev.TaskSubmitted(task("next", model="m"))]
    assert engine.step(before.now + SECOND, events) == d.step(*events)


def test_the_vector_of_places_follows_every_change(desk: Any, task: Any) -> None:
    d = desk("aigc", Limits(models_per_node=2))
    for name in ("n1", "n2", "n3"):
        d.node(name)
    cluster = d.engine.state.cluster
    cluster.places("m")
    report(d, "n2", ResidentModel("m"))
    assert list(cluster.places("m")) == [0, 2, 0]
    report(d, "n2", ResidentModel("m", Tier.MEMORY), ResidentModel("x"))
    cluster.remember_model(cluster.by_name["n3"], "m", 2)
    assert list(cluster.places("m")) == [0, 3, 1]
    report(d, "n2", ResidentModel("x"))
    assert list(cluster.places("m")) == [0, 0, 1]
    d.node("n4")
    assert list(cluster.places("m")) == [0, 0, 1, 0]
