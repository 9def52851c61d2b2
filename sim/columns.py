"""A workload as columns of numbers: a million arrivals in tens of megabytes, each made into a task when it is looked at."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import overload

import numpy as np
import numpy.typing as npt

from engine.resources import Demand
from engine.tasks import URGENT_PRIORITY, Affinity, FailureCause, Micros, TaskSpec, TaskType
from sim.draws import choice, lognormal, unit
from sim.maker import Maker
from sim.workload import Arrival, Truth

Ints = npt.NDArray[np.int64]

_SPECS, _TRUTHS, _ARRIVALS = Maker(TaskSpec), Maker(Truth), Maker(Arrival)
_REST = tuple(field.default for field in fields(TaskSpec))[16:]
"""What every task leaves as it is."""
_TP, _GC, _PREFERRED = TaskType.TP, TaskType.GC, Affinity.PREFERRED
_DECLARED_STEP_US = 5_000_000
_TRAINING_FEATURES = (("images", 4), ("steps", 400))


class _Names(dict[int, str]):
    """Numbers as names, each made once: equal names are one object, which the dictionaries find sooner."""

    def __init__(self, stem: str) -> None:
        self.stem = stem

    def __missing__(self, number: int) -> str:
        name = self[number] = f"{self.stem}{number:04d}"
        return name


@dataclass(frozen=True, slots=True, eq=False)
class Columns(Sequence[Arrival]):
    """Arrivals in time order, one row each; `kind`, `images`, `steps` and `lora` hold -1 where they do not apply."""

    at: Ints
    """Microseconds from the beginning."""
    group: Ints
    model: Ints
    images: Ints
    steps: Ints
    kind: Ints
    """Index in `kinds`; -1: a training."""
    lora: Ints
    work_us: Ints
    """-1: the hardware model works it out."""
    fails: npt.NDArray[np.bool_]
    kinds: tuple[str, ...]
    separate_loras: bool
    demand: Demand
    tenant: Ints | None = None
    urgent: npt.NDArray[np.bool_] | None = None
    declared_us: Ints | None = None
    """-1: none."""
    slots: int = 1
    first: int = 0
    """Number of the first row, which names the tasks."""

    def __len__(self) -> int:
        """Return the number of arrivals."""
        return len(self.at)

    @overload
    def __getitem__(self, index: int) -> Arrival: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Arrival, ...]: ...
    def __getitem__(self, index: int | slice) -> Arrival | tuple[Arrival, ...]:
        """Make one arrival, or several."""
        if isinstance(index, slice):
            return tuple(self[row] for row in range(*index.indices(len(self))))
        row = range(len(self))[index]
        return next(self._rows(row, row + 1))

    def __iter__(self) -> Iterator[Arrival]:
        """Make every arrival, in order."""
        for start in range(0, len(self), 8192):
            yield from self._rows(start, min(len(self), start + 8192))

    def _rows(self, start: int, stop: int) -> Iterator[Arrival]:
        none = [-1] * (stop - start)
        ranks = none if self.tenant is None else self.tenant[start:stop].tolist()
        rows = zip(
            self.at[start:stop].tolist(),
            self.group[start:stop].tolist(),
            self.model[start:stop].tolist(),
            self.images[start:stop].tolist(),
            self.steps[start:stop].tolist(),
            self.kind[start:stop].tolist(),
            self.lora[start:stop].tolist(),
            self.work_us[start:stop].tolist(),
            self.fails[start:stop].tolist(),
            ranks,
            none if self.urgent is None else self.urgent[start:stop].tolist(),
            none if self.declared_us is None else self.declared_us[start:stop].tolist(),
            strict=True,
        )
        number = self.first + start
        users, loras = _Names("G"), _Names("lora-")
        models, tenants = _Names("M"), {rank: f"tenant-{max(0, rank)}" for rank in dict.fromkeys(ranks)}
        for at, group, model, images, steps, kind, lora, work_us, fails, tenant, urgent, declared_us in rows:
            user = users[group]
            lora_name = loras[lora] if lora >= 0 else ""
            features: tuple[tuple[str, str | int | float], ...]
            if kind < 0:
                features = (*_TRAINING_FEATURES, ("user", user))
            elif lora < 0:
                features = (
                    ("images", images),
                    ("kind", self.kinds[kind]),
                    ("loras", 0),
                    ("steps", steps),
                    ("user", user),
                )
            else:
                features = (
                    ("images", images),
                    ("kind", self.kinds[kind]),
                    ("lora_set", lora_name),
                    ("loras", 1),
                    ("steps", steps),
                    ("user", user),
                )
            own = (
                f"synthetic-{number:07d}",
                tenants[tenant],
                user,
                _TP if kind < 0 else _GC,
                "dreambooth" if kind < 0 else "text_to_image",
                models[model],
                URGENT_PRIORITY if urgent is True else 0,
                self.demand,
                self.slots,
                1,
                _PREFERRED,
                None,
                None,
                3,
                declared_us if declared_us >= 0 else None,
                features,
            )
            task: TaskSpec = _SPECS.make(own + _REST)
            truth: Truth = _TRUTHS.make(
                (
                    work_us if work_us >= 0 else None,
                    FailureCause.BAD_INPUT if fails else None,
                    0,
                    (lora_name,) if lora >= 0 and self.separate_loras else (),
                    None,
                )
            )
            arrival: Arrival = _ARRIVALS.make((at, task, truth))
            yield arrival
            number += 1

    def digest(self) -> str:
        """Return a fingerprint of every row."""
        fold = hashlib.blake2b(repr((self.kinds, self.separate_loras, self.demand, self.slots)).encode(), digest_size=8)
        for column in (
            self.at,
            self.group,
            self.model,
            self.images,
            self.steps,
            self.kind,
            self.lora,
            self.work_us,
            self.fails,
            self.tenant,
            self.urgent,
            self.declared_us,
        ):
            fold.update(b"|" if column is None else np.ascontiguousarray(column).tobytes())
        return fold.hexdigest()

    def limited(self, count: int) -> Columns:
        """Return the first `count` rows."""
        columns = ("at", "group", "model", "images", "steps", "kind", "lora", "work_us", "fails")
        cut = {name: getattr(self, name)[:count] for name in columns}
        for name in ("tenant", "urgent", "declared_us"):
            column = getattr(self, name)
            cut[name] = None if column is None else column[:count]
        return replace(self, **cut)

    def scaled(self, rate: float) -> Columns:
        """Return the rows `rate` times as fast."""
        at: list[Micros] = [round(moment / rate) for moment in self.at.tolist()]
        return replace(self, at=np.array(at, dtype=np.int64))

    def ranked(self, tenants: int, urgent_share: float, seed: int) -> Columns:
        """Spread groups over tenants and make a share of the tasks urgent, by draws keyed by identity."""
        of_group = {
            group: choice(tenants, seed, "tenant", f"G{group:04d}") for group in dict.fromkeys(self.group.tolist())
        }
        rows = range(self.first, self.first + len(self))
        return replace(
            self,
            tenant=np.array([of_group[group] for group in self.group.tolist()], dtype=np.int64),
            urgent=np.array([unit(seed, "urgent", f"synthetic-{row:07d}") < urgent_share for row in rows], dtype=bool),
        )

    def demanding(self, demand: Demand, slots: int) -> Columns:
        """Have every task ask for this, and its Pod run so many at once."""
        return replace(self, demand=demand, slots=slots)

    def declared(self, sigma: float, seed: int) -> Columns:
        """Let callers declare run times: the true one times a lognormal error, rounded up to 5 s; trainings declare none."""
        step = _DECLARED_STEP_US
        declared = [
            -1
            if work < 0
            else -(-round(work * lognormal(sigma, seed, "declared", f"synthetic-{row:07d}")) // step) * step
            for row, work in enumerate(self.work_us.tolist(), self.first)
        ]
        return replace(self, declared_us=np.array(declared, dtype=np.int64))
