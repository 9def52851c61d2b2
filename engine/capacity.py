"""What is known of the capacity to come: the demand forecast, the fleet of nodes that can grow and shrink, and how much was in use.

The events are facts from outside: the forecast is made before the journal, so replay needs no model. The rest of this file is the
part of the state that the elasticity level decides from; it is the same after a recovery.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine import agenda
from engine.resources import Demand
from engine.tasks import Micros

if TYPE_CHECKING:
    from engine.entities import Node
    from engine.state import State

PEAKS = 512
"""Looks at the use of GPUs that are remembered."""


@dataclass(frozen=True, slots=True)
class ModelDemand:
    """What is expected to come for one model, and the Pod that serves it."""

    method: str
    model: str
    demand: Demand
    slots: int
    run_us: tuple[tuple[Micros, ...], ...]
    """Run time of what arrives, one slot each, summed: by horizon, then by level."""


@dataclass(frozen=True, slots=True)
class DemandForecast:
    """What is expected to arrive from now on. A later forecast replaces it."""

    horizons_us: tuple[Micros, ...]
    """Ascending."""
    levels_permille: tuple[int, ...]
    """The quantiles that are given, ascending: 900 is the P90."""
    gpu_us: tuple[tuple[Micros, ...], ...]
    """Time of whole GPUs that everything together takes: by horizon, then by level."""
    models: tuple[ModelDemand, ...] = ()


@dataclass(frozen=True, slots=True)
class FleetConfigured:
    """Nodes can be had and given back within these bounds; `nodes_max` 0: no more."""

    nodes_min: int
    nodes_max: int
    gpus: int
    """GPUs of one such node."""
    start_us: Micros
    """From asking for a node to its joining."""
    cool_down_us: Micros
    """How long less must have been in use before nodes go."""
    prefix: str = ""
    """Names of the fleet's nodes begin with it; others are there anyway."""


@dataclass(frozen=True, slots=True)
class CapacityChecked:
    """It is time to see whether nodes and warm Pods are as many as wanted; what was in use is noted."""


class Fleet:
    """The part of the state that tells how many nodes there may be, how many GPUs were in use, and what is expected."""

    __slots__ = ("asked", "config", "forecast", "forecast_at", "looked_at", "mean_use", "peaks")

    def __init__(self) -> None:
        self.config: FleetConfigured | None = None
        self.forecast: DemandForecast | None = None
        self.forecast_at: Micros = 0
        self.peaks: list[tuple[Micros, int]] = []
        """(when, thousandths of GPUs in use), later ones smaller: the first is the peak of the cool-down."""
        self.looked_at: Micros = 0
        """When the use was noted last."""
        self.mean_use = 0
        """Thousandths of GPUs in use, averaged over about the start-up time of a node."""
        self.asked: list[tuple[Micros, int]] = []
        """(when, nodes) that were asked for when there were to be more, later ones fewer."""

    def note_use(self, now: Micros, used: int) -> None:
        """Take a look at the use in; what is older than the cool-down goes."""
        start_us = 0 if self.config is None else self.config.start_us
        past_us = now - self.looked_at
        if not self.peaks:
            self.mean_use = used
        elif past_us > 0:
            self.mean_use += (used - self.mean_use) * past_us // (start_us + past_us)
        self.looked_at = now
        while self.peaks and self.peaks[-1][1] <= used:
            self.peaks.pop()
        self.peaks.append((now, used))
        span_us = 0 if self.config is None else self.config.cool_down_us
        while len(self.peaks) > 1 and (self.peaks[0][0] + span_us < now or len(self.peaks) > PEAKS):
            del self.peaks[0]

    def note_asked(self, now: Micros, nodes: int) -> None:
        """Note that more nodes were asked for: those that have not joined yet are not sent away for not being in use."""
        while self.asked and self.asked[-1][1] <= nodes:
            self.asked.pop()
        self.asked.append((now, nodes))
        while self.asked[0][0] + self._asked_span_us() < now or len(self.asked) > PEAKS:
            del self.asked[0]

    def asked_lately(self, now: Micros) -> int:
        """Return the most nodes that were asked for when there were to be more: they have a cool-down from when they are there."""
        return max([nodes for at, nodes in self.asked if at + self._asked_span_us() >= now], default=0)

    def _asked_span_us(self) -> Micros:
        return 0 if self.config is None else self.config.start_us + self.config.cool_down_us

    def quantile(self, horizon: int, level: int) -> Micros:
        """Return the expected GPU time of a horizon (its place) at a level in thousandths."""
        forecast = self.forecast
        if forecast is None or not forecast.gpu_us:
            return 0
        return forecast.gpu_us[horizon][self.place_of(level)]

    def place_of(self, level: int) -> int:
        """Return where the forecast has the lowest level that is not below one."""
        forecast = self.forecast
        levels = () if forecast is None else forecast.levels_permille
        for place, each in enumerate(levels):
            if each >= level:
                return place
        return len(levels) - 1

    def horizon_of(self, span_us: Micros) -> int:
        """Return the place of the shortest horizon that covers a span, the longest one where none does."""
        forecast = self.forecast
        horizons = () if forecast is None else forecast.horizons_us
        for place, each in enumerate(horizons):
            if each >= span_us:
                return place
        return len(horizons) - 1

    def owns(self, node: Node) -> bool:
        """Tell whether a node belongs to the fleet."""
        return self.config is not None and node.name.startswith(self.config.prefix)


def gpus_in_use(state: State) -> int:
    """Return the thousandths of GPUs under Pods that have tasks."""
    return sum(sum(grant.share for grant in pod.grants) for pod in state.pods.values() if pod.tasks)


def demand_forecast(state: State, now: Micros, e: DemandForecast) -> None:
    """A new forecast, unless its parts do not fit together."""
    fleet = state.fleet
    whole = all(len(each) == len(e.levels_permille) for each in e.gpu_us) and len(e.gpu_us) == len(e.horizons_us)
    parts = all(
        len(each.run_us) == len(e.horizons_us)
        and each.slots > 0
        and all(len(row) == len(e.levels_permille) for row in each.run_us)
        for each in e.models
    )
    if not (whole and parts and e.horizons_us and e.levels_permille and min(e.horizons_us) > 0):
        state.ignore(e)
        return
    fleet.forecast, fleet.forecast_at = e, now


def fleet_configured(state: State, now: Micros, e: FleetConfigured) -> None:
    """Nodes can be had, or no longer."""
    if not 0 <= e.nodes_min <= e.nodes_max or e.gpus < 1 or e.start_us < 0 or e.cool_down_us < 0:
        if e.nodes_max or e.nodes_min:
            state.ignore(e)
            return
        state.fleet.config = None
        return
    state.fleet.config = e if e.nodes_max else None


def capacity_checked(state: State, now: Micros, e: CapacityChecked) -> None:
    """Note what is in use; the elasticity level looks at it in the same step."""
    state.fleet.note_use(now, gpus_in_use(state))
    state.agenda.append((agenda.CAPACITY, None))
