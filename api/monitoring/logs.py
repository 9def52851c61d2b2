"""Structured JSON logs of every module, and a ring of the latest lines that can be followed live.

A line always carries `timestamp`, `level`, `module` and `event`, and `reqNo` where one request is spoken of. Values under names
that look like credentials never leave the process.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import structlog

LEVELS = ("debug", "info", "warning", "error", "critical")
_SECRET_NAMES = ("authorization", "api_key", "apikey", "secret", "password", "token", "signature", "cookie")


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of the ring; numbers rise by one."""

    number: int
    fields: Mapping[str, Any]


class LogRing:
    """The latest log lines of this process (and of files it follows); threads write, event loops read."""

    def __init__(self, size: int = 5000) -> None:
        if size < 1:
            raise ValueError("size: must be at least 1")
        self._lines: deque[LogLine] = deque(maxlen=size)
        self._lock = threading.Lock()
        self._number = 0

    def add(self, fields: Mapping[str, Any]) -> None:
        """Add a line."""
        with self._lock:
            self._number += 1
            self._lines.append(LogLine(self._number, dict(fields)))

    def after(self, number: int) -> list[LogLine]:
        """Return the lines after a number that are still kept."""
        with self._lock:
            if not self._lines or self._number <= number:
                return []
            skip = max(0, number - self._lines[0].number + 1)
            return list(self._lines)[skip:]

    async def follow(self, after: int, poll_s: float = 0.2) -> AsyncIterator[LogLine]:
        """Yield lines for ever, from those after a number on."""
        while True:
            for line in self.after(after):
                after = line.number
                yield line
            await asyncio.sleep(poll_s)


def redact(_logger: Any, _name: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Hide values whose names look like credentials (a structlog processor)."""
    for name in fields:
        if any(secret in name.lower() for secret in _SECRET_NAMES):
            fields[name] = "[hidden]"
    return fields


def configure_logging(
    module: str,
    *,
    level: str = "info",
    stream: TextIO | None = None,
    ring: LogRing | None = None,
    standard_library: bool = True,
) -> None:
    """Let structlog and the standard library's loggers write JSON lines to a stream (stderr) and into a ring."""
    if level not in LEVELS:
        raise ValueError(f"level: must be one of {', '.join(LEVELS)}")

    def name_module(_logger: Any, _name: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        fields.setdefault("module", module)
        return fields

    def keep(_logger: Any, _name: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        if ring is not None:
            ring.add({name: _plain(value) for name, value in fields.items()})
        return fields

    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        name_module,
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        redact,
        keep,
    ]
    render = structlog.processors.JSONRenderer(default=str)
    number = getattr(logging, level.upper())
    structlog.configure(
        processors=[*shared, render],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=stream or sys.stderr),
        cache_logger_on_first_use=False,
    )
    if not standard_library:
        return
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)
    for noisy in ("uvicorn.access", "httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class FileTail:
    """Reads the JSON lines that other processes append to log files into a ring.

    It starts at the end of files that were there before, and follows a file that was replaced. The file that this process writes
    its own lines to is left out, for those are in the ring already.
    """

    def __init__(self, directory: Path, ring: LogRing, pattern: str = "*.log", max_line_bytes: int = 65_536) -> None:
        self._directory = directory
        self._ring = ring
        self._pattern = pattern
        self._max_line_bytes = max_line_bytes
        self._places: dict[Path, tuple[int, int]] = {
            path: (path.stat().st_ino, path.stat().st_size) for path in directory.glob(pattern)
        }

    def poll(self) -> int:
        """Read what was appended since the last call; returns the number of lines."""
        count = 0
        for path in sorted(self._directory.glob(self._pattern)):
            try:
                count += self._read(path)
            except OSError:
                continue
        return count

    def _read(self, path: Path) -> int:
        status = path.stat()
        if status.st_ino == _own_inode():
            return 0
        inode, place = self._places.get(path, (status.st_ino, 0))
        if inode != status.st_ino or status.st_size < place:
            inode, place = status.st_ino, 0
        with path.open("rb") as file:
            file.seek(place)
            block = file.read(1 << 20)
        whole = block.rfind(b"\n") + 1
        if not whole and len(block) >= self._max_line_bytes:
            whole = len(block)
        lines = block[:whole].splitlines()
        for line in lines:
            self._ring.add(_parsed(line, path.stem))
        self._places[path] = (inode, place + whole)
        return len(lines)


def _own_inode() -> int:
    try:
        return os.fstat(2).st_ino
    except OSError:
        return -1


def _parsed(line: bytes, module: str) -> dict[str, Any]:
    text = line.decode(errors="replace")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        return {"module": module, "level": "info", "event": text[:2000]}
    return {"module": module, **redact(None, "", fields)}


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None), list, dict)) else str(value)
