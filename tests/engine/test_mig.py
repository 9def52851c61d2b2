"""Partitions of a GPU follow the rules of NVIDIA's MIG user guide ("Supported MIG Profiles"); the engine schedules onto them."""

from __future__ import annotations

from itertools import combinations_with_replacement
from typing import Any

import pytest

from engine import events as ev
from engine import mig
from engine.mig import CATALOGUE, InvalidLayout, Partition
from engine.resources import Demand, GpuSpec, NodeSpec

A100 = "a100-40gb"
GIB = 1 << 30


@pytest.mark.parametrize(
    ("names", "starts"),
    [
        (["7g"], [0]),
        (["4g", "3g"], [0, 4]),
        (["3g", "3g"], [0, 4]),
        (["4g", "2g", "1g"], [0, 4, 6]),
        (["2g", "2g", "2g", "1g"], [0, 2, 4, 6]),
        (["3g", "2g", "1g"], [0, 4, 6]),
        (["1g"] * 7, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_the_drivers_combinations_have_a_layout(names: list[str], starts: list[int]) -> None:
    assert [each.start for each in mig.layout(A100, names)] == starts


@pytest.mark.parametrize(
    "names", [["7g", "1g"], ["4g", "4g"], ["3g", "3g", "1g"], ["2g"] * 4, ["1g"] * 8, ["4g", "2g", "2g"]]
)
def test_what_the_driver_refuses_has_none(names: list[str]) -> None:
    with pytest.raises(InvalidLayout, match="do not fit together on one a100-40gb"):
        mig.layout(A100, names)


def test_no_layout_overlaps_or_takes_more_than_there_is() -> None:
    kinds = [each.name for each in CATALOGUE[A100]]
    found = 0
    for count in range(1, 8):
        for names in combinations_with_replacement(kinds, count):
            try:
                placed = mig.layout(A100, names)
            except InvalidLayout:
                continue
            found += 1
            profiles = [mig.profile_of(A100, each.profile) for each in placed]
            taken = [
                slice_
                for each, profile in zip(placed, profiles, strict=True)
                for slice_ in range(each.start, each.start + profile.memory)
            ]
            assert len(taken) == len(set(taken))
            assert max(taken) < mig.MEMORY_SLICES
            assert sum(profile.compute for profile in profiles) <= mig.COMPUTE_SLICES
            assert all(each.start in profile.starts for each, profile in zip(placed, profiles, strict=True))
            assert sorted(each.profile for each in placed) == sorted(names)
    assert found > 20


def test_a_small_partition_goes_where_it_blocks_least() -> None:
    # At 6 a 1g takes the slice that no 2g could begin at; both places of a 3g's half and the 4g's stay open at the front.
    assert mig.best_start(A100, (), "1g") == 6
    assert mig.best_start(A100, (), "3g") == 4
    assert mig.best_start(A100, (Partition(6, "1g"),), "1g") == 4
    assert mig.free_starts(A100, (Partition(0, "1g"),), "4g") == ()
    assert mig.best_start(A100, (Partition(0, "7g"),), "1g") is None


def test_half_free_is_not_half_to_be_had() -> None:
    spread = (Partition(1, "1g"), Partition(5, "1g"))
    assert mig.free_starts(A100, spread, "3g") == ()
    assert mig.free_starts(A100, (Partition(4, "1g"), Partition(5, "1g")), "3g") == (0,)


def test_a_partitioned_gpu_is_several_devices() -> None:
    devices = mig.partitioned(GpuSpec("GPU-1", "a100-80gb", 80 * GIB, healthy=False), ["3g", "2g", "1g"])
    assert [(each.uuid, each.model, each.memory_bytes // GIB, each.healthy) for each in devices] == [
        ("GPU-1/1g.10gb@6", "a100-80gb.1g.10gb", 10, False),
        ("GPU-1/2g.20gb@4", "a100-80gb.2g.20gb", 20, False),
        ("GPU-1/3g.40gb@0", "a100-80gb.3g.40gb", 40, False),
    ]


def test_a_part_of_a_gpu_becomes_a_partition_that_suffices() -> None:
    # 3/7 are 428 thousandths: 400 need 3g, 430 need 4g; 25 GiB need more than 2g's 20.
    def names(demand: Demand) -> list[str]:
        return [each.removeprefix("a100-80gb.") for each in mig.onto_partitions(demand, "a100-80gb").gpu_models]

    assert names(Demand(gpu_share=400)) == ["3g.40gb", "4g.40gb", "7g.80gb"]
    assert names(Demand(gpu_share=430)) == ["4g.40gb", "7g.80gb"]
    assert names(Demand(gpu_share=100, gpu_memory_bytes=25 * GIB)) == ["3g.40gb", "4g.40gb", "7g.80gb"]
    assert mig.onto_partitions(Demand(gpu_share=100), A100).gpu_share == 1000
    assert mig.onto_partitions(Demand(gpus=0), A100) == Demand(gpus=0)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: mig.layout("t4", ["1g"]), "the GPU model 't4' has none; use one of a100-40gb"),
        (lambda: mig.layout(A100, ["5g"]), "a100-40gb has no partition '5g'; use one of 1g.5gb"),
        (lambda: mig.onto_partitions(Demand(), "t4"), "the GPU model 't4' has none"),
        (lambda: mig.onto_partitions(Demand(gpu_memory_bytes=41 * GIB), A100), "no partition of a100-40gb has"),
    ],
)
def test_what_cannot_be_is_named_with_its_remedy(call: Any, complaint: str) -> None:
    with pytest.raises(InvalidLayout) as caught:
        call()
    assert complaint in str(caught.value)


def test_the_engine_places_tasks_on_partitions_the_smallest_that_suffices(desk: Any, task: Any) -> None:
    d = desk("first-fit")
    gpu = GpuSpec("GPU-1", A100, 40 * GIB)
    d.step(ev.NodeJoined(NodeSpec("n1", mig.partitioned(gpu, ["4g", "2g", "1g"]))))
    for at, share in enumerate((100, 250, 100, 100)):
        d.submit(task(f"t{at}", model=f"m{at}", demand=mig.onto_partitions(Demand(gpu_share=share), A100)))
    placed = [d.engine.state.pods[d.engine.state.tasks[f"t{at}"].pods[0]].grants[0].uuid for at in range(3)]
    assert placed == ["GPU-1/1g.5gb@6", "GPU-1/2g.10gb@4", "GPU-1/4g.20gb@0"]
    assert d.state("t3") == "pending"
