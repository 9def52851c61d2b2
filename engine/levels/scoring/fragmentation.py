"""How much free GPU of a node the usual work cannot use: the measure that fragmentation gradient descent (FGD) goes down.

Definitions of Weng et al., "Beware of Fragmentation", USENIX ATC 2023, sections 3 and 4, in whole numbers: instead of a popularity
in percent every typical shape carries a count, so a fragmentation is counts x thousandths of a GPU and no rounding decides a tie.

For a typical shape that does not fit on a node, all its free share is a fragment; for one that fits, the devices with less free
share than one of its GPUs asks for are. Shapes of one GPU (and of several whole ones) make that a sum over devices, read from a
table by (class of free CPU, free share): a node costs one look-up per device.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, log

import numpy as np
import numpy.typing as npt

from engine.resources import WHOLE_GPU

Table = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Typical:
    """A shape of the usual work and how often it comes."""

    count: int
    cpu_milli: int = 0
    gpus: int = 1
    gpu_share: int = WHOLE_GPU
    gpu_models: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"typical.count: {self.count} is wrong; use a whole number of at least 1")
        if self.gpus and not 1 <= self.gpu_share <= WHOLE_GPU:
            raise ValueError(f"typical.gpu_share: {self.gpu_share} is wrong; a GPU has 1 to {WHOLE_GPU} thousandths")
        if self.gpus > 1 and self.gpu_share != WHOLE_GPU:
            raise ValueError(
                f"typical.gpu_share: a shape of {self.gpus} GPUs takes whole ones; use {WHOLE_GPU}, not {self.gpu_share}"
            )


def most_popular(shapes: Iterable[Typical], percent: int = 95) -> tuple[Typical, ...]:
    """Return the most frequent shapes that make up this part of all by count, the most frequent first."""
    ranked = sorted(
        shapes, key=lambda each: (-each.count, -each.cpu_milli, -each.gpu_share, -each.gpus, each.gpu_models)
    )
    total = sum(each.count for each in ranked)
    kept: list[Typical] = []
    reached = 0
    for shape in ranked:
        if reached * 100 >= percent * total:
            break
        kept.append(shape)
        reached += shape.count
    return tuple(kept)


class Fragmentation:
    """Tables of one set of typical shapes; a stateless value once made."""

    def __init__(self, typical: Sequence[Typical]) -> None:
        if not typical:
            raise ValueError("typical: there is no shape; name at least one")
        self.typical = tuple(typical)
        self.total = sum(each.count for each in typical)
        """Counts of all shapes together: what one whole popularity is worth."""
        self.cpu_steps: list[int] = sorted({each.cpu_milli for each in typical})
        """Free CPU below the first is class 0, at or above the last is the last class."""
        self._models: dict[str, int] = {"": 0}
        for each in typical:
            for name in each.gpu_models:
                self._models.setdefault(name, len(self._models))
        self.share_table: Table = np.stack([self._share_table(name) for name in self._models])
        """[model, CPU class, free share] -> what one device adds."""
        self.whole_table: Table = np.stack([self._whole_table(name) for name in self._models])
        """[model, CPU class, wholly free devices] -> what shapes of several GPUs take off, per wholly free device."""
        self._share: list[list[list[int]]] = self.share_table.tolist()
        self._whole: list[list[list[int]]] = self.whole_table.tolist()
        self.steps: list[int] = [ceil(WHOLE_GPU * self.total * log(s / (100 - s))) for s in range(1, 100)]
        """The least decrease of fragmentation that scores 1, 2, ... 99."""

    def model(self, name: str) -> int:
        """Return the number under which the tables know a GPU model; 0 for every model that no shape names."""
        return self._models.get(name, 0)

    def cpu_class(self, cpu_milli: int) -> int:
        """Return the class of an amount of free CPU."""
        return bisect_right(self.cpu_steps, cpu_milli)

    def of(self, model: int, cpu_class: int, shares: Iterable[int]) -> int:
        """Return the fragmentation of a node with these free shares, in counts x thousandths of a GPU."""
        table = self._share[model][cpu_class]
        amount = whole = 0
        for share in shares:
            if share > 0:
                amount += table[share]
                if share == WHOLE_GPU:
                    whole += 1
        if whole > 1:
            by_count = self._whole[model][cpu_class]
            amount -= whole * by_count[min(whole, len(by_count) - 1)]
        return amount

    def decreases(self, model: int, now: int, after: int, shares: Sequence[int], share: int) -> dict[int, int]:
        """Return by how much fragmentation falls when a share is taken of a device: free share of the device -> decrease.

        `now` and `after` are the classes of free CPU; only devices that have the share count.
        """
        table, by_count = self._share[model][after], self._whole[model][after]
        most = len(by_count) - 1
        base, wholes = self.of(model, now, shares), 0
        for each in shares:
            if each > 0:
                base -= table[each]
                if each == WHOLE_GPU:
                    wholes += 1
        partly = base + wholes * by_count[min(wholes, most)]
        found: dict[int, int] = {}
        for each in shares:
            if each >= share and each not in found:
                if each < WHOLE_GPU:
                    found[each] = partly + table[each] - table[each - share]
                else:
                    fewer = (wholes - 1) * by_count[min(wholes - 1, most)]
                    found[each] = base + fewer + table[each] - table[each - share]
        return found

    def best_device(self, model: int, now: int, after: int, shares: Sequence[int], share: int) -> int:
        """Return the index of the device with the best score, the first among equals; one of them has the share."""
        decreases = self.decreases(model, now, after, shares, share)
        if len(decreases) == 1:
            return next(at for at, each in enumerate(shares) if each >= share)
        best = self.score(max(decreases.values()))
        good = {each for each, decrease in decreases.items() if self.score(decrease) == best}
        return next(at for at, each in enumerate(shares) if each in good)

    def score(self, decrease: int) -> int:
        """Return 100 times the sigmoid of a decrease in GPUs, rounded down (section 4.2): 50 where nothing changes."""
        return bisect_right(self.steps, decrease)

    def _allowed(self, name: str) -> list[Typical]:
        return [each for each in self.typical if each.gpus and (not each.gpu_models or name in each.gpu_models)]

    def _share_table(self, name: str) -> Table:
        table = np.zeros((len(self.cpu_steps) + 1, WHOLE_GPU + 1), dtype=np.int64)
        served = np.zeros(WHOLE_GPU + 1, dtype=np.int64)
        shares = np.arange(WHOLE_GPU + 1, dtype=np.int64)
        table[0] = shares * self.total
        for row, step in enumerate(self.cpu_steps, start=1):
            for each in self._allowed(name):
                if each.cpu_milli == step and each.gpus == 1:
                    served[each.gpu_share :] += each.count
            table[row] = shares * (self.total - served)
        return table

    def _whole_table(self, name: str) -> Table:
        most = max(2, max(each.gpus for each in self.typical))
        table = np.zeros((len(self.cpu_steps) + 1, most + 1), dtype=np.int64)
        served = np.zeros(most + 1, dtype=np.int64)
        for row, step in enumerate(self.cpu_steps, start=1):
            for each in self._allowed(name):
                if each.cpu_milli == step and each.gpus > 1:
                    served[each.gpus :] += each.count
            table[row] = WHOLE_GPU * served
        return table
