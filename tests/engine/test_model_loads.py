"""Loads of models are spread over many tasks: which Pod goes for whom, and whose model gets the room."""

from __future__ import annotations

from typing import Any

from engine import events as ev
from engine.commands import DeletePod
from engine.tasks import SECOND, URGENT_PRIORITY, Estimate, Quantiles


def estimate(seconds: float) -> Estimate:
    us = round(seconds * SECOND)
    return Estimate((("*", Quantiles(us, us, us, us)),))


def test_a_warm_model_goes_first_until_another_has_waited_much_longer(desk: Any, task: Any, started: Any) -> None:
    """Much longer: 25 times what the model took to load there."""
    d = desk("aigc")
    d.node()
    d.step(ev.TaskSubmitted(task("m0", model="m")))
    d.answer(d.step(ev.PodStarted(1), after=4))
    d.submit(task("x", model="x"))
    d.submit(task("m1", model="m"), after=10)
    d.submit(task("m2", model="m"), after=91)
    assert started(d.answer(d.finish("m0"))) == ["m1"]
    assert started(d.answer(d.finish("m1"))) == ["x"]


def _hot_and_cold(d: Any, task: Any, load_s: float) -> None:
    """Two GPUs hold models a and b, each with tasks running and waiting."""
    d.node(gpus=2)
    d.step(ev.TaskSubmitted(task("a0", model="a"), estimate(20)), ev.TaskSubmitted(task("b0", model="b"), estimate(20)))
    d.answer(d.step(ev.PodStarted(1), ev.PodStarted(2), after=load_s))
    for number in range(1, 9):
        d.step(ev.TaskSubmitted(task(f"a{number}", model="a"), estimate(20)))
        d.step(ev.TaskSubmitted(task(f"b{number}", model="b"), estimate(20)))


def test_a_pod_serves_for_twenty_loads_before_it_leaves_its_room_even_to_urgent_tasks(
    desk: Any, task: Any, started: Any
) -> None:
    d = desk("aigc")
    _hot_and_cold(d, task, load_s=10)
    d.step(ev.TaskSubmitted(task("u", model="c", priority=URGENT_PRIORITY), estimate(20)), after=1)
    assert started(d.answer(d.finish("a0"))) == ["a1"], "the load of 10 s has not paid yet"
    d.step(after=200)
    assert [c.reason for c in d.finish("b0") if isinstance(c, DeletePod)] == ["room"]


def test_room_goes_to_the_model_with_the_most_tasks_per_pod(desk: Any, task: Any) -> None:
    d = desk("aigc")
    d.node()
    d.answer(d.step(ev.TaskSubmitted(task("a0", model="a"), estimate(20))))
    d.step(ev.TaskSubmitted(task("lonely", model="b"), estimate(20)), after=1)
    for number in range(3):
        d.step(ev.TaskSubmitted(task(f"c{number}", model="c"), estimate(20)), after=1)
    d.answer(d.finish("a0"))
    models = {pod.model for pod in d.engine.state.pods.values()}
    assert models == {"c"}, "one load serves three"


def test_who_stands_back_is_served_in_the_end_though_nothing_else_happens(desk: Any, task: Any) -> None:
    """The only Pod of its model is busy for an hour; another model's Pod is idle and is looked at again."""
    d = desk("aigc")
    d.node(gpus=2)
    d.step(ev.TaskSubmitted(task("long", model="a"), estimate(3600)))
    d.step(ev.TaskSubmitted(task("b0", model="b"), estimate(20)))
    d.answer(d.step(ev.PodStarted(1), ev.PodStarted(2), after=30))
    d.step(ev.TaskSubmitted(task("short", model="a"), estimate(1)))
    d.step(after=20)
    assert not [c for c in d.finish("b0") if isinstance(c, DeletePod)]
    for _ in range(400):
        if d.state("short") == "running":
            break
        wakeup = d.engine.wakeup_at
        assert wakeup is not None
        d.answer(d.step(after=max(0.0, wakeup / SECOND - d.seconds)))
    assert d.state("short") == "running"
    assert 60 < d.seconds < 160
