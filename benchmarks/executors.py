"""How fast pictures are made for many personalised models: ``python -m benchmarks.executors [--requests 48] [--device cpu]``.

A mix of requests, each for one of 32 personalised models (random LoRAs of rank 4 on every linear layer of the UNet and the text
encoder of the bundled model, or of ``--model DIR``) and one of four step counts, is made in one run by

    ours        one running batch: every request at its own step, with its own LoRA
    one by one  diffusers' own pipeline, a call for each request; all LoRAs are loaded before and `set_adapters` picks one
    reloaded    the same, but only one LoRA is in memory: `load_lora_weights` and `unload_lora_weights` for each request
    static      diffusers' own pipeline, requests of the same model and step count in one call

The pictures of all four are compared. Then: step time against batch size, without LoRAs, with the same one in all rows (fused into
the weights) and with a different one in each; and how long an urgent request waits when it meets a full batch.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine_line
from executors.batching.batch import RunningBatch
from executors.batching.lora import AdapterBank
from executors.batching.requests import Entered, Failed, Finished, PictureRequest
from executors.methods import adapters, device, pipelines
from executors.methods.base import ModelRef
from executors.tiny import MODEL_DIR

MODELS = 32
RANK = 4
STEPS = (8, 12, 16, 24)
PROMPTS = ("a red star", "a blue house on a white background", "a green circle", "a yellow robot")
GUIDANCE = 3.0
Made = dict[str, np.ndarray[Any, Any]]


def random_adapters(loaded: pipelines.LoadedPipeline, count: int) -> dict[str, dict[str, torch.Tensor]]:
    """Differences strong enough to be seen, under the names that diffusers reads."""
    generator = torch.Generator().manual_seed(0)
    linears = {
        adapters.weight_key(part, name): module
        for part, whole in loaded.parts.items()
        for name, module in whole.named_modules()
        if isinstance(module, torch.nn.Linear)
    }

    def one() -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for key, linear in linears.items():
            down = torch.randn((RANK, linear.in_features), generator=generator) * linear.in_features**-0.5
            up = torch.randn((linear.out_features, RANK), generator=generator) * 0.05
            tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
        return tensors

    return {f"model-{number}": one() for number in range(count)}


def mix(count: int, size: int) -> list[PictureRequest]:
    """Every model in turn, step counts and prompts spread over them."""
    return [
        PictureRequest(
            str(index),
            PROMPTS[index % len(PROMPTS)],
            seed=index,
            steps=STEPS[(index * 7 + index // MODELS) % len(STEPS)],
            guidance=GUIDANCE,
            width=size,
            height=size,
            adapters=((f"model-{index % MODELS}", 1.0),),
        )
        for index in range(count)
    ]


# --- four ways ------------------------------------------------------------------------------------------------------


def ours(batch: RunningBatch, requests: Sequence[PictureRequest]) -> Made:
    """One running batch for all."""
    for request in requests:
        batch.admit(request)
    made: Made = {}
    while len(batch):
        for event in batch.step():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                made[event.id] = np.asarray(event.picture, dtype=float)
    return made


def _called(loaded: pipelines.LoadedPipeline, requests: Sequence[PictureRequest]) -> Made:
    """One call of diffusers' own pipeline."""
    pictures = loaded.pipe(
        prompt=[request.prompt for request in requests],
        num_inference_steps=requests[0].steps,
        guidance_scale=GUIDANCE,
        width=requests[0].width,
        height=requests[0].height,
        generator=[torch.Generator("cpu").manual_seed(request.seed) for request in requests],
    ).images
    return {request.id: np.asarray(picture, dtype=float) for request, picture in zip(requests, pictures, strict=True)}


def one_by_one(loaded: pipelines.LoadedPipeline, requests: Sequence[PictureRequest]) -> Made:
    """A call for each request; its LoRA is picked among those loaded."""
    made: Made = {}
    for request in requests:
        loaded.pipe.set_adapters([request.adapters[0][0]])
        made |= _called(loaded, [request])
    return made


def reloaded(
    loaded: pipelines.LoadedPipeline, requests: Sequence[PictureRequest], known: dict[str, dict[str, torch.Tensor]]
) -> Made:
    """A call for each request, before which its LoRA takes the place of the last one."""
    made: Made = {}
    for request in requests:
        name = request.adapters[0][0]
        loaded.pipe.load_lora_weights(dict(known[name]), adapter_name=name)
        made |= _called(loaded, [request])
        loaded.pipe.unload_lora_weights()
    return made


def static(loaded: pipelines.LoadedPipeline, requests: Sequence[PictureRequest]) -> Made:
    """A call for all requests of one model and step count."""
    groups: dict[tuple[str, int], list[PictureRequest]] = {}
    for request in requests:
        groups.setdefault((request.adapters[0][0], request.steps), []).append(request)
    made: Made = {}
    for (name, _steps), group in groups.items():
        loaded.pipe.set_adapters([name])
        made |= _called(loaded, group)
    return made


# --- measuring ------------------------------------------------------------------------------------------------------


@contextmanager
def _timed(into: list[float], where: torch.device) -> Iterator[None]:
    began = time.perf_counter()
    yield
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    into.append(time.perf_counter() - began)


