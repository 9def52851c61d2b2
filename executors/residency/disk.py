"""The disk tier of a node: fetched models in one directory, shared by the agent and every Pod, and whole at every moment.

A model is a directory named by what it holds (the SHA-256 over its files' names and content addresses). It is fetched aside,
checked, synced and renamed, so a crash leaves whole models or none. A lock file for each makes many fetches of one model a single
one and keeps what a process uses from being evicted; the kernel gives locks back however a process ends. `ledger.json` remembers
sizes, uses and costs; it is a memory, not the truth: without it the directories are taken in as they are.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from executors.dfs import CorruptFile, ObjectFileStore, open_store, synced
from executors.methods.base import ModelMissing
from executors.residency import records
from executors.residency.holds import Holds, NoRoom
from executors.residency.records import Kept, Shelf
from executors.residency.weights import check_finite, check_name, inspect

__all__ = ["DiskTier", "NoRoom", "OnDisk", "key_of"]

RESERVE_BYTES: Final = 1 << 30
"""Disk space that a fetch leaves free for others."""
VERIFIED_BYTES: Final = 512 << 20
"""Models up to this size are held against their content addresses whenever a process takes hold of them: disks rot."""
MAX_FILES: Final = 64
"""Files of one model."""
MAX_IDS: Final = 64
"""Names under which one set of files is known."""
MAX_QUICK_USES: Final = 1_000
_PART: Final = ".part"


@dataclass(frozen=True, slots=True)
class OnDisk:
    """A model that lies in the tier."""

    model_ids: tuple[str, ...]
    size_bytes: int
    pinned: bool
    directory: Path


class DiskTier:
    """The fetched models of a node. Every process of the node may open it, and any thread may use it."""

    def __init__(self, root: Path, store_url: str, budget_bytes: int) -> None:
        self.root = root
        self._store_url = store_url
        self._budget_bytes = budget_bytes
        self._store: ObjectFileStore | None = None
        self._holds = Holds(root)

    # --- what is needed now -------------------------------------------------------------------------------------------

    def fetch(self, model_id: str, files: Mapping[str, str], *, hold: bool = True, ahead: bool = False) -> Path:
        """Return a directory that holds these files (name -> file id), checked; many calls for one model are one fetch.

        With `hold` it stays until `release`, or until this process ends. A model fetched `ahead` of need must fit the budget; one
        that is needed now is fetched all the same and goes as soon as nobody holds it. Raises ModelMissing with the reason, NoRoom.
        """
        key = key_of(files)
        if hold and self._holds.again(key):
            return self.root / key
        self.root.mkdir(parents=True, exist_ok=True)
        while not self._fetched(key, model_id, files, hold=hold, ahead=ahead):
            pass
        return self.root / key

    def release(self, files: Mapping[str, str]) -> None:
        """Let go of a model once; raises ValueError when this process does not hold it."""
        self._holds.release(key_of(files))

    # --- what should stay -----------------------------------------------------------------------------------------------

    def pin(self, model_id: str) -> None:
        """Keep a model from now on, also one that is fetched later; pinning twice is pinning once."""
        with self._session() as shelf:
            shelf.pin(model_id)

    def unpin(self, model_id: str) -> None:
        """Let a model be evicted like others."""
        with self._session() as shelf:
            shelf.unpin(model_id)

    def drop(self, model_id: str) -> int:
        """Unpin a model and remove its files; returns how many bytes that freed. What somebody holds goes when nobody does."""
        freed = 0
        with self._session() as shelf:
            shelf.unpin(model_id)
            for key in shelf.keys_of(model_id):
                freed += shelf.size_of(key) if self._holds.remove(key) else 0
                shelf.ledger.drop(key)
                shelf.forget(key)
        return freed

    def tidy(self) -> None:
        """Remove what has no place here any more and is not in use; cheap where there is nothing."""
        shelf = self._read()
        if any(path.name not in shelf.ledger for path in self._models()):
            with self._session():
                pass

    # --- what is there ----------------------------------------------------------------------------------------------------

    def on_disk(self) -> tuple[OnDisk, ...]:
        """Return the models that are here and whole, the last used one first."""
        shelf = self._read()
        keys = sorted((key for key in shelf.ledger if (self.root / key).is_dir()), key=shelf.last_use, reverse=True)
        return tuple(OnDisk(shelf.ids(key), shelf.size_of(key), shelf.is_pinned(key), self.root / key) for key in keys)

    def counts(self) -> Mapping[str, int]:
        """Return what happened in this tier since it was made, and what lies in it now, by name."""
        shelf = self._read()
        counts = shelf.ledger.counts
        return {
            "hits": counts.hits,
            "misses": counts.misses,
            "evictions": counts.evictions,
            "refusals": counts.refusals,
            "bytes_in": counts.bytes_in,
            "bytes_evicted": counts.bytes_evicted,
            "bytes": shelf.ledger.used_bytes,
            "budget_bytes": self._budget_bytes,
            "models": len(shelf.ledger),
        }

    # --- fetching ---------------------------------------------------------------------------------------------------------

    def _fetched(self, key: str, model_id: str, files: Mapping[str, str], *, hold: bool, ahead: bool) -> bool:
        """Fetch and hold; False when somebody brought or removed the model in between.

        A lock that may be shared is enough for what is here: others that use the model keep theirs for as long as they live.
        Only who fetches has the lock alone, and those who want the same model wait for that.
        """
        lock = self._holds.open(key)
        held = False
        try:
            self._holds.share(lock)
            if not self._is_here(key) and not self._holds.alone(key, lock, lambda: self._is_here(key)):
                return False
            if not self._holds.is_current(key, lock):
                return False
            if not self._use(key, model_id) or (hold and not self._is_true(key, files)):
                if not self._holds.alone(key, lock, lambda: self._is_here(key) and self._is_true(key, files)):
                    return False
                if not self._holds.is_current(key, lock):
                    return False
                if not self._is_here(key) or not self._is_true(key, files):
                    self._clear(key)
                    self._bring(key, model_id, files, ahead=ahead)
            if hold:
                self._holds.share(lock)
                if not self._holds.is_current(key, lock) or not (self.root / key).is_dir():
                    return False
                self._holds.keep(key, lock)
                held = True
        finally:
            if not held:
                lock.close()
        return True

    def _is_here(self, key: str) -> bool:
        directory = self.root / key
        return directory.is_dir() and self._read().is_whole(key, directory)

    def _is_true(self, key: str, files: Mapping[str, str]) -> bool:
        """Tell whether a model's bytes are those that its content addresses name; larger ones are believed."""
        try:
            if sum((self.root / key / name).stat().st_size for name in files) > VERIFIED_BYTES:
                return True
            return all(_digest(self.root / key / name) == file_id for name, file_id in files.items())
        except OSError:
            return False

    def _use(self, key: str, model_id: str) -> bool:
        """Note a use of what is here and whole; False when it is to be fetched. The key's lock is held."""
        with self._session() as shelf:
            if not (self.root / key).is_dir() or not shelf.is_whole(key, self.root / key):
                shelf.ledger.use("")  # A miss.
                return False
            shelf.ledger.use(key)
            shelf.name(key, model_id, MAX_IDS)
        os.utime(self.root / key)
        return True

    def _clear(self, key: str) -> None:
        """Remove what is not whole. The key's lock is held alone."""
        with self._session() as shelf:
            shelf.ledger.drop(key)
            shelf.forget(key)
            shutil.rmtree(self.root / key, ignore_errors=True)

    def _bring(self, key: str, model_id: str, files: Mapping[str, str], *, ahead: bool) -> None:
        """Fetch what is absent. The key's lock is held, so this happens once; the room is taken before the first byte comes."""
        sizes = self._sizes(files)
        total = sum(sizes.values())
        with self._session() as shelf:
            kept = self._make_room(shelf, key, total)
            if kept:
                shelf.add(key, Kept((model_id,), tuple(sorted(sizes.items()))))
        if ahead and not kept:
            raise NoRoom(
                f"model {model_id[:200]!r}: its {total} bytes find no room in the {self._budget_bytes} of {self.root} among "
                "what is pinned or in use; unpin models or raise the budget"
            )
        began = time.monotonic()
        try:
            self._check_free(model_id, total)
            self._download(key, files)
        except BaseException:
            with self._session() as shelf:
                shelf.ledger.drop(key)
                shelf.forget(key)
            raise
        if kept:
            with self._session() as shelf:
                shelf.ledger.learn(key, round((time.monotonic() - began) * 1e6))

    def _sizes(self, files: Mapping[str, str]) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for name, file_id in files.items():
            try:
                found = self._open_store().stat(file_id)
            except ValueError as error:
                raise ModelMissing(f"model.adapter: {error}") from error
            if found is None:
                raise ModelMissing(
                    f"model.adapter: {name!r} is not in the file store (file {file_id[:80]}); train or upload the model again"
                )
            sizes[name] = found.size_bytes
        return sizes

    def _check_free(self, model_id: str, size_bytes: int) -> None:
        free = shutil.disk_usage(self.root).free
        if free < size_bytes + RESERVE_BYTES:
            raise NoRoom(
                f"model {model_id[:200]!r}: its {size_bytes} bytes do not fit the disk of {self.root}, where {free} are free and "
                f"{RESERVE_BYTES} stay so; free some space"
            )

    def _download(self, key: str, files: Mapping[str, str]) -> None:
        for left in self.root.glob(f".{key}.*{_PART}"):
            shutil.rmtree(left, ignore_errors=True)  # By a process that was killed; nobody else fetches this model now.
        partial = self.root / f".{key}.{secrets.token_hex(4)}{_PART}"
        partial.mkdir()
        try:
            for name, file_id in sorted(files.items()):
                path = self._open_store().fetch(file_id, partial / name)
                if path.suffix.lower() == ".safetensors":
                    check_finite(inspect(path))
                synced(path)
            synced(partial)
            partial.rename(self.root / key)
            synced(self.root)
        except FileNotFoundError as error:
            raise ModelMissing(
                f"model.adapter: a file is not in the file store ({error}); train or upload the model again"
            ) from error
        except CorruptFile as error:
            raise ModelMissing(f"model.adapter: {error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _open_store(self) -> ObjectFileStore:
        if self._store is None:
            self._store = open_store(self._store_url)
        return self._store

    # --- room -------------------------------------------------------------------------------------------------------------

    def _make_room(self, shelf: Shelf, key: str, size_bytes: int) -> bool:
        """Evict until there is room, and take it; False when all the rest is pinned or in use."""
        while True:
            going = shelf.ledger.plan(size_bytes)
            if going is None:
                break
            busy = [each for each in going if not self._holds.is_free(each)]
            if not busy:
                busy = [each for each in going if not self._evict(shelf, each)]
            if not busy:
                break
            for each in busy:
                shelf.ledger.hold(each)
        return shelf.ledger.admit(key, size_bytes) is not None

    def _evict(self, shelf: Shelf, key: str) -> bool:
        if not self._holds.remove(key):
            return False
        shelf.ledger.evict(key)
        shelf.forget(key)
        return True

    # --- the ledger on disk -------------------------------------------------------------------------------------------------

    @contextmanager
    def _session(self) -> Iterator[Shelf]:
        """Read the ledger, let it be changed by one process at a time, and write it."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "ledger.lock").open("ab") as one_at_a_time:
            fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
            shelf = self._read()
            self._sweep(shelf)
            for key, times in self._holds.take_quick_uses().items():
                for _ in range(min(times, MAX_QUICK_USES)):
                    shelf.ledger.use(key)
            yield shelf
            scratch = self.root / "ledger.new"
            scratch.write_text(json.dumps(shelf.to_json(), separators=(",", ":")), encoding="utf-8")
            scratch.replace(self.root / "ledger.json")

    def _read(self) -> Shelf:
        try:
            fields: Any = json.loads((self.root / "ledger.json").read_text(encoding="utf-8"))
            return Shelf.from_json(fields, self._budget_bytes)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return records.adopted(self._models(), self._budget_bytes)

    def _models(self) -> list[Path]:
        if not self.root.is_dir():
            return []
        return [path for path in self.root.iterdir() if path.is_dir() and not path.name.startswith(".")]

    def _sweep(self, shelf: Shelf) -> None:
        """Make the ledger and the directory agree: what a crash left on one side only goes, unless somebody is at work on it."""
        present = {path.name for path in self._models()}
        for key in [key for key in shelf.ledger if key not in present]:
            if self._holds.remove(key):
                shelf.ledger.drop(key)
                shelf.forget(key)
        for key in present:
            if key not in shelf.ledger:
                self._holds.remove(key)
        for key in shelf.ledger.overflow():  # The budget was lowered.
            self._evict(shelf, key)


def key_of(files: Mapping[str, str]) -> str:
    """Return the name of a set of files (name -> file id) on a node's disk; raises ModelMissing when a name is none."""
    if not 1 <= len(files) <= MAX_FILES:
        raise ModelMissing(f"model.adapter: {len(files)} files; a model has from 1 to {MAX_FILES}")
    for name in files:
        check_name(name, "model.adapter")
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
