"""A paced method for the agents of the tests, which hangs, computes nonsense or waits when its parameters say so."""

from __future__ import annotations

import threading
from typing import Any

from executors.methods.base import MethodContext, MethodResult, ModelRef, NotFinite


class Steps:
    """Takes eight steps, then does what it is told."""

    paced = True

    def load(self, model: ModelRef | None, device: str) -> None:
        pass

    def close(self) -> None:
        pass

    def run(self, parameters: Any, context: MethodContext) -> MethodResult:
        for done in range(8):
            context.progress(done + 1, 10)
            context.flush()  # type: ignore[attr-defined]  # every step is heard of, however fast they are
        match parameters.then:
            case "hang":
                never_returns()
            case "nonsense":
                raise NotFinite("the latents hold numbers that are not finite")
            case "wait":
                while not context.should_stop():
                    context.progress(9, 10)
                    threading.Event().wait(0.02)
        return MethodResult()


def never_returns() -> None:
    """Stands for a kernel that does not come back."""
    threading.Event().wait()
