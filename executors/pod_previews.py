"""Previews on their way out of a Pod: made into files and announced by a thread of their own, so that no step waits for the store.

Of one attempt only the newest preview waits. Its files live as long as somebody may look at them: the one before the newest goes
when a new one comes, all of them with the end of the attempt. Each carries its attempt's name: no other file has its content.
"""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from executors.dfs import ObjectFileStore
from executors.pod_checkpoints import STORE_ERRORS

KEPT = 2
"""Files of one attempt that are there at once."""


@dataclass(slots=True)
class _Shown:
    announce: Callable[[str], None]
    newest: Any = None
    files: list[str] = field(default_factory=list)
    number: int = 0


class Previews:
    """The previews of a Pod's attempts; the thread starts with the first."""

    def __init__(self, store: ObjectFileStore) -> None:
        self._store = store
        self._changed = threading.Condition()
        self._shown: dict[str, _Shown] = {}
        self._busy = ""
        self._thread: threading.Thread | None = None

    def show(self, name: str, picture: Any, announce: Callable[[str], None]) -> None:
        """Store a PIL picture soon, and give its file id to `announce`; `name` is the attempt's."""
        with self._changed:
            shown = self._shown.setdefault(name, _Shown(announce))
            shown.newest = picture
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="previews", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def forget(self, name: str) -> None:
        """Announce nothing more of an attempt, and remove its files; waits for one that is being written."""
        with self._changed:
            shown = self._shown.pop(name, None)
            self._changed.wait_for(lambda: self._busy != name)
        for file_id in shown.files if shown is not None else ():
            self._remove(file_id)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._next)
                name = self._busy = self._next()
                shown = self._shown[name]
                picture, shown.newest = shown.newest, None
            try:
                self._keep(name, shown, picture)
            except STORE_ERRORS as error:
                print(f"a preview could not be stored, the run goes on: {error}", file=sys.stderr, flush=True)
            finally:
                with self._changed:
                    self._busy = ""
                    self._changed.notify_all()

    def _next(self) -> str:
        return next((name for name, shown in self._shown.items() if shown.newest is not None), "")

    def _keep(self, name: str, shown: _Shown, picture: Any) -> None:
        shown.number += 1
        ref = self._store.put_bytes(_png(picture, f"{name}/{shown.number}"), "image/png")
        shown.files.append(ref.file_id)
        shown.announce(ref.file_id)
        while len(shown.files) > KEPT:
            self._remove(shown.files.pop(0))

    def _remove(self, file_id: str) -> None:
        try:
            self._store.delete(file_id)
        except STORE_ERRORS as error:
            print(f"a preview stays in the store: {error}", file=sys.stderr, flush=True)


def _png(picture: Any, name: str) -> bytes:
    from PIL.PngImagePlugin import PngInfo

    about = PngInfo()
    about.add_text("preview", name)
    content = io.BytesIO()
    picture.save(content, format="PNG", pnginfo=about)
    return content.getvalue()
