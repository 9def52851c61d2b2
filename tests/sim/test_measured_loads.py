"""Load times from the service's monitoring: each GPU is one of its containers."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import pytest

from engine.tasks import SECOND
from sim import measured_loads
from sim.hardware import Hardware, cluster
from sim.measured_loads import BASE, LORA, PIPELINE, Container, MeasuredLoads
from sim.workload import WorkloadError

TRACES = Path(__file__).resolve().parents[3] / "shared" / "traces" / "gentd26"
FAST = Container((3 * SECOND,) * 20, (SECOND,) * 20, (2 * SECOND,) * 20)
SLOW = Container((30 * SECOND,) * 20, (5 * SECOND,) * 20, (9 * SECOND,) * 20)


def write(folder: Path, name: str, rows: list[str], packed: bool = False) -> None:
    text = "timestamp_anon,value,container_ip\n" + "".join(f"{row}\n" for row in rows)
    if packed:
        (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    else:
        (folder / name).write_text(text)


def test_a_gpu_keeps_its_container_and_draws_from_it():
    loads = MeasuredLoads((FAST, SLOW))
    drawn = {gpu: {loads.base_us(f"gpu-{gpu}", 0, "m", nth) for nth in range(5)} for gpu in range(20)}
    assert all(len(each) == 1 for each in drawn.values())
    assert {next(iter(each)) for each in drawn.values()} == {3 * SECOND, 30 * SECOND}


def test_slower_loads_take_so_many_times_as_long():
    hardware = Hardware(cluster(1, 1), measured=MeasuredLoads((SLOW,))).loading(2.0)
    assert hardware.measured is not None
    assert hardware.measured.base_us("g", 0) == 60 * SECOND
    assert hardware.measured.lora_us("g", 0) == 10 * SECOND
    assert hardware.measured.pipeline_us("g", 0) == 18 * SECOND


def test_files_are_read_packed_or_not_and_short_containers_are_left_out(tmp_path):
    write(tmp_path, BASE, [f"1,{2000 + number},a" for number in range(20)] + ["1,9,b"], packed=True)
    write(tmp_path, LORA, ["1,4400,a"] * 25 + ["1,9,b"] * 30)
    write(tmp_path, PIPELINE, ["1,0,a"] * 20 + ["1,9,b"] * 30)
    assert measured_loads.present(tmp_path)
    (only,) = measured_loads.read(tmp_path).containers
    assert only.base_us == tuple((2000 + number) * 1000 for number in range(20))
    assert only.pipeline_us == (0,) * 20


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        (["1,quick,a"], f"{BASE}, line 2, value: 'quick' is not a number"),
        (["1,-5,a"], "out of range"),
        (["1,5,a"], "no container in"),
    ],
)
def test_a_wrong_file_is_named(rows, named, tmp_path):
    for name in (BASE, LORA, PIPELINE):
        write(tmp_path, name, rows)
    with pytest.raises(WorkloadError, match=named):
        measured_loads.read(tmp_path)


def test_a_missing_file_is_named_with_the_remedy(tmp_path):
    assert not measured_loads.present(tmp_path)
    with pytest.raises(WorkloadError, match=r"cannot read basemodel.*give the folder"):
        measured_loads.read(tmp_path)


def test_pods_load_and_switch_pipelines_in_measured_times(play, tiny_engine):
    from engine.tasks import TaskSpec, TaskType
    from sim.workload import Arrival, Truth, Workload

    def arrival(number: int, kind: str, *loras: str) -> Arrival:
        task = TaskSpec(
            f"r{number}", "t", "", TaskType.GC, "text_to_image", model="m", features=(("kind", kind),), slots=1
        )
        return Arrival(number, task, Truth(work_us=SECOND, loras=loras))

    kinds = [("text",), ("text", "l1"), ("image", "l1"), ("image",)]
    workload = Workload("w", tuple(arrival(number, *each) for number, each in enumerate(kinds)))
    hardware = replace(Hardware(cluster(1, 1)), measured=MeasuredLoads((SLOW,)))
    metrics, world = play(tiny_engine, workload, hardware=hardware)
    assert metrics.ends["finished"] == 4
    assert world.counts["pipeline_switches"] == 1
    assert world.counts["lora_loads"] == 1
    spent_s = metrics.last_end_at / SECOND
    assert 4 + 5 + 9 < spent_s < 4 + 5 + 9 + 33


@pytest.mark.skipif(not TRACES.is_dir(), reason="the GenTD26 files are not here")
def test_the_services_own_containers_are_of_two_kinds():
    containers = measured_loads.read(TRACES).containers
    medians = sorted(sorted(each.base_us)[len(each.base_us) // 2] for each in containers)
    quick = sum(median < 6 * SECOND for median in medians)
    assert len(containers) > 100
    assert 0.1 < quick / len(medians) < 0.35
    assert not [median for median in medians if 6 * SECOND <= median < 15 * SECOND]
