"""What tasks ask for, each sort of it once: shapes, the kinds of Pods that serve them, and where their demands fit."""

from __future__ import annotations

from dataclasses import replace

from engine.entities import Task
from engine.fit import Fit
from engine.kinds import Kind, Shape, rounded_up
from engine.profile import Profile
from engine.resources import WHOLE_GPU, Demand
from engine.state import State


class Asked:
    """Remembers them by their keys, until the backlog is rebuilt."""

    __slots__ = ("_fits", "_kind_of", "_kinds", "_profile", "_scorers", "_shapes", "_state")

    def __init__(self, state: State, profile: Profile) -> None:
        self._state = state
        self._profile = profile
        self._scorers = profile.scorer_values()
        self._kinds: dict[tuple[str, str, int, Demand], Kind] = {}
        self._kind_of: dict[tuple[str, str, int, Demand], Kind] = {}
        """As `_kinds`, by demands as they are asked for, GPU memory and all."""
        self._fits: dict[tuple[Demand, bool], Fit] = {}
        self._shapes: dict[tuple[str, str, int, Demand, int, bool], Shape] = {}

    def clear(self) -> None:
        """Forget everything."""
        self._kinds.clear()
        self._kind_of.clear()
        self._fits.clear()
        self._shapes.clear()

    def shape_of(self, task: Task) -> Shape:
        """Return what the task asks for, once predictions and past failures are taken in."""
        spec = task.spec
        demand, memory = spec.demand, 0
        if demand.gpus:
            if task.alone:
                memory = self._at_most_a_card(max(demand.gpu_memory_bytes, task.memory_floor), demand)
            elif task.estimate is not None and self._profile.predicted_memory and demand.gpu_share < WHOLE_GPU:
                memory = task.estimate.gpu_memory_bytes
                if memory:
                    memory = self._at_most_a_card(rounded_up(memory), demand)
        key = (spec.method, spec.model, spec.slots, demand, memory, task.alone)
        shape = self._shapes.get(key)
        if shape is None:
            slots = spec.slots
            if task.alone and demand.gpus:
                demand, slots = replace(demand, gpu_share=WHOLE_GPU, gpu_memory_bytes=memory), 1
            elif memory:
                demand = replace(demand, gpu_memory_bytes=memory)
            shape = self._shapes[key] = Shape(self.kind(spec.method, spec.model, slots, demand), demand, slots)
        return shape

    def kind(self, method: str, model: str, slots: int, demand: Demand) -> Kind:
        """Return the kind of Pods that serve a demand."""
        asked = (method, model, slots, demand)
        kind = self._kind_of.get(asked)
        if kind is None:
            key = (method, model, slots, replace(demand, gpu_memory_bytes=0))
            kind = self._kinds.get(key)
            if kind is None:
                kind = self._kinds[key] = Kind(repr(key), (method, model))
            self._kind_of[asked] = kind
        return kind

    def fit(self, demand: Demand, empty: bool = False) -> Fit:
        """Return where a demand fits; `empty`: on nodes without Pods only."""
        fit = self._fits.get((demand, empty))
        if fit is None:
            fit = self._fits[demand, empty] = Fit(self._state.cluster, demand, self._scorers, empty, self._profile.tie)
        return fit

    def _at_most_a_card(self, memory_bytes: int, demand: Demand) -> int:
        """Cap memory that was predicted or learned at the largest card; what the customer asked for stays."""
        largest = self._state.cluster.largest_card(demand.gpu_models)
        return min(memory_bytes, largest) if largest else memory_bytes
