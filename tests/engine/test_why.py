"""Why a task waits: every blocker, and what is missing."""

from __future__ import annotations

from typing import Any

import pytest

from engine import events as ev
from engine.reasons import Reason
from engine.resources import Demand


def test_every_missing_resource_is_named_with_the_closest_miss(desk: Any, task: Any) -> None:
    d = desk()
    d.node(
        "n1",
        gpus=2,
        memory=80,
        cpu_milli=4000,
        memory_bytes=100,
        disk_bytes=10,
        network_bps=10,
        extra=(("license", 2),),
    )
    d.node(
        "n2",
        gpus=2,
        memory=80,
        cpu_milli=4000,
        memory_bytes=100,
        disk_bytes=10,
        network_bps=10,
        extra=(("license", 2),),
    )
    hog = Demand(
        gpus=1,
        gpu_memory_bytes=80,
        cpu_milli=3000,
        memory_bytes=90,
        disk_bytes=9,
        network_bps=9,
        extra=(("license", 1),),
    )
    d.answer(d.submit(task("h1", demand=hog), task("h2", demand=hog, model="x")))
    wide = Demand(
        gpus=2,
        gpu_memory_bytes=70,
        cpu_milli=2000,
        memory_bytes=20,
        disk_bytes=3,
        network_bps=4,
        extra=(("license", 2),),
    )
    d.submit(task("t", demand=wide))
    found = {b.reason: b for b in d.engine.why("t")}
    lacking = {reason: (b.nodes, b.missing, b.node) for reason, b in found.items()}
    assert lacking[Reason.NO_CPU] == (2, 1000, "n1")
    assert lacking[Reason.NO_MEMORY] == (2, 10, "n1")
    assert lacking[Reason.NO_DISK] == (2, 2, "n1")
    assert lacking[Reason.NO_NETWORK] == (2, 3, "n1")
    assert lacking[Reason.NO_EXTRA] == (2, 1, "n1")
    assert lacking[Reason.NO_GPU_SHARE] == (2, 1000, "n1")
    assert lacking[Reason.NO_GPU_MEMORY] == (2, 70, "n1")
    assert "2 of 2 nodes: too little cpu_milli; the closest, n1, lacks 1000" in found[Reason.NO_CPU].detail


def test_nodes_that_are_lost_draining_or_of_another_kind_are_told_apart(desk: Any, task: Any) -> None:
    d = desk()
    d.node("n1", model="h100")
    d.node("n2", gpus=0)
    d.node("n3", model="a100")
    d.node("n4", model="a100")
    d.step(ev.NodeLost("n3"), ev.NodeDrainRequested("n4"))
    d.submit(task("t", demand=Demand(gpu_models=("a100",))))
    reasons = {b.reason: b.nodes for b in d.engine.why("t")}
    assert reasons[Reason.NO_GPU_MODEL] == 1
    assert reasons[Reason.NO_GPU] == 1
    assert reasons[Reason.NODE_DOWN] == 1
    assert reasons[Reason.NODE_DRAINING] == 1


def test_without_a_node_that_is_the_reason(desk: Any, task: Any) -> None:
    d = desk()
    d.submit(task("t"))
    assert Reason.NO_NODE in [b.reason for b in d.engine.why("t")]


def test_each_stage_of_an_attempt_has_its_reason(desk: Any, task: Any) -> None:
    d = desk()
    d.node()
    d.submit(task("t"))
    assert [b.reason for b in d.engine.why("t")] == [Reason.POD_CREATING]
    d.step(ev.PodStarted(1))
    assert [b.reason for b in d.engine.why("t")] == [Reason.START_UNCONFIRMED]
    d.step(ev.TaskStarted("t", 1))
    assert d.engine.why("t") == ()
    d.step(ev.TaskCancelRequested("t"))
    assert [b.reason for b in d.engine.why("t")] == [Reason.STOPPING]
    d.step(ev.TaskStopped("t", 1))
    assert d.engine.why("t") == ()


def test_a_backoff_says_until_when(desk: Any, task: Any) -> None:
    d = desk()
    d.node()
    d.answer(d.submit(task("t")))
    d.step(ev.TaskFailed("t", 1, "crashed"))
    (blocker,) = d.engine.why("t")
    assert (blocker.reason, blocker.until) == (Reason.BACKING_OFF, d.engine.state.tasks["t"].retry_at)
    assert d.engine.wakeup_at == blocker.until


def test_an_unknown_task_is_a_key_error(desk: Any) -> None:
    with pytest.raises(KeyError):
        desk().engine.why("nobody")


def test_a_full_warm_pod_is_named(desk: Any, task: Any) -> None:
    d = desk()
    d.node()
    d.answer(d.submit(task("t1", model="m")))
    d.submit(task("t2", model="m"))
    details = {b.reason: b.detail for b in d.engine.why("t2")}
    assert details[Reason.NO_WARM_SLOT] == "1 Pods would do; 1 of their 1 slots are taken"


def test_reasons_are_counted(desk: Any, task: Any) -> None:
    d = desk()
    d.node()
    d.submit(task("t1", method=""), task("t2", slots=0))
    assert d.engine.reasons[Reason.INVALID] == 2
