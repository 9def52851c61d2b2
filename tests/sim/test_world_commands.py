"""The simulated world answering single commands, without a scheduler."""

from __future__ import annotations

import pytest
import simpy

from engine.commands import CreatePod, DeletePod, Notify, PrefetchModel, StartTask, StopTask
from engine.events import (
    NodeReported,
    PodStarted,
    PodStopped,
    TaskFailed,
    TaskFinished,
    TaskProgressed,
    TaskStarted,
    TaskStopped,
    TaskSubmitted,
)
from engine.resources import Demand, GpuGrant
from engine.tasks import SECOND, FailureCause, TaskSpec, TaskState, TaskType
from sim.caches import ByteCache
from sim.faults import Fault, FaultKind, FaultPlan
from sim.hardware import GIB, Hardware, cluster
from sim.workload import Arrival, Truth, Workload
from sim.world import SimWorld


class Hands:
    """Gives commands by hand and reads what comes back."""

    def __init__(self, *arrivals: Arrival, faults: FaultPlan | None = None, **hardware) -> None:
        self.env = simpy.Environment()
        self.hardware = Hardware(cluster(1, 2), load_sigma=0.0, **hardware)
        self.world = SimWorld(self.env, self.hardware, Workload("by hand", arrivals), 0, faults)
        self.seen: list[tuple[int, object]] = []

    def until(self, seconds: float):
        """Go on to this time; return the events since the last look."""
        fresh = []
        while self.env.peek() <= seconds * SECOND:
            self.env.step()
            fresh += [(self.world.now(), event) for event in self.world.take()]
        if seconds * SECOND > self.env.now:
            self.env.run(until=round(seconds * SECOND))
        return fresh

    def pod(self, number: int, *, model: str = "", slots: int = 1, method: str = "sleep", memory: int = 0) -> None:
        grant = GpuGrant("node-0-gpu-0", 1000, memory)
        self.world.perform(CreatePod(number, "node-0", method, model, (grant,), Demand(), slots))

    def start(self, req_no: str, attempt: int = 1, pod: int = 1, checkpoint: str = "") -> None:
        self.world.perform(StartTask(req_no, attempt, pod, "node-0", checkpoint=checkpoint))


def arrival(req_no: str, seconds: float = 10.0, kind: TaskType = TaskType.GC, **truth) -> Arrival:
    task = TaskSpec(req_no, "a", "", kind, "sleep", features=(("steps", 10),))
    return Arrival(0, task, Truth(work_us=round(seconds * SECOND), **truth))


def of(kind, seen):
    return [(at, event) for at, event in seen if isinstance(event, kind)]


def test_a_load_is_cold_once_then_warm():
    hands = Hands()
    hands.pod(1, model="m", method="text_to_image")
    (cold, _) = of(PodStarted, hands.until(100))[0]
    hands.world.perform(DeletePod(1, "test"))
    hands.until(200)
    hands.pod(2, model="m", method="text_to_image")
    (warm, _) = of(PodStarted, hands.until(300))[0]
    assert cold / SECOND == pytest.approx(31.4, abs=0.1)
    assert (warm - 200 * SECOND) / SECOND == pytest.approx(2.2, abs=0.1)
    assert hands.world.counts == {"pods_created": 2, "loads_remote": 1, "loads_memory": 1}


def test_a_prefetched_model_loads_from_disk_and_a_load_meets_a_fetch_under_way():
    hands = Hands()
    hands.world.perform(PrefetchModel("node-0", "m"))
    hands.until(100)
    hands.pod(1, model="m", method="text_to_image")
    (at, _) = of(PodStarted, hands.until(200))[0]
    assert (at - 100 * SECOND) / SECOND == pytest.approx(5.7, abs=0.1)
    hands.world.perform(PrefetchModel("node-0", "n"))
    hands.until(210)
    hands.pod(2, model="n", method="text_to_image")
    (at, _) = of(PodStarted, hands.until(300))[0]
    assert (at - 200 * SECOND) / SECOND == pytest.approx(31.4, abs=0.3)


