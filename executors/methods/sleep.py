"""A method that only waits: it shows the platform's own cost, and fails on request so that failures can be drilled."""

from __future__ import annotations

import os
import signal
import time

from pydantic import BaseModel

from executors.methods.base import Cancelled, MethodContext, MethodResult, ModelRef
from executors.methods.parameters import SleepParameters


class Sleep:
    """Waits in small steps."""

    def load(self, model: ModelRef | None, device: str) -> None:
        """Load nothing."""

    def run(self, parameters: BaseModel, context: MethodContext) -> MethodResult:
        """Wait for `seconds`, in `steps` steps, each by the clock's end so that the steps' own cost does not add up."""
        assert isinstance(parameters, SleepParameters)
        began = time.monotonic()
        for step in range(parameters.steps):
            if context.should_stop():
                raise Cancelled
            if parameters.fail is not None and step >= parameters.steps // 2:
                _fail(parameters.fail)
            ends = began + parameters.seconds * (step + 1) / parameters.steps
            while (left := ends - time.monotonic()) > 0:
                if context.should_stop():
                    raise Cancelled
                time.sleep(min(left, 0.05))
            context.progress(step + 1, parameters.steps)
        return MethodResult(metadata={"slept_s": round(time.monotonic() - began, 6)})

    def close(self) -> None:
        """Give nothing back."""


def _fail(how: str) -> None:
    match how:
        case "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        case "oom":
            raise MemoryError("out of memory, as asked for by `fail`")
        case _:
            raise RuntimeError("failed, as asked for by `fail`")
