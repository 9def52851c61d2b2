"""The journal's codec at the speed the journal needs: the format of `engine.journal`, written and read by msgspec.

`engine.codec` defines the format and stays its reference: what is written here is read there and the other way round, which tests
hold for every event and command. Recovery reads some hundred thousand events, and the reference takes twenty times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from engine import codec
from engine.commands import Command
from engine.events import Event
from engine.journal import Record, decode_record
from engine.tasks import Micros


class _Step(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    version: int
    seq: int
    now: int
    events: list[tuple[str, msgspec.Raw]]
    commands: list[tuple[str, msgspec.Raw]]


_STEP = msgspec.json.Decoder(_Step)
_ITEMS: dict[str, msgspec.json.Decoder[Any]] = {name: msgspec.json.Decoder(kind) for name, kind in codec.TYPES.items()}


def encode_step(seq: int, now: Micros, events: Sequence[Event], commands: Sequence[Command]) -> bytes:
    """Encode a step; default values are spelled out, which costs bytes and saves time."""
    written = [(type(event).__name__, event) for event in events]
    ordered = [(type(command).__name__, command) for command in commands]
    return msgspec.json.encode((codec.VERSION, seq, now, written, ordered))


def decode_step(data: bytes) -> Record:
    """Decode a step; raises CodecError."""
    try:
        step = _STEP.decode(data)
        codec.check_version(step.version)
        events = tuple([_ITEMS[name].decode(body) for name, body in step.events])
        commands = tuple([_ITEMS[name].decode(body) for name, body in step.commands])
    except (msgspec.MsgspecError, KeyError):
        return decode_record(data)  # it knows best what to say about it
    return Record(step.seq, step.now, events, commands)
