"""The example of docs/messages.md, run as an outside program against a scheduler with a world in memory."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api.sm.process import Scheduler, SchedulerConfig
from api.state_dir import StateDir
from api.support.drill import DrillWorld
from api.support.intake import MethodDefaults
from api.support.jobs import Model
from engine import profiles

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "mq_client.py"


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[Scheduler]:
    scheduler = Scheduler(
        SchedulerConfig(
            state=StateDir(tmp_path),
            make_world=lambda begin: DrillWorld(begin.payloads, not_before=begin.not_before),
            profile=profiles.load("aigc"),
            methods={name: MethodDefaults() for name in ("sleep", "text_to_image", "dreambooth")},
            models=[Model("tiny", "builtin")],
        )
    )
    scheduler.start()
    yield scheduler
    scheduler.close()
    assert scheduler.error is None


def example(scheduler: Scheduler, *arguments: str) -> tuple[int, dict[str, Any], str]:
    queue = scheduler.config.state.queue
    command = [sys.executable, str(EXAMPLE), str(queue), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, timeout=120, check=False
    )
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def test_the_example_asks_for_a_generation_and_prints_its_result(scheduler: Scheduler) -> None:
    code, result, talk = example(
        scheduler, "GC", "text_to_image", '{"prompt": "a red circle"}', "--priority", "100", "--group", "g"
    )
    assert (code, result["state"]) == (0, "finished"), talk


def test_the_example_trains_a_model(scheduler: Scheduler) -> None:
    parameters = {"pictures": [f"{n:064x}" for n in range(3)], "category": "dog"}
    code, result, talk = example(scheduler, "TP", "dreambooth", json.dumps(parameters), "--tenant", "acme")
    assert (code, result["state"]) == (0, "finished"), talk
    assert result["result"]["model"].startswith("lora-")


def test_a_refused_request_is_explained_and_exits_with_one(scheduler: Scheduler) -> None:
    code, result, _ = example(scheduler, "GC", "text_to_image", '{"prompt": ""}')
    assert (code, result["state"], result["reason"]) == (1, "rejected", "invalid")
    assert "body.parameters.prompt" in result["detail"]


def test_a_lost_client_asks_again_with_the_same_number(scheduler: Scheduler) -> None:
    req_no = str(uuid.uuid4())
    asked = ("GC", "sleep", '{"seconds": 1}', "--req-no", req_no)
    code, result, talk = example(scheduler, *asked, "--timeout", "0")
    assert (code, result) == (2, {})
    assert req_no in talk
    code, result, _ = example(scheduler, *asked)
    assert (code, result["attempt"]) == (0, 1)


def test_the_formats_on_the_page_are_those_of_the_code() -> None:
    from api.mq.messages import decode

    page = (ROOT / "docs" / "messages.md").read_text()
    blocks = [part.split("```")[0] for part in page.split("```json\n")[1:]]
    request, result = (decode(block.encode()) for block in blocks)
    assert request.body.method == "text_to_image"
    assert result.body.parameters["state"] == "finished"
