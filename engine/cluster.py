"""The physical resource list: nodes x resources and nodes x GPUs as numpy arrays, with plain integers beside them.

The arrays serve vectorised filters and scorers; the integers on `Node` and `Gpu` serve decisions about one node, where reading a
numpy scalar costs more than the decision. Every change goes through `put`, which keeps both and notes the node in a log, so that
whoever caches something per node looks again only at nodes that changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from engine.entities import Gpu, Node
from engine.resources import WHOLE_GPU, Demand, GpuGrant, GpuSpec, NodeSpec

CPU, MEMORY, DISK, NETWORK, UNOFFERED = range(5)
BASE_COLUMNS = ("cpu_milli", "memory_bytes", "disk_bytes", "network_bps", "")
"""The last one stands for every resource that no node offers: there is none of it anywhere."""


class Trial:
    """What was taken inside `Cluster.trial()`; undone unless `commit` is called."""

    def __init__(self) -> None:
        self.taken: list[tuple[Node, tuple[GpuGrant, ...], Demand]] = []
        self.committed = False

    def commit(self) -> None:
        """Keep what was taken."""
        self.committed = True


class Cluster:
    """All nodes, by row; a row is never given to another node.

    Arrays (rows beyond `len(nodes)` are unused): `free`, `total` int64[n, resources]; `gpu_share`, `gpu_memory` int64[n, gpus] hold
    what is free of each device, with share -1 where the device is absent, ill or drained; `gpu_model` int32[n, gpus]; `is_open`
    bool[n]: up and not draining; `exclusive` int64[n]: the group's number or -1; `pods` int32[n].
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.by_name: dict[str, Node] = {}
        self.columns: dict[str, int] = {name: i for i, name in enumerate(BASE_COLUMNS)}
        self.models: dict[str, int] = {}
        self.cards: dict[tuple[str, int], int] = {}
        """(GPU model, memory) -> how many the nodes have, lost ones included."""
        self.changes: list[int] = []
        self.epoch = 0
        """Grows when `changes` was cut: every cursor into it is void then."""
        self.version = 0
        """Grows with every change of a row."""
        self.cached: dict[str, dict[int, None]] = {}
        """Model -> rows of the nodes whose cache probably holds it."""
        self.pinning: dict[int, None] = {}
        """Rows of the nodes in whose caches models stay."""
        self._places: dict[str, npt.NDArray[np.int8]] = {}
        """The same as vectors of `place_code`, for models that many nodes hold."""
        self.topology = 0
        """Grows when what nodes have in all changed."""
        self._trials: list[Trial] = []
        self._allocate(16, len(BASE_COLUMNS), 1)

    def _allocate(self, rows: int, columns: int, gpus: int) -> None:
        self.free = np.zeros((rows, columns), dtype=np.int64)
        self.total = np.zeros((rows, columns), dtype=np.int64)
        self.gpu_share = np.full((rows, gpus), -1, dtype=np.int64)
        self.gpu_memory = np.full((rows, gpus), -1, dtype=np.int64)
        self.gpu_size = np.full((rows, gpus), -1, dtype=np.int64)
        self.gpu_model = np.full((rows, gpus), -1, dtype=np.int32)
        self.is_open = np.zeros(rows, dtype=np.bool_)
        self.exclusive = np.full(rows, -1, dtype=np.int64)
        self.pods = np.zeros(rows, dtype=np.int32)

    def _grow(self, rows: int, columns: int, gpus: int) -> None:
        have_rows, have_columns, have_gpus = len(self.is_open), self.free.shape[1], self.gpu_share.shape[1]
        if rows <= have_rows and columns <= have_columns and gpus <= have_gpus:
            return
        while have_rows < rows:
            have_rows *= 2
        self._allocate(have_rows, max(columns, have_columns), max(gpus, have_gpus))
        for node in self.nodes:
            node.free += [0] * (self.free.shape[1] - len(node.free))
            self._write_totals(node)
            self.put(node)
        self._cut_log()

    def fit_width(self, gpus: int) -> None:
        """Make the arrays wide enough for a node with this many devices."""
        self._grow(len(self.nodes), len(self.columns), gpus)

    def _cut_log(self) -> None:
        self.changes.clear()
        self.epoch += 1

    def __len__(self) -> int:
        return len(self.nodes)

    def column(self, name: str) -> int:
        """Return the column of a named resource, made on first sight."""
        column = self.columns.get(name)
        if column is None:
            column = self.columns[name] = len(self.columns)
            self._grow(len(self.nodes), len(self.columns), 1)
        return column

    def model(self, name: str) -> int:
        """Return the number of a GPU model."""
        return self.models.setdefault(name, len(self.models))

    def add(self, spec: NodeSpec) -> Node:
        """Append a new node with everything free."""
        node = Node(NodeSpec(spec.name), len(self.nodes))
        self._grow(node.index + 1, len(self.columns), len(spec.gpus))
        self.nodes.append(node)
        self.by_name[spec.name] = node
        self.describe(node, spec)
        return node

    def describe(self, node: Node, spec: NodeSpec) -> None:
        """Take over what a node says it has, keeping what its Pods hold of it."""
        wanted = {"cpu_milli": spec.cpu_milli, "memory_bytes": spec.memory_bytes, "disk_bytes": spec.disk_bytes}
        wanted["network_bps"] = spec.network_bps
        wanted.update(spec.extra)
        for name in wanted:
            self.column(name)
        old = self.totals(node.spec)
        node.free += [0] * (self.free.shape[1] - len(node.free))
        self._count_cards(node.spec.gpus, -1)
        self._count_cards(spec.gpus, 1)
        node.spec = spec
        for column, total in enumerate(self.totals(spec)):
            node.free[column] += total - old[column]
        self._describe_gpus(node, spec.gpus)
        self._grow(len(self.nodes), len(self.columns), len(node.gpus))
        self._write_totals(node)
        self.topology += 1
        self.put(node)

    def _count_cards(self, gpus: Sequence[GpuSpec], sign: int) -> None:
        for gpu in gpus:
            key = (gpu.model, gpu.memory_bytes)
            count = self.cards.get(key, 0) + sign
            if count:
                self.cards[key] = count
            else:
                del self.cards[key]

    def largest_card(self, models: Sequence[str]) -> int:
        """Return the memory of the largest GPU among these models (none: all models), in bytes; 0 when there is none."""
        return max((size for model, size in self.cards if not models or model in models), default=0)

    def totals(self, spec: NodeSpec) -> list[int]:
        """Return the amounts of a node's description by column."""
        row = [0] * len(self.columns)
        row[:UNOFFERED] = (spec.cpu_milli, spec.memory_bytes, spec.disk_bytes, spec.network_bps)
        for name, amount in spec.extra:
            row[self.columns[name]] = amount
        return row

    def _describe_gpus(self, node: Node, specs: Sequence[GpuSpec]) -> None:
        for gpu in node.gpus:
            gpu.present = False
        for spec in specs:
            if spec.uuid not in node.by_uuid:
                node.by_uuid[spec.uuid] = Gpu(spec)
                node.gpus.append(node.by_uuid[spec.uuid])
            else:
                gpu = node.by_uuid[spec.uuid]
                gpu.memory_free += spec.memory_bytes - gpu.memory_bytes
                gpu.memory_bytes = spec.memory_bytes
                gpu.model = spec.model
                gpu.healthy = spec.healthy
                gpu.present = True
        for gpu in [
            g for g in node.gpus if not g.present and g.share_free == WHOLE_GPU and g.memory_free == g.memory_bytes
        ]:
            node.gpus.remove(gpu)
            del node.by_uuid[gpu.uuid]

    def _write_totals(self, node: Node) -> None:
        for column, total in enumerate(self.totals(node.spec)):
            self.total[node.index, column] = total

    def put(self, node: Node) -> None:
        """Write a node's row from its plain values, and note that it changed."""
        row = node.index
        self.free[row, : len(node.free)] = node.free
        self.is_open[row] = node.up and not node.draining
        self.exclusive[row] = -1 if node.exclusive is None else node.exclusive.seq
        self.pods[row] = len(node.pods)
        gpus = node.gpus
        if gpus:
            width = len(gpus)
            self.gpu_share[row, :width] = [g.share_free if g.open else -1 for g in gpus]
            self.gpu_memory[row, :width] = [g.memory_free for g in gpus]
            self.gpu_size[row, :width] = [g.memory_bytes if g.open else -1 for g in gpus]
            self.gpu_model[row, :width] = [self.models.setdefault(g.model, len(self.models)) for g in gpus]
        if len(gpus) < self.gpu_share.shape[1]:
            self.gpu_share[row, len(gpus) :] = -1
            self.gpu_memory[row, len(gpus) :] = -1
            self.gpu_size[row, len(gpus) :] = -1
            self.gpu_model[row, len(gpus) :] = -1
        self._changed(row)

    def _changed(self, row: int) -> None:
        if len(self.changes) > 4096 + 2 * len(self.nodes):
            self._cut_log()
        self.changes.append(row)
        self.version += 1

    def take(self, node: Node, grants: Sequence[GpuGrant], demand: Demand) -> None:
        """Take what a Pod or a claim holds of a node."""
        self._move(node, grants, demand, -1)
        if self._trials:
            self._trials[-1].taken.append((node, tuple(grants), demand))

    def release(self, node: Node, grants: Sequence[GpuGrant], demand: Demand) -> None:
        """Give back what was taken; a device that has gone in the meantime is dropped with its last holder."""
        self._move(node, grants, demand, 1)
        for grant in grants:
            gpu = node.by_uuid[grant.uuid]
            if not gpu.present and gpu.share_free == WHOLE_GPU and gpu.memory_free == gpu.memory_bytes:
                node.gpus.remove(gpu)
                del node.by_uuid[gpu.uuid]
                self.put(node)

    def _move(self, node: Node, grants: Sequence[GpuGrant], demand: Demand, sign: int) -> None:
        self.suppose(node, grants, demand, sign)
        row = node.index
        self.free[row, : len(node.free)] = node.free
        self.pods[row] = len(node.pods)
        for column, gpu in enumerate(node.gpus) if grants else ():
            for grant in grants:
                if grant.uuid == gpu.uuid:
                    self.gpu_share[row, column] = gpu.share_free if gpu.open else -1
                    self.gpu_memory[row, column] = gpu.memory_free
        self._changed(row)

    def suppose(self, node: Node, grants: Sequence[GpuGrant], demand: Demand, sign: int) -> None:
        """Give back (1) or take (-1) in a node's plain values only: for plans about one node, which undo it before they return."""
        for column, amount in self.amounts(demand):
            node.free[column] += sign * amount
        for grant in grants:
            gpu = node.by_uuid[grant.uuid]
            gpu.share_free += sign * grant.share
            gpu.memory_free += sign * grant.memory_bytes

    def remember_model(self, node: Node, model: str, most: int) -> None:
        """Note that a node's cache probably holds a model now; of more than `most` the least used is forgotten."""
        if not model:
            return
        models = node.models
        if model in models:
            del models[model]
        else:
            self.cached.setdefault(model, {})[node.index] = None
        models[model] = None
        self.place_changed(node, model)
        if len(models) > most:
            oldest = next(iter(models))
            self.forget_model(node, oldest)

    def forget_models(self, node: Node) -> None:
        """Note that nothing is known of a node's cache."""
        for model in node.models:
            self._uncache(node, model)
        node.models.clear()
        node.expected.clear()
        node.pins.clear()
        self.pinning.pop(node.index, None)
        node.tiers = None

    def pin_model(self, node: Node, model: str) -> None:
        """Note that a model stays in a node's cache."""
        node.pins[model] = None
        self.pinning[node.index] = None

    def unpin_model(self, node: Node, model: str) -> None:
        """Note that a model may leave a node's cache."""
        node.pins.pop(model, None)
        if not node.pins:
            self.pinning.pop(node.index, None)

    def forget_model(self, node: Node, model: str) -> None:
        """Note that a node's cache does not hold a model any more."""
        if model in node.models:
            del node.models[model]
            self._uncache(node, model)
        node.expected.pop(model, None)
        if node.tiers is not None:
            node.tiers.pop(model, None)

    def _uncache(self, node: Node, model: str) -> None:
        rows = self.cached[model]
        del rows[node.index]
        if not rows:
            del self.cached[model]
            self._places.pop(model, None)
        else:
            places = self._places.get(model)
            if places is not None and node.index < len(places):
                places[node.index] = 0

    def place_changed(self, node: Node, model: str) -> None:
        """Note that a node holds a model, maybe somewhere else than before."""
        places = self._places.get(model)
        if places is not None and node.index < len(places):
            places[node.index] = place_code(node, model)

    def places(self, model: str) -> npt.NDArray[np.int8]:
        """Return for every node where it holds a model, as `place_code` says it."""
        places = self._places.get(model)
        if places is None or len(places) != len(self.nodes):
            places = np.zeros(len(self.nodes), dtype=np.int8)
            for row in self.cached.get(model, ()):
                places[row] = place_code(self.nodes[row], model)
            self._places[model] = places
        return places

    def amounts(self, demand: Demand) -> list[tuple[int, int]]:
        """Return (column, amount) for everything besides GPUs that a demand asks for."""
        found = []
        if demand.cpu_milli:
            found.append((CPU, demand.cpu_milli))
        if demand.memory_bytes:
            found.append((MEMORY, demand.memory_bytes))
        if demand.disk_bytes:
            found.append((DISK, demand.disk_bytes))
        if demand.network_bps:
            found.append((NETWORK, demand.network_bps))
        for name, amount in demand.extra:
            if amount:
                found.append((self.columns.get(name, UNOFFERED), amount))
        return found

    @contextmanager
    def trial(self) -> Iterator[Trial]:
        """Try takes out: on leaving, everything taken inside is given back, unless the trial was committed."""
        trial = Trial()
        self._trials.append(trial)
        try:
            yield trial
        finally:
            self._trials.pop()
            if trial.committed:
                if self._trials:
                    self._trials[-1].taken += trial.taken
            else:
                for node, grants, demand in reversed(trial.taken):
                    self._move(node, grants, demand, 1)


