"""The command line against a real platform: every command does what its help says."""

from __future__ import annotations

import json
import os
import signal
import uuid
from pathlib import Path

import pytest
from PIL import Image

from api.demo import draw_subject

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("platform")]


def _sleep(platform, **parameters) -> str:
    job = platform.client.request("POST", "/v1/jobs", json={"method": "sleep", "parameters": parameters})
    return job["req_no"]


def test_generate_writes_the_pictures_it_was_asked_for(platform, tmp_path: Path) -> None:
    text = platform.aigc(
        "generate", "a red circle on a white background", "-n", "2", "--seed", "1", "--steps", "4", "-o", str(tmp_path)
    )
    paths = [Path(line) for line in text.split()]
    assert len(paths) == 2
    for path in paths:
        with Image.open(path) as picture:
            assert picture.size == (64, 64)
            assert "a red circle" in json.dumps(picture.info)


def test_the_same_seed_gives_the_same_picture(platform, tmp_path: Path) -> None:
    pictures = []
    for name in ("one", "two"):
        line = platform.aigc("generate", "a blue star", "--seed", "7", "--steps", "4", "-o", str(tmp_path / name))
        with Image.open(line.strip()) as picture:
            pictures.append(picture.tobytes())
    assert pictures[0] == pictures[1]


def test_train_gives_a_model_that_can_be_deployed_used_and_deleted(platform, tmp_path: Path) -> None:
    pictures = [str(path) for path in draw_subject(tmp_path / "subject")]
    model = platform.aigc("train", *pictures, "--category", "emblem", "--steps", "10").strip()
    shown = platform.json("models", "show", model)
    assert shown["base"] == "tiny"
    platform.aigc("models", "deploy", model)

    def warm() -> bool:
        pods = [pod for node in platform.json("nodes", "list") for pod in node["pods"]]
        # A LoRA shares the Pods of its base.
        return any(pod["model"] == "tiny" and pod["state"] in {"ready", "idle"} for pod in pods)

    platform.until(warm, "a Pod is warm with the deployed model")
    line = platform.aigc(
        "generate", "a sks emblem", "--model", model, "--steps", "4", "--seed", "1", "-o", str(tmp_path)
    )
    with Image.open(line.strip()) as picture:
        assert picture.size == (64, 64)
    platform.aigc("models", "undeploy", model)
    platform.aigc("models", "delete", model)
    assert model not in {row["model_id"] for row in platform.json("models", "list")}
    platform.aigc("models", "show", model, code=4)


def test_a_running_job_is_cancelled_for_certain(platform) -> None:
    req_no = _sleep(platform, seconds=60, steps=600)
    platform.until(lambda: platform.json("jobs", "show", req_no)["state"] == "running", "the job runs")
    assert platform.json("jobs", "cancel", req_no)["state"] == "cancelled"
    job = platform.json("jobs", "show", req_no)
    assert (job["state"], job["result"]) == ("cancelled", None)
    assert platform.json("jobs", "cancel", req_no)["state"] == "cancelled", "cancelling twice is cancelling once"


def test_watch_follows_a_job_and_tells_success_from_failure(platform) -> None:
    assert platform.json("jobs", "watch", _sleep(platform, seconds=0.2, steps=2))["state"] == "finished"
    failed = platform.json("jobs", "watch", _sleep(platform, seconds=0.1, steps=2, fail="error"), code=1)
    assert failed["state"] == "dead"


def test_a_job_that_crashes_its_pod_is_retried_and_then_goes_to_the_dead_letter(platform) -> None:
    job = platform.json("jobs", "watch", _sleep(platform, seconds=0.1, steps=2, fail="crash"), code=1)
    assert job["state"] == "dead"
    assert job["attempt"] == 3
    assert job["reason"] == "attempts_used"
    assert "crashed" in job["detail"]


def test_why_names_what_is_missing_when_every_node_is_drained(platform) -> None:
    nodes = [node["name"] for node in platform.json("nodes", "list")]
    for node in nodes:
        platform.aigc("nodes", "drain", node)
    try:
        req_no = _sleep(platform, seconds=0.1)
        platform.until(lambda: platform.json("jobs", "show", req_no)["state"] == "pending", "the job waits")
        assert "drain" in platform.aigc("jobs", "why", req_no).lower()
    finally:
        for node in nodes:
            platform.aigc("nodes", "uncordon", node)
    assert platform.json("jobs", "watch", req_no)["state"] == "finished"


def test_lists_filter_and_page(platform) -> None:
    group = f"g-{uuid.uuid4().hex[:8]}"
    wanted = set()
    for _ in range(3):
        body = {"method": "sleep", "parameters": {"seconds": 0.01, "steps": 1}, "group": group}
        wanted.add(platform.client.request("POST", "/v1/jobs", json=body)["req_no"])
    platform.until(
        lambda: (
            {job["req_no"] for job in platform.json("jobs", "list", "--group", group, "--state", "finished")} == wanted
        ),
        "all of the group have finished",
    )
    assert len(platform.json("jobs", "list", "--group", group, "--limit", "2")) == 2


def test_a_scheduler_that_is_killed_comes_back_with_everything(platform) -> None:
    req_nos = [_sleep(platform, seconds=0.3, steps=3) for _ in range(6)]
    part = platform.supervisor.part("scheduler")
    os.kill(part.process.pid, signal.SIGKILL)
    part.process.wait()

    def back() -> bool:
        platform.supervisor.check()
        return part.alive() and part.ready()

    platform.until(back, "the scheduler is back")
    for req_no in req_nos:
        platform.until(
            lambda req_no=req_no: platform.json("jobs", "show", req_no)["state"] == "finished", f"{req_no} finishes"
        )


def test_replay_decides_a_live_journal_as_recorded(platform) -> None:
    _ = platform.json("jobs", "watch", _sleep(platform, seconds=0.05, steps=1))
    from typer.testing import CliRunner

    from api.cli.main import app

    answer = CliRunner().invoke(app, ["replay", str(platform.state / "journal.db"), "--from-start", "--json"])
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["same"] is True


def test_doctor_finds_no_fault_in_a_running_platform(platform) -> None:
    findings = platform.json("doctor")
    assert [finding for finding in findings if finding["verdict"] == "fault"] == []
    assert any(finding["what"] == "gateway" and finding["verdict"] == "ok" for finding in findings)


def test_keys_are_made_listed_and_revoked(platform) -> None:
    made = platform.json("keys", "create", "--tenant", "acme", "--label", "ci")
    assert platform.json("jobs", "list", "--key", made["key"]) == []
    platform.aigc("nodes", "list", "--key", made["key"], code=4)
    assert made["key_id"] in {record["key_id"] for record in platform.json("keys", "list")}
    platform.aigc("keys", "revoke", made["key_id"])
    platform.aigc("jobs", "list", "--key", made["key"], code=4)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("generate", "a", "--size", "big"), 2),
        (("generate", "a", "--steps", "0"), 4),
        (("generate", "a", "--model", "no-such-model"), 4),
        (("train", "nowhere.png", "x.png", "y.png", "--category", "dog"), 2),
        (("jobs", "show", "not-a-uuid"), 4),
        (("jobs", "show", "00000000-0000-4000-8000-000000000000"), 4),
        (("nodes", "drain", "no-such-node"), 4),
    ],
)
def test_bad_input_is_refused_with_the_documented_code(platform, arguments: tuple[str, ...], code: int) -> None:
    platform.aigc(*arguments, code=code)


def test_an_absent_gateway_is_exit_code_3(platform) -> None:
    platform.aigc("jobs", "list", "--url", "http://127.0.0.1:9", code=3)
