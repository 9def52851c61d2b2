"""The scheduler's process is killed with SIGKILL under load, again and again: nothing accepted is lost, nothing is done twice."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from api.mq.messages import encode_request, request_id
from api.mq.port import REQUESTS, RESULTS, Outgoing
from api.mq.sqlite import SqliteQueue
from api.sm.journal import read_journal
from api.sm.process import LIMITS
from api.state_dir import StateDir
from engine.commands import StartTask
from engine.events import TaskFinished
from engine.replay import refold

PARTS = Path(__file__).with_name("scheduler_parts.py")
KILLS = 10
TASKS = 240
SECONDS = 0.02
DEADLINE_S = 600.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def part(name: str, root: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PARTS.parents[2])}
    with (root / f"{name}.log").open("ab") as log:
        command = [sys.executable, str(PARTS), name, str(root), str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(20)


class Asker:
    """An outside program: it asks, and counts every delivery of a result."""

    def __init__(self, root: Path) -> None:
        self.queue = SqliteQueue(StateDir(root).queue)
        self.asked: list[str] = []
        self.deliveries: dict[str, int] = {}
        self.states: dict[str, str] = {}

    def ask(self, number: int) -> None:
        messages = []
        for _ in range(number):
            req_no = str(uuid.uuid4())
            parameters = {"seconds": SECONDS, "steps": 1}
            body = encode_request(req_no=req_no, task_type="GC", method="sleep", parameters=parameters, tenant="acme")
            messages.append(Outgoing(request_id("acme", req_no), body))
            self.asked.append(f"acme/{req_no}")
        self.queue.put_many(REQUESTS, messages)

    def collect(self, wait_s: float) -> None:
        taken = self.queue.take(RESULTS, 64, wait_s=wait_s)
        for delivery in taken:
            self.deliveries[delivery.message_id] = self.deliveries.get(delivery.message_id, 0) + 1
            self.states[delivery.message_id] = json.loads(delivery.body)["body"]["parameters"]["state"]
        self.queue.ack(taken)

    def collect_until(self, number: int, root: Path, deadline: float, scheduler: subprocess.Popen[bytes]) -> None:
        while len(self.deliveries) < number:
            if time.monotonic() > deadline or scheduler.poll() is not None:
                logs = "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(root.glob("*.log")))
                pytest.fail(f"{len(self.deliveries)} of {number} results came\n{logs}")
            self.collect(0.2)


@pytest.mark.slow
@pytest.mark.e2e
def test_ten_kills_under_load_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    StateDir(tmp_path).create()
    port = free_port()
    asker = Asker(tmp_path)
    chance = random.Random(2024)
    deadline = time.monotonic() + DEADLINE_S
    with part("agent", tmp_path, port):
        for kill in range(KILLS):
            asker.ask(TASKS // KILLS)
            with part("scheduler", tmp_path, port) as scheduler:
                # A few results after its start it is killed in the middle of its work, wherever that is.
                asker.collect_until(
                    len(asker.deliveries) + chance.randint(1, TASKS // KILLS // 2), tmp_path, deadline, scheduler
                )
                asker.collect(chance.random() * 0.1)
                scheduler.kill()
                assert scheduler.wait(20) == -signal.SIGKILL, f"kill {kill}"
        with part("scheduler", tmp_path, port) as scheduler:
            asker.collect_until(TASKS, tmp_path, deadline, scheduler)
            scheduler.terminate()
            assert scheduler.wait(30) == 0, (tmp_path / "scheduler.log").read_text()[-3000:]
    asker.collect(0.1)
    assert sorted(asker.deliveries) == sorted(asker.asked), "every request has its result"
    assert set(asker.deliveries.values()) == {1}, "and no result came twice"
    assert set(asker.states.values()) == {"finished"}
    assert asker.queue.counts().get(REQUESTS, {"ready": 0})["ready"] == 0
    asker.queue.close()
    check_the_journal(tmp_path)


def check_the_journal(root: Path) -> None:
    with sqlite3.connect(StateDir(root).journal) as db:
        assert db.execute("SELECT count(*), count(DISTINCT req_no) FROM outcome").fetchone() == (TASKS, TASKS)
        assert db.execute("SELECT epoch FROM leader").fetchone() == (KILLS + 1,)
    _, records = read_journal(StateDir(root).journal, from_start=True)
    ordered = [command.req_no for record in records for command in record.commands if isinstance(command, StartTask)]
    finished = [event.req_no for record in records for event in record.events if isinstance(event, TaskFinished)]
    assert len(set(finished)) == len(finished) == TASKS, "no report was taken twice"
    assert len(set(ordered)) == len(ordered) == TASKS, "the node outlived every kill, so nothing was run twice"
    snapshot, tail = read_journal(StateDir(root).journal)
    assert refold(snapshot, tail).digest() == refold(None, records, LIMITS).digest()
