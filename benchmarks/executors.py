"""How fast pictures are made for many personalised models: ``python -m benchmarks.executors``.

A mix of requests, each for one of 32 personalised models (random LoRAs of rank 4 on every linear layer of the networks), is made in
one run by

    ours        one running batch: every request at its own step, with its own LoRA
    one by one  diffusers' own pipeline, a call for each request; all LoRAs are loaded before and `set_adapters` picks one
    reloaded    the same, but only one LoRA is in memory: `load_lora_weights` and `unload_lora_weights` for each request
    static      diffusers' own pipeline, requests of the same model and step count in one call

and their pictures are compared. Before that: step time against batch size, with the same LoRA in all rows (fused into the weights)
and with a different one in each, and what share of the device's measured matrix-product rate that is; how long an urgent request
waits when it meets a full batch; what switching to another model costs; the longest time between two calls of the network while
others are begun and decoded; and diffusers' pipeline under torch.compile, in a process of its own that is ended when its time is
over.

As it is, on a CPU the bundled model is measured; on a GPU the published architectures of Stable Diffusion 1.5 and SDXL with random
weights (nothing is downloaded), 30 steps, in less than ten minutes: what there is no more time for is left out, and said.
``--architecture small`` goes through all of it anywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import architectures, generation
from benchmarks.machine import machine_line
from executors.methods import device, pipelines
from executors.methods.base import ModelRef
from executors.tiny import MODEL_DIR

PARTS = ("step", "urgent", "switching", "mix", "gaps", "compiled")
GPU_MINUTES = 9.0
"""How long a run on a GPU may take where nothing is said; the last part that was begun ends a little later."""
GPU_REQUESTS = {"sd15": 64, "sdxl": 16}
SEQUENTIAL_LIMIT_S = 40.0
"""How long each way of one request after the other may take on a GPU; those made until then say what one costs."""
COMPILED_BATCHES = (1, 8)


@dataclass
class Run:
    """One run: what was found, and how much time is left."""

    options: argparse.Namespace
    console: Console
    ends_at: float
    report: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    """What there was no time for."""
    failed: list[str] = field(default_factory=list)

    def left_s(self) -> float:
        return self.ends_at - time.monotonic()

    def measure(self, model: str, part: str, title: str, run: Callable[[], Any]) -> None:
        """Measure a part that was asked for, unless the time is over; what fails is told, and the others go on."""
        if part not in self.options.parts:
            return
        if self.left_s() <= 0:
            self.left_out.append(f"{part} of {model}: no time left")
            return
        began = time.monotonic()
        try:
            found = run()
        except Exception as error:
            self.failed.append(f"{part} of {model}: {type(error).__name__}: {error}")
            return
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        rows = found if isinstance(found, list) else [found]
        if rows:
            self.report.setdefault(model, {})[part] = rows
            _show(self.console, f"{model}: {title}, in {time.monotonic() - began:.0f} s", rows)
        self.save()

    def save(self) -> None:
        """Write what is known so far, so that it is not lost when the rest fails."""
        if self.options.json:
            known = {**self.report, "left_out": self.left_out, "failed": self.failed}
            self.options.json.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def _show(console: Console, title: str, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if name == "way" else "right")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)


def _measure_model(run: Run, name: str, fresh: generation.Fresh, requests: int, limit_s: float) -> None:
    options = run.options
    first = fresh()
    size, where, numbers = first.native_size[0], first.device, architectures.parameters_of(first)
    del first
    run.report.setdefault(name, {})["parameters"] = json.loads(numbers)
    step_counts = generation.STEPS if options.steps is None else (options.steps,)
    mix = generation.mix(requests, size, step_counts)
    title = f"{requests} requests of {generation.MODELS} models, steps {step_counts}, {size} px"
    parts: list[tuple[str, str, Callable[[], Any]]] = [
        (
            "step",
            f"one step of the running batch, {size} px",
            lambda: generation.step_times(fresh, size, options.repeats, options.batches),
        ),
        (
            "urgent",
            "an urgent request meets a full batch",
            lambda: generation.urgent_wait(fresh, size, options.capacity),
        ),
        ("switching", "until the next call is another model's", lambda: generation.switching(fresh)),
        ("mix", title, lambda: generation.compare(fresh, mix, options.capacity, limit_s)),
        (
            "gaps",
            "between two calls of the network while others come and end",
            lambda: generation.gaps(fresh, size, options.capacity, 6 * options.repeats),
        ),
        ("compiled", "diffusers' pipeline without LoRAs", lambda: _compiled_apart(run, name, step_counts[-1])),
    ]
    for part, told, measured in parts:
        run.measure(name, part, told, measured)
    run.console.print(f"{name}: {_machine(where)}, device {where}; parameters {numbers}", soft_wrap=True)


def _compiled_apart(run: Run, name: str, steps: int) -> list[dict[str, Any]]:
    """Measure torch.compile in a process of its own, which is ended with all that it started when the time is over."""
    options = run.options
    which = ["--model", str(options.model)] if options.model else ["--architecture", name]
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        command = [sys.executable, "-m", "benchmarks.executors", *which, "--compiled-rows", str(rows)]
        child = subprocess.Popen([*command, "--steps", str(steps), "--device", options.device], start_new_session=True)
        timeout = None if math.isinf(run.ends_at) else max(1.0, run.left_s())
        try:
            ended = child.wait(timeout)
            if ended:
                run.failed.append(f"compiled of {name}: its process ended with {ended}")
        except subprocess.TimeoutExpired:
            run.left_out.append(f"compiled of {name}: ended when the time was over")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        return [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()] if rows.exists() else []


def _compiled_here(options: argparse.Namespace, fresh: generation.Fresh) -> None:
    """Be the process that `_compiled_apart` starts: a line for each row, as soon as it is known."""
    size = fresh().native_size[0]
    with options.compiled_rows.open("a", encoding="utf-8") as file:

        def found(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        generation.compiled(fresh, size, options.steps, COMPILED_BATCHES, found)


def _machine(where: torch.device) -> str:
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "1 thread"
    return f"{machine_line()}, {name}, torch {torch.__version__}, diffusers {version('diffusers')}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, help="48 of the bundled model; 64 of sd15 and 16 of sdxl")
    parser.add_argument("--capacity", type=int, default=16, help="pictures in the running batch")
    parser.add_argument("--repeats", type=int, default=10, help="steps of which the median is taken")
    parser.add_argument("--steps", type=int, help="steps of every request; 30 on a GPU, else 8, 12, 16 and 24 in turn")
    parser.add_argument("--batches", type=int, nargs="+", default=list(generation.BATCHES), help="pictures in one step")
    parser.add_argument("--device", default="auto")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", type=Path, help="a diffusers directory")
    what.add_argument(
        "--architecture", nargs="+", choices=sorted(architectures.ARCHITECTURES), help="random weights of its shapes"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, help="what is measured; all, torch.compile on a GPU or with --compile only"
    )
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too; it takes minutes")
    parser.add_argument("--minutes", type=float, help=f"begin no part after these; {GPU_MINUTES:g} on a GPU")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--compiled-rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if (options.requests or 2) < 2 or options.capacity < 2 or options.repeats < 1 or min(options.batches) < 1:
        parser.error("--requests and --capacity must be 2 or more, --repeats and --batches 1 or more")
    if options.steps is not None and options.steps < 2:
        parser.error("--steps must be 2 or more")
    if options.minutes is not None and options.minutes <= 0:
        parser.error("--minutes must be more than 0")
    return options


def _fill_in(options: argparse.Namespace) -> bool:
    """Set what was left open as it suits the device; returns whether that is a GPU."""
    on_gpu = device.resolve(options.device).type == "cuda"
    if options.model is None and options.architecture is None:
        options.model, options.architecture = (None, ["sd15", "sdxl"]) if on_gpu else (MODEL_DIR, None)
    if on_gpu and options.steps is None:
        options.steps = 30
    if on_gpu and options.minutes is None:
        options.minutes = GPU_MINUTES
    if options.parts is None:
        options.parts = [part for part in PARTS if part != "compiled" or on_gpu or options.compile]
    return on_gpu


def main() -> int:
    options = _options()
    began = time.monotonic()
    on_gpu = _fill_in(options)
    models: dict[str, generation.Fresh] = {}
    for name in options.architecture or []:
        models[name] = lambda name=name: architectures.build(name, options.device)  # type: ignore[misc]
    if options.model:
        models[options.model.name] = lambda: pipelines.load(ModelRef(options.model.name, options.model), options.device)
    if options.compiled_rows:
        _compiled_here(options, next(iter(models.values())))
        return 0
    ends_at = math.inf if options.minutes is None else began + 60.0 * options.minutes
    run = Run(options, Console(width=130), ends_at)
    run.report["machine"] = _machine(device.resolve(options.device))
    for name, fresh in models.items():
        requests = options.requests or GPU_REQUESTS.get(name, 48)
        _measure_model(run, name, fresh, requests, SEQUENTIAL_LIMIT_S if on_gpu else math.inf)
    run.save()
    for word, reasons in (("left out", run.left_out), ("failed", run.failed)):
        for reason in reasons:
            run.console.print(f"{word}: {reason}", soft_wrap=True, markup=False)
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
