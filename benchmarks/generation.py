"""What `benchmarks.executors` measures: one function for each table, each returning its rows as plain values."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks import architectures
from executors.batching.aside import Aside
from executors.batching.batch import RunningBatch
from executors.batching.lora import AdapterBank
from executors.batching.requests import Entered, Failed, Finished, PictureRequest
from executors.methods import adapters, pipelines

MODELS = 32
RANK = 4
STEPS = (8, 12, 16, 24)
PROMPTS = ("a red star", "a blue house on a white background", "a green circle", "a yellow robot")
GUIDANCE = 3.0
RELOADED = 16
"""Requests that are made with a LoRA loaded for each."""
BATCHES = (1, 2, 4, 8, 16)
Made = dict[str, np.ndarray[Any, Any]]
Fresh = Callable[[], pipelines.LoadedPipeline]
"""Loads or builds the model anew."""


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


def _in_time(requests: Sequence[Any], limit_s: float) -> Iterator[Any]:
    """Requests until a time has passed, at least one: where one comes after the other, some of them say what each costs."""
    began = time.perf_counter()
    for number, request in enumerate(requests):
        if number and time.perf_counter() - began > limit_s:
            return
        yield request


def one_by_one(loaded: pipelines.LoadedPipeline, requests: Sequence[PictureRequest], limit_s: float) -> Made:
    """A call for each request; its LoRA is picked among those loaded."""
    made: Made = {}
    for request in _in_time(requests, limit_s):
        loaded.pipe.set_adapters([request.adapters[0][0]])
        made |= _called(loaded, [request])
    return made


def reloaded(
    loaded: pipelines.LoadedPipeline,
    requests: Sequence[PictureRequest],
    known: dict[str, dict[str, torch.Tensor]],
    limit_s: float,
) -> Made:
    """A call for each request, before which its LoRA takes the place of the last one."""
    made: Made = {}
    for request in _in_time(requests, limit_s):
        name = request.adapters[0][0]
        loaded.pipe.load_lora_weights(dict(known[name]), adapter_name=name)
        made |= _called(loaded, [request])
        loaded.pipe.unload_lora_weights()
    return made


def static(loaded: pipelines.LoadedPipeline, requests: Sequence[PictureRequest], limit_s: float) -> Made:
    """A call for all requests of one model and step count."""
    groups: dict[tuple[str, int], list[PictureRequest]] = {}
    for request in requests:
        groups.setdefault((request.adapters[0][0], request.steps), []).append(request)
    made: Made = {}
    for (name, _steps), group in _in_time(list(groups.items()), limit_s):
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
    fresh: Fresh, requests: Sequence[PictureRequest], capacity: int, limit_s: float = math.inf
) -> list[dict[str, Any]]:
    """Make all requests in each way; rates (on a CPU by processor time), and how far pictures are from those made one by one.

    Ways that make one after the other stop after `limit_s`.
    """
    loaded = fresh()
    known = random_adapters(loaded, min(len(requests), MODELS))  # The first requests are those of the first models.
    bank = AdapterBank(loaded)
    for name, tensors in known.items():
        bank.put(name, tensors)
    batch = RunningBatch(loaded, capacity=capacity, bank=bank)
    plain, bare = fresh(), fresh()
    for name, tensors in known.items():
        plain.pipe.load_lora_weights(dict(tensors), adapter_name=name)
    ways: dict[str, Callable[[Sequence[PictureRequest]], Made]] = {
        "ours": lambda few: ours(batch, few),
        "one by one": lambda few: one_by_one(plain, few, limit_s),
        "reloaded": lambda few: reloaded(bare, few, known, limit_s),
        "static": lambda few: static(plain, few, limit_s),
    }
    rows: list[dict[str, Any]] = []
    pictures: dict[str, Made] = {}
    for way, run in ways.items():
        run([replace(request, steps=2) for request in requests[:2]])
        some = requests[:RELOADED] if way == "reloaded" else requests
        taken: list[float] = []
        began = time.process_time()
        with _timed(taken, loaded.device):
            pictures[way] = run(some)
        used_s = time.process_time() - began
        # On a CPU that others use too, what it did for us says more than the time that passed.
        counted, made = used_s if loaded.device.type == "cpu" else taken[0], len(pictures[way])
        rows.append(
            {"way": way, "made": made, "seconds": taken[0], "cpu_seconds": used_s, "pictures_per_s": made / counted}
        )
    for row in rows:
        row["ours_times"] = rows[0]["pictures_per_s"] / row["pictures_per_s"]
        both = pictures[row["way"]].keys() & pictures["one by one"].keys()
        off = [np.abs(pictures[row["way"]][id] - pictures["one by one"][id]).max() for id in both]
        row["largest_difference"] = float(max(off))
    return rows


def step_times(fresh: Fresh, size: int, repeats: int, batches: Sequence[int] = BATCHES) -> list[dict[str, Any]]:
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


def urgent_wait(fresh: Fresh, size: int, capacity: int) -> dict[str, Any]:
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


def switching(fresh: Fresh) -> list[dict[str, Any]]:
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


def gaps(fresh: Fresh, size: int, capacity: int, steps: int) -> list[dict[str, Any]]:
    """The time between two calls of the network in a full batch while others come and end, by who begins and decodes them.

    The stepping thread's own processor time says what it did meanwhile, also where other programs use the processor.
    """
    rows = []
    for way in ("nobody comes or ends", "between the steps", "beside the steps"):
        loaded = fresh()
        aside = Aside(loaded.device) if way == "beside the steps" else None
        batch = RunningBatch(loaded, capacity=capacity, aside=aside)
        lasting = capacity if way.startswith("nobody") else 1
        base = PictureRequest("", PROMPTS[0], steps=steps, guidance=GUIDANCE, width=size, height=size)
        for index in range(lasting):
            batch.admit(replace(base, id=f"long-{index}", seed=index))
        between = _Between(loaded)
        entered = made = 0
        while "long-0" in batch:
            while entered - made < capacity - lasting:
                # Each a step longer than the last one, so that they do not end together.
                own_steps = 2 + entered % max(1, steps // 5)
                batch.admit(replace(base, id=str(entered), steps=own_steps, prompt=f"{PROMPTS[1]} {entered}"))
                entered += 1
            made += sum(isinstance(event, Finished) and not event.id.startswith("long") for event in batch.step())
            if "long-0" not in batch.running:
                break
        if aside is not None:
            aside.close()
        rows.append({"way": way, **between.row(), "others_made": made})
    return rows


class _Between:
    """Listens when the network is called and when it has answered. The first calls, which begin everybody, are left out."""

    def __init__(self, loaded: pipelines.LoadedPipeline) -> None:
        self._device = loaded.device
        self._answered: tuple[float, float] | None = None
        self._called = (0.0, 0.0)
        self._gaps: list[tuple[float, float]] = []
        self._calls: list[float] = []
        loaded.denoiser.register_forward_pre_hook(self._before)
        loaded.denoiser.register_forward_hook(self._after)

    def row(self) -> dict[str, Any]:
        """Milliseconds: of a call, median; between calls, the stepping thread's own and all that passed."""
        own, passed = zip(*self._gaps[2:], strict=True)
        return {
            "calls": len(self._calls),
            "call_ms": median(self._calls) * 1e3,
            "own_gap_ms": median(own) * 1e3,
            "longest_own_gap_ms": max(own) * 1e3,
            "gap_ms": median(passed) * 1e3,
            "longest_gap_ms": max(passed) * 1e3,
        }

    def _before(self, *_: Any) -> None:
        self._called = self._now()
        if self._answered is not None:
            self._gaps.append((self._called[0] - self._answered[0], self._called[1] - self._answered[1]))

    def _after(self, *_: Any) -> None:
        self._answered = self._now()
        self._calls.append(self._answered[1] - self._called[1])

    def _now(self) -> tuple[float, float]:
        if self._device.type == "cuda":
            # What is beside the steps has streams of its own, which no step waits for.
            torch.cuda.current_stream(self._device).synchronize()
        return time.thread_time(), time.perf_counter()


def compiled(
    fresh: Fresh, size: int, steps: int, batches: Sequence[int], found: Callable[[dict[str, Any]], None]
) -> None:
    """Diffusers' own pipeline without a LoRA, as it is and under torch.compile; each row is told as soon as it is known."""
    for way in ("as it is", "torch.compile"):
        loaded = fresh()
        if way == "torch.compile":
            loaded.pipe.unet = torch.compile(loaded.pipe.unet, dynamic=False)
        for count in batches:
            requests = [
                PictureRequest(str(n), PROMPTS[0], seed=n, steps=steps, width=size, height=size) for n in range(count)
            ]
            began = time.perf_counter()
            _called(loaded, [replace(request, steps=2) for request in requests])
            first_s = time.perf_counter() - began
            taken: list[float] = []
            with _timed(taken, loaded.device):
                _called(loaded, requests)
            found(
                {
                    "way": way,
                    "pictures": count,
                    "pictures_per_s": count / taken[0],
                    "ms_a_step": taken[0] / steps * 1e3,
                    "first_call_s": first_s,
                }
            )
