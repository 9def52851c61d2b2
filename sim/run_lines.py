"""A file of JSON lines that finished runs are appended to, one at a time, so that an interruption loses none of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sim.configuration import ConfigError


class RunLines:
    """The lines of one file: read once, then appended to. A line that was cut off is passed over."""

    def __init__(self, path: Path, take: Callable[[dict[str, Any]], None], *, make_folder: bool = False) -> None:
        """Give `take` each line of a file that may be missing; it raises ValueError, KeyError or TypeError for what is no run.

        Raises `ConfigError` when the file cannot be read or written, or is one of something else.
        """
        torn = _read(path, take)
        try:
            if make_folder:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(
                f"store: cannot write {path}: {error.strerror}; name a file that can be written"
            ) from None
        if torn:
            os.write(self._file, b"\n")

    def add(self, line: dict[str, Any]) -> None:
        """Append one line: one write, on the disk before this returns."""
        left = memoryview(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        while left:
            left = left[os.write(self._file, left) :]
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _read(path: Path, take: Callable[[dict[str, Any]], None]) -> bool:
    """Take in what is there; True when the last line was cut off."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ConfigError(f"store: cannot read {path}: {error.strerror}; name a file, or remove it") from None
    pieces = raw.split(b"\n")
    for number, piece in enumerate(pieces, 1):
        if not piece:
            continue
        try:
            take(json.loads(piece))
        except (ValueError, KeyError, TypeError):
            if number == len(pieces) or piece.startswith(b'{"schema"'):
                continue
            raise ConfigError(
                f"store: line {number} of {path} is no finished run; name another file, this one is of something else"
            ) from None
    return bool(pieces[-1])
