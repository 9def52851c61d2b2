"""The placement policies of the packing experiment, for a few nodes and every shape at once.

They give the same scores as the engine's scorers of the same names (in hundredths instead of thousandths); a test runs both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from engine.levels.scoring.fragmentation import Fragmentation
from engine.levels.scoring.vectors import MOST_GPU_SHARE, dot_product, least_left
from engine.resources import WHOLE_GPU

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
_NO_DEVICE = np.iinfo(np.int64).max // 4
_STEP = WHOLE_GPU + 1
"""Free shares in a row of the table."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """The distinct demands of a pod list, as columns; those that share one GPU come first."""

    shared: int
    """How many share one GPU."""
    cpu: Ints
    memory: Ints
    gpus: Ints
    share: Ints
    """Thousandths of each GPU."""
    slot: Ints
    """Column of the device that must have the share for all GPUs to have it, when a node's devices stand fullest first."""
    tag: Ints
    """Bit of the shape's kind for GPU clustering; 0 without GPUs."""
    access: Bools
    """[model of the node, shape]: the node's GPUs will do, and a node can have as many."""

    def __len__(self) -> int:
        return len(self.cpu)


@dataclass(slots=True)
class Nodes:
    """Nodes of one or several runs, as columns; `left` is [node, device] in thousandths, 0 for a device that is not there."""

    cpu: Ints
    memory: Ints
    left: Ints
    gpus: Ints
    model: Ints
    tags: Ints
    """Kinds of the Pods on the node, as bits."""

    def __len__(self) -> int:
        return len(self.cpu)

    def take(self, rows: Ints) -> Nodes:
        """Return copies of these rows."""
        return Nodes(
            self.cpu[rows], self.memory[rows], self.left[rows], self.gpus[rows], self.model[rows], self.tags[rows]
        )


class Policy(Protocol):
    """Scores nodes for every shape, and chooses the device for a shape that shares one."""

    def scores(self, nodes: Nodes, shapes: Shapes) -> Ints:
        """Return int64[node, shape], at least 0 where the shape fits; the caller masks where it does not."""
        ...

    def devices(self, nodes: Nodes, shapes: Shapes, rows: Ints, draw: npt.NDArray[np.float64] | None) -> Ints:
        """Return for each node the device that the shape in `rows` shares; it is one that has the share."""
        ...


class FirstFit:
    """Every node is as good as any other; the fullest device that has the share."""

    def scores(self, nodes: Nodes, shapes: Shapes) -> Ints:
        """Return 0."""
        return np.zeros((len(nodes), len(shapes)), dtype=np.int64)

    def devices(self, nodes: Nodes, shapes: Shapes, rows: Ints, draw: npt.NDArray[np.float64] | None) -> Ints:
        """Return the fullest device, the first among equals."""
        left = nodes.left
        fullest: Ints = np.where(left >= shapes.share[rows][:, None], left, WHOLE_GPU + 1).argmin(axis=1)
        return fullest


class Random(FirstFit):
    """Any node (the draws decide between equals), any device that has the share."""

    def devices(self, nodes: Nodes, shapes: Shapes, rows: Ints, draw: npt.NDArray[np.float64] | None) -> Ints:
        """Return a device that is drawn."""
        if draw is None:
            return super().devices(nodes, shapes, rows, draw)
        return drawn(nodes.left >= shapes.share[rows][:, None], draw)


class DotProduct(FirstFit):
    """Prefer the node whose free vector points least where the demand's does."""

    def scores(self, nodes: Nodes, shapes: Shapes) -> Ints:
        """Return hundredths."""
        free = nodes.left.sum(axis=1)
        scores: Ints = dot_product(nodes.cpu[:, None], free[:, None], shapes.cpu, shapes.share * shapes.gpus)
        return np.clip(scores, 0, 100)


class BestFit(FirstFit):
    """Prefer the node on which the least CPU and GPU is left."""

    def scores(self, nodes: Nodes, shapes: Shapes) -> Ints:
        """Return hundredths."""
        free = nodes.left.sum(axis=1)
        scores: Ints = least_left(nodes.cpu[:, None], free[:, None], shapes.cpu, shapes.share * shapes.gpus)
        return np.clip(scores, 0, 100)


class WorstFit(BestFit):
    """Prefer the node on which the most CPU and GPU is left."""

    def scores(self, nodes: Nodes, shapes: Shapes) -> Ints:
        """Return hundredths."""
        return 100 - super().scores(nodes, shapes)


