"""What every world must do, in one suite: the simulated cluster, and real agents with real Pods behind ZeroMQ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sim_factory import make_sim_rig
from zmq_factory import make_zmq_rig

from engine import invariants
from engine.commands import CreatePod, StartTask
from engine.events import (
    NodeDrainRequested,
    NodeLost,
    NodeUncordoned,
    PodStarted,
    PodStopped,
    TaskCancelRequested,
    TaskFinished,
    TaskStarted,
    TaskSubmitted,
)
from engine.tasks import TERMINAL_STATES, TaskState

Rig = Any
MakeRig = Callable[..., Rig]


def make_memory_pods_rig(**named: Any) -> Rig:
    """Build real agents whose Pods are entries in a table: quick, and everything but the Pods is real."""
    return make_zmq_rig(kind="fake", **named)


WORLDS: dict[str, MakeRig] = {"sim": make_sim_rig, "zmq": make_memory_pods_rig, "zmq-pods": make_zmq_rig}


@pytest.fixture(
    params=[
        "sim",
        pytest.param("zmq", marks=pytest.mark.e2e),
        pytest.param("zmq-pods", marks=[pytest.mark.e2e, pytest.mark.slow]),
    ]
)
def make_rig(request: pytest.FixtureRequest) -> Iterator[MakeRig]:
    """Make rigs of one world; each is checked and closed after the test."""
    rigs: list[Rig] = []

    def make(**named: Any) -> Rig:
        rig = WORLDS[request.param](**named)
        rigs.append(rig)
        return rig

    yield make
    for rig in rigs:
        rig.close()
    for rig in rigs:
        invariants.check(rig.engine.state)
        for req_no in {notice.req_no for notice in rig.notices}:
            ends = [state for state in rig.states(req_no) if state in TERMINAL_STATES]
            assert len(ends) <= 1, f"{req_no} ended more than once: {ends}"


def ends(rig: Rig, req_no: str, state: TaskState) -> None:
    """Go on until a task ended, and check how."""
    rig.pump(lambda: rig.last(req_no) in TERMINAL_STATES)
    assert rig.last(req_no) is state


def attempts(rig: Rig, req_no: str) -> list[int]:
    """Return the attempts that were ordered."""
    return [command.attempt for command in rig.commands if isinstance(command, StartTask) and command.req_no == req_no]


def pods(rig: Rig) -> int:
    """Return how many Pods were ordered."""
    return sum(isinstance(command, CreatePod) for command in rig.commands)


def test_a_task_runs_from_submission_to_its_result(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.submit("one", 0.2)
    ends(rig, "one", TaskState.FINISHED)
    told = rig.states("one")
    assert told.index(TaskState.RUNNING) < told.index(TaskState.FINISHED)
    kinds = [
        type(event)
        for event in rig.events
        if isinstance(event, TaskSubmitted | TaskStarted | TaskFinished | PodStarted)
    ]
    assert kinds == [TaskSubmitted, PodStarted, TaskStarted, TaskFinished]


def test_a_warm_pod_is_used_again(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.submit("first", 0.1)
    ends(rig, "first", TaskState.FINISHED)
    rig.submit("second", 0.1)
    ends(rig, "second", TaskState.FINISHED)
    assert pods(rig) == 1


def test_submitting_twice_is_submitting_once(make_rig: MakeRig) -> None:
    rig = make_rig()
    spec = rig.submit("twin", 0.2)
    rig.post(TaskSubmitted(spec))
    ends(rig, "twin", TaskState.FINISHED)
    rig.post(TaskSubmitted(spec))
    rig.submit("after", 0.1)
    ends(rig, "after", TaskState.FINISHED)
    assert attempts(rig, "twin") == [1]
    assert sum(isinstance(event, TaskFinished) and event.req_no == "twin" for event in rig.events) == 1


def test_a_waiting_task_is_cancelled_at_once_and_never_starts(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.submit("runs", 0.5)
    rig.pump(lambda: rig.last("runs") is TaskState.RUNNING)
    rig.submit("waits", 0.1)
    rig.pump(lambda: rig.last("waits") is TaskState.PENDING)
    rig.post(TaskCancelRequested("waits"))
    ends(rig, "waits", TaskState.CANCELLED)
    ends(rig, "runs", TaskState.FINISHED)
    assert attempts(rig, "waits") == []


def test_a_running_task_is_stopped_when_it_is_cancelled(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.submit("long", 60.0, steps=1200)
    rig.pump(lambda: rig.last("long") is TaskState.RUNNING)
    rig.post(TaskCancelRequested("long"))
    ends(rig, "long", TaskState.CANCELLED)
    rig.submit("next", 0.1)
    ends(rig, "next", TaskState.FINISHED)
    assert not any(isinstance(event, TaskFinished) and event.req_no == "long" for event in rig.events)


def test_an_attempt_that_fails_is_tried_again(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.submit("shaky", 0.2, fail="crash", fail_attempts=1)
    ends(rig, "shaky", TaskState.FINISHED)
    assert attempts(rig, "shaky") == [1, 2]


def test_an_attempt_whose_pod_crashes_is_tried_again_in_another(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.submit("victim", 1.5, steps=30)
    rig.pump(lambda: rig.last("victim") is TaskState.RUNNING)
    rig.crash_pods(rig.nodes()[0])
    ends(rig, "victim", TaskState.FINISHED)
    assert attempts(rig, "victim") == [1, 2]
    assert pods(rig) == 2
    assert any(isinstance(event, PodStopped) for event in rig.events)


def test_a_task_that_always_fails_goes_to_the_dead_letter(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.submit("hopeless", 0.1, fail="crash", fail_attempts=99, max_attempts=2)
    ends(rig, "hopeless", TaskState.DEAD)
    assert attempts(rig, "hopeless") == [1, 2]


def test_the_work_of_a_lost_node_is_done_elsewhere(make_rig: MakeRig) -> None:
    rig = make_rig(nodes=2)
    rig.submit("moved", 3.0, steps=60)
    rig.pump(lambda: rig.last("moved") is TaskState.RUNNING)
    home = next(command.node for command in rig.commands if isinstance(command, StartTask))
    rig.lose_node(home)
    ends(rig, "moved", TaskState.FINISHED)
    assert any(isinstance(event, NodeLost) and event.node == home for event in rig.events)
    placed = [command.node for command in rig.commands if isinstance(command, StartTask)]
    assert placed[0] == home
    assert placed[-1] != home


def test_a_node_that_comes_back_takes_work_again(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.submit("patient", 0.6, steps=12)
    rig.pump(lambda: rig.last("patient") is TaskState.RUNNING)
    rig.lose_node(rig.nodes()[0], repair_after_s=0.1)
    ends(rig, "patient", TaskState.FINISHED)
    assert attempts(rig, "patient") == [1, 2]


def test_a_drained_node_gets_nothing_new_until_it_is_uncordoned(make_rig: MakeRig) -> None:
    rig = make_rig(nodes=2)
    drained, other = rig.nodes()
    rig.post(NodeDrainRequested(drained))
    for number in range(3):
        rig.submit(f"kept-off-{number}", 0.1)
    for number in range(3):
        ends(rig, f"kept-off-{number}", TaskState.FINISHED)
    assert {command.node for command in rig.commands if isinstance(command, StartTask)} == {other}
    rig.post(NodeDrainRequested(other))
    rig.post(NodeUncordoned(drained))
    rig.submit("back", 0.1)
    ends(rig, "back", TaskState.FINISHED)
    assert [command.node for command in rig.commands if isinstance(command, StartTask)][-1] == drained


def test_a_gang_starts_on_all_its_gpus(make_rig: MakeRig) -> None:
    rig = make_rig(gpus=2)
    rig.submit("gang", 0.3, members=2)
    ends(rig, "gang", TaskState.FINISHED)
    assert sorted(command.rank for command in rig.commands if isinstance(command, StartTask)) == [0, 1]


def test_many_tasks_all_end_and_none_is_run_twice(make_rig: MakeRig) -> None:
    rig = make_rig(nodes=2, gpus=2)
    names = [f"many-{number}" for number in range(40)]
    for name in names:
        rig.submit(name, 0.02, steps=1)
    rig.pump(lambda: all(rig.last(name) is TaskState.FINISHED for name in names))
    finished = [event.req_no for event in rig.events if isinstance(event, TaskFinished)]
    assert sorted(finished) == sorted(names)
