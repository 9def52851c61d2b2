"""Tasks that share a Pod's running batch: how long each takes as others come and go, and where the figures come from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import simpy

from engine.commands import CreatePod, StartTask, StopTask
from engine.events import TaskFinished, TaskStopped
from engine.resources import Demand, GpuGrant
from engine.tasks import SECOND, TaskSpec, TaskType
from predictors import step_times
from predictors.step_times import StepTimes, StepTimesError
from sim.hardware import BatchRow, Hardware, HardwareError, cluster
from sim.workload import Arrival, Truth, Workload
from sim.world import SimWorld

LINE = StepTimes("a100", "sdxl", 1024, (1, 2, 4), (1.0, 1.5, 2.0))


def arrival(name: str, seconds: float, *loras: str) -> Arrival:
    task = TaskSpec(name, "t", "", TaskType.GC, "text_to_image", model="m")
    return Arrival(0, task, Truth(work_us=round(seconds * SECOND), loras=loras))


def ends(arrivals: list[Arrival], begins: list[float], **hardware: object) -> dict[str, tuple[float, TaskFinished]]:
    """Start tasks in one Pod of eight slots at these seconds after it is ready; return when each ended, and its report."""
    made = Hardware(cluster(1, 1), load_sigma=0.0, lora_sigma=0.0, dispatch_us=0, steps=(LINE,), **hardware)  # type: ignore[arg-type]
    env = simpy.Environment()
    world = SimWorld(env, made, Workload("by hand", tuple(arrivals)), 0)
    grant = GpuGrant("node-0-gpu-0", 1000, 0)
    world.perform(CreatePod(1, "node-0", "text_to_image", "m", (grant,), Demand(), 8))
    env.run(until=100 * SECOND)
    world.take()
    for each, begin in zip(arrivals, begins, strict=True):
        env.run(until=round((100 + begin) * SECOND) + 1)
        world.perform(StartTask(each.task.req_no, 1, 1, "node-0"))
    found: dict[str, tuple[float, TaskFinished]] = {}
    while env.peek() < 10_000 * SECOND:
        env.step()
        for event in world.take():
            if isinstance(event, TaskFinished):
                found[event.req_no] = (env.now / SECOND - 100, event)
    return found


def test_two_that_begin_together_take_what_the_table_says() -> None:
    found = ends([arrival("a", 10), arrival("b", 10)], [0, 0.000001])
    assert [found[name][0] for name in "ab"] == pytest.approx([15.0, 15.0], abs=0.01)


def test_who_comes_later_slows_the_first_only_from_then_on() -> None:
    found = ends([arrival("a", 10), arrival("b", 10)], [0, 4])
    # a: 4 s alone, the other 6 s of work at 1.5; b: 6 s of work in those 9 s, and 4 s alone.
    assert found["a"][0] == pytest.approx(13.0, abs=0.01)
    assert found["b"][0] == pytest.approx(17.0, abs=0.01)


def test_between_and_beyond_the_sizes_of_the_table_steps_grow_evenly() -> None:
    assert [LINE.step(rows) for rows in (1, 2, 3, 4, 8)] == pytest.approx([1.0, 1.5, 1.75, 2.0, 3.0])
    three = ends([arrival(name, 10) for name in "abc"], [0, 0.000001, 0.000002])
    assert three["c"][0] == pytest.approx(17.5, abs=0.01)


def test_only_the_gpus_part_of_a_recorded_time_gets_longer() -> None:
    found = ends([arrival("a", 10), arrival("b", 10)], [0, 0.000001], recorded_gpu_share=0.2)
    assert found["a"][0] == pytest.approx(10 * (0.8 + 0.2 * 1.5), abs=0.01)


def test_an_adapter_that_loads_does_not_slow_the_batch_beside_it() -> None:
    found = ends([arrival("a", 10), arrival("b", 10, "style")], [0, 1])
    load_s = Hardware(cluster(1, 1)).lora_load_us / SECOND
    apart = 1 + load_s
    assert found["a"][0] == pytest.approx(apart + (10 - apart) * 1.5, abs=0.01)


def test_a_report_tells_the_time_alone_and_the_company() -> None:
    found = ends([arrival("a", 10), arrival("b", 10)], [0, 4])
    report = found["a"][1]
    assert report.alone_us == pytest.approx(10 * SECOND, abs=2)
    assert report.run_us == pytest.approx(13 * SECOND, abs=2)
    assert report.company_permille == pytest.approx(1000 * 9 / 13, abs=2)


def test_stopping_one_that_still_loads_takes_effect_at_once_and_leaves_the_others_alone() -> None:
    arrivals = (arrival("a", 10), arrival("b", 10, "style"))
    env = simpy.Environment()
    made = Hardware(cluster(1, 1), load_sigma=0.0, lora_sigma=0.0, dispatch_us=0, steps=(LINE,))
    world = SimWorld(env, made, Workload("by hand", arrivals), 0)
    world.perform(CreatePod(1, "node-0", "text_to_image", "m", (GpuGrant("node-0-gpu-0", 1000, 0),), Demand(), 8))
    env.run(until=100 * SECOND)
    world.take()
    world.perform(StartTask("a", 1, 1, "node-0"))
    world.perform(StartTask("b", 1, 1, "node-0"))
    env.run(until=102 * SECOND)
    world.perform(StopTask("b", 1, 1, "node-0", grace_us=5 * SECOND, keep_checkpoint=False))
    seen: dict[type, float] = {}
    while env.peek() < 1_000 * SECOND:
        env.step()
        seen.update({type(event): env.now / SECOND - 100 for event in world.take()})
    assert seen[TaskStopped] == pytest.approx(2.0, abs=0.01)
    assert seen[TaskFinished] == pytest.approx(10.0, abs=0.01)


def test_pictures_of_other_sizes_go_through_the_network_one_batch_after_the_other() -> None:
    hardware = Hardware(cluster(1, 1), family="sd15", steps=())
    small, large = BatchRow("sd15", 512, 512, 1.0), BatchRow("sd15", 768, 768, 1.0)
    alone = [hardware.step_us("a100", *row.bucket, 1.0) for row in (small, large)]
    assert hardware.stretches("a100", [small, large]) == pytest.approx([sum(alone) / each for each in alone])
    together = hardware.stretches("a100", [small, small])[0]
    assert 1.0 < together < 2.0, "one size shares the fixed part of a step"


def test_the_bundled_table_agrees_with_what_it_was_measured_from() -> None:
    table = step_times.read()
    found = step_times.find(table, "h100", "sd15", 512 * 512)
    assert found is not None and found.gain(8) == pytest.approx(3.1)
    found = step_times.find(table, "cpu", "tiny", 64 * 64)
    assert found is not None and found.step(16) == pytest.approx(16 * 107 / 372)
    assert step_times.find(table, "h100", "sd15", 640 * 640) is None


def test_a_pod_of_eight_slots_ends_more_tasks_where_steps_share_more() -> None:
    sdxl = Hardware(cluster(1, 1))
    sd15 = replace(sdxl, family="sd15")
    assert 1.0 < sdxl.shared_gain("a100", 8) < sd15.shared_gain("a100", 8) < 8.0
    assert replace(sdxl, recorded_gpu_share=0.0).shared_gain("a100", 8) == 8.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("measured = 3", r"\[\[measured\]\]"),
        ("[[measured]]\ngpu = 'x'\nfamily = 'sdxl'\npicture_px = 0\nrows = [1, 2]\ngain = [1, 1]", "picture_px"),
        ("[[measured]]\ngpu = 'x'\nfamily = 'sdxl'\npicture_px = 512\nrows = [2, 4]\ngain = [1, 1]", "rows"),
        ("[[measured]]\ngpu = 'x'\nfamily = 'sdxl'\npicture_px = 512\nrows = [1, 4]\ngain = [1]", "gain"),
        ("[[measured]]\ngpu = 'x'\nfamily = 'sdxl'\npicture_px = 512\nrows = [1, 4]", "exactly one"),
        ("[[measured]]\ngpu = 'x'\nfamily = 'sdxl'\npicture_px = 512\nrows = [1, 4]\nstep_ms = [5, 3]", "quicker"),
        ("[[measured]]\ngpu = 'x'\nspeed = 3", "speed"),
    ],
)
def test_a_wrong_table_is_refused_by_the_field(tmp_path, text: str, says: str) -> None:
    path = tmp_path / "steps.toml"
    path.write_text(text)
    with pytest.raises(StepTimesError, match=says):
        step_times.read(path)


def test_shares_out_of_range_are_refused() -> None:
    with pytest.raises(HardwareError, match="recorded_gpu_share"):
        Hardware(cluster(1, 1), recorded_gpu_share=1.5)
    with pytest.raises(HardwareError, match="marginal_slot"):
        Hardware(cluster(1, 1), marginal_slot=-0.1)
