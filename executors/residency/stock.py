"""A node's models as the agent sees them: what to report of them, and the orders to bring, keep and release them.

Orders are carried out one after the other in a thread of their own, so the agent's loop never waits for a download; each is a
hint, and what fails is logged. What lies in memory is asked of the kernel at most once in `LOOK_EVERY_S`.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from engine.resources import ResidentModel, Tier
from executors.residency import pages

if TYPE_CHECKING:
    from pathlib import Path

    from executors.pod_models import ModelCache

MAX_WAITING: Final = 256
"""Orders that may wait; more are dropped, since each is only a hint."""
MAX_REPORTED: Final = 128
"""Models that a report names."""
MAX_ID_CHARS: Final = 200
LOOK_EVERY_S: Final = 30.0

_log = logging.getLogger(__name__)


class NodeStock:
    """Bounded orders about a `ModelCache`, and its contents. Any thread may use it; the thread for orders starts with the first."""

    def __init__(self, models: ModelCache) -> None:
        self._models = models
        self._waiting: queue.Queue[str] = queue.Queue(MAX_WAITING)
        self._known: set[str] = set()
        """Orders that wait or are under way."""
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._failures = 0
        self._seen: tuple[ResidentModel, ...] = ()
        self._seen_at = -LOOK_EVERY_S
        self._memory: Mapping[str, int] = {}

    # --- orders -----------------------------------------------------------------------------------------------------------

    def bring(self, model: Mapping[str, Any]) -> None:
        """Fetch a model some time soon, and keep it where its ``"pin"`` is true; what waits already is not ordered twice."""
        self._add({"bring": dict(model)})

    def release(self, model_id: str, drop: bool = False) -> None:
        """Let a model be evicted some time soon; with `drop` its files go at once unless somebody uses them."""
        self._add({"release": model_id, "drop": drop})

    def close(self) -> None:
        """Take no further orders; what is under way goes on in the background and leaves the cache whole."""
        with self._lock:
            self._closed = True
            while True:
                try:
                    self._waiting.get_nowait()
                except queue.Empty:
                    break
            self._known.clear()
            self._waiting.put_nowait("")

    def _add(self, order: Mapping[str, Any]) -> None:
        text = json.dumps(order, sort_keys=True)
        with self._lock:
            if self._closed or text in self._known:
                return
            try:
                self._waiting.put_nowait(text)
            except queue.Full:
                _log.warning("an order about models was dropped, %d wait already: %s", MAX_WAITING, text[:200])
                return
            self._known.add(text)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="models", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while text := self._waiting.get():
            try:
                self._obey(json.loads(text))
            except Exception as error:
                self._failures += 1
                _log.warning("an order about models failed: %s: %s", text[:200], error)
            with self._lock:
                self._known.discard(text)
                self._seen_at = -LOOK_EVERY_S

    def _obey(self, order: Mapping[str, Any]) -> None:
        if "bring" in order:
            self._models.prefetch(order["bring"])
        elif order["drop"]:
            for held in self._models.disk.on_disk():
                if order["release"] in held.model_ids:
                    pages.let_go(held.directory)
            self._models.disk.drop(order["release"])
        else:
            self._models.unpin(order["release"])

    # --- what is there ------------------------------------------------------------------------------------------------------

    def resident(self) -> tuple[ResidentModel, ...]:
        """Return the models that are here, base models first, then pinned ones, then the last used; at most `MAX_REPORTED`."""
        now = time.monotonic()
        if now - self._seen_at >= LOOK_EVERY_S:
            self._seen_at = now
            self._seen = self._look()
        return self._seen

    def counts(self) -> tuple[tuple[str, int], ...]:
        """Return what happened in the disk tier and what lies in memory, by name."""
        counts = {f"disk_{name}": value for name, value in self._models.disk.counts().items()}
        return tuple(sorted({**counts, **self._memory, "orders_failed": self._failures}.items()))

    def _look(self) -> tuple[ResidentModel, ...]:
        self._models.disk.tidy()
        found: list[ResidentModel] = []
        for name, directory in self._models.base_models().items():
            found.append(_seen(name, directory, pages.size_bytes(directory), pinned=False))
        fetched = sorted(self._models.disk.on_disk(), key=lambda each: not each.pinned)
        for each in fetched:
            for name in each.model_ids:
                found.append(_seen(name, each.directory, each.size_bytes, pinned=each.pinned))
        in_memory = [each for each in found if each.tier is Tier.MEMORY]
        self._memory = {
            "memory_models": len(in_memory),
            "memory_bytes": sum(each.size_bytes for each in in_memory),
            "base_models": len(found) - sum(len(each.model_ids) for each in fetched),
        }
        return tuple(each for each in found if each.model and len(each.model) <= MAX_ID_CHARS)[:MAX_REPORTED]


def _seen(name: str, directory: Path, size_bytes: int, *, pinned: bool) -> ResidentModel:
    tier = Tier.MEMORY if pages.in_memory(directory) else Tier.DISK
    return ResidentModel(name, tier, size_bytes, pinned)