def pick_gpus(node: Node, demand: Demand) -> tuple[GpuGrant, ...] | None:
    """Choose devices of a node: for a share the fullest device that still has it, whole devices in their order.

    Returns None when too few devices fit; an empty tuple when none is asked for.
    """
    if demand.gpus == 0:
        return ()
    share, memory, models = demand.gpu_share, demand.gpu_memory_bytes, demand.gpu_models
    fitting = [
        g
        for g in node.gpus
        if g.share_free >= share and g.memory_free >= memory and g.open and (not models or g.model in models)
    ]
    if len(fitting) < demand.gpus:
        return None
    if share < WHOLE_GPU:
        fitting.sort(key=lambda g: (g.share_free, g.memory_free))
        return tuple(GpuGrant(g.uuid, share, memory) for g in fitting[: demand.gpus])
    return tuple(GpuGrant(g.uuid, WHOLE_GPU, g.memory_bytes) for g in fitting[: demand.gpus])


def place_code(node: Node, model: str) -> int:
    """Return where a node holds a model: 0 nowhere, 1 it never reported, 2 on its disk (or soon), 3 in its memory."""
    if model not in node.models:
        return 0
    tiers = node.tiers
    if tiers is None:
        return 1
    return 3 if tiers.get(model, 0) > 1 else 2
