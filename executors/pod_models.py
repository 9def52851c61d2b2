"""Where models lie on a node: base models in a directory, personalised ones fetched from the file store into a bounded cache."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from executors.dfs import ObjectFileStore, open_store
from executors.methods.base import ModelMissing, ModelRef

BUILTIN_MODELS = {"tiny": Path(__file__).parent / "tiny" / "model"}
"""Base models that come with the package."""
CACHE_MAX_BYTES = 20 << 30

_MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*(/[A-Za-z0-9][A-Za-z0-9._:-]*)*")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_LOCKS_HELD: list[IO[bytes]] = []
"""Locks of the models in use by this process, kept until it ends: the cache evicts nothing that a Pod holds."""


class BaseModelMissing(ModelMissing, FileNotFoundError):
    """No base model of this name is on the node."""


@dataclass(frozen=True, slots=True)
class ModelCache:
    """The models of a node. Every process of the node may open it; a Pod resolves its own model, so that the agent never waits."""

    cache_dir: Path
    store_url: str
    models_dir: Path | None = None
    """Each directory below it with a `model_index.json` is a base model, named by its path (`sd15`, `org/name`)."""
    cache_max_bytes: int = CACHE_MAX_BYTES
    """Size that fetched models are brought down to, least recently used first; models in use stay."""

    def base_dir(self, model_id: str) -> Path:
        """Return a base model's directory; raises BaseModelMissing, which is a FileNotFoundError too."""
        if model_id in BUILTIN_MODELS:
            found = BUILTIN_MODELS[model_id]
        elif self.models_dir is not None and _MODEL_ID.fullmatch(model_id):
            found = self.models_dir / model_id
        else:
            found = None
        if found is None or not (found / "model_index.json").is_file():
            where = (
                f"{self.models_dir}/{model_id[:200]}"
                if self.models_dir
                else "nowhere: this node has no models directory"
            )
            raise BaseModelMissing(
                f"model: base {model_id[:200]!r} is not on this node (looked in {where}); put its pipeline there"
            )
        return found

    def resolve(self, model: Mapping[str, Any]) -> ModelRef | None:
        """Return a Pod's model as local paths, fetching what is absent; None when it needs none.

        Takes ``{"id", "base", "adapter": {name: file_id} | None, "path": str | None}``; raises ModelMissing.
        """
        if not model:
            return None
        model_id = str(model.get("id") or model.get("base") or "")
        if model.get("path"):
            base = Path(str(model["path"]))
            if not base.is_dir():
                raise ModelMissing(
                    f"model: {model_id[:200]!r} should lie in {base}, which is no directory on this node"
                )
        else:
            base = self.base_dir(str(model.get("base") or model_id))
        adapter = model.get("adapter")
        return ModelRef(model_id, base, self._adapter_dir(adapter, hold=True) if adapter else None)

    def prefetch(self, model: Mapping[str, Any]) -> None:
        """Bring a model to this node and its weights into the page cache; raises ModelMissing."""
        if not model:
            return
        base = (
            Path(str(model["path"])) if model.get("path") else self.base_dir(str(model.get("base") or model.get("id")))
        )
        directories = [base]
        if model.get("adapter"):
            directories.append(self._adapter_dir(model["adapter"], hold=False))
        for directory in directories:
            for path in directory.rglob("*.safetensors"):
                with path.open("rb") as weights:
                    os.posix_fadvise(weights.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def to_json(self) -> dict[str, Any]:
        """Return what another process needs to open the same cache."""
        return {
            "cache_dir": str(self.cache_dir),
            "store_url": self.store_url,
            "models_dir": str(self.models_dir) if self.models_dir else None,
            "cache_max_bytes": self.cache_max_bytes,
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ModelCache:
        """Open the cache that `to_json` described."""
        models_dir = Path(fields["models_dir"]) if fields["models_dir"] else None
        return cls(Path(fields["cache_dir"]), fields["store_url"], models_dir, fields["cache_max_bytes"])

    def _adapter_dir(self, files: Mapping[str, str], *, hold: bool) -> Path:
        """Return the directory that holds these files, fetched and checked; the same files are fetched once per node."""
        for name in files:
            if not _FILE_NAME.fullmatch(name):
                raise ModelMissing(f"model.adapter: {name[:80]!r} is no plain file name")
        key = hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        target = self.cache_dir / key
        lock = (self.cache_dir / f"{key}.lock").open("ab")
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            if target.is_dir():
                os.utime(target)
            else:
                self._fetch(files, target)
                self._evict(keep=key)
            if hold:
                fcntl.flock(lock, fcntl.LOCK_SH)
                _LOCKS_HELD.append(lock)
        finally:
            if not hold or lock not in _LOCKS_HELD:
                lock.close()
        return target

    def _fetch(self, files: Mapping[str, str], target: Path) -> None:
        store: ObjectFileStore = open_store(self.store_url)
        for left in self.cache_dir.glob(f".{target.name}.*.part"):
            shutil.rmtree(left, ignore_errors=True)  # By a Pod that was killed; nobody else fetches this model now.
        partial = self.cache_dir / f".{target.name}.{secrets.token_hex(4)}.part"
        try:
            partial.mkdir()
            for name, file_id in sorted(files.items()):
                store.fetch(file_id, partial / name)
            partial.rename(target)
        except FileNotFoundError as error:
            raise ModelMissing(
                f"model.adapter: a file is not in the file store ({error}); train or upload the model again"
            ) from error
        except ValueError as error:
            raise ModelMissing(f"model.adapter: {error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _evict(self, keep: str) -> None:
        with (self.cache_dir / "evict.lock").open("ab") as one_at_a_time:
            fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
            models = [path for path in self.cache_dir.iterdir() if path.is_dir() and not path.name.startswith(".")]
            sizes = {path: _size_bytes(path) for path in sorted(models, key=lambda path: path.stat().st_mtime_ns)}
            total = sum(sizes.values())
            for path, size in sizes.items():
                if total <= self.cache_max_bytes:
                    return
                if path.name != keep and self._remove_unused(path):
                    total -= size

    def _remove_unused(self, path: Path) -> bool:
        with (self.cache_dir / f"{path.name}.lock").open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            shutil.rmtree(path, ignore_errors=True)
            return True


def _size_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
