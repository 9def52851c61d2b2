"""What no GPU here can ever hold is refused before it is queued, with the numbers and the remedy."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest
from model_folders import model_dir

from api.mq.messages import encode_request, request_id
from api.mq.port import REQUESTS, RESULTS
from api.sm.process import Scheduler, SchedulerConfig
from api.state_dir import StateDir
from api.support.drill import DrillWorld
from api.support.intake import MethodDefaults
from api.support.jobs import Model
from api.support.memory import MemoryDoor
from engine import profiles
from engine.resources import Demand

GIB = 1 << 30
UNET = {"block_out_channels": (320, 640), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Model]:
    """A small and a huge base model, a LoRA and a full model of the small one, and models whose files are not here."""
    small = model_dir(tmp_path / "small", "StableDiffusionPipeline", UNET, (1_000_000_000,))
    huge = model_dir(tmp_path / "huge", "StableDiffusionXLPipeline", UNET, (100_000, 1_000_000))
    return {
        "small": Model("small", "local", metadata={"path": str(small)}),
        "huge": Model("huge", "local", metadata={"path": str(huge)}),
        "lora": Model("lora", "lora", base="small"),
        "full": Model("full", "full", base="huge"),
        "elsewhere": Model("elsewhere", "local"),
        "broken": Model("broken", "local", metadata={"path": str(tmp_path)}),
        "orphan": Model("orphan", "lora", base="gone"),
        "tiny": Model("tiny", "builtin"),
    }


def _door(models: dict[str, Model], largest: int = 8 * GIB) -> MemoryDoor:
    return MemoryDoor(models.get, lambda: largest)


def test_a_model_that_fits_no_gpu_is_told_with_what_it_needs(models: dict[str, Model]) -> None:
    door = _door(models)
    assert door.problem("small", {"width": 512, "height": 512}) == ""
    for name in ("huge", "full"):
        assert door.problem(name, {}).startswith(
            f"width, height: pictures of 64x64 from {name} need at least 186.3 GiB"
        )
    assert door.problem("huge", {}).endswith("the largest GPU here has 8.0 GiB; ask for a smaller picture")


def test_a_picture_too_large_for_every_gpu_is_told_although_its_model_fits(models: dict[str, Model]) -> None:
    door = _door(models, 4 * GIB)
    assert door.problem("lora", {"width": 1024, "height": 1024}) == ""
    assert "pictures of 6144x6144 from lora" in door.problem("lora", {"width": 6144, "height": 6144})


def test_a_training_that_fits_no_gpu_is_told_with_the_ways_out(models: dict[str, Model]) -> None:
    door = _door(models)
    assert door.training_problem("small", {"method": "lora", "size": 512}) == ""
    full = door.training_problem("small", {"method": "full", "size": 512})
    assert full.startswith("size: a training of small at 512 px needs at least 1")
    assert full.endswith("ask for gradient_checkpointing, method lora, a smaller size")
    assert door.training_problem("elsewhere", {"method": "full"}) == ""
    assert _door(models, 0).training_problem("small", {"method": "full"}) == ""


@pytest.mark.parametrize("name", ["elsewhere", "broken", "orphan", "unheard of"])
def test_what_is_not_known_here_is_for_the_pod_to_judge(models: dict[str, Model], name: str) -> None:
    assert _door(models, 1).problem(name, {"width": 8192, "height": 8192}) == ""
    assert _door(models).features(name) == ()


def test_while_no_gpu_is_known_nothing_is_refused(models: dict[str, Model]) -> None:
    assert _door(models, 0).problem("huge", {}) == ""


def test_predictions_are_told_family_and_weights(models: dict[str, Model]) -> None:
    door = _door(models)
    assert door.features("small") == (("family", "sd15"), ("weights_bytes", 2_000_000_000 + 5 * 2 + 24))
    assert dict(door.features("huge"))["family"] == "sdxl"
    assert door.features("tiny") == ()


def test_the_scheduler_refuses_it_before_it_is_queued(tmp_path: Path, models: dict[str, Model]) -> None:
    config = SchedulerConfig(
        state=StateDir(tmp_path / "state"),
        make_world=lambda begin: DrillWorld(begin.payloads, not_before=begin.not_before, nodes=1, gpus=1),
        profile=profiles.load("fifo"),
        methods={"text_to_image": MethodDefaults(Demand(gpus=1))},
        models=[models["tiny"], models["small"], models["huge"]],
    )
    scheduler = Scheduler(config)
    scheduler.start()
    try:
        told: dict[str, Any] = {}
        for model in ("huge", "small"):
            req_no = str(uuid.uuid4())
            asked = {"prompt": "a red star", "model": model, "width": 64, "height": 64, "steps": 1}
            body = encode_request(
                req_no=req_no, tenant="acme", task_type="GC", method="text_to_image", parameters=asked
            )
            scheduler.queue.put(REQUESTS, request_id("acme", req_no), body, 0)
            [delivery] = scheduler.queue.take(RESULTS, 1, wait_s=30)
            scheduler.queue.ack([delivery])
            told[model] = json.loads(delivery.body)["body"]["parameters"]
        assert (told["huge"]["state"], told["huge"]["reason"]) == ("rejected", "invalid")
        assert "body.parameters.width, height: pictures of 64x64 from huge need at least" in told["huge"]["detail"]
        assert told["small"]["state"] == "finished"
        [task] = scheduler.engine.state.tasks.values()
        assert dict(task.spec.features)["family"] == "sd15"
    finally:
        scheduler.close()
    assert scheduler.error is None
