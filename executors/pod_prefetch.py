"""Bringing models to a node ahead of need, in a thread of the agent's, so that its loop never waits for a download."""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Mapping
from typing import Any

from executors.pod_models import ModelCache

MAX_WAITING = 64
"""Models that may wait; more are dropped, since a prefetch is only a hint."""

_log = logging.getLogger(__name__)


class Prefetcher:
    """Fetches one model after the other; the thread starts with the first."""

    def __init__(self, models: ModelCache) -> None:
        self._models = models
        self._waiting: queue.Queue[str] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None

    def add(self, model: Mapping[str, Any]) -> None:
        """Fetch a model some time soon."""
        try:
            self._waiting.put_nowait(json.dumps(dict(model)))
        except queue.Full:
            _log.warning("prefetch of model %s dropped: %d wait already", model.get("id"), MAX_WAITING)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Fetch nothing more; what is under way goes on in the background and leaves the cache whole."""
        while True:
            try:
                self._waiting.get_nowait()
            except queue.Empty:
                self._waiting.put_nowait("")
                return

    def _run(self) -> None:
        while text := self._waiting.get():
            model = json.loads(text)
            try:
                self._models.prefetch(model)
            except Exception as error:
                _log.warning("prefetch of model %s failed: %s", model.get("id"), error)
