"""The whole way of a checkpoint: from a real Pod through agent, sockets and engine into the order that another node gets."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from zmq_factory import FeaturePayloads, ZmqRig, make_zmq_rig

from engine import commands as c
from engine.events import TaskFinished, TaskProgressed, TaskSubmitted
from engine.resources import Demand
from engine.tasks import TaskSpec, TaskType
from executors.dfs import open_store

pytest.importorskip("torch", reason="the AI methods need the executors extra")
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.torch]

GENEROUS_S = 240.0


class TrainingPayloads(FeaturePayloads):
    """Every task is the same training of the bundled model."""

    def __init__(self) -> None:
        super().__init__()
        self.parameters: dict[str, Any] = {}

    def pod(self, command: c.CreatePod) -> dict[str, object]:
        return {"id": "tiny", "base": "tiny", "adapter": None, "path": None}

    def task(self, command: c.StartTask) -> dict[str, object]:
        return self.parameters


def _pictures(root: Path) -> list[str]:
    from PIL import Image, ImageDraw

    store = open_store((root / "files").as_uri())
    ids = []
    for shift in range(3):
        picture = Image.new("RGB", (64, 64), (30, 90, 160))
        ImageDraw.Draw(picture).ellipse((10 + shift, 12, 44 + shift, 46), fill=(240, 200, 40))
        out = io.BytesIO()
        picture.save(out, "PNG")
        ids.append(store.put_bytes(out.getvalue(), "image/png").file_id)
    return ids


@pytest.fixture
def rig() -> Iterator[ZmqRig]:
    payloads = TrainingPayloads()
    made = make_zmq_rig(nodes=2, gpus=1, payloads=payloads)
    payloads.parameters = {
        "pictures": _pictures(Path(made.home.name)),
        "category": "emblem",
        "steps": 16,
        "prior_preservation": False,
        "batch": 1,
        "checkpoint_every": 4,
        "validation_prompts": ["a photo of sks emblem"],
        "validation_every": 8,
    }
    try:
        yield made
    finally:
        made.close()


def _train(rig: ZmqRig, req_no: str) -> None:
    demand = Demand(gpus=1)
    rig.post(
        TaskSubmitted(TaskSpec(req_no, tenant="a", group="", task_type=TaskType.TP, method="dreambooth", demand=demand))
    )


def _files(rig: ZmqRig, req_no: str) -> dict[str, str]:
    (result,) = [event.result for event in rig.events if isinstance(event, TaskFinished) and event.req_no == req_no]
    return {file["name"]: file["file_id"] for file in json.loads(result)["files"]}


@pytest.mark.parametrize("loss", ["of its node", "of its Pod"])
def test_a_training_outlives_the_loss_and_ends_with_the_same_model(rig: ZmqRig, loss: str) -> None:
    _train(rig, "undisturbed")
    rig.pump(lambda: rig.last("undisturbed") == "finished", GENEROUS_S)

    def told() -> list[str]:
        seen = [e for e in rig.events if isinstance(e, TaskProgressed) and (e.req_no, e.attempt) == ("lost", 1)]
        return [event.checkpoint for event in seen if event.checkpoint]

    def starts() -> list[c.StartTask]:
        return [each for each in rig.commands if isinstance(each, c.StartTask) and each.req_no == "lost"]

    _train(rig, "lost")
    rig.pump(lambda: bool(told()), GENEROUS_S)
    (first,) = starts()
    if loss == "of its node":
        rig.lose_node(first.node)
    else:
        rig.crash_pods(first.node)
    rig.pump(lambda: rig.last("lost") == "finished", GENEROUS_S)
    second = starts()[-1]
    assert (second.attempt, second.checkpoint) == (2, told()[-1])
    assert (second.node != first.node) or loss == "of its Pod"
    assert _files(rig, "lost") == _files(rig, "undisturbed")
    done = [e.done for e in rig.events if isinstance(e, TaskProgressed) and (e.req_no, e.attempt) == ("lost", 2)]
    assert done[0] > 4, "the first steps are not done again"
