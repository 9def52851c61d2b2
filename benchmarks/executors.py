"""How fast pictures are made for many personalised models: ``python -m benchmarks.executors [--requests 48] [--device cpu]``.

A mix of requests, each for one of 32 personalised models (random LoRAs of rank 4 on every linear layer of the networks), is made in
one run by

    ours        one running batch: every request at its own step, with its own LoRA
    one by one  diffusers' own pipeline, a call for each request; all LoRAs are loaded before and `set_adapters` picks one
    reloaded    the same, but only one LoRA is in memory: `load_lora_weights` and `unload_lora_weights` for each request
    static      diffusers' own pipeline, requests of the same model and step count in one call

of the bundled model, of ``--model DIR``, or of ``--architecture sd15`` or ``sdxl`` with random weights (nothing is downloaded). The
pictures of all four are compared. Then: step time against batch size, without LoRAs, with the same one in all rows (fused into the
weights) and with a different one in each, and what share of the device's measured matrix-product rate that is; what switching to
another model costs; how long an urgent request waits when it meets a full batch; the longest gap between two steps while others are
begun and decoded; and, with ``--compile``, diffusers' pipeline under torch.compile. On an H100, in about five minutes each:

    python -m benchmarks.executors --architecture sd15 --steps 30 --requests 64 --compile
    python -m benchmarks.executors --architecture sdxl --steps 30 --requests 16 --compile
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

from benchmarks import architectures
from benchmarks.machine import machine_line
from executors.batching.aside import Aside
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
RELOADED = 16
"""Requests that are made with a LoRA loaded for each."""
BATCHES = (1, 2, 4, 8, 16)
PARTS = ("step", "urgent", "gaps", "switching", "mix")
Made = dict[str, np.ndarray[Any, Any]]


def random_adapters(loaded: pipelines.LoadedPipeline, count: int) -> dict[str, dict[str, torch.Tensor]]:
    """Differences strong enough to be seen, under the names that diffusers reads."""
    generator = torch.Generator().manual_seed(0)
    linears = {
        adapters.weight_key(part, name): module
        for part, whole in loaded.parts.items()
        for name, module in whole.named_modules()
        # SDXL's LoRAs mostly leave its text encoders alone, and diffusers nests those differently.
        if isinstance(module, torch.nn.Linear) and (part == "unet" or loaded.family == "sd")
    }

    def one() -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for key, linear in linears.items():
            down = torch.randn((RANK, linear.in_features), generator=generator) * linear.in_features**-0.5
            up = torch.randn((linear.out_features, RANK), generator=generator) * 0.05
            tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
        return tensors

    return {f"model-{number}": one() for number in range(count)}


def mix(count: int, size: int, step_counts: Sequence[int] = STEPS) -> list[PictureRequest]:
    """Every model in turn, step counts and prompts spread over them."""
    return [
        PictureRequest(
            str(index),
            PROMPTS[index % len(PROMPTS)],
            seed=index,
            steps=step_counts[(index * 7 + index // MODELS) % len(step_counts)],
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
    """Make all requests in each way; rates (on a CPU by processor time), and how far pictures are from those made one by one."""
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
        # Each request costs the same where one comes after the other: some of them say how much.
        some = requests[:RELOADED] if way == "reloaded" else requests
        taken: list[float] = []
        began = time.process_time()
        with _timed(taken, loaded.device):
            pictures[way] = run(some)
        used = time.process_time() - began
        # On a CPU that others use too, what it did for us says more than the time that passed.
        counted = used if loaded.device.type == "cpu" else taken[0]
        rows.append({"way": way, "seconds": taken[0], "cpu_seconds": used, "pictures_per_s": len(some) / counted})
    for row in rows:
        row["ours_times"] = rows[0]["pictures_per_s"] / row["pictures_per_s"]
        both = pictures[row["way"]].keys() & pictures["one by one"].keys()
        off = [np.abs(pictures[row["way"]][id] - pictures["one by one"][id]).max() for id in both]
        row["largest_difference"] = float(max(off))
    return rows


def step_times(
    fresh: Callable[[], pipelines.LoadedPipeline], size: int, repeats: int, batches: Sequence[int] = BATCHES
) -> list[dict[str, Any]]:
    """Milliseconds of one step by pictures in it (two rows each), median, and its share of the device's matrix-product rate."""
    loaded = fresh()
    rate = architectures.matrix_rate(loaded.device, loaded.dtype, 8192 if loaded.device.type == "cuda" else 1024)
    per_row = architectures.operations_per_row(loaded, size)
    known = random_adapters(loaded, 16)
    bank = AdapterBank(loaded)
    for name, tensors in known.items():
        bank.put(name, tensors)
    rows = []
    for pictures in batches:
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
        row["tflop_per_s"] = 2 * pictures * per_row / row["mixed_ms"] / 1e9
        row["share_of_products"] = row["tflop_per_s"] * 1e12 / rate
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


def switching(fresh: Callable[[], pipelines.LoadedPipeline]) -> list[dict[str, Any]]:
    """Milliseconds until the next call is another personalised model's, median."""
    loaded, plain = fresh(), fresh()
    known = random_adapters(loaded, 6)
    bank = AdapterBank(loaded)
    for name, tensors in known.items():
        plain.pipe.load_lora_weights(dict(tensors), adapter_name=name)

    def put_and_use(name: str) -> None:
        bank.put(name, known[name])
        with bank.applied([((name, 1.0),)]):
            pass

    def use(name: str) -> None:
        with bank.applied([((name, 1.0),)]):
            pass

    def fuse(name: str) -> None:
        plain.pipe.set_adapters([name])
        plain.pipe.fuse_lora(adapter_names=[name])
        plain.pipe.unfuse_lora()

    ways: list[tuple[str, Callable[[str], Any]]] = [
        ("ours, from host memory", put_and_use),
        ("ours, in the bank", use),
        ("diffusers, set_adapters", lambda name: plain.pipe.set_adapters([name])),
        ("diffusers, fuse and unfuse", fuse),
    ]
    rows = []
    for way, act in ways:
        taken: list[float] = []
        for name in known:
            with _timed(taken, loaded.device):
                act(name)
        rows.append({"way": way, "ms": median(taken[1:]) * 1e3})
    return rows


