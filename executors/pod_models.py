"""Where models lie on a node: base models in a directory, personalised ones fetched from the file store into a bounded cache."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from executors.methods.base import ModelMissing, ModelRef
from executors.residency import pages
from executors.residency.disk import DiskTier
from executors.residency.weights import check_directory

BUILTIN_MODELS = {"tiny": Path(__file__).parent / "tiny" / "model"}
"""Base models that come with the package."""
CACHE_MAX_BYTES = 20 << 30

_MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*(/[A-Za-z0-9][A-Za-z0-9._:-]*)*")


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
    """Budget of the disk tier: what is fetched never takes more, but for models that are in use and find no room."""
    disk: DiskTier = field(init=False, repr=False, compare=False)
    """The fetched models: `disk.fetch`, `disk.pin`, `disk.drop`, `disk.counts`."""

    def __post_init__(self) -> None:
        """Open the disk tier; nothing is written before something is fetched or pinned."""
        object.__setattr__(self, "disk", DiskTier(self.cache_dir, self.store_url, self.cache_max_bytes))

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

    def base_models(self) -> dict[str, Path]:
        """Return the base models that are here, by name."""
        found = dict(BUILTIN_MODELS)
        if self.models_dir is not None:
            for index in sorted(self.models_dir.rglob("model_index.json")):
                name = index.parent.relative_to(self.models_dir).as_posix()
                if _MODEL_ID.fullmatch(name):
                    found.setdefault(name, index.parent)
        return found

    def resolve(self, model: Mapping[str, Any]) -> ModelRef | None:
        """Return a Pod's model as local paths, fetching what is absent; None when it needs none.

        Takes ``{"id", "base", "adapter": {name: file_id} | None, "path": str | None}``; raises ModelMissing, also for weights that
        must not be loaded. What is fetched is held until this process ends.
        """
        if not model:
            return None
        model_id = _id(model)
        base = self._base(model)
        check_base(base)
        adapter = model.get("adapter")
        return ModelRef(model_id, base, self.fetch(model_id, adapter) if adapter else None)

    def fetch(self, model_id: str, files: Mapping[str, str]) -> Path:
        """Return a directory with a personalised model's files, fetched and checked.

        It stays until `release`, or until this process ends. Blocks while it fetches: call it where nobody else waits.
        Raises ModelMissing with the reason, NoRoom.
        """
        return self.disk.fetch(model_id, files)

    def release(self, files: Mapping[str, str]) -> None:
        """Let go once of what `fetch` returned."""
        self.disk.release(files)

    def pin(self, model_id: str) -> None:
        """Keep a personalised model on this node's disk once it is here; idempotent."""
        self.disk.pin(model_id)

    def unpin(self, model_id: str) -> None:
        """Let a model be evicted like others; idempotent."""
        self.disk.unpin(model_id)

    def prefetch(self, model: Mapping[str, Any]) -> None:
        """Bring a model to this node and its weights into memory; with ``"pin": True`` it stays. Raises ModelMissing, NoRoom."""
        if not model:
            return
        directories = [self._base(model)]
        if model.get("adapter"):
            if model.get("pin"):
                self.pin(_id(model))
            directories.append(self.disk.fetch(_id(model), model["adapter"], hold=False, ahead=True))
        for directory in directories:
            pages.bring(directory)

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

    def _base(self, model: Mapping[str, Any]) -> Path:
        if not model.get("path"):
            return self.base_dir(str(model.get("base") or _id(model)))
        base = Path(str(model["path"]))
        if not base.is_dir():
            raise ModelMissing(f"model: {_id(model)[:200]!r} should lie in {base}, which is no directory on this node")
        return base


def check_base(base: Path) -> None:
    """Refuse a base model's directory with weights that must not be loaded; reads headers only. Raises WeightsRefused.

    Links inside it may lead to files of the same directory, or of the same repository where it is a snapshot of a hub's cache.
    """
    real = base.resolve()
    hub = real.parent.name == "snapshots"
    check_directory(real, within=real.parent.parent if hub else real)


def _id(model: Mapping[str, Any]) -> str:
    return str(model.get("id") or model.get("base") or "")
