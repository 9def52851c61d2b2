"""Methods that misbehave in one way each; Pods of the tests load them as ``drill_methods:Name``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from executors.methods.base import Cancelled, MethodContext, MethodResult, ModelMissing, ModelRef, ResultFile


class Drill:
    """Loads nothing; what it does, its `run` says."""

    model: ModelRef | None = None

    def load(self, model: ModelRef | None, device: str) -> None:
        self.model = model

    def close(self) -> None:
        pass


class WhoAmI(Drill):
    """Tells what a Pod's process is like."""

    def run(self, parameters: Any, context: MethodContext) -> MethodResult:
        import resource

        return MethodResult(
            metadata={
                "pid": os.getpid(),
                "group": os.getpgrp(),
                "session": os.getsid(0),
                "cwd": os.getcwd(),
                "output_dir": str(context.output_dir),
                "device": context.device,
                "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
                "data": resource.getrlimit(resource.RLIMIT_DATA)[0],
                "cuda": os.environ.get("CUDA_VISIBLE_DEVICES"),
                "omp": os.environ.get("OMP_NUM_THREADS"),
                "cgroup": Path("/proc/self/cgroup").read_text(),
                "descriptors": sorted(
                    os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)
                ),
                "model": [self.model.id, str(self.model.base_dir), str(self.model.adapter_dir)] if self.model else None,
            }
        )


class Hog(Drill):
    """Touches ever more memory, up to `bytes`."""

    def run(self, parameters: Any, context: MethodContext) -> MethodResult:
        held = []
        for done in range(parameters.bytes >> 20):
            held.append(bytearray(os.urandom(1 << 10)) * (1 << 10))
            context.progress(done, parameters.bytes >> 20)
        return MethodResult(metadata={"held": len(held)})


class Stubborn(Drill):
    """Never asks whether to stop."""

    def run(self, parameters: Any, context: MethodContext) -> MethodResult:
        context.progress(0, 1)
        while True:
            time.sleep(0.05)


class Talker(Drill):
    """Writes to its log, then exits with status 3."""

    def run(self, parameters: Any, context: MethodContext) -> MethodResult:
        for line in range(parameters.lines):
            print(f"line {line} of the log", file=sys.stderr)
        print("the last words", flush=True)
        os._exit(3)


class Litter(Drill):
    """Leaves children behind: one in its group, one that fled into a session of its own."""

    def run(self, parameters: Any, context: MethodContext) -> MethodResult:
        sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
        staying = subprocess.Popen(sleeper)
        fleeing = subprocess.Popen(sleeper, start_new_session=True)
        pids = [os.getpid(), staying.pid, fleeing.pid]
        if parameters.crash:
            (Path(parameters.note)).write_text(json.dumps(pids))
            os._exit(9)
        return MethodResult(metadata={"pids": pids})


class Writer(Drill):
    """Writes result files: a picture in its output directory and, if told so, one outside of it."""

    def run(self, parameters: Any, context: MethodContext) -> MethodResult:
        picture = context.output_dir / "picture.png"
        picture.write_bytes(context.fetch(parameters.source).read_bytes() if parameters.source else b"png")
        files = [ResultFile(picture, "image/png", "picture")]
        if parameters.outside:
            files.append(ResultFile(Path("/etc/hostname"), "text/plain", "log"))
        return MethodResult(files=tuple(files), metadata={"made": 1}, peak_gpu_memory_bytes=5)


class Stepper(Drill):
    """Counts steps; keeps a checkpoint when stopped and goes on from one."""

    def run(self, parameters: Any, context: MethodContext) -> MethodResult:
        began = 0
        if context.checkpoint is not None:
            began = json.loads((context.checkpoint / "state" / "step.json").read_text())
        for step in range(began, parameters.steps):
            if context.should_stop():
                kept = context.output_dir / "checkpoint"
                (kept / "state").mkdir(parents=True)
                (kept / "state" / "step.json").write_text(json.dumps(step))
                raise Cancelled(kept)
            time.sleep(parameters.step_s)
            context.progress(step + 1, parameters.steps)
        return MethodResult(metadata={"began": began})


class NoModel(Drill):
    """Finds its model missing."""

    def load(self, model: ModelRef | None, device: str) -> None:
        raise ModelMissing("model: 'gone' is not here")


class Broken(Drill):
    """Gets an error after which CUDA refuses to work."""

    def run(self, parameters: Any, context: MethodContext) -> MethodResult:
        raise RuntimeError("CUDA error: device-side assert triggered")


class SlowToLoad(Drill):
    """Never finishes loading."""

    def load(self, model: ModelRef | None, device: str) -> None:
        time.sleep(600)


def _is_open(descriptor: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{descriptor}")
