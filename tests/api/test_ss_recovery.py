"""A scheduler that falls, or whose storage fails, loses nothing and tells nothing twice."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

from ss_platform import Platform

from api.mq.messages import decode, encode_request
from api.mq.port import REQUESTS
from api.mq.sqlite import SqliteQueue
from api.sm.journal import JournalBroken
from api.state_dir import StateDir


def test_a_result_sent_but_not_marked_is_sent_again_and_dropped_by_the_queue(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    read = platform.ask()
    platform.results(1)
    unread = platform.ask()
    platform.job_when(unread, {"finished"})
    platform.scheduler.core.intake.stop()
    platform.scheduler.loop.stop()
    platform.scheduler.core.mail.stop()
    with platform.scheduler.journal.transaction() as db:
        db.execute("UPDATE outbox SET sent = 0")  # as if the process had died before each mark
    platform.scheduler.core.mail.sent.clear()
    platform.stop()
    platform.start()
    last = platform.ask()
    assert set(platform.results(2)) == {f"acme/{unread}", f"acme/{last}"}, f"{read} had been read already"
    platform.stop()


def test_a_request_journaled_but_not_acknowledged_is_recognised(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    queue = platform.queue
    forget = queue.ack
    queue.ack = lambda deliveries: 0  # type: ignore[method-assign]
    req_no = platform.ask()
    platform.job_when(req_no, {"finished"})
    platform.stop()
    queue.ack = forget  # type: ignore[method-assign]
    platform.start()
    last = platform.ask()
    assert set(platform.results(2)) == {f"acme/{req_no}", f"acme/{last}"}
    assert platform.scheduler.core.counters["duplicate"] == 1
    assert platform.scheduler.core.counters["accepted"] == 1
    platform.stop()


def test_a_storage_failure_ends_the_scheduler_and_the_next_one_goes_on(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    platform.result(platform.ask())
    scheduler = platform.scheduler
    with scheduler.journal.transaction() as db:
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages}")
    asked = [platform.ask(group="x" * 128, note="y" * 4000) for _ in range(30)]
    assert scheduler.failed.wait(30)
    health = platform.call(platform.support.health)
    assert not health["ready"]
    assert "full" in health["modules"]["scheduler"]["detail"]
    scheduler.close()
    assert isinstance(scheduler.error, JournalBroken)
    platform.start()
    assert {f"acme/{req_no}" for req_no in asked} == set(platform.results(len(asked)))
    platform.stop()


def test_everything_accepted_comes_back_after_a_restart(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    running = platform.ask(seconds=3600)
    platform.job_when(running, {"running"})
    done = platform.ask()
    first = platform.results(1)[f"acme/{done}"]
    assert first["body"]["parameters"]["state"] == "finished"
    platform.stop()
    waiting = str(uuid.uuid4())
    queue = SqliteQueue(StateDir(tmp_path).queue)
    queue.put(
        REQUESTS, "by-hand", encode_request(req_no=waiting, task_type="GC", method="sleep", parameters={"seconds": 0})
    )
    queue.close()
    platform.start()
    assert set(platform.results(1)) == {f"default/{waiting}"}
    view = platform.job_when(running, {"running"})
    assert view.attempt == 2, "its node died with the process"
    assert platform.call(lambda: platform.support.cancel("acme", running)).state == "cancelled"
    assert platform.call(lambda: platform.support.job("acme", done)).state == "finished"
    decode(json.dumps(platform.results(1)[f"acme/{running}"]).encode())
    platform.stop()
