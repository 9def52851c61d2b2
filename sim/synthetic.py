"""Makes workloads like GenTD26 of any size: the same burstiness, popularity of models and users, and run times.

How it was fitted (docs/simulation.md has the table):

- Arrivals are an interrupted Poisson process times a slow random rate. Requests come in spells: the service is busy a quarter of
  the time. Spells of 2,500 s and pauses of 7,500 s on average give the index of dispersion at 1 and 10 minutes and the variation
  of the gaps; the slow lognormal rate (a day's memory) adds the dispersion at an hour and the peaks.
- Users (groups) come back: a request belongs to the user of a recent request with probability `session`, otherwise to a user drawn
  from a Zipf law. A user stays with their last model with probability `loyalty` (equal models in a row: .71 measured).
- Run time is lognormal: the model's level x images^.14 x steps^.26 x LoRA, times a user's level and noise of .26, which is how much
  equal requests of one user differ minutes apart.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import numpy as np

from engine.tasks import SECOND
from sim.columns import Columns
from sim.gentd26 import DEMAND
from sim.workload import Workload, WorkloadError

_T = TypeVar("_T")
_IMAGES = ((1, 0.580), (4, 0.191), (8, 0.147), (2, 0.082))
_STEPS = ((30, 0.908), (40, 0.051), (28, 0.008), (35, 0.010), (25, 0.008), (20, 0.007), (50, 0.008))
_LEVELS = (-0.20, 0.50, -0.10, -0.10, 0.85, 0.0, -0.10, -0.05, -0.05, 0.45)
"""Logarithm of the ten most used models' run times beside the others', as measured; the rest are drawn."""
_KINDS = (("TXT_2_IMG", 0.911), ("IMG_2_IMG", 0.082), ("INPAINTING", 0.007))
_KIND_INDEX = {name: index for index, (name, _) in enumerate(_KINDS)}


@dataclass(frozen=True, slots=True)
class SyntheticConfig:
    """What to make. The defaults are GenTD26's own figures; change the size, the rate and the mix at will."""

    tasks: int = 20_000
    per_day: float = 1_165.0
    """Mean rate; a higher one compresses time, so the burstiness keeps its shape."""
    tenants: int = 4
    urgent_share: float = 0.1
    training_share: float = 0.0
    """Share of DreamBooth trainings, which GenTD26 has none of; their run time comes from the hardware model."""
    groups: int = 4_247
    group_zipf: float = 0.81
    models: int = 86
    model_zipf: float = 2.4
    model_shift: float = 3.0
    """Popularity of the model of rank r is ``(r + 1 + shift) ** -zipf``: the first few models are nearly equals."""
    loras: int = 874
    lora_zipf: float = 0.92
    lora_share: float = 0.161
    session: float = 0.60
    loyalty: float = 0.71
    busy_share: float = 0.25
    spell_s: float = 2_500.0
    slow_sigma: float = 0.45
    slow_memory_s: float = 86_400.0
    noise_sigma: float = 0.26
    failure_share: float = 0.015
    separate_lora_loads: bool = False
    """Take adapters' load times out of the run times and let the world load them, so that residency pays."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be made."""
        for name in ("tasks", "tenants", "groups", "models", "loras"):
            if getattr(self, name) < 1:
                raise WorkloadError(f"synthetic.{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("per_day", "spell_s", "slow_memory_s"):
            if not getattr(self, name) > 0:
                raise WorkloadError(f"synthetic.{name}: must be greater than 0, got {getattr(self, name)}")
        for name in ("urgent_share", "training_share", "lora_share", "session", "loyalty", "failure_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise WorkloadError(f"synthetic.{name}: must lie between 0 and 1, got {getattr(self, name)}")
        if not 0 < self.busy_share <= 1:
            raise WorkloadError(f"synthetic.busy_share: must be above 0 and at most 1, got {self.busy_share}")


class Zipf:
    """Ranks below `count` with probability proportional to ``(rank + 1 + shift) ** -exponent``."""

    __slots__ = ("_cumulative",)

    def __init__(self, count: int, exponent: float, shift: float = 0.0) -> None:
        weights = list(accumulate((rank + 1 + shift) ** -exponent for rank in range(count)))
        self._cumulative = [weight / weights[-1] for weight in weights]

    def rank(self, uniform: float) -> int:
        """Return the rank for a uniform draw."""
        return min(len(self._cumulative) - 1, bisect_left(self._cumulative, uniform))


def make(config: SyntheticConfig) -> Workload:
    """Make the workload; the same configuration gives the same tasks, byte for byte."""
    times = _arrival_times(config, np.random.default_rng([config.seed, 1]))
    columns = _columns(config, times, np.random.default_rng([config.seed, 2]))
    columns = columns.ranked(config.tenants, config.urgent_share, config.seed)
    return Workload(
        f"synthetic-{config.tasks}-seed-{config.seed}",
        columns,
        (("made", "like GenTD26"), ("per_day", config.per_day)),
    )


def _arrival_times(config: SyntheticConfig, rng: np.random.Generator) -> list[int]:
    """Draw arrival times in microseconds, in order."""
    native = 1_165.0 / 86_400.0
    compress = config.per_day / 1_165.0
    pause_s = config.spell_s * (1 - config.busy_share) / config.busy_share
    rate_in_spell = native / config.busy_share
    sigma = config.slow_sigma
    level = float(rng.standard_normal())
    clock = 0.0
    made: list[float] = []
    while len(made) < config.tasks:
        spell = float(rng.exponential(config.spell_s))
        rate = rate_in_spell * math.exp(sigma * level - sigma * sigma / 2)
        count = int(rng.poisson(rate * spell))
        made.extend((clock + np.sort(rng.random(count)) * spell).tolist())
        pause = float(rng.exponential(pause_s)) if pause_s else 0.0
        clock += spell + pause
        memory = math.exp(-(spell + pause) / config.slow_memory_s)
        level = memory * level + math.sqrt(1 - memory * memory) * float(rng.standard_normal())
    origin = made[0]
    return [round((moment - origin) / compress * SECOND) for moment in made[: config.tasks]]


def _columns(config: SyntheticConfig, times: list[int], rng: np.random.Generator) -> Columns:
    groups = Zipf(config.groups, config.group_zipf)
    models = Zipf(config.models, config.model_zipf, config.model_shift)
    loras = Zipf(config.loras, config.lora_zipf)
    model_level = rng.normal(0.0, 0.25, config.models)
    model_level[: len(_LEVELS)] = _LEVELS[: config.models]
    levels = model_level.tolist()
    user_level = rng.normal(0.0, 0.18, config.groups).tolist()
    recent: deque[int] = deque(maxlen=12)
    favourite: dict[int, int] = {}
    with_lora: dict[int, bool] = {}
    rows = array("q")
    """Eight numbers a task: (group, model, images, steps, kind, lora, run time in microseconds, fails)."""
    for _ in times:
        draw = rng.random(10).tolist()
        returning = recent and draw[0] < config.session
        group = recent[int(draw[1] * len(recent))] if returning else groups.rank(draw[1])
        recent.append(group)
        if group not in favourite or draw[2] >= config.loyalty:
            favourite[group] = models.rank(draw[3])
            with_lora[group] = draw[4] < config.lora_share
        model = favourite[group]
        wears = with_lora[group]
        if draw[9] < config.training_share:
            rows.extend((group, model, -1, -1, -1, -1, -1, 0))
            continue
        images, steps, kind = _pick(_IMAGES, draw[5]), _pick(_STEPS, draw[6]), _pick(_KINDS, draw[7])
        log_s = 2.90 + levels[model] + user_level[group] + config.noise_sigma * float(rng.standard_normal())
        log_s += 0.14 * math.log(images) + 0.26 * math.log(steps / 30) + (0.80 if wears else 0.0)
        log_s += 0.35 * float(rng.exponential(1.0)) if rng.random() < 0.10 else 0.0
        seconds = min(600.0, math.exp(log_s))
        lora = loras.rank(float(rng.random())) if wears else -1
        if config.separate_lora_loads and wears:
            seconds = max(1.0, seconds - 4.4)
        fails = draw[8] < config.failure_share
        rows.extend((group, model, images, steps, _KIND_INDEX[kind], lora, round(seconds * SECOND), fails))
    table = np.frombuffer(rows, dtype=np.int64).reshape(len(times), 8)
    group_of, model_of, images_of, steps_of, kind_of, lora_of, work_us, failing = (
        np.ascontiguousarray(table[:, column]) for column in range(8)
    )
    return Columns(
        at=np.array(times, dtype=np.int64),
        group=group_of,
        model=model_of,
        images=images_of,
        steps=steps_of,
        kind=kind_of,
        lora=lora_of,
        work_us=work_us,
        fails=failing > 0,
        kinds=tuple(name for name, _ in _KINDS),
        separate_loras=config.separate_lora_loads,
        demand=DEMAND,
    )


def _pick(table: tuple[tuple[_T, float], ...], uniform: float) -> _T:
    """Pick from a table of (value, share); what the shares leave goes to the first value."""
    for value, share in table:
        if uniform < share:
            return value
        uniform -= share
    return table[0][0]