def compare(
    fresh: Callable[[], pipelines.LoadedPipeline], requests: Sequence[PictureRequest], capacity: int
) -> list[dict[str, Any]]:
    """Make all requests in each way; rates, and how far the pictures are from those made one by one."""
    loaded = fresh()
    known = random_adapters(loaded, MODELS)
    bank = AdapterBank(loaded)
    for name, tensors in known.items():
        bank.put(name, tensors)
    batch = RunningBatch(loaded, capacity=capacity, bank=bank)
    plain, bare = fresh(), fresh()
    for name, tensors in known.items():
        plain.pipe.load_lora_weights(dict(tensors), adapter_name=name)
    ways: dict[str, Callable[[Sequence[PictureRequest]], Made]] = {
        "ours": lambda few: ours(batch, few),
        "one by one": lambda few: one_by_one(plain, few),
        "reloaded": lambda few: reloaded(bare, few, known),
        "static": lambda few: static(plain, few),
    }
    rows: list[dict[str, Any]] = []
    pictures: dict[str, Made] = {}
    for way, run in ways.items():
        run([replace(request, steps=2) for request in requests[:2]])
        taken: list[float] = []
        with _timed(taken, loaded.device):
            pictures[way] = run(requests)
        rows.append({"way": way, "seconds": taken[0], "pictures_per_s": len(requests) / taken[0]})
    for row in rows:
        row["ours_times"] = rows[0]["pictures_per_s"] / row["pictures_per_s"]
        off = [np.abs(pictures[row["way"]][r.id] - pictures["one by one"][r.id]).max() for r in requests]
        row["largest_difference"] = float(max(off))
    return rows


def step_times(fresh: Callable[[], pipelines.LoadedPipeline], size: int, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of one step by pictures in it (two rows each), median."""
    loaded = fresh()
    known = random_adapters(loaded, 16)
    bank = AdapterBank(loaded)
    for name, tensors in known.items():
        bank.put(name, tensors)
    rows = []
    for pictures in (1, 2, 4, 8, 16):
        row: dict[str, Any] = {"pictures": pictures}
        # A LoRA that is fused into the weights costs exactly what no LoRA costs.
        for kind in ("fused", "mixed"):
            batch = RunningBatch(loaded, capacity=pictures, bank=bank)
            for index in range(pictures):
                own = ((f"model-{index}", 1.0),) if kind == "mixed" else ()
                batch.admit(
                    PictureRequest(
                        str(index),
                        PROMPTS[0],
                        seed=index,
                        steps=repeats + 3,
                        guidance=GUIDANCE,
                        width=size,
                        height=size,
                        adapters=own,
                    )
                )
            batch.step()
            taken: list[float] = []
            for _ in range(repeats):
                with _timed(taken, loaded.device):
                    batch.step()
            row[f"{kind}_ms"] = median(taken) * 1e3
        row["pictures_steps_per_s"] = pictures / row["mixed_ms"] * 1e3
        row["mixed_over_fused"] = row["mixed_ms"] / row["fused_ms"]
        rows.append(row)
    return rows


def urgent_wait(fresh: Callable[[], pipelines.LoadedPipeline], size: int, capacity: int) -> dict[str, Any]:
    """An urgent request comes in the midst of a step of a full batch with others waiting: how long until it takes part?"""
    loaded = fresh()
    batch = RunningBatch(loaded, capacity=capacity)
    base = PictureRequest("", PROMPTS[0], steps=40, guidance=GUIDANCE, width=size, height=size)
    for index in range(capacity + 4):
        batch.admit(replace(base, id=str(index), seed=index))
    taken: list[float] = []
    for _ in range(5):
        with _timed(taken, loaded.device):
            batch.step()
    # The earliest moment of its coming is the start of a step: it waits for that one, and enters with the next.
    with _timed(taken, loaded.device):
        batch.step()
    batch.admit(replace(base, id="urgent", priority=100, steps=4))
    with _timed(taken, loaded.device):
        events = batch.step()
    entered = any(isinstance(event, Entered) and event.id == "urgent" for event in events)
    return {
        "capacity": capacity,
        "step_ms": median(taken[:5]) * 1e3,
        "wait_ms": taken[5] * 1e3,
        "steps_waited": 1 if entered else 2,
        "step_with_exchange_ms": taken[6] * 1e3,
    }


def _machine(where: torch.device) -> str:
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "1 thread"
    return f"{machine_line()}, {name}, torch {torch.__version__}, diffusers {version('diffusers')}"


def _show(console: Console, title: str, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if name == "way" else "right")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--capacity", type=int, default=16, help="pictures in the running batch")
    parser.add_argument("--repeats", type=int, default=10, help="steps of which the median is taken")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--model", type=Path, default=MODEL_DIR, help="a diffusers directory; the bundled one otherwise"
    )
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    if options.requests < 2 or options.capacity < 1 or options.repeats < 1:
        parser.error("--requests must be 2 or more, --capacity and --repeats 1 or more")

    def fresh() -> pipelines.LoadedPipeline:
        return pipelines.load(ModelRef(options.model.name, options.model), options.device)

    first = fresh()
    size, where = first.native_size[0], first.device
    del first
    report: dict[str, Any] = {
        "machine": _machine(device.resolve(options.device)),
        "mix": compare(fresh, mix(options.requests, size), options.capacity),
        "step": step_times(fresh, size, options.repeats),
        "urgent": urgent_wait(fresh, size, options.capacity),
    }
    console = Console(width=110)
    title = f"{options.requests} requests of {MODELS} models, steps {STEPS}, {size} px"
    _show(console, title, report["mix"])
    _show(console, "one step of the running batch", report["step"])
    _show(console, "an urgent request meets a full batch", [report["urgent"]])
    console.print(f"{report['machine']}, device {where}", soft_wrap=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
