"""Failures of devices on their whole way, from a real Pod through agent, sockets and engine to the attempt that succeeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from zmq_factory import FeaturePayloads, ZmqRig, make_zmq_rig, set_gpus

from engine import commands as c
from engine.events import NodeReported, PodStopped, TaskFailed, TaskFinished, TaskProgressed, TaskSubmitted
from engine.resources import Demand
from engine.tasks import FailureCause, TaskSpec, TaskType

pytestmark = [pytest.mark.e2e]

GENEROUS_S = 90.0


class Scripted(FeaturePayloads):
    """What each attempt does, by task."""

    def __init__(self) -> None:
        super().__init__()
        self.then: dict[str, list[str]] = {}

    def task(self, command: c.StartTask) -> dict[str, object]:
        script = self.then[command.req_no]
        return {"then": script[command.attempt - 1] if command.attempt <= len(script) else "finish"}


@pytest.fixture
def make_rig() -> Iterator[Callable[..., ZmqRig]]:
    made: list[ZmqRig] = []

    def make(nodes: int = 2) -> ZmqRig:
        made.append(make_zmq_rig(nodes=nodes, gpus=1, kind="file", payloads=Scripted()))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


def _submit(rig: ZmqRig, req_no: str, *then: str, max_attempts: int = 3) -> None:
    assert isinstance(rig.payloads, Scripted)
    rig.payloads.then[req_no] = list(then)
    spec = TaskSpec(
        req_no,
        tenant="a",
        group="",
        task_type=TaskType.GC,
        method="steps",
        demand=Demand(gpus=1),
        max_attempts=max_attempts,
    )
    rig.post(TaskSubmitted(spec))


def _starts(rig: ZmqRig, req_no: str) -> list[c.StartTask]:
    return [each for each in rig.commands if isinstance(each, c.StartTask) and each.req_no == req_no]


def _why(rig: ZmqRig, req_no: str) -> list[str]:
    return [notice.detail for notice in rig.notices if notice.req_no == req_no and notice.detail]


def test_a_gpu_that_is_removed_while_a_task_runs_costs_the_attempt_and_the_next_runs_elsewhere(
    make_rig: Callable[..., ZmqRig],
) -> None:
    rig = make_rig()
    _submit(rig, "r", "wait")
    rig.pump(lambda: any(isinstance(event, TaskProgressed) for event in rig.events), GENEROUS_S)
    [first] = _starts(rig, "r")
    set_gpus(Path(rig.home.name), first.node, [])
    rig.pump(lambda: rig.last("r") == "finished", GENEROUS_S)
    second = _starts(rig, "r")[-1]
    assert (second.attempt, second.node != first.node) == (2, True)
    assert any(detail.startswith("gpu_lost") for detail in _why(rig, "r"))
    deleted = [each for each in rig.commands if isinstance(each, c.DeletePod) and each.pod == first.pod]
    assert [each.reason for each in deleted] == ["gpu_lost"]


def test_a_gpu_that_falls_ill_takes_no_more_work_until_it_is_well(make_rig: Callable[..., ZmqRig]) -> None:
    rig = make_rig(nodes=1)
    gpu, root = "node-0-gpu-0", Path(rig.home.name)
    set_gpus(root, "node-0", [gpu], ill=[gpu])
    rig.pump(lambda: any(isinstance(e, NodeReported) and not all(g.healthy for g in e.gpus) for e in rig.events))
    _submit(rig, "r")
    rig.pump(lambda: "r" in rig.engine.state.tasks)
    assert _starts(rig, "r") == []
    set_gpus(root, "node-0", [gpu])
    rig.pump(lambda: rig.last("r") == "finished", GENEROUS_S)


def test_a_hung_step_ends_its_pod_and_the_next_attempt_succeeds_elsewhere(make_rig: Callable[..., ZmqRig]) -> None:
    rig = make_rig()
    _submit(rig, "r", "hang")
    rig.pump(lambda: rig.last("r") == "finished", GENEROUS_S)
    [stopped] = [e for e in rig.events if isinstance(e, PodStopped) and e.cause is FailureCause.HUNG]
    assert stopped.pod == _starts(rig, "r")[0].pod
    assert "never_returns" in stopped.detail, "the stack of the thread that hangs came all the way"
    first, second = _starts(rig, "r")
    assert (second.attempt, second.node != first.node) == (2, True)
    assert any(detail.startswith("hung: no step for") for detail in _why(rig, "r"))


def test_numbers_that_are_none_are_tried_once_more_and_then_refused_with_the_reason(
    make_rig: Callable[..., ZmqRig],
) -> None:
    rig = make_rig(nodes=1)
    _submit(rig, "once", "nonsense")
    _submit(rig, "always", *["nonsense"] * 9, max_attempts=9)
    rig.pump(lambda: rig.last("once") == "finished" and rig.last("always") == "dead", GENEROUS_S)
    failed = [e for e in rig.events if isinstance(e, TaskFailed) and e.req_no == "always"]
    assert [(e.attempt, e.cause) for e in failed] == [(1, FailureCause.NOT_FINITE), (2, FailureCause.NOT_FINITE)]
    assert "in the last of 2 attempts: not_finite: NotFinite: the latents hold" in _why(rig, "always")[-1]
    assert len([e for e in rig.events if isinstance(e, TaskFinished)]) == 1


def test_a_node_whose_gpu_fails_one_task_after_another_gets_no_more(make_rig: Callable[..., ZmqRig]) -> None:
    rig = make_rig()
    for number in range(3):
        _submit(rig, f"r{number}", *["nonsense"] * 2)
        rig.pump(lambda name=f"r{number}": rig.last(name) == "dead", GENEROUS_S)  # type: ignore[misc]
    faulty = {node for node, _gpu in rig.engine.state.faults}
    cordoned = [node.name for node in rig.engine.state.cluster.nodes if not node.gpus[0].open]
    assert len(cordoned) == 1
    assert cordoned[0] in faulty
    _submit(rig, "next")
    rig.pump(lambda: rig.last("next") == "finished", GENEROUS_S)
    assert _starts(rig, "next")[0].node != cordoned[0]
