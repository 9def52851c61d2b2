"""What a task takes besides time and GPU memory: host memory from Pods' own peaks, GPU use from what nodes report."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from engine.commands import CreatePod, StartTask
from engine.events import Event, NodeJoined, NodeReported, TaskFinished, TaskStarted, TaskSubmitted
from engine.resources import Demand, GpuGrant, GpuSpec, NodeSpec
from engine.tasks import SECOND, Estimate, Micros, TaskSpec, TaskType
from predictors import OnlineForecaster
from predictors.features import read_request
from predictors.use import GpuUseModel, HostMemoryModel

GIB = 2**30
GPUS = tuple(GpuSpec(f"g{i}", "a100", 80 * GIB) for i in range(2))


def task(req_no: str, model: str = "sd") -> TaskSpec:
    return TaskSpec(req_no, "t", "", TaskType.GC, "text_to_image", model)


def cluster() -> OnlineForecaster:
    forecaster = OnlineForecaster()
    forecaster.stamp(0, [NodeJoined(NodeSpec("n", gpus=GPUS))])
    return forecaster


def start(forecaster: OnlineForecaster, now: Micros, req_no: str, pod: int, *gpus: str, model: str = "sd") -> None:
    forecaster.stamp(now, [TaskSubmitted(task(req_no, model))])
    grants = tuple(GpuGrant(gpu, 1000, GIB) for gpu in gpus)
    made = CreatePod(pod, "n", "text_to_image", model, grants, Demand())
    forecaster.note([made, StartTask(req_no, 1, pod, "n")])
    forecaster.stamp(now, [TaskStarted(req_no, 1)])


def report(forecaster: OnlineForecaster, now: Micros, **busy: int) -> None:
    forecaster.stamp(now, [NodeReported("n", GPUS, gpu_busy_permille=tuple(busy.items()))])


def finish(forecaster: OnlineForecaster, now: Micros, req_no: str, host: int = 0) -> None:
    forecaster.stamp(now, [TaskFinished(req_no, 1, run_us=SECOND, peak_host_memory_bytes=host)])


def stamped(forecaster: OnlineForecaster, now: Micros, model: str = "sd") -> Estimate:
    event: Event = forecaster.stamp(now, [TaskSubmitted(task(f"asked-{now}-{model}", model))])[0]
    assert isinstance(event, TaskSubmitted)
    assert event.estimate is not None
    return event.estimate


def test_nothing_is_said_before_anything_was_measured() -> None:
    estimate = stamped(cluster(), 0)
    assert (estimate.host_memory_bytes, estimate.gpu_busy_permille) == (0, 0)


def test_a_measured_peak_of_the_host_is_the_estimate_of_the_next_with_a_margin() -> None:
    forecaster = cluster()
    start(forecaster, 0, "a", 1, "g0")
    finish(forecaster, 9 * SECOND, "a", host=5 * GIB)
    assert 5 * GIB < stamped(forecaster, 10 * SECOND).host_memory_bytes < 7 * GIB


def test_the_estimate_of_host_memory_covers_ninety_nine_in_a_hundred_peaks() -> None:
    model, rng, over = HostMemoryModel(), random.Random(4), 0
    sizes = {"small": 3 * GIB, "large": 12 * GIB}
    for i in range(3000):
        name = rng.choice(list(sizes))
        request = read_request({"method": "text_to_image", "model": name})
        peak = round(sizes[name] * rng.lognormvariate(0, 0.05))
        over += i >= 1000 and peak > model.p99_bytes(request, float(i))
        model.learn(request, float(i), peak)
    assert 2 <= over <= 40
    large = read_request({"method": "text_to_image", "model": "large"})
    assert 12 * GIB < model.p99_bytes(large, 3000.0) < 14.5 * GIB


def test_how_busy_a_gpu_was_is_weighed_by_time_and_learned_when_the_task_has_finished() -> None:
    forecaster = cluster()
    report(forecaster, 10 * SECOND, g0=0)
    start(forecaster, 10 * SECOND, "a", 1, "g0")
    report(forecaster, 20 * SECOND, g0=900)
    report(forecaster, 50 * SECOND, g0=500)
    assert stamped(forecaster, 51 * SECOND).gpu_busy_permille == 0
    finish(forecaster, 52 * SECOND, "a")
    assert stamped(forecaster, 53 * SECOND).gpu_busy_permille == pytest.approx(600, abs=1)


def test_of_several_gpus_the_mean_counts() -> None:
    forecaster = cluster()
    report(forecaster, 0, g0=0, g1=0)
    start(forecaster, 0, "a", 1, "g0", "g1")
    report(forecaster, 10 * SECOND, g0=800, g1=200)
    finish(forecaster, 11 * SECOND, "a")
    assert stamped(forecaster, 12 * SECOND).gpu_busy_permille == pytest.approx(500, abs=1)


def test_tasks_that_shared_a_gpu_teach_nothing_of_its_use_and_the_next_one_alone_does() -> None:
    forecaster = cluster()
    report(forecaster, 0, g0=0)
    start(forecaster, 0, "a", 1, "g0")
    start(forecaster, SECOND, "b", 2, "g0")
    report(forecaster, 5 * SECOND, g0=1000)
    finish(forecaster, 6 * SECOND, "a")
    finish(forecaster, 6 * SECOND, "b")
    assert stamped(forecaster, 7 * SECOND).gpu_busy_permille == 0
    start(forecaster, 8 * SECOND, "c", 3, "g0")
    report(forecaster, 10 * SECOND, g0=300)
    finish(forecaster, 11 * SECOND, "c")
    assert stamped(forecaster, 12 * SECOND).gpu_busy_permille == pytest.approx(300, abs=1)


def test_a_task_during_which_no_report_came_teaches_nothing() -> None:
    forecaster = cluster()
    report(forecaster, 0, g0=700)
    start(forecaster, SECOND, "a", 1, "g0")
    finish(forecaster, 2 * SECOND, "a")
    assert stamped(forecaster, 3 * SECOND).gpu_busy_permille == 0


def test_a_new_model_is_expected_to_use_gpus_as_others_of_its_method_do() -> None:
    use = GpuUseModel()
    known, new, other = (
        read_request({"method": method, "model": model})
        for method, model in (("text_to_image", "a"), ("text_to_image", "b"), ("dreambooth", "a"))
    )
    use.learn(known, 0.0, 640)
    assert (use.permille(known, 1.0), use.permille(new, 1.0), use.permille(other, 1.0)) == (640, 640, 0)
    use.learn(known, 1.0, -1)
    assert use.permille(known, 1e9) == 640  # However long ago.


def test_both_are_saved_and_attempts_under_way_go_on_being_watched(tmp_path: Path) -> None:
    forecaster = cluster()
    report(forecaster, 0, g0=0)
    start(forecaster, 0, "a", 1, "g0")
    report(forecaster, 4 * SECOND, g0=400)
    finish(forecaster, 5 * SECOND, "a", host=GIB)
    start(forecaster, 5 * SECOND, "b", 2, "g0")
    forecaster.save(tmp_path / "state")
    again = OnlineForecaster.load(tmp_path / "state")
    for each in (forecaster, again):
        report(each, 9 * SECOND, g0=800)
        finish(each, 10 * SECOND, "b", host=2 * GIB)
    said, said_again = (stamped(each, 11 * SECOND) for each in (forecaster, again))
    assert said.host_memory_bytes == said_again.host_memory_bytes > GIB
    assert said.gpu_busy_permille == said_again.gpu_busy_permille
    assert 400 < said.gpu_busy_permille < 800
