"""What a Pod is told about an attempt beside its parameters: the adapters it draws with, resolved, and how urgent it is.

The support service writes them, the protocol carries them unread, the Pod reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from engine.tasks import URGENT_PRIORITY

MAX_WEIGHT = 4.0
"""Largest weight of an adapter, up or down."""


class TermsWrong(ValueError):
    """Terms that this version cannot read; names the field."""


@dataclass(frozen=True, slots=True)
class AdapterTerms:
    """A personalised model (LoRA) that an attempt adds to the Pod's model."""

    model: str
    """Its id, by which requests and results name it."""
    files: Mapping[str, str]
    """Its files' names and their ids in the file store."""
    weight: float = 1.0
    base: str = ""
    """The model it was trained on."""
    pinned: bool = False
    """It is deployed: it stays in the Pod where others would go."""


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms of an attempt; the defaults are those of a plain one."""

    adapters: tuple[AdapterTerms, ...] = ()
    priority: int = 0
    model: str = ""
    """The model that the customer asked for, where the Pod holds another one (its base)."""

    @property
    def urgent(self) -> bool:
        """Tell whether it may set ordinary ones aside."""
        return self.priority >= URGENT_PRIORITY

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads; empty for plain terms."""
        return {} if self == _PLAIN else asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any] | None) -> Terms:
        """Read terms, unknown fields aside: a newer scheduler can talk to an older node; raises TermsWrong."""
        if not fields:
            return _PLAIN
        adapters = fields.get("adapters") or ()
        if not isinstance(adapters, list | tuple):
            raise TermsWrong("terms.adapters: give a list of adapters")
        priority, model = fields.get("priority", 0), fields.get("model", "")
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise TermsWrong(f"terms.priority: {priority!r} is no whole number")
        return cls(tuple(_adapter(each) for each in adapters), priority, str(model))


_PLAIN = Terms()


def _adapter(fields: Any) -> AdapterTerms:
    if not isinstance(fields, Mapping) or not isinstance(fields.get("model"), str) or not fields["model"]:
        raise TermsWrong("terms.adapters: each needs a model id and files")
    files, weight = fields.get("files"), fields.get("weight", 1.0)
    where = f"terms.adapters: {fields['model'][:80]!r}"
    if not isinstance(files, Mapping) or not files or not all(isinstance(id, str) for id in files.values()):
        raise TermsWrong(f"{where} has no files; train or upload the model again")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= MAX_WEIGHT:
        raise TermsWrong(f"{where} has the weight {weight!r}; give a number from -{MAX_WEIGHT} to {MAX_WEIGHT}")
    base = fields.get("base", "")
    return AdapterTerms(fields["model"], dict(files), float(weight), str(base), fields.get("pinned") is True)
