"""The simulated provider of nodes: they take time to start, may fail to, cost money, and drain before they go.

What wants nodes is the engine (`ScaleNodes`) or a `Scaler`, an autoscaler as others have it, to compare with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from engine.capacity import FleetConfigured
from engine.commands import ScaleNodes
from engine.events import NodeDrainRequested, NodeJoined, NodeLost
from engine.protocol.fleet import FleetKeeper, NodeOffer
from engine.resources import NodeSpec
from engine.tasks import SECOND, Micros
from sim.draws import lognormal, unit
from sim.parts import SimNode

if TYPE_CHECKING:
    from sim.world import SimWorld

LOOK_US = 10 * SECOND
START_SIGMA = 0.15


@dataclass(frozen=True, slots=True)
class View:
    """What an autoscaler sees of the cluster at one look."""

    now: Micros
    nodes: int
    """That are asked for: starting ones too, leaving ones not."""
    ready: int
    gpus: int
    """Of one node."""
    busy: float
    """GPUs under Pods that run tasks."""
    running: int
    """Tasks that run."""
    open: int
    """Tasks that entered and are not over."""


Scaler = Callable[[View], int]
"""Returns how many nodes there should be."""


class SimFleet:
    """Starts, drains and ends nodes of a simulated world, and keeps the account.

    `spec` describes a node; names are given by the offer's prefix and a number. Those of the first `nodes_min` are there at once.
    """

    def __init__(
        self,
        world: SimWorld,
        offer: NodeOffer,
        spec: NodeSpec,
        *,
        scaler: Scaler | None = None,
        fail_ppm: int = 0,
        first: int | None = None,
    ) -> None:
        self.world = world
        self.offer = offer
        self.scaler = scaler
        self._spec = spec
        self._fail_ppm = fail_ppm
        self._starts: dict[str, int] = {}
        self._asked_at: dict[str, Micros] = {}
        self._up: dict[str, None] = {}
        self._draining: dict[str, None] = {}
        self._gone: list[str] = []
        self.node_us: Micros = 0
        """Time of nodes that are gone, from being asked for."""
        self.changes: list[tuple[Micros, int]] = []
        """(when, by how much the number of wanted nodes changed)."""
        self.sizes: list[tuple[Micros, int]] = []
        """(when, nodes wanted)."""
        self.keeper = FleetKeeper(self)
        self.keeper.want(offer.nodes_min if first is None else first)
        for number in range(self.keeper.wanted):
            name = f"{offer.prefix}{number}"
            self.keeper.here[name] = None
            self._asked_at[name] = world.now()
            self._join(name, 0)
        self.sizes.append((world.now(), self.keeper.wanted))
        world.on_scale = self.scale
        if scaler is None:
            config = FleetConfigured(
                offer.nodes_min, offer.nodes_max, offer.gpus, offer.start_us, offer.cool_down_us, offer.prefix
            )
            world.post(config)
        world.after(LOOK_US, self._look)

    # --- who wants nodes ----------------------------------------------------------------------------------------------

    def scale(self, order: ScaleNodes) -> None:
        """Carry out what the engine wants."""
        if self.scaler is None:
            self._want(order.nodes, order.leave)

    def _want(self, nodes: int, leave: tuple[str, ...]) -> None:
        before = self.keeper.wanted
        self.keeper.want(nodes, leave)
        if self.keeper.wanted != before:
            self.changes.append((self.world.now(), self.keeper.wanted - before))
            self.sizes.append((self.world.now(), self.keeper.wanted))
        self.keeper.turn(self.world.now())

    def _look(self) -> None:
        world = self.world
        if self.scaler is not None:
            nodes = self.scaler(self.view())
            spare = max(0, len(self.keeper.here) - max(nodes, self.offer.nodes_min))
            self._want(nodes, tuple(self._emptiest(spare)))
        for name in [name for name in self._draining if not world.nodes[name].pods]:
            self._end(name, "it left")
        self.keeper.turn(world.now())
        if not world.settled:
            world.after(LOOK_US, self._look)
            if self.scaler is None and world.bell is not None:
                world.bell()

    def view(self) -> View:
        """Return what an autoscaler may know."""
        world = self.world
        busy, running = 0, 0
        for pod in world.pods.values():
            if pod.running:
                busy += sum(grant.share for grant in pod.order.grants)
                running += len(pod.running)
        return View(
            world.now(),
            len(self.keeper.here),
            len(self._up),
            self.offer.gpus,
            busy / 1000,
            running,
            len(world.open_tasks),
        )

    def _emptiest(self, count: int) -> list[str]:
        """Return nodes to let go, those without tasks first: as kind as a drain can be."""

        def tasks(name: str) -> int:
            node = self.world.nodes.get(name)
            return 0 if node is None or name not in self._up else sum(len(pod.running) for pod in node.pods.values())

        order = sorted(self.keeper.here, key=lambda name: (name in self._up, tasks(name), -self._asked_at[name]))
        return order[:count]

    # --- the provider port --------------------------------------------------------------------------------------------

    def start(self, name: str) -> None:
        """Begin to start a node."""
        world = self.world
        nth = self._starts[name] = self._starts.get(name, 0) + 1
        self._asked_at[name] = world.now()
        world.count("nodes_asked_for")
        delay = round(self.offer.start_us * lognormal(START_SIGMA, world.seed, "node start", name, nth))
        if unit(world.seed, "node fails", name, nth) * 1_000_000 < self._fail_ppm:
            world.count("nodes_failed_to_start")
            world.after(delay, self._failed, name, nth)
        else:
            world.after(delay, self._join, name, nth)

    def stop(self, name: str) -> None:
        """Let a node drain, then go."""
        if name in self._up:
            del self._up[name]
            self._draining[name] = None
            self.world.emit(NodeDrainRequested(name, leaving=True))
        else:
            self._starts[name] = self._starts.get(name, 0) + 1
            self._close(name)
            self._gone.append(name)

    def gone(self) -> list[str]:
        """Return the nodes that went since the last call."""
        gone, self._gone = self._gone, []
        return gone

    def _join(self, name: str, nth: int) -> None:
        if self._starts.get(name, 0) != nth or name not in self.keeper.here:
            return
        gpus = tuple(replace(gpu, uuid=f"{name}-gpu-{place}") for place, gpu in enumerate(self._spec.gpus))
        spec = replace(self._spec, name=name, gpus=gpus)
        old = self.world.nodes.get(name)
        node = self.world.nodes[name] = SimNode(spec, self.world.hardware)
        node.life = 0 if old is None else old.life + 1
        self._up[name] = None
        self.keeper.joined()
        self.world.post(NodeJoined(spec))

    def _failed(self, name: str, nth: int) -> None:
        if self._starts.get(name, 0) == nth and name in self.keeper.here:
            self._close(name)
            self._gone.append(name)
            self.keeper.turn(self.world.now())

    def _end(self, name: str, why: str) -> None:
        del self._draining[name]
        node = self.world.nodes[name]
        node.up = False
        node.life += 1
        self._close(name)
        self._gone.append(name)
        self.world.emit(NodeLost(name, why))

    # --- the account --------------------------------------------------------------------------------------------------

    def _close(self, name: str) -> None:
        asked = self._asked_at.pop(name, None)
        if asked is not None:
            self.node_us += self.world.now() - asked

    def node_hours(self, until: Micros) -> float:
        """Return the hours of nodes so far, from being asked for until they were gone."""
        still = sum(max(0, until - asked) for asked in self._asked_at.values())
        return (self.node_us + still) / SECOND / 3600

    def reversals(self, within_us: Micros) -> int:
        """Return how often the number of nodes went one way and the other again within a span."""
        found = 0
        for (at, by), (later, back) in pairwise(self.changes):
            if by * back < 0 and later - at <= within_us:
                found += 1
        return found
