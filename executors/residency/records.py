"""What a tier on disk remembers beside its ledger: which models an entry is known as, of which files it is made, what is pinned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from executors.residency.ledger import Counts, Entry, TierLedger

FORMAT: Final = 1
MAX_PINS: Final = 4_096


@dataclass(frozen=True, slots=True)
class Kept:
    """An entry's models and files. No sizes: it was taken in as it lay there."""

    model_ids: tuple[str, ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()


@dataclass(slots=True)
class Shelf:
    """A ledger of directories by key, with names; pins are by model id, so that they hold for files that are yet to come."""

    ledger: TierLedger
    kept: dict[str, Kept] = field(default_factory=dict)
    pinned_ids: dict[str, None] = field(default_factory=dict)

    def ids(self, key: str) -> tuple[str, ...]:
        """Return the models that an entry is known as."""
        return self.kept.get(key, Kept()).model_ids

    def keys_of(self, model_id: str) -> list[str]:
        """Return the entries that are known as a model."""
        return [key for key, kept in self.kept.items() if model_id in kept.model_ids]

    def size_of(self, key: str) -> int:
        """Return an entry's size, 0 when it is absent."""
        entry = self.ledger.entry(key)
        return entry.size_bytes if entry is not None else 0

    def last_use(self, key: str) -> int:
        """Return when an entry was used, in calls of the ledger."""
        entry = self.ledger.entry(key)
        return entry.last_use if entry is not None else 0

    def is_pinned(self, key: str) -> bool:
        """Tell whether an entry stays."""
        return any(each in self.pinned_ids for each in self.ids(key))

    def is_whole(self, key: str, directory: Path) -> bool:
        """Tell whether an entry's files have the sizes that they had when they were fetched; what is not noted counts as whole."""
        sizes = self.kept.get(key, Kept()).sizes
        return all(_size(directory / name) == size for name, size in sizes)

    def add(self, key: str, kept: Kept) -> None:
        """Note what an entry is; a model has the files that it was fetched with last."""
        for model_id in kept.model_ids:
            for other in self.keys_of(model_id):
                names = tuple(each for each in self.kept[other].model_ids if each != model_id)
                self.kept[other] = replace(self.kept[other], model_ids=names)
        self.kept[key] = kept
        self._pin_keys()

    def name(self, key: str, model_id: str, most: int) -> None:
        """Note one more model of an entry, the last of at most so many."""
        known = self.kept.get(key, Kept())
        if model_id not in known.model_ids:
            self.add(key, replace(known, model_ids=(*known.model_ids, model_id)[-most:]))

    def forget(self, key: str) -> None:
        """Forget what an entry was."""
        self.kept.pop(key, None)
        self.ledger.unpin(key)

    def pin(self, model_id: str) -> None:
        """Keep a model; raises ValueError when too many are pinned."""
        if model_id not in self.pinned_ids and len(self.pinned_ids) >= MAX_PINS:
            raise ValueError(f"model {model_id[:200]!r}: {MAX_PINS} models are pinned already; unpin some")
        self.pinned_ids[model_id] = None
        self._pin_keys()

    def unpin(self, model_id: str) -> None:
        """Let a model go like others."""
        self.pinned_ids.pop(model_id, None)
        self._pin_keys()

    def _pin_keys(self) -> None:
        for key in self.kept:
            if self.is_pinned(key):
                self.ledger.pin(key)
            else:
                self.ledger.unpin(key)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "format": FORMAT,
            "age": self.ledger.age,
            "calls": self.ledger.calls,
            "counts": asdict(self.ledger.counts),
            "pins": list(self.pinned_ids),
            "entries": {
                key: {**asdict(entry), "ids": list(self.ids(key)), "sizes": dict(self.kept.get(key, Kept()).sizes)}
                for key in self.ledger
                if (entry := self.ledger.entry(key)) is not None
            },
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], budget_bytes: int) -> Shelf:
        """Read what `to_json` wrote; raises KeyError, TypeError or ValueError when it is something else."""
        if fields["format"] != FORMAT:
            raise ValueError(f"format {fields['format']!r} is unknown, this version reads {FORMAT}")
        shelf = cls(TierLedger(budget_bytes))
        names = ("size_bytes", "cost_us", "uses", "worth", "last_use")
        for key, entry in fields["entries"].items():
            shelf.ledger.restore(str(key), Entry(*(int(entry[name]) for name in names)))
            sizes = tuple(sorted((str(name), int(size)) for name, size in entry["sizes"].items()))
            shelf.kept[str(key)] = Kept(tuple(str(each) for each in entry["ids"]), sizes)
        shelf.ledger.age = int(fields["age"])
        shelf.ledger.calls = int(fields["calls"])
        shelf.ledger.counts = Counts(**{name: int(value) for name, value in fields["counts"].items()})
        shelf.pinned_ids = dict.fromkeys(str(each) for each in fields["pins"])
        shelf._pin_keys()
        return shelf


def adopted(directories: Iterable[Path], budget_bytes: int) -> Shelf:
    """Return a shelf of models that lie there but that no ledger knows, as if each was used once, in the order of their times."""
    shelf = Shelf(TierLedger(budget_bytes))
    for number, path in enumerate(sorted(directories, key=lambda each: each.stat().st_mtime_ns), start=1):
        size = sum(found for each in path.rglob("*") if (found := _size(each)) is not None)
        shelf.ledger.restore(path.name, Entry(size, last_use=number))
        shelf.kept[path.name] = Kept()
    return shelf


def _size(path: Path) -> int | None:
    """Return a regular file's size; None for anything else."""
    if path.is_symlink() or not path.is_file():
        return None
    return path.stat().st_size