class Clustering(FirstFit):
    """Keep Pods of one kind (shared, one GPU, two GPUs ...) together; fuller nodes first."""

    def scores(self, nodes: Nodes, shapes: Shapes) -> Ints:
        """Return hundredths: three quarters and more where only the kind is, then beside others, then empty nodes."""
        full = np.maximum(0, 25 * (MOST_GPU_SHARE - nodes.left.sum(axis=1)) // MOST_GPU_SHARE)
        tags = nodes.tags[:, None]
        same = (tags & shapes.tag) != 0
        level = np.where(same, np.where(tags == shapes.tag, 75, 50), np.where(tags == 0, 25, 0))
        scores: Ints = (level + full[:, None]) * (shapes.tag > 0)
        return scores


class Packing(FirstFit):
    """Devices in use first, then free devices of nodes in use, then nodes that are not in use."""

    def scores(self, nodes: Nodes, shapes: Shapes) -> Ints:
        """Return hundredths: 50 to 100, 33 to 50, up to 33."""
        left = nodes.left
        free = (left == WHOLE_GPU).sum(axis=1)
        untouched = np.maximum(33 - free, free)[:, None]
        scores: Ints = np.maximum(33, 50 - np.maximum(1, shapes.gpus)) + np.zeros((len(nodes), 1), dtype=np.int64)
        shared = shapes.shared
        if shared:
            fits = (left[:, :, None] >= shapes.share[:shared]) & (left < WHOLE_GPU)[:, :, None]
            fullest = np.where(fits, left[:, :, None], WHOLE_GPU).min(axis=1)
            scores[:, :shared] = np.where(fullest < WHOLE_GPU, np.maximum(50, 100 - fullest // 100), 49)
        scores = np.where((free == nodes.gpus)[:, None], untouched, scores)
        scores[:, shapes.gpus == 0] = 0
        return scores


class Fgd:
    """Fragmentation gradient descent: prefer the node, and the device on it, where fragmentation grows least.

    The tables of `Fragmentation` are read flat: every gather of a few hundred numbers costs a microsecond, and ten of them are what
    a placement costs.
    """

    def __init__(self, measure: Fragmentation, models: list[str], nodes: Nodes, shapes: Shapes) -> None:
        self._measure = measure
        counts = nodes.left.shape[1] + 1
        gpus = np.minimum(np.arange(max(counts, int(shapes.gpus.max()) + 1)), counts - 1)
        whole = measure.whole_table[:, :, np.minimum(np.arange(counts), measure.whole_table.shape[2] - 1)]
        whole = whole * np.arange(counts)
        one = measure.share_table[:, :, WHOLE_GPU]
        taken = gpus * one[:, :, None, None] + whole[:, :, np.maximum(np.arange(counts)[:, None] - gpus, 0)]
        self._classes, self._counts, self._wide = whole.shape[1], counts, len(gpus)
        self._share = measure.share_table.reshape(-1)
        self._whole = whole.reshape(-1)
        """(model, class, wholly free devices) -> what shapes of several GPUs take off."""
        self._opened = (whole - np.concatenate([whole[:, :, :1], whole[:, :, :-1]], axis=2)).reshape(-1)
        """(model, class, wholly free devices) -> what is lost of that when one of them is begun."""
        self._taken = taken.reshape(-1)
        """(model, class, wholly free devices, whole GPUs taken) -> what these were, and what shapes of several take off then."""
        self._steps = np.array(measure.steps, dtype=np.int64)
        self._most = most = int(max(nodes.cpu.max(), shapes.cpu.max()))
        steps = np.array(measure.cpu_steps, dtype=np.int64)
        self._class: Ints = np.searchsorted(steps, np.arange(-most, most + 1), side="right").astype(np.int64)
        self._now = self._class[most:]
        self._shift = most - shapes.cpu
        self._model: Ints = np.array([measure.model(name) for name in models], dtype=np.int64)
        self._first = (self._model * self._classes)[:, None]
        self._rows = ((self._first + np.arange(self._classes)) * _STEP)[:, :, None]
        self._gpus = shapes.gpus[shapes.shared :]

    def scores(self, nodes: Nodes, shapes: Shapes) -> Ints:
        """Return hundredths."""
        left, shared = nodes.left, shapes.shared
        first = self._first[nodes.model]
        free = (left == WHOLE_GPU).sum(axis=1)[:, None]
        sums = self._share.take(self._rows[nodes.model] + left[:, None, :]).sum(axis=2)
        row = np.arange(0, sums.size, self._classes)[:, None]
        now = self._now.take(nodes.cpu)[:, None]
        before = sums.take(row + now) - self._whole.take((first + now) * self._counts + free)
        after = self._class.take(nodes.cpu[:, None] + self._shift)
        decrease = before - sums.take(row + after)
        at = (after + first) * self._counts + free
        if shared < len(shapes):
            decrease[:, shared:] += self._taken.take(at[:, shared:] * self._wide + self._gpus)
        if shared:
            some = left[:, :, None]
            rest = some - shapes.share[:shared]
            base = ((after[:, :shared] + first) * _STEP)[:, None, :]
            least = self._share.take(base + rest, mode="clip")
            least -= self._share.take(base + some)
            if free.any():
                at = at[:, :shared]
                least += (some == WHOLE_GPU) * self._opened.take(at)[:, None, :]
                decrease[:, :shared] += self._whole.take(at)
            np.copyto(least, _NO_DEVICE, where=rest < 0)
            decrease[:, :shared] -= least.min(axis=1)
        scores: Ints = self._steps.searchsorted(decrease, side="right")
        return scores

    def devices(self, nodes: Nodes, shapes: Shapes, rows: Ints, draw: npt.NDArray[np.float64] | None) -> Ints:
        """Return the device with the best score, the first among equals."""
        measure, shift = self._measure, self._most
        found = []
        for cpu, left, model, row in zip(
            nodes.cpu.tolist(), nodes.left.tolist(), nodes.model.tolist(), rows.tolist(), strict=True
        ):
            now, after = self._class.item(cpu + shift), self._class.item(cpu - shapes.cpu.item(row) + shift)
            found.append(measure.best_device(self._model.item(model), now, after, left, shapes.share.item(row)))
        return np.array(found, dtype=np.int64)


def drawn(allowed: Bools, draw: npt.NDArray[np.float64]) -> Ints:
    """Return for each row one of the columns that are allowed, each as likely as any other."""
    rank = np.cumsum(allowed, axis=1)
    column: Ints = (rank > np.floor(draw * rank[:, -1])[:, None]).argmax(axis=1)
    return column
