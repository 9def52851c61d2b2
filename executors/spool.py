"""The agent's spool: results that the scheduler has not acknowledged, kept on disk so that a crash of the agent loses none.

An append-only file of framed records (length, CRC-32, body). A torn or corrupt tail is what a crash leaves behind: reading stops
there. The file is written anew when nothing in it is needed any more, or when it has grown long.

Writing survives the death of the process; surviving a loss of power takes `sync`, which the agent calls for what is not
acknowledged within `SYNC_AFTER_US`. A result lost in that moment costs a repetition of its attempt, nothing else.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from engine.protocol import messages as m
from engine.protocol.agent import SpoolChange
from engine.tasks import NEVER, Micros
from executors import wire

_HEAD = struct.Struct("<IIB")
_KEEP, _FORGET = 1, 2
COMPACT_BYTES = 1 << 20
SYNC_AFTER_US = 100_000


class Spool:
    """Unacknowledged results on disk. Not for two agents at once: the agent's directory is locked by its owner."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.held: dict[m.AttemptKey, m.TerminalReport] = {}
        self.sync_at: int = NEVER
        """When `sync` is due, on the clock of `apply`."""
        self.torn_bytes = 0
        """Bytes at the end of the file that were no whole record."""
        for kind, body in self._records():
            if kind == _KEEP:
                report = wire.decode_report(body)
                if isinstance(report, m.Done | m.Failed | m.Stopped):
                    self.held[m.attempt_key(report)] = report
            elif kind == _FORGET:
                req_no, attempt, rank = msgspec.msgpack.decode(body, type=tuple[str, int, int])
                self.held.pop((req_no, attempt, rank), None)
        self._handle = -1
        self._rewrite()

    def apply(self, now: Micros, change: SpoolChange) -> None:
        """Write a change; raises OSError when the disk refuses, and then nothing of it may be relied on."""
        data = bytearray()
        for report in change.keep:
            self.held[m.attempt_key(report)] = report
            data += _frame(_KEEP, wire.encode_item(report))
        for key in change.forget:
            self.held.pop(key, None)
        if not self.held and self._size > COMPACT_BYTES:
            self._rewrite()
            return
        for key in change.forget:
            data += _frame(_FORGET, msgspec.msgpack.encode(key))
        os.write(self._handle, data)
        self._size += len(data)
        if not self.held:
            self.sync_at = NEVER
        elif change.keep:
            self.sync_at = min(self.sync_at, now + SYNC_AFTER_US)
        if self._size > COMPACT_BYTES + 512 * len(self.held):
            self._rewrite()

    def sync(self) -> None:
        """Bring what was written to the disk; raises OSError."""
        os.fdatasync(self._handle)
        self.sync_at = NEVER

    def close(self) -> None:
        """Close the file."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _records(self) -> Iterator[tuple[int, bytes]]:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return
        at = 0
        while at + _HEAD.size <= len(data):
            length, crc, kind = _HEAD.unpack_from(data, at)
            body = data[at + _HEAD.size : at + _HEAD.size + length]
            if len(body) < length or zlib.crc32(body, kind) != crc:
                break
            yield kind, body
            at += _HEAD.size + length
        self.torn_bytes = len(data) - at

    def _rewrite(self) -> None:
        """Replace the file by one that holds just what is needed."""
        scratch = self._path.with_suffix(".new")
        data = b"".join(_frame(_KEEP, wire.encode_item(report)) for report in self.held.values())
        handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        os.write(handle, data)
        os.fdatasync(handle)
        scratch.replace(self._path)
        directory = os.open(self._path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
        self.close()
        self._handle = handle
        self.sync_at = NEVER
        self._size = len(data)


def _frame(kind: int, body: bytes) -> bytes:
    return _HEAD.pack(len(body), zlib.crc32(body, kind), kind) + body
