"""What a journal holds: one record per step. Making it durable is an adapter's work, outside the engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from engine import codec
from engine.commands import Command
from engine.events import Event
from engine.tasks import Micros


@dataclass(frozen=True, slots=True)
class Record:
    """One step: when, what had happened, what was ordered. `seq` counts from 1 without gaps."""

    seq: int
    now: Micros
    events: tuple[Event, ...]
    commands: tuple[Command, ...]


def encode_record(record: Record) -> bytes:
    """Encode a record under the codec's version."""
    events = [codec.tagged(each) for each in record.events]
    commands = [codec.tagged(each) for each in record.commands]
    return codec.dumps([codec.VERSION, record.seq, record.now, events, commands])


def decode_record(data: bytes) -> Record:
    """Decode a record; raises CodecError."""
    plain = codec.loads(data)
    if not isinstance(plain, list) or not plain:
        raise codec.CodecError("the record is no list")
    codec.check_version(plain[0])
    if len(plain) != 5 or type(plain[1]) is not int or type(plain[2]) is not int:
        raise codec.CodecError("the record is no list of version, seq, now, events and commands")
    if not isinstance(plain[3], list) or not isinstance(plain[4], list):
        raise codec.CodecError("the record's events or commands are no list")
    events: list[Any] = [codec.untagged(each) for each in plain[3]]
    commands: list[Any] = [codec.untagged(each) for each in plain[4]]
    return Record(plain[1], plain[2], tuple(events), tuple(commands))


class MemoryJournal:
    """A journal in memory: for simulation, replay and tests. Implements `ports.Journal`.

    Steps without events and commands are left out; they change nothing but the time.
    """

    def __init__(self, first_seq: int = 1) -> None:
        self.records: list[Record] = []
        self._next_seq = first_seq

    def __call__(self, now: Micros, events: Sequence[Event], commands: Sequence[Command]) -> None:
        """Keep one step."""
        if events or commands:
            self.records.append(Record(self._next_seq, now, tuple(events), tuple(commands)))
            self._next_seq += 1


def decisions_digest(records: Iterable[Record]) -> str:
    """Return a SHA-256 over all orders and their times: equal digests, equal decisions."""
    hasher = sha256()
    for record in records:
        if record.commands:
            hasher.update(codec.dumps([record.now, [codec.tagged(each) for each in record.commands]]))
    return hasher.hexdigest()
