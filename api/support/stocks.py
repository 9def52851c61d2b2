"""What nodes said last about the models they hold and about their caches, for operators and monitoring. It decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from engine.events import Event, NodeReported
from engine.resources import ResidentModel


class Stocks:
    """The latest word of each node; forgotten with the process, and said again within a minute."""

    def __init__(self) -> None:
        self._models: dict[str, tuple[ResidentModel, ...]] = {}
        self._counts: dict[str, tuple[tuple[str, int], ...]] = {}

    def note(self, events: Iterable[Event]) -> None:
        """Take in what the events of a step say."""
        for event in events:
            if isinstance(event, NodeReported):
                if event.resident is not None:
                    self._models[event.node] = event.resident
                if event.cache_counts:
                    self._counts[event.node] = event.cache_counts

    def view(self) -> Mapping[str, Mapping[str, Any]]:
        """Return ``{"models": [...], "caches": {tier: {figure: value}}}`` of each node that said something."""
        return {
            node: {"models": _models(self._models.get(node, ())), "caches": _caches(self._counts.get(node, ()))}
            for node in {**self._models, **self._counts}
        }


def _models(resident: tuple[ResidentModel, ...]) -> list[dict[str, Any]]:
    return [
        {"model": each.model, "tier": each.tier.value, "size_bytes": each.size_bytes, "pinned": each.pinned}
        for each in resident
    ]


def _caches(counts: tuple[tuple[str, int], ...]) -> dict[str, dict[str, int]]:
    """Sort figures by tier: ``disk_hits`` is the figure ``hits`` of the tier ``disk``."""
    shown: dict[str, dict[str, int]] = {}
    for name, value in counts:
        tier, _, figure = name.partition("_")
        shown.setdefault(tier, {})[figure] = value
    return shown