def test_two_tasks_in_one_pod_slow_each_other_down():
    hands = Hands(arrival("one"), arrival("two"), marginal_slot=0.69)
    hands.pod(1, slots=2)
    hands.until(20)
    hands.start("one")
    hands.start("two")
    ends = [at / SECOND - 20 for at, _ in of(TaskFinished, hands.until(60))]
    assert ends == pytest.approx([16.9, 16.9], abs=0.01)


def test_a_task_speeds_up_again_when_its_neighbour_leaves():
    hands = Hands(arrival("long", 10), arrival("short", 5), marginal_slot=0.69)
    hands.pod(1, slots=2)
    hands.until(20)
    hands.start("long")
    hands.start("short")
    ends = {event.req_no: at / SECOND - 20 for at, event in of(TaskFinished, hands.until(60))}
    assert ends["short"] == pytest.approx(5 * 1.69, abs=0.01)
    assert ends["long"] == pytest.approx(5 * 1.69 + 5, abs=0.01)


def test_a_stop_takes_effect_between_two_steps_and_a_resumed_task_does_the_rest_only():
    hands = Hands(arrival("train", 10, TaskType.TP))
    hands.pod(1)
    hands.until(20)
    hands.start("train")
    hands.until(24.5)
    hands.world.perform(StopTask("train", 1, 1, "node-0", grace_us=5 * SECOND, keep_checkpoint=True))
    ((at, stopped),) = of(TaskStopped, hands.until(40))
    assert at / SECOND == pytest.approx(25.2, abs=0.01)
    assert stopped.checkpoint.endswith("5-of-10")
    hands.start("train", attempt=2, checkpoint=stopped.checkpoint)
    ((_, finished),) = of(TaskFinished, hands.until(60))
    assert finished.run_us == 5 * SECOND


def test_a_stop_without_a_checkpoint_keeps_nothing():
    hands = Hands(arrival("plain"))
    hands.pod(1)
    hands.until(20)
    hands.start("plain")
    hands.until(22.5)
    hands.world.perform(StopTask("plain", 1, 1, "node-0"))
    ((_, stopped),) = of(TaskStopped, hands.until(40))
    assert stopped.checkpoint == ""
    hands.start("plain", attempt=2)
    ((_, finished),) = of(TaskFinished, hands.until(60))
    assert finished.run_us == 10 * SECOND


def test_a_step_that_outlasts_the_grace_costs_the_pod():
    hands = Hands(arrival("slow", 1000))
    hands.pod(1)
    hands.until(20)
    hands.start("slow")
    hands.until(30)
    hands.world.perform(StopTask("slow", 1, 1, "node-0", grace_us=5 * SECOND))
    seen = hands.until(300)
    assert [at / SECOND for at, _ in of(PodStopped, seen)] == [35.0]
    assert not of(TaskStopped, seen)


def test_a_task_stopped_before_it_began_never_begins():
    hands = Hands(arrival("early"))
    hands.pod(1)
    hands.until(20)
    hands.start("early")
    hands.world.perform(StopTask("early", 1, 1, "node-0"))
    seen = hands.until(60)
    assert len(of(TaskStopped, seen)) == 1
    assert not of(TaskStarted, seen)
    assert not of(TaskFinished, seen)


def test_a_deleted_pod_takes_its_tasks_with_it():
    hands = Hands(arrival("gone"))
    hands.pod(1)
    hands.until(20)
    hands.start("gone")
    hands.until(22)
    hands.world.perform(DeletePod(1, "test"))
    seen = hands.until(60)
    assert len(of(PodStopped, seen)) == 1
    assert not of(TaskFinished, seen)


def test_a_pod_deleted_while_it_starts_never_starts():
    hands = Hands()
    hands.pod(1)
    hands.world.perform(DeletePod(1, "test"))
    seen = hands.until(60)
    assert of(PodStopped, seen)
    assert not of(PodStarted, seen)


