"""The architectures that GPU machines measure have the published sizes, and make pictures with whatever weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from executors.batching.batch import RunningBatch
from executors.batching.requests import Failed, Finished, PictureRequest

architectures = pytest.importorskip("benchmarks.architectures", reason="the benchmarks are not in this tree")

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(("name", "millions"), [("sd15", 859.52), ("sdxl", 2567.46)])
def test_a_published_network_has_its_published_number_of_parameters(name: str, millions: float) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**architectures.ARCHITECTURES[name].unet)
    assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_equal_calls_build_pipelines_of_equal_numbers_that_make_pictures() -> None:
    made = []
    for _ in range(2):
        loaded = architectures.build("small", "cpu")
        batch = RunningBatch(loaded)
        batch.admit(PictureRequest("a", "a red star", steps=2, width=32, height=32))
        while len(batch):
            for event in batch.step():
                assert not isinstance(event, Failed), event
                if isinstance(event, Finished):
                    made.append(event.picture.tobytes())
    assert made[0] == made[1]
    assert architectures.operations_per_row(loaded, 32) > 1e6
