"""Methods that fail as devices and native code do; Pods of the tests load them as ``failure_drills:Name``."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from typing import Any

from executors.methods.base import MethodContext, MethodResult, ModelRef, NotFinite


class _Drill:
    def load(self, model: ModelRef | None, device: str) -> None:
        pass

    def close(self) -> None:
        pass

    @staticmethod
    def step(parameters: Any, context: MethodContext) -> None:
        for done in range(parameters.steps):
            context.progress(done + 1, 1000)
            context.flush()  # type: ignore[attr-defined]  # every step is heard of, however fast they are


def never_returns() -> None:
    """Stands for a kernel launch that does not come back."""
    threading.Event().wait()


class Freezes(_Drill):
    """Takes some steps, then hangs."""

    paced = True

    def run(self, parameters: Any, context: MethodContext) -> MethodResult:
        self.step(parameters, context)
        if parameters.hang:
            never_returns()
        return MethodResult(metadata={"pid": os.getpid()})


class StoppedShort(_Drill):
    """Is stopped by a signal in the midst of a step: not even its threads answer any more."""

    paced = True

    def run(self, parameters: Any, context: MethodContext) -> MethodResult:
        self.step(parameters, context)
        os.kill(os.getpid(), signal.SIGSTOP)
        return MethodResult()


class Unpaced(_Drill):
    """Promises no steps, and is patient."""

    def run(self, parameters: Any, context: MethodContext) -> MethodResult:
        self.step(parameters, context)
        while not context.should_stop():
            threading.Event().wait(0.01)
        return MethodResult()


class Segfaults(_Drill):
    """Reads where nothing is."""

    def run(self, parameters: Any, context: MethodContext) -> MethodResult:
        return MethodResult(metadata={"read": str(ctypes.string_at(8))})


class Raises(_Drill):
    """Raises an error with the text that it is given."""

    def run(self, parameters: Any, context: MethodContext) -> MethodResult:
        kinds: dict[str, type[Exception]] = {"runtime": RuntimeError, "not finite": NotFinite, "memory": MemoryError}
        raise kinds[parameters.kind](parameters.text)


class ExitsWith(_Drill):
    """Ends its process."""

    def run(self, parameters: Any, context: MethodContext) -> MethodResult:
        self.step(parameters, context)
        os._exit(parameters.status)
