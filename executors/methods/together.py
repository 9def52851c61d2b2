"""What a method is that runs several attempts at once on one device; importing this file imports no torch."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class SharedMethod(Protocol):
    """A `Method` whose runs can share the device: threads call `run`, one thread does the work of them all in `serve`."""

    def share(self, slots: int) -> bool:
        """Say that up to `slots` threads will call `run` at once; False when the loaded model runs one at a time only."""
        ...

    def serve(self) -> None:
        """Do the device's work until `leave` is called; runs under way then fail."""
        ...

    def leave(self) -> None:
        """Let `serve` return; may be called from any thread, and before `serve`."""
        ...
