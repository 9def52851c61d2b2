"""The durable journal: what it promises about order, damage, fencing and failing storage."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import get_args

import pytest

from api.sm.journal import JournalBroken, JournalCorrupt, JournalFenced, SqliteJournal, read_journal
from api.sm.journal_codec import decode_step, encode_step
from engine import snapshot
from engine.commands import Command, CreatePod, Notify, StartTask
from engine.events import Event, NodeJoined, PodStarted, TaskFinished, TaskSubmitted
from engine.journal import MemoryJournal, Record, decode_record, encode_record
from engine.profile import Profile
from engine.replay import recover, refold
from engine.resources import Demand, GpuGrant, GpuSpec, NodeSpec
from engine.scheduler import Engine
from engine.tasks import NEVER, Estimate, FailureCause, Quantiles, TaskSpec, TaskState, TaskType

SPEC = TaskSpec(
    "r1",
    "acme",
    "g",
    TaskType.GC,
    "sleep",
    demand=Demand(gpus=2),
    features=(("steps", 20), ("x", 1.5)),
    start_deadline=NEVER,
)
EVENTS: tuple[Event, ...] = (
    NodeJoined(NodeSpec("n1", (GpuSpec("u1", "cpu", 1 << 30),), extra=(("slots", 3),)), pods=(4,)),
    TaskSubmitted(SPEC, Estimate((("*", Quantiles(1, 2, 3, 4)),))),
    PodStarted(7),
    TaskFinished("r1", 1, result='{"files":[]} "ü\\"'),
)
COMMANDS: tuple[Command, ...] = (
    CreatePod(7, "n1", "sleep", "", (GpuGrant("u1", 1000, 5),), Demand()),
    StartTask("r1", 1, 7, "n1"),
    Notify("r1", TaskState.FINISHED, 1, result="x", at=5),
)


def test_steps_come_back_as_they_were_written(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "journal.db")
    journal(10, EVENTS, COMMANDS)
    journal(11, (), ())
    journal(12, EVENTS[:1], ())
    assert journal.load() == (None, [Record(1, 10, EVENTS, COMMANDS), Record(2, 12, EVENTS[:1], ())])
    journal.close()
    assert read_journal(tmp_path / "journal.db")[1][1].now == 12


def test_the_fast_writer_and_the_codec_agree() -> None:
    record = Record(3, 99, EVENTS, COMMANDS)
    fast, reference = encode_step(3, 99, EVENTS, COMMANDS), encode_record(record)
    assert decode_record(fast) == decode_record(reference) == decode_step(fast) == decode_step(reference) == record


SAMPLES = {
    "str": "é",
    "int": 3,
    "FleetConfigured.gpus": 8,
    "Micros": 4,
    "tuple[Micros, ...]": (1, 2),
    "tuple[int, ...]": (500, 900),
    "tuple[tuple[Micros, ...], ...]": ((1, 2), (3, 4)),
    "cause": FailureCause.CRASHED,
    "demand": Demand(gpus=3),
    "estimate": Estimate((("*", Quantiles(1, 2, 3, 4)),), 5, 6),
    "gpus": (GpuSpec("u1", "a100", 80),),
}


def needed(f: Field[object]) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


@pytest.mark.parametrize("kind", [*get_args(Event), *get_args(Command)], ids=lambda kind: kind.__name__)
def test_every_event_and_command_survives_the_fast_writer(kind: type) -> None:
    known = {type(item).__name__: item for item in (*EVENTS, *COMMANDS)}
    item = known.get(kind.__name__) or kind(
        **{
            f.name: SAMPLES[next(n for n in (f"{kind.__name__}.{f.name}", f.name, str(f.type)) if n in SAMPLES)]
            for f in fields(kind)
            if needed(f)
        }
    )
    events, commands = ((item,), ()) if kind in get_args(Event) else ((), (item,))
    fast, record = encode_step(1, 1, events, commands), Record(1, 1, events, commands)
    assert decode_record(fast) == decode_step(fast) == decode_step(encode_record(record)) == record


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"{", "no JSON"),
        (b"[2,1,1,[],[]]", "version 2"),
        (b'[1,1,1,[["Nonsense",{}]],[]]', "Nonsense"),
        (b'[1,1,1,[["PodStarted",{}]],[]]', "pod"),
        (b'[1,1,1,[["PodStarted",{"pod":"x"}]],[]]', "pod"),
    ],
)
def test_what_is_no_step_is_refused_with_the_place(data: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        decode_step(data)


def test_each_opening_takes_the_lead_and_fences_the_one_before(tmp_path: Path) -> None:
    old = SqliteJournal(tmp_path / "journal.db")
    old(1, EVENTS[:1], ())
    new = SqliteJournal(tmp_path / "journal.db")
    assert new.epoch == old.epoch + 1
    with pytest.raises(JournalFenced, match="another scheduler leads"):
        old(2, EVENTS[:1], ())
    new(2, EVENTS[:1], ())
    assert [record.seq for record in new.load()[1]] == [1, 2]


def test_what_a_step_derives_is_in_the_same_transaction(tmp_path: Path) -> None:
    published: list[int] = []

    def within(db: sqlite3.Connection, now: int, events: object, commands: object) -> None:
        db.execute("CREATE TABLE IF NOT EXISTS derived(at INTEGER)")
        db.execute("INSERT INTO derived VALUES(?)", (now,))
        if now == 2:
            raise KeyError("a bug")

    journal = SqliteJournal(tmp_path / "journal.db", within=within, published=lambda: published.append(journal.seq))
    journal(1, EVENTS[:1], ())
    with pytest.raises(KeyError):
        journal(2, EVENTS[:1], ())
    assert published == [1]
    assert len(journal.load()[1]) == 1
    with journal.transaction() as db:
        assert db.execute("SELECT at FROM derived").fetchall() == [(1,)]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("UPDATE event SET body = x'5b315d' WHERE seq = 2", "record 2: its checksum"),
        ("UPDATE event SET at = at, epoch = 7 WHERE seq = 3", "record 3: its checksum"),
        ("DELETE FROM event WHERE seq = 2", "record 2: it is missing"),
        ("DELETE FROM event WHERE seq = 3", "record 3: it is missing"),
    ],
)
def test_a_damaged_record_is_named_with_the_remedy(tmp_path: Path, damage: str, says: str) -> None:
    journal = SqliteJournal(tmp_path / "journal.db")
    for now in (1, 2, 3):
        journal(now, EVENTS[:1], ())
    journal.close()
    with sqlite3.connect(tmp_path / "journal.db") as db:
        db.execute(damage)
    with pytest.raises(JournalCorrupt, match=says) as caught:
        read_journal(tmp_path / "journal.db")
    assert "backup" in str(caught.value)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal.db").write_bytes(b"this is no database at all" * 100)
    with pytest.raises(JournalCorrupt, match="backup"):
        SqliteJournal(tmp_path / "journal.db")
    with pytest.raises(FileNotFoundError, match=r"none\.db"):
        read_journal(tmp_path / "none.db")


def test_a_full_disk_is_final(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "journal.db")
    journal(1, EVENTS, COMMANDS)
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(JournalBroken, match="full"):
        for now in range(2, 1000):
            journal(now, EVENTS, COMMANDS)
    written = journal.seq
    journal._db.execute("PRAGMA max_page_count = 1000000")
    with pytest.raises(JournalBroken, match="before"):
        journal(2000, EVENTS, COMMANDS)
    assert len(read_journal(tmp_path / "journal.db")[1]) == written


def run_engine(journal: SqliteJournal, steps: range, engine: Engine | None = None, snapshots: int = 0) -> Engine:
    engine = engine or Engine(Profile())
    for n in steps:
        events: tuple[Event, ...] = (TaskSubmitted(TaskSpec(f"t{n}", "acme", "", TaskType.GC, "sleep")),)
        if n == 0:
            events = (NodeJoined(NodeSpec("n1", (GpuSpec("u1", "cpu", 1 << 30),))), *events)
        journal(n, events, engine.step(n, events))
        if snapshots and n % snapshots == snapshots - 1:
            journal.write_snapshot(snapshot.take(engine.state))
    return engine


def test_recovery_from_snapshot_and_records_is_the_live_state(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "journal.db")
    engine = run_engine(journal, range(25), snapshots=10)
    body, records = journal.load()
    assert body is not None
    assert [record.seq for record in records] == [21, 22, 23, 24, 25]
    assert recover(body, records).state.digest() == engine.state.digest()
    whole = read_journal(tmp_path / "journal.db", from_start=True)
    assert refold(*whole).digest() == engine.state.digest()


def test_a_damaged_snapshot_falls_back_to_the_one_before(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "journal.db")
    engine = run_engine(journal, range(25), snapshots=10)
    journal._db.execute("UPDATE snapshot SET body = x'00' WHERE seq = 20")
    body, records = journal.load()
    assert body is not None
    assert len(records) == 15
    assert recover(body, records).state.digest() == engine.state.digest()


def test_old_records_go_beyond_the_retention_and_never_those_a_snapshot_needs(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "journal.db", retain_records=3)
    engine = run_engine(journal, range(35), snapshots=10)
    first = journal._db.execute("SELECT min(seq) FROM event").fetchone()[0]
    assert first == 21, "the older of the two snapshots needs the records after it"
    assert recover(*journal.load()).state.digest() == engine.state.digest()
    body, records = read_journal(tmp_path / "journal.db", from_start=True)
    assert (body is not None, records[0].seq) == (True, 21), "from the oldest snapshot there is"
    assert refold(body, records).digest() == engine.state.digest()


def test_a_killed_process_loses_no_recorded_step(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    code = (
        "import os, sys\nfrom api.sm.journal import SqliteJournal\nfrom engine.events import PodStarted\n"
        f"journal = SqliteJournal({str(path)!r})\n"
        "for n in range(1, 10**6):\n    journal(n, (PodStarted(n),), ())\n    print(n, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = 0
    for line in process.stdout:
        last = int(line)
        if last == 30:
            process.kill()
            break
    last = int((process.communicate(timeout=30)[0].split() or [last])[-1])
    journal = SqliteJournal(path)
    numbers = [record.now for record in journal.load()[1]]
    assert numbers[:last] == list(range(1, last + 1))
    assert len(numbers) in (last, last + 1)


def test_records_in_memory_and_on_disk_are_equal(tmp_path: Path) -> None:
    journal, memory = SqliteJournal(tmp_path / "journal.db"), MemoryJournal()
    for now in (1, 2):
        journal(now, EVENTS, COMMANDS)
        memory(now, EVENTS, COMMANDS)
    assert journal.load()[1] == memory.records
