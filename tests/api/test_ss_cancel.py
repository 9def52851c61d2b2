"""Cancels are certain when they are acknowledged, and leave nothing behind."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from ss_platform import Platform

from engine.events import TaskFailed, TaskFinished, TaskProgressed
from engine.tasks import FailureCause


def test_a_running_task_is_cancelled_and_no_result_follows(platform: Platform) -> None:
    req_no = platform.ask(seconds=3600)
    platform.job_when(req_no, {"running"})
    view = platform.call(lambda: platform.support.cancel("acme", req_no))
    assert view.state == "cancelled"
    assert platform.call(lambda: platform.support.cancel("acme", req_no)).state == "cancelled"
    assert platform.result(req_no)["state"] == "cancelled"
    other = platform.ask()
    assert set(platform.results(1)) == {f"acme/{other}"}


@pytest.mark.parametrize(("end", "left"), [("cancelled", 0), ("finished", 0), ("dead", 2)])
def test_checkpoints_leave_with_a_job_that_nobody_will_resume(platform: Platform, end: str, left: int) -> None:
    kept = [platform.files.put_bytes(content, "application/x-tar").file_id for content in (b"first", b"second")]
    req_no = platform.ask(seconds=3600)
    platform.job_when(req_no, {"running"})
    post = platform.scheduler.core.post
    for done, file_id in enumerate(kept, start=1):
        post(TaskProgressed(req_no, 1, done, 9, 0, file_id))
    match end:
        case "cancelled":
            platform.call(lambda: platform.support.cancel("acme", req_no))
        case "finished":
            post(TaskFinished(req_no, 1, 0, '{"files":[],"metadata":{}}', 1))
        case _:
            post(TaskFailed(req_no, 1, FailureCause.BAD_INPUT))
    assert platform.result(req_no)["state"] == end
    platform.stop()  # Sends what is owed and removes what is unwanted.
    found = [file_id for file_id in kept if platform.files.stat(file_id) is not None]
    platform.start()
    assert len(found) == left


def test_a_cancel_after_the_result_answers_the_result(platform: Platform) -> None:
    req_no = platform.ask()
    platform.result(req_no)
    assert platform.call(lambda: platform.support.cancel("acme", req_no)).state == "finished"


def test_no_result_follows_an_acknowledged_cancel_whenever_it_comes(tmp_path: Path) -> None:
    platform = Platform(tmp_path, gpus=8)
    chance = random.Random(7)
    asked = [platform.ask(seconds=chance.random() * 0.1) for _ in range(60)]

    async def cancel(req_no: str) -> tuple[str, str]:
        await asyncio.sleep(chance.random() * 0.3)
        return req_no, (await platform.support.cancel("acme", req_no)).state

    async def cancel_all() -> dict[str, str]:
        return dict(await asyncio.gather(*(cancel(req_no) for req_no in asked)))

    acknowledged = platform.call(cancel_all)
    told = {name: message["body"]["parameters"]["state"] for name, message in platform.results(len(asked)).items()}
    assert told == {f"acme/{req_no}": state for req_no, state in acknowledged.items()}
    assert set(told.values()) <= {"finished", "cancelled"}
    assert "cancelled" in told.values()
    platform.stop()


def test_a_request_still_in_the_queue_is_seen_and_cancelled(platform: Platform) -> None:
    platform.scheduler.core.intake.stop()
    req_no = platform.ask()
    view = platform.call(lambda: platform.support.job("acme", req_no))
    assert (view.state, view.method) == ("queued", "sleep")
    assert platform.call(lambda: platform.support.why("acme", req_no))[0]["reason"] == "queued"
    ended = platform.call(lambda: platform.support.cancel("acme", req_no))
    assert ended.state in ("cancelled", "finished")
    assert platform.result(req_no)["state"] == ended.state
