"""The simulated world under the real engine, through the rig that the contract suite uses."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from engine.events import NodeDrainRequested, NodeLost, TaskCancelRequested, TaskStarted, TaskStopped
from engine.tasks import TaskState, TaskType


def _factory():
    path = Path(__file__).resolve().parents[1] / "worlds" / "sim_factory.py"
    spec = importlib.util.spec_from_file_location("sim_factory_under_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


make_sim_rig = _factory().make_sim_rig


def test_a_submitted_task_finishes():
    rig = make_sim_rig()
    rig.submit("one", seconds=2)
    rig.pump(lambda: rig.last("one") is TaskState.FINISHED)
    assert TaskState.RUNNING in rig.states("one")


def test_a_waiting_task_is_cancelled_at_once_and_never_starts():
    rig = make_sim_rig()
    rig.submit("long", seconds=100)
    rig.submit("waits", seconds=1)
    rig.pump(lambda: rig.last("long") is TaskState.RUNNING)
    rig.post(TaskCancelRequested("waits"))
    rig.pump(lambda: rig.last("waits") is TaskState.CANCELLED, 5)
    assert not any(isinstance(event, TaskStarted) and event.req_no == "waits" for event in rig.events)


def test_a_running_task_is_cancelled_between_two_steps():
    rig = make_sim_rig()
    rig.submit("long", seconds=300)
    rig.pump(lambda: rig.last("long") is TaskState.RUNNING)
    rig.post(TaskCancelRequested("long"))
    rig.pump(lambda: rig.last("long") is TaskState.CANCELLED, 60)


def test_a_task_whose_pod_crashes_once_is_tried_again_and_finishes():
    rig = make_sim_rig()
    rig.submit("fragile", seconds=2, fail="crash", fail_attempts=1)
    rig.pump(lambda: rig.last("fragile") is TaskState.FINISHED)
    assert TaskState.BACKOFF in rig.states("fragile")


def test_a_task_that_always_fails_goes_to_the_dead_letter():
    rig = make_sim_rig()
    rig.submit("hopeless", seconds=1, fail="crash", max_attempts=2)
    rig.pump(lambda: rig.last("hopeless") is TaskState.DEAD)
    starts = [event for event in rig.events if isinstance(event, TaskStarted)]
    assert [event.attempt for event in starts] == [1, 2]


def test_work_of_a_lost_node_goes_on_elsewhere():
    rig = make_sim_rig(nodes=2)
    rig.submit("moves", seconds=30)
    rig.pump(lambda: rig.last("moves") is TaskState.RUNNING)
    first = rig.notices[-1].node
    rig.lose_node(first)
    rig.pump(lambda: rig.last("moves") is TaskState.FINISHED)
    assert any(isinstance(event, NodeLost) and event.node == first for event in rig.events)


def test_work_of_a_lost_node_waits_for_its_return():
    rig = make_sim_rig(nodes=1)
    rig.submit("waits", seconds=5)
    rig.pump(lambda: rig.last("waits") is TaskState.RUNNING)
    rig.lose_node(rig.nodes()[0], repair_after_s=120)
    rig.pump(lambda: rig.last("waits") is TaskState.FINISHED)
    assert rig.world.now() > 120_000_000


def test_a_node_that_comes_back_before_it_was_missed_has_lost_its_work_all_the_same():
    rig = make_sim_rig(nodes=1)
    rig.submit("again", seconds=5)
    rig.pump(lambda: rig.last("again") is TaskState.RUNNING)
    rig.lose_node(rig.nodes()[0], repair_after_s=2)
    rig.pump(lambda: rig.last("again") is TaskState.FINISHED)
    assert not any(isinstance(event, NodeLost) for event in rig.events)
    assert sum(isinstance(event, TaskStarted) for event in rig.events) == 2


def test_a_drained_node_takes_nothing_new():
    rig = make_sim_rig(nodes=2)
    rig.pump(lambda: bool(rig.events))
    rig.post(NodeDrainRequested("node-0"))
    for number in range(4):
        rig.submit(f"task-{number}")
    rig.pump(lambda: all(rig.last(f"task-{number}") is TaskState.FINISHED for number in range(4)))
    assert {notice.node for notice in rig.notices if notice.state is TaskState.RUNNING} == {"node-1"}


def test_a_stopped_training_resumes_from_its_checkpoint():
    rig = make_sim_rig(profile="aigc")
    rig.submit("train", seconds=1000, steps=100, task_type=TaskType.TP, declared_us=1_000_000_000)
    rig.pump(lambda: rig.last("train") is TaskState.RUNNING)
    began = rig.world.now()
    rig.pump(lambda: rig.world.now() > began + 600_000_000, 700)
    rig.submit("urgent", seconds=5, priority=200, declared_us=5_000_000)
    rig.pump(lambda: rig.last("urgent") is TaskState.FINISHED, 2_000)
    rig.pump(lambda: rig.last("train") is TaskState.FINISHED, 2_000)
    (stopped,) = [event for event in rig.events if isinstance(event, TaskStopped)]
    assert stopped.checkpoint.endswith("-of-100")
    assert rig.world.now() - began < 1_100_000_000