def gaps(fresh: Callable[[], pipelines.LoadedPipeline], size: int, capacity: int) -> list[dict[str, Any]]:
    """The longest time between two steps of a picture while others come and end, by who begins and decodes them."""
    rows = []
    for way in ("between the steps", "beside the steps"):
        loaded = fresh()
        aside = Aside(loaded.device) if way == "beside the steps" else None
        batch = RunningBatch(loaded, capacity=capacity, aside=aside)
        base = PictureRequest("long", PROMPTS[0], steps=60, guidance=GUIDANCE, width=size, height=size)
        batch.admit(base)
        batch.step()
        made = entered = 0
        taken: list[float] = []
        while "long" in batch.running:
            if entered < 30 and entered - made < capacity - 1:
                batch.admit(replace(base, id=str(entered), steps=6, prompt=f"{PROMPTS[1]} {entered}"))
                entered += 1
            with _timed(taken, loaded.device):
                events = batch.step()
            made += sum(isinstance(event, Finished) for event in events)
        if aside is not None:
            aside.close()
        typical = median(taken)
        rows.append(
            {
                "way": way,
                "step_ms": typical * 1e3,
                "longest_ms": max(taken) * 1e3,
                "longest_over_step": max(taken) / typical,
                "steps_per_s": len(taken) / sum(taken),
                "others_made": made,
            }
        )
    return rows


def compiled(fresh: Callable[[], pipelines.LoadedPipeline], size: int, steps: int) -> list[dict[str, Any]]:
    """Diffusers' own pipeline without a LoRA, as it is and under torch.compile, one picture at a time and in batches."""
    rows = []
    for way in ("as it is", "torch.compile"):
        loaded = fresh()
        if way == "torch.compile":
            loaded.pipe.unet = torch.compile(loaded.pipe.unet, mode="max-autotune-no-cudagraphs", dynamic=False)
        for count in (1, 8):
            requests = [
                PictureRequest(str(n), PROMPTS[0], seed=n, steps=steps, width=size, height=size) for n in range(count)
            ]
            _called(loaded, [replace(request, steps=2) for request in requests])
            taken: list[float] = []
            with _timed(taken, loaded.device):
                _called(loaded, requests)
            rows.append(
                {"way": way, "pictures": count, "pictures_per_s": count / taken[0], "ms_a_step": taken[0] / steps * 1e3}
            )
    return rows


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


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--capacity", type=int, default=16, help="pictures in the running batch")
    parser.add_argument("--repeats", type=int, default=10, help="steps of which the median is taken")
    parser.add_argument("--steps", type=int, help="steps of every request; 8, 12, 16 and 24 in turn otherwise")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), help="pictures in one step")
    parser.add_argument("--device", default="auto")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", type=Path, default=MODEL_DIR, help="a diffusers directory; the bundled one otherwise")
    what.add_argument(
        "--architecture", choices=sorted(architectures.ARCHITECTURES), help="random weights of its shapes"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too; it takes minutes")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    if options.requests < 2 or options.capacity < 1 or options.repeats < 1 or min(options.batches) < 1:
        parser.error("--requests must be 2 or more, --capacity, --repeats and --batches 1 or more")
    if options.steps is not None and options.steps < 2:
        parser.error("--steps must be 2 or more")
    return options


def main() -> None:
    options = _options()

    def fresh() -> pipelines.LoadedPipeline:
        if options.architecture:
            return architectures.build(options.architecture, options.device)
        return pipelines.load(ModelRef(options.model.name, options.model), options.device)

    first = fresh()
    size, where, parts = first.native_size[0], first.device, architectures.parameters_of(first)
    del first
    step_counts = STEPS if options.steps is None else (options.steps,)
    report: dict[str, Any] = {"machine": _machine(device.resolve(options.device)), "parameters": parts}
    console = Console(width=110)

    def measure(name: str, title: str, run: Callable[[], Any]) -> None:
        if name in PARTS and name not in options.parts:
            return
        found = run()
        report[name] = found
        _show(console, title, found if isinstance(found, list) else [found])
        if where.type == "cuda":
            torch.cuda.empty_cache()
        if options.json:  # What was measured before something fails is not lost.
            options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    title = f"{options.requests} requests of {MODELS} models, steps {step_counts}, {size} px"
    measure("step", "one step of the running batch", lambda: step_times(fresh, size, options.repeats, options.batches))
    measure("urgent", "an urgent request meets a full batch", lambda: urgent_wait(fresh, size, options.capacity))
    measure("gaps", "the longest step while others are begun and decoded", lambda: gaps(fresh, size, options.capacity))
    measure("switching", "until the next call is another model's", lambda: switching(fresh))
    measure("mix", title, lambda: compare(fresh, mix(options.requests, size, step_counts), options.capacity))
    if options.compile:
        measure("compiled", "diffusers' pipeline without LoRAs", lambda: compiled(fresh, size, step_counts[-1]))
    console.print(f"{report['machine']}, device {where}; parameters {parts}", soft_wrap=True)


if __name__ == "__main__":
    main()
