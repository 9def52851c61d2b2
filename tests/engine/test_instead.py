"""What would let a task start now: each answer is tried out on the engine itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engine import events as ev
from engine.ahead.instead import would_start_if
from engine.resources import Demand

GIB = 1 << 30


def kinds(desk: Any, req_no: str) -> set[str]:
    return {each.kind for each in would_start_if(desk.engine.state, desk.engine.profile, req_no)}


def begun(desk: Any, req_no: str) -> bool:
    return desk.state(req_no) in ("bound", "starting", "running")


@pytest.fixture
def full(desk: Callable[..., Any], task: Callable[..., Any]) -> Any:
    """Return a desk whose only GPU runs a task, and another one waits."""
    made = desk("aigc")
    made.node("n1")
    made.answer(made.submit(task("t1", demand=Demand(gpus=1), declared_us=3_600_000_000)))
    made.submit(task("t2", demand=Demand(gpus=1)))
    made.step(after=10)
    assert made.state("t2") == "pending"
    return made


def test_one_more_gpu_would_do_and_does(full: Any) -> None:
    assert "gpu" in kinds(full, "t2")
    full.node("n2")
    assert begun(full, "t2")


def test_urgency_would_do_and_does(full: Any, task: Callable[..., Any]) -> None:
    assert "urgent_lane" in kinds(full, "t2")
    full.submit(task("u", demand=Demand(gpus=1), priority=200))
    full.answer(full.step(after=6))
    assert begun(full, "u")


def test_urgency_is_not_offered_where_nobody_may_be_stopped(desk: Callable[..., Any], task: Callable[..., Any]) -> None:
    made = desk("aigc")
    made.node("n1")
    made.answer(made.submit(task("t1", demand=Demand(gpus=1), preemptible=False)))
    made.submit(task("t2", demand=Demand(gpus=1)))
    made.step(after=10)
    assert "urgent_lane" not in kinds(made, "t2")


def test_another_node_would_do_without_strict_affinity_and_does(
    desk: Callable[..., Any], task: Callable[..., Any]
) -> None:
    made = desk("aigc")
    made.node("n1")
    strict = {"demand": Demand(gpus=1), "group": "g", "affinity": "strict"}
    made.answer(made.submit(task("t1", **strict)))
    made.node("n2")
    made.submit(task("t2", **strict))
    made.step(after=1)
    assert made.state("t2") == "pending"
    [found] = [each for each in would_start_if(made.engine.state, made.engine.profile, "t2") if each.kind == "affinity"]
    assert (found.node, "n2" in found.detail) == ("n2", True)
    made.submit(task("t3", demand=Demand(gpus=1)))
    assert begun(made, "t3")


def test_a_tenants_limit_is_named_alone_and_raising_it_does(desk: Callable[..., Any], task: Callable[..., Any]) -> None:
    made = desk("aigc")
    made.node("n1", gpus=2)
    made.step(ev.TenantConfigured("a", max_running=1))
    made.answer(made.submit(task("t1", demand=Demand(gpus=1))))
    made.submit(task("t2", demand=Demand(gpus=1)))
    assert made.state("t2") == "pending"
    assert kinds(made, "t2") == {"tenant_limit"}
    made.step(ev.TenantConfigured("a", max_running=2))
    assert begun(made, "t2")


def test_an_idle_pod_of_another_model_is_named(desk: Callable[..., Any], task: Callable[..., Any]) -> None:
    made = desk("aigc")
    made.node("n1", gpus=2)
    made.answer(made.step(ev.ModelDeployed("kept", "sleep", Demand(gpus=1), pods=2)))
    made.submit(task("t1", demand=Demand(gpus=1), model="other"))
    assert made.state("t1") == "pending"
    assert "warm_model" in kinds(made, "t1")
    made.answer(made.submit(task("t2", demand=Demand(gpus=1), model="kept")))
    assert begun(made, "t2")


def test_missing_memory_is_told_in_gib(desk: Callable[..., Any], task: Callable[..., Any]) -> None:
    made = desk("aigc")
    made.node("n1", memory=80 * GIB)
    half = Demand(gpus=1, gpu_share=400, gpu_memory_bytes=60 * GIB)
    made.answer(made.submit(task("t1", demand=half)))
    made.submit(task("t2", demand=half, model="m2"))
    made.step(after=1)
    [found] = [
        each for each in would_start_if(made.engine.state, made.engine.profile, "t2") if each.kind == "gpu_memory"
    ]
    assert found.detail == "40.0 GiB more GPU memory were free on node n1"


def test_what_runs_or_is_over_needs_nothing_else(full: Any) -> None:
    assert would_start_if(full.engine.state, full.engine.profile, "t1") == ()
    full.step(ev.TaskCancelRequested("t2"))
    assert would_start_if(full.engine.state, full.engine.profile, "t2") == ()


def test_asking_changes_nothing(full: Any) -> None:
    before = full.engine.state.digest()
    would_start_if(full.engine.state, full.engine.profile, "t2")
    assert full.engine.state.digest() == before
