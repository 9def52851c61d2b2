"""The board of SS: how every job looks now, for readers and listeners in other threads.

It only ever shows what is durable: the journal publishes to it after the commit. It is the platform's embedded cache: the newest
jobs are read from here, older ones from the store.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from api.support.jobs import Change

Key = tuple[str, str]
T = TypeVar("T")


class Listener:
    """One reader of changes. When it falls behind, the oldest changes are dropped: each carries the whole view anyway."""

    def __init__(self, wants: Callable[[Change], bool], bound: int) -> None:
        self._wants = wants
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._changes: deque[Change] = deque(maxlen=bound)
        self._rung = False

    def offer(self, changes: Iterable[Change]) -> None:
        """Take the changes this reader wants; called from the publishing thread."""
        wanted = [change for change in changes if self._wants(change)]
        if not wanted:
            return
        self._changes.extend(wanted)
        self.ring()

    def ring(self) -> None:
        """Wake the reader."""
        if not self._rung:
            self._rung = True
            try:
                self._loop.call_soon_threadsafe(self._ready.set)
            except RuntimeError:
                pass  # the reader's loop is closed; it is about to leave

    async def take(self, timeout_s: float) -> list[Change]:
        """Return the changes since the last call, waiting for the first; empty after the timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            return []
        self._ready.clear()
        self._rung = False
        taken: list[Change] = []
        while self._changes:
            taken.append(self._changes.popleft())
        return taken


class Board:
    """The published views, bounded, and whoever listens to their changes."""

    def __init__(self, max_views: int = 20_000, listener_bound: int = 1_000) -> None:
        self._max_views = max_views
        self._bound = listener_bound
        self._lock = threading.Lock()
        self._views: OrderedDict[Key, tuple[int, Mapping[str, Any]]] = OrderedDict()
        self._listeners: dict[Listener, None] = {}
        self._closed = False

    def publish(self, changes: Iterable[Change]) -> None:
        """Show durable changes."""
        changes = list(changes)
        with self._lock:
            for change in changes:
                key = change.job.key
                self._views[key] = (change.event_id, change.view)
                self._views.move_to_end(key)
            while len(self._views) > self._max_views:
                self._views.popitem(last=False)
            listeners = list(self._listeners)
        for listener in listeners:
            listener.offer(changes)

    def view(self, key: Key) -> tuple[int, Mapping[str, Any]] | None:
        """Return (event id, view) of a job, None when it is not on the board."""
        with self._lock:
            return self._views.get(key)

    def listen(self, wants: Callable[[Change], bool]) -> Listener:
        """Begin to collect changes for the running event loop; end with `leave`."""
        listener = Listener(wants, self._bound)
        with self._lock:
            self._listeners[listener] = None
        return listener

    def leave(self, listener: Listener) -> None:
        """Stop collecting."""
        with self._lock:
            self._listeners.pop(listener, None)

    @property
    def closed(self) -> bool:
        """Tell whether SS is going down."""
        return self._closed

    def close(self) -> None:
        """Wake every listener for good."""
        self._closed = True
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener.ring()

    async def until(self, look: Callable[[], T | None], timeout_s: float) -> T | None:
        """Return what `look` finds as soon as it finds something, None after the timeout; looks again after every change."""
        listener = self.listen(lambda _: True)
        try:
            deadline = asyncio.get_running_loop().time() + timeout_s
            while True:
                found = look()
                if found is not None:
                    return found
                left = deadline - asyncio.get_running_loop().time()
                if left <= 0 or self._closed:
                    return None
                # Some facts (a deployment, a deleted dead letter) change no view: look once in a while anyway.
                await listener.take(min(left, 0.05))
        finally:
            self.leave(listener)
