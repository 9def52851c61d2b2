"""Recovery re-applies, replay re-decides, and neither depends on how Python hashes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine import codec, profiles, snapshot
from engine import events as ev
from engine.errors import InvalidEvent
from engine.journal import MemoryJournal, Record, decisions_digest, decode_record, encode_record
from engine.replay import recover, replay
from engine.resources import Demand
from engine.scheduler import Engine

ROOT = Path(__file__).parents[2]

SCENARIO = """
import random
from engine import events as ev, profiles
from engine.commands import CreatePod, DeletePod, StartTask
from engine.journal import MemoryJournal, decisions_digest
from engine.resources import Demand, GpuSpec, NodeSpec
from engine.scheduler import Engine
from engine.tasks import TaskSpec, TaskType, Affinity

rng = random.Random(7)
engine, journal, now, running, outbox = Engine(profiles.load("aigc")), MemoryJournal(), 0, [], []
for i in range(6):
    outbox.append(ev.NodeJoined(NodeSpec(f"n{i}", tuple(GpuSpec(f"g{j}", "ab"[j % 2], 80) for j in range(4)), 16000)))
for step in range(300):
    now += rng.randrange(2_000_000)
    for i in range(rng.randrange(4)):
        outbox.append(ev.TaskSubmitted(TaskSpec(
            f"t{step}-{i}", f"tenant{rng.randrange(4)}", f"g{rng.randrange(20)}", TaskType.GC, "sleep", f"m{rng.randrange(6)}",
            priority=rng.choice((0, 0, 100)), demand=Demand(gpu_share=rng.choice((500, 1000))),
            affinity=rng.choice(list(Affinity)[:3]), slots=rng.choice((1, 2)), declared_us=rng.randrange(1, 9) * 1_000_000)))
    events, outbox = outbox, []
    commands = engine.step(now, events)
    journal(now, events, commands)
    for c in commands:
        if isinstance(c, CreatePod):
            outbox.append(ev.PodStarted(c.pod))
        elif isinstance(c, DeletePod):
            outbox.append(ev.PodStopped(c.pod))
        elif isinstance(c, StartTask):
            outbox.append(ev.TaskStarted(c.req_no, c.attempt))
            running.append(c)
    while len(running) > 15:
        c = running.pop(rng.randrange(len(running)))
        outbox.append(ev.TaskFinished(c.req_no, c.attempt))
print(decisions_digest(journal.records), engine.state.digest(), len(journal.records), engine.state.outcomes["finished"])
"""


def run_scenario(seed: str) -> list[str]:
    environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCENARIO],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.split()


def test_the_same_decisions_come_out_under_every_hash_seed() -> None:
    first, second = run_scenario("1"), run_scenario("4242")
    assert first == second
    assert int(first[3]) > 100


def lived(desk: Any, task: Any) -> Any:
    d = desk("aigc")
    d.node("n1", gpus=2)
    d.answer(d.submit(task("t1", model="m", group="g"), task("t2", model="x"), task("t3", model="m")))
    d.step(ev.TaskFailed("t1", 1, "crashed"))
    d.step(ev.ModelDeployed("m", "sleep", Demand()), ev.TaskCancelRequested("t3"))
    d.answer(d.step(after=3))
    return d


def test_a_recovered_engine_is_the_live_one(desk: Any, task: Any) -> None:
    d = lived(desk, task)
    records = [decode_record(encode_record(r)) for r in d.journal.records]
    assert recover(None, records).state.digest() == d.engine.state.digest()


def test_a_recovery_may_start_from_any_snapshot(desk: Any, task: Any) -> None:
    d = lived(desk, task)
    engine, journal = Engine(profiles.load("aigc")), MemoryJournal()
    for at, record in enumerate(d.journal.records, start=1):
        engine.step(record.now, record.events)
        journal(record.now, record.events, ())
        recovered = recover(engine.snapshot(), d.journal.records[at:])
        assert recovered.state.digest() == d.engine.state.digest()


def test_a_recovery_asks_no_policy(desk: Any, task: Any) -> None:
    d = lived(desk, task)
    assert recover(None, d.journal.records, profiles.load("fifo")).state.digest() == d.engine.state.digest()


def test_a_replay_of_the_same_policies_finds_no_difference(desk: Any, task: Any) -> None:
    d = lived(desk, task)
    report = replay(d.journal.records, profiles.load("aigc"))
    assert report.same
    assert report.steps == len(d.journal.records)


def test_a_replay_names_the_first_difference(desk: Any, task: Any) -> None:
    d = desk("aigc")
    d.node("n1", gpus=1)
    d.node("n2", gpus=1)
    d.submit(task("t1"), task("t2", priority=100))
    report = replay(d.journal.records, profiles.load("fifo"))
    assert not report.same
    assert (report.difference.seq, report.difference.index) == (3, 2)
    assert "req_no='t2'" in str(report.difference)
    assert "req_no='t1'" in str(report.difference)


def test_a_replay_notices_orders_that_are_missing_or_too_many(desk: Any, task: Any) -> None:
    d = lived(desk, task)
    first, second, *_ = d.journal.records
    shorter = Record(second.seq, second.now, second.events, second.commands[:-1])
    assert replay([first, shorter], d.engine.profile).difference.recorded is None
    longer = Record(second.seq, second.now, second.events, (*second.commands, second.commands[-1]))
    assert replay([first, longer], d.engine.profile).difference.decided is None


def test_time_never_goes_back(desk: Any, task: Any) -> None:
    d = desk()
    d.node()
    with pytest.raises(InvalidEvent, match="time never goes back"):
        d.engine.step(5, [])
    with pytest.raises(InvalidEvent, match="sort the records by seq"):
        recover(None, [Record(1, 9, (), ()), Record(2, 8, (), ())])


def test_what_is_no_event_is_refused(desk: Any) -> None:
    with pytest.raises(InvalidEvent, match="str is no event"):
        desk().engine.step(1, ["boo"])


def test_a_snapshot_of_another_version_or_a_damaged_one_is_refused(desk: Any) -> None:
    good = desk().engine.snapshot()
    assert snapshot.restore(good).digest()
    for bad in (b"[2,{}]", b"[1,{}]", b"{", b"[1]"):
        with pytest.raises(codec.CodecError):
            snapshot.restore(bad)


def test_decisions_that_differ_have_another_digest(desk: Any, task: Any) -> None:
    d = lived(desk, task)
    assert decisions_digest(d.journal.records) == decisions_digest(list(d.journal.records))
    assert decisions_digest(d.journal.records) != decisions_digest(d.journal.records[:-1])
