"""Plans, predictions and simulations count memory alike: one source for what networks keep alive, and the same figures from it."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from model_folders import model_dir

from api.mq.messages import decode, encode_request
from api.support.intake import MethodDefaults, understand
from api.support.jobs import Model
from engine.resources import Demand
from engine.tasks import TaskSpec, TaskType
from executors.memory.footprint import Footprint, PartWeights, read_footprint
from executors.memory.plan import GIB, TrainingNeeds, training_too_large
from predictors import Predictor, physics
from predictors.features import read_request, task_features
from predictors.memory import GpuMemoryModel
from sim.hardware import Hardware, cluster

UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "block_out_channels": (320, 640), "down_block_types": ("CrossAttnDownBlock2D", "D")},
    "sdxl": {"sample_size": 128, "block_out_channels": (320, 640), "down_block_types": ("DownBlock2D", "D")},
}
CLASSES = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


@pytest.fixture(params=["sd15", "sdxl"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def footprint(tmp_path: Path, family: str) -> Footprint:
    """A family's footprint as its directory tells it, with as many numbers as the true networks have."""
    counted = physics.FAMILIES[family]
    read = read_footprint(model_dir(tmp_path, CLASSES[family], UNETS[family]))
    parts = {
        "unet": PartWeights(counted.unet_parameters),
        "text_encoder": PartWeights(counted.text_parameters),
        "vae": read.parts["vae"],
    }
    return replace(read, parts=parts)


def _features(footprint: Footprint, **more: str | int) -> dict[str, Any]:
    known = {"method": "text_to_image", "model": "m", "family": footprint.family, "images": 1}
    return {**known, "weights_bytes": footprint.weights_bytes(2), **more}


def test_a_directory_tells_the_same_activations_as_the_family_by_name(footprint: Footprint, family: str) -> None:
    assert footprint.family == family
    assert footprint.activations == physics.FAMILIES[family].activations
    assert footprint.native_px == physics.FAMILIES[family].native_px


@pytest.mark.parametrize("side", [512, 768, 1024, 1536])
def test_what_is_predicted_for_a_new_model_is_what_the_plan_counts(footprint: Footprint, side: int) -> None:
    step, decode = footprint.step_bytes(side, side, 2, 2), footprint.decode_bytes(side, side, 1, 2)
    planned = footprint.weights_bytes(2) + max(step, decode)
    expected = GpuMemoryModel().expected_bytes(read_request(_features(footprint, width=side)), 0.0)
    assert expected == pytest.approx(planned, rel=1e-6)


@pytest.mark.parametrize("frugal", [0, 1])
@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("full", [False, True])
def test_what_is_predicted_for_a_training_is_what_the_plan_counts(
    footprint: Footprint, frugal: int, rows: int, full: bool
) -> None:
    side = footprint.native_px
    given = _features(footprint, method="dreambooth", rows=rows, frugal=frugal, style="full" if full else "lora")
    expected = GpuMemoryModel().expected_bytes(read_request(given), 0.0)
    planned = footprint.weights_bytes(2) + footprint.train_bytes(side, side, rows, 2, frugal=bool(frugal))
    if full:
        planned += 16 * (footprint.parts["unet"].numbers + footprint.parts["text_encoder"].numbers)
    else:  # The plan leaves an adapter out: its rank is the request's.
        planned += 16 * physics.adapter_bytes(physics.FAMILIES[footprint.family], 16) // 2
    assert expected == pytest.approx(planned, rel=1e-6)


def test_a_training_that_is_refused_at_the_door_would_be_predicted_to_need_more_than_the_card(
    footprint: Footprint,
) -> None:
    full = TrainingNeeds(footprint.native_px, 1, full=True, parts=("unet", "text_encoder"))
    given = _features(footprint, method="dreambooth", rows=1, style="full")
    predicted = Predictor().predict(given, 0).gpu_memory_bytes
    for card in (8 * GIB, 12 * GIB):
        assert training_too_large(footprint, 2, full, card, "m")
        assert predicted > card


def test_the_simulated_hardware_takes_what_is_planned_and_predicted(footprint: Footprint, family: str) -> None:
    hardware = Hardware(cluster(1, 1), family=family)
    weights = physics.FAMILIES[family].weights_bytes
    side = footprint.native_px
    for method, features in (
        ("text_to_image", {"images": 1}),
        ("dreambooth", {"rows": 4, "frugal": 1, "method": "lora"}),
        ("dreambooth", {"rows": 8, "method": "full"}),
        ("dreambooth", {}),
    ):
        task = TaskSpec(
            req_no="r",
            tenant="t",
            group="",
            method=method,
            model="m",
            task_type=TaskType.TP if method == "dreambooth" else TaskType.GC,
            demand=Demand(gpus=1),
            features=tuple(sorted({**features, "width": side, "height": side}.items())),
        )
        asked = read_request({**task_features(task), "family": family})
        expected = GpuMemoryModel().expected_bytes(asked, 0.0)
        assert hardware.peak_memory_bytes(task) == pytest.approx(expected, rel=1e-6)
        assert hardware.peak_memory_bytes(task) > weights


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, {"rows": 8, "frugal": 0}),
        ({"batch": 3, "prior_preservation": False, "size": 768}, {"rows": 3, "frugal": 0, "width": 768, "height": 768}),
        ({"gradient_checkpointing": True, "batch": 1}, {"rows": 2, "frugal": 1}),
    ],
)
def test_a_training_says_at_the_door_what_its_memory_goes_by(given: dict[str, Any], told: dict[str, int]) -> None:
    parameters = {"pictures": ["a" * 64, "b" * 64, "c" * 64], "category": "dog", **given}
    message = decode(
        encode_request(
            req_no=str(uuid.UUID(int=7)), tenant="acme", task_type="TP", method="dreambooth", parameters=parameters
        )
    )
    request = understand(
        message,
        message_id="m",
        task_id="task",
        now=0,
        methods={"dreambooth": MethodDefaults(Demand(gpus=1))},
        default_model="tiny",
        find_model={"tiny": Model("tiny", "builtin")}.get,
    )
    assert request.spec is not None
    features = dict(request.spec.features)
    assert {name: features.get(name) for name in ("rows", "frugal", *told)} == told
    assert ("width" in features) is ("width" in told)
    assert read_request(task_features(request.spec)).batch == told["rows"]
