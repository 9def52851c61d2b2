"""Elasticity in the scheduler process: the demand forecast before the journal, kept between two lives, and the metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from api.elastic import FleetFile
from engine.capacity import DemandForecast, FleetConfigured
from engine.commands import Command, Notify, ScaleNodes
from engine.events import Event, NodeJoined, NodeLost
from engine.journal import Record
from engine.ports import Forecaster
from engine.profile import Profile
from engine.tasks import SECOND, Micros
from predictors import demand_stored
from predictors.demand_forecaster import DemandForecaster

CHECK_US = 10 * SECOND
"""How often the engine looks at its capacity, where there is a fleet or Pods are started ahead."""
NO_FLEET = FleetConfigured(0, 0, 1, 0, 0)
"""Tells an engine that there is no fleet any more."""
_log = structlog.get_logger("sm")


def live_demand(
    forecaster: Forecaster,
    profile: Profile,
    fleet: FleetConfigured | None,
    file: Path | None,
    records: Sequence[Record],
) -> DemandForecaster:
    """Return the demand forecast around a forecaster: what it had learned, and what the recovered records teach beyond that."""
    model = None
    if file is not None and file.is_file():
        try:
            model = demand_stored.load(file)
        except demand_stored.DemandUnusable as error:
            _log.warning("demand_forecast_begins_anew", file=str(file), error=str(error))
    check_us: Micros = 0
    if fleet is not None:
        check_us = min(CHECK_US, max(SECOND, fleet.cool_down_us // 3))
    elif profile.warm_ahead:
        check_us = CHECK_US
    demand = DemandForecaster(forecaster, model, check_us)
    demand.recall(records)
    return demand


def advice_to(file: FleetFile | None) -> Callable[[Notify | ScaleNodes], None]:
    """Return what writes the engine's wishes for nodes into a file, for whoever starts them."""

    def heed(order: Notify | ScaleNodes) -> None:
        if isinstance(order, ScaleNodes) and file is not None:
            file.write(order)

    return heed


class CapacityMetrics:
    """Gauges and counters of the demand forecast and the fleet, from each journaled step."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.gpu_seconds = Gauge(
            "aigc_demand_gpu_seconds",
            "GPU time that is expected to be asked for within a horizon, at a quantile.",
            ("horizon_s", "quantile"),
            registry=registry,
        )
        self.models = Gauge("aigc_demand_models", "Models that the forecast names.", registry=registry)
        self.wanted = Gauge("aigc_fleet_nodes_wanted", "Nodes that the scheduler wants.", registry=registry)
        self.nodes = Gauge("aigc_fleet_nodes", "Nodes that have joined and are not lost.", registry=registry)
        self.orders = Counter(
            "aigc_fleet_orders", "Changes of the wanted number of nodes.", ("direction", "reason"), registry=registry
        )
        self._wanted = 0
        self._up: set[str] = set()

    def begin(self, wanted: int, up: Sequence[str]) -> None:
        """Take in what a recovery found."""
        self._wanted = wanted
        self._up = set(up)
        self.wanted.set(wanted)
        self.nodes.set(len(self._up))

    def step(self, events: Sequence[Event], commands: Sequence[Command]) -> None:
        """Take in one step."""
        for event in events:
            match event:
                case DemandForecast():
                    self._forecast(event)
                case NodeJoined():
                    self._up.add(event.node.name)
                    self.nodes.set(len(self._up))
                case NodeLost():
                    self._up.discard(event.node)
                    self.nodes.set(len(self._up))
                case _:
                    pass
        for command in commands:
            if isinstance(command, ScaleNodes):
                direction = "out" if command.nodes > self._wanted else "in"
                self.orders.labels(direction, command.reason).inc()
                self._wanted = command.nodes
                self.wanted.set(command.nodes)

    def _forecast(self, forecast: DemandForecast) -> None:
        self.models.set(len(forecast.models))
        for horizon_us, row in zip(forecast.horizons_us, forecast.gpu_us, strict=True):
            for permille, gpu_us in zip(forecast.levels_permille, row, strict=True):
                labels = (str(horizon_us // SECOND), f"{permille / 1000:g}")
                self.gpu_seconds.labels(*labels).set(gpu_us / SECOND)