def test_too_small_a_grant_runs_out_of_memory_part_of_the_way():
    hands = Hands(arrival("big", 10, peak_gpu_memory_bytes=10 * GIB))
    hands.pod(1, memory=8 * GIB)
    hands.until(20)
    hands.start("big")
    ((at, failed),) = of(TaskFailed, hands.until(60))
    assert failed.cause is FailureCause.OUT_OF_MEMORY
    assert failed.peak_gpu_memory_bytes == 8 * GIB
    assert 21 < at / SECOND < 26


def test_a_hung_gpu_finishes_nothing_and_is_reported_ill_and_well():
    plan = FaultPlan(
        faults=(Fault(25 * SECOND, FaultKind.GPU_ILL, "node-0", "node-0-gpu-0", repair_after_us=60 * SECOND),)
    )
    hands = Hands(arrival("hangs"), faults=plan)
    hands.pod(1)
    hands.until(20)
    hands.start("hangs")
    seen = hands.until(200)
    assert not of(TaskFinished, seen)
    reports = [(at / SECOND, [gpu.healthy for gpu in event.gpus]) for at, event in of(NodeReported, seen)]
    assert reports == [(25.0, [False, True]), (85.0, [True, True])]


def test_training_reports_progress_when_asked():
    hands = Hands(arrival("train", 10, TaskType.TP), progress_reports=4)
    hands.pod(1)
    hands.until(20)
    hands.start("train")
    reports = [(event.done, event.total) for _, event in of(TaskProgressed, hands.until(60))]
    assert reports == [(2, 10), (4, 10), (6, 10), (8, 10)]


def test_a_finished_task_is_forgotten_and_commands_about_it_do_nothing():
    hands = Hands(arrival("done", 1))
    hands.pod(1)
    hands.until(20)
    hands.start("done")
    hands.until(30)
    hands.world.perform(Notify("done", TaskState.FINISHED))
    assert hands.world.settled
    hands.start("done", attempt=2)
    hands.world.perform(StopTask("done", 1, 1, "node-0"))
    assert hands.until(60) == []


def test_the_cache_forgets_the_least_recently_used_and_never_takes_what_cannot_fit():
    cache = ByteCache(10)
    cache.put("a", 4)
    cache.put("b", 4)
    assert cache.touch("a")
    cache.put("c", 4)
    assert "b" not in cache
    assert "a" in cache
    cache.put("huge", 11)
    assert "huge" not in cache
    assert cache.used_bytes == 8


def test_a_journal_is_a_workload_again():
    from engine.journal import MemoryJournal
    from sim.from_journal import summarise_records, workload_from_records
    from sim.simulate import SimulationConfig, simulate

    config = SimulationConfig(synthetic_tasks=80, nodes=2, gpus_per_node=2, rate_scale=30, forecaster="none")
    journal = MemoryJournal()
    first = simulate(config, journal=journal)
    assert summarise_records(journal.records).to_json() == first.summary.to_json()
    again = workload_from_records(journal.records)
    original = config.workload()
    assert [a.at for a in again.arrivals] == [a.at for a in original.arrivals]
    assert [a.task for a in again.arrivals] == [a.task for a in original.arrivals]
    ran = {a.task.req_no: a.truth.work_us for a in original.arrivals if a.truth.fails_with is None}
    assert {a.task.req_no: a.truth.work_us for a in again.arrivals if a.truth.fails_with is None} == ran
    second = simulate(config, workload=again)
    assert second.summary.waiting["all"].count == first.summary.waiting["all"].count


def test_submissions_from_outside_are_tasks_like_any_other():
    hands = Hands()
    hands.world.post(
        TaskSubmitted(TaskSpec("x", "a", "", TaskType.GC, "sleep", features=(("seconds", 3.0),))), at=5 * SECOND
    )
    assert not hands.world.settled
    hands.pod(1)
    hands.until(20)
    hands.start("x")
    ((_, finished),) = of(TaskFinished, hands.until(60))
    assert finished.run_us == 3 * SECOND
