"""Level 1: who may enter, and who is told why not."""

from __future__ import annotations

from typing import Any

import pytest

from engine import events as ev
from engine.limits import Limits
from engine.resources import Demand
from engine.tasks import SECOND, Affinity, Estimate, Quantiles

Q = Quantiles(1, 1, 1, 1)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"req_no": ""}, "req_no"),
        ({"method": ""}, "method"),
        ({"members": 0}, "members"),
        ({"members": 2000}, "members"),
        ({"slots": 0}, "slots"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"run_limit_us": 0}, "run_limit_us"),
        ({"demand": Demand(gpus=-1)}, "demand.gpus"),
        ({"demand": Demand(gpu_share=0)}, "demand.gpu_share"),
        ({"demand": Demand(gpu_share=1001)}, "demand.gpu_share"),
        ({"demand": Demand(cpu_milli=-1)}, "demand"),
        ({"demand": Demand(extra=(("x", -1),))}, "demand"),
    ],
)
def test_an_invalid_task_is_refused_with_the_fields_name(
    desk: Any, task: Any, changes: dict[str, Any], field: str
) -> None:
    d = desk()
    orders = d.submit(task(**{"req_no": "t", **changes}))
    assert [(c.state, c.reason) for c in orders] == [("rejected", "invalid")]
    assert orders[0].detail.startswith(field + ":")


def test_an_impossible_task_is_refused_at_once(desk: Any, task: Any, told: Any) -> None:
    d = desk()
    d.node(gpus=2, memory=80)
    orders = d.submit(
        task("fits", demand=Demand(gpus=2)),
        task("wide", demand=Demand(gpus=3)),
        task("big", demand=Demand(gpu_memory_bytes=81)),
        task("other", demand=Demand(gpu_models=("h100",))),
        task("named", demand=Demand(extra=(("license", 1),))),
        task("gang", members=3),
        task("together", members=2, demand=Demand(gpus=2), group="g", affinity=Affinity.STRICT),
    )
    refused = {r for r, state, reason in told(orders) if (state, reason) == ("rejected", "impossible")}
    assert refused == {"wide", "big", "other", "named", "gang", "together"}


def test_without_any_node_nothing_is_impossible(desk: Any, task: Any, told: Any) -> None:
    d = desk()
    assert told(d.submit(task("t", demand=Demand(gpus=64)))) == [("t", "pending", "")]


def test_a_tenants_waiting_tasks_are_limited(desk: Any, task: Any, told: Any) -> None:
    d = desk()
    d.step(ev.TenantConfigured("a", max_pending=2))
    orders = d.submit(task("t1"), task("t2"), task("t3"), task("t4", tenant="b"))
    assert ("t3", "rejected", "tenant_pending_quota") in told(orders)
    assert ("t4", "pending", "") in told(orders)


def test_the_whole_queue_is_limited(desk: Any, task: Any, told: Any) -> None:
    d = desk(limits=Limits(pending=1))
    assert told(d.submit(task("t1"), task("t2")))[1] == ("t2", "rejected", "queue_full")


def test_a_deadline_that_has_passed_is_refused(desk: Any, task: Any, told: Any) -> None:
    d = desk()
    assert told(d.submit(task("t", start_deadline=SECOND))) == [("t", "rejected", "deadline_passed")]


def test_an_estimate_must_serve_every_gpu_model(desk: Any, task: Any) -> None:
    d = desk()
    (order,) = d.step(ev.TaskSubmitted(task("t"), Estimate((("a100", Q),))))
    assert order.state == "rejected"
    assert "estimate.durations" in order.detail


def test_submitting_twice_is_submitting_once_even_after_the_end(desk: Any, task: Any) -> None:
    d = desk()
    d.node()
    d.answer(d.submit(task("t"), task("t")))
    d.finish("t")
    assert d.submit(task("t")) == []
    assert d.engine.state.ignored == {"TaskSubmitted": 2}


def test_the_identity_of_terminal_tasks_is_forgotten_beyond_the_limit(desk: Any, task: Any) -> None:
    d = desk(limits=Limits(remembered=2))
    d.node()
    for i in range(4):
        d.answer(d.submit(task(f"t{i}")))
        d.finish(f"t{i}")
    assert list(d.engine.state.tasks) == ["t2", "t3"]
