"""Keeps the runs of a sweep in a file of JSON lines, so that an interrupted one goes on where it was.

A run is known by its key: the configuration, and what the files it names hold. A line also carries a fingerprint of the code, and
lines of other code are passed over: a result is used again only if running it again would give the same.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sim.configuration import ConfigError, SimulationConfig
from sim.run_lines import RunLines

SCHEMA = 1
_WHOLE = {"summary", "world", "workload_digest", "decisions_digest", "simulated_s", "wall_s"}
_CODE = {"engine": "**/*.py", "predictors": "**/*.py", "sim": "*.py"}
_NOT_OF_A_RUN = ("sim/report.py", "sim/plots.py", "sim/paired.py", "sim/run_lines.py", "sim/sweep", "sim/likeness.py")


class Store:
    """A file of finished runs; `lines` holds those of this code."""

    def __init__(self, path: Path, code: str) -> None:
        self._code = code
        self.lines: dict[str, dict[str, Any]] = {}
        self.passed_over = 0
        """Lines of other code."""
        self._file = RunLines(path, self._take, make_folder=True)

    def _take(self, line: dict[str, Any]) -> None:
        schema, code, key = line["schema"], line["code"], line["key"]
        if schema != SCHEMA or code != self._code or not line.keys() >= _WHOLE:
            self.passed_over += 1
        else:
            self.lines[key] = line

    def add(self, key: str, line: dict[str, Any]) -> None:
        """Append one finished run: one write, on the disk before this returns."""
        self.lines[key] = line
        self._file.add({"schema": SCHEMA, "code": self._code, "key": key, **line})

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def run_key(config: SimulationConfig) -> str:
    """Return a short hash of the configuration and of the contents of the files that it names."""
    held: dict[str, Any] = {"schema": SCHEMA, "config": config.to_json()}
    for field in ("trace", "profile"):
        value = getattr(config, field)
        if isinstance(value, Path) or str(value).endswith(".toml"):
            held[f"{field} holds"] = _contents(field, Path(value))
    return hashlib.blake2b(json.dumps(held, sort_keys=True, default=str).encode(), digest_size=12).hexdigest()


def _contents(field: str, path: Path) -> str:
    try:
        stat = path.stat()
        return _digest_of(path, stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        raise ConfigError(f"{field}: cannot read {path}: {error.strerror}; check the path") from None


@lru_cache(maxsize=256)
def _digest_of(path: Path, _changed_ns: int, _size: int) -> str:
    if path.is_dir():
        fold = hashlib.blake2b(digest_size=12)
        for each in sorted(path.iterdir()):
            if each.is_file():
                fold.update(each.name.encode() + hashlib.blake2b(each.read_bytes()).digest())
        return fold.hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=12)).hexdigest()


@cache
def code_fingerprint() -> str:
    """Return a short hash of the code and the profiles that decide how a run comes out."""
    fold = hashlib.blake2b(digest_size=8)
    for package, pattern in _CODE.items():
        found = find_spec(package)
        for root in (found.submodule_search_locations or ()) if found else ():
            chosen = [path for path in Path(root).glob(pattern) if path.is_file()]
            for path in sorted(chosen):
                name = f"{package}/{path.relative_to(root).as_posix()}"
                if not name.startswith(_NOT_OF_A_RUN):
                    fold.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return fold.hexdigest()
