"""Which nodes of a fleet to start and to let go, so that there are as many as the engine wants: a state machine without IO.

It serves every provider: the simulated one and the one that runs agents on this machine. All it needs to go on after a restart is
which nodes run and how many are wanted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from engine.tasks import SECOND, Micros

BACKOFF_US = 5 * SECOND
BACKOFF_MOST_US = 300 * SECOND


@dataclass(frozen=True, slots=True)
class NodeOffer:
    """What nodes a provider has, and on what terms."""

    nodes_max: int
    nodes_min: int = 0
    gpus: int = 1
    start_us: Micros = 120 * SECOND
    """From asking for a node to its joining, usually."""
    cool_down_us: Micros = 300 * SECOND
    """How long less must have been in use before nodes go."""
    price_per_hour: float = 0.0
    """Of one node, in whatever money; from asking for it until it is gone."""
    prefix: str = "elastic-"
    """Its nodes' names: the prefix and a number."""

    def __post_init__(self) -> None:
        """Refuse terms that make no sense."""
        if not 0 <= self.nodes_min <= self.nodes_max:
            raise ValueError(
                f"nodes_min: {self.nodes_min} must lie between 0 and nodes_max ({self.nodes_max}); use min:max such as 1:4"
            )
        for name in ("gpus", "nodes_max"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("start_us", "cool_down_us", "price_per_hour"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative, got {getattr(self, name)}")
        if not self.prefix:
            raise ValueError("prefix: must not be empty; nodes of the fleet are known by it")


class NodeProvider(Protocol):
    """Whoever has machines. What it was asked for it does in its own time; a node joins by itself when it is there."""

    offer: NodeOffer

    def start(self, name: str) -> None:
        """Begin to start a node of that name."""
        ...

    def stop(self, name: str) -> None:
        """Have a node drain and go; one that has not joined yet goes at once."""
        ...

    def gone(self) -> Iterable[str]:
        """Return the nodes that are known to be gone since the last call, whether told to or not."""
        ...


class FleetKeeper:
    """Keeps a provider's nodes at the number that is wanted; replaces those that fall, later and later if they fall again."""

    def __init__(self, provider: NodeProvider, running: Iterable[str] = ()) -> None:
        self.provider = provider
        self.here: dict[str, None] = dict.fromkeys(running)
        """Nodes that were started and not told to go, the oldest first."""
        self.leaving: dict[str, None] = {}
        self.wanted = provider.offer.nodes_min
        self.falls = 0
        """Nodes that went unasked, one after the other, since one was told to go or more were wanted."""
        self.start_after: Micros = 0

    def want(self, nodes: int, leave: Iterable[str] = ()) -> None:
        """Take in how many nodes are wanted, and which are to go."""
        offer = self.provider.offer
        self.wanted = min(offer.nodes_max, max(offer.nodes_min, nodes))
        for name in leave:
            if name in self.here and len(self.here) > self.wanted:
                self._let_go(name)

    def turn(self, now: Micros) -> None:
        """Note who has gone, then start and stop what is lacking or too much."""
        for name in self.provider.gone():
            if self.leaving.pop(name, name) is None:
                continue
            if name in self.here:
                del self.here[name]
                self.falls += 1
                wait = min(BACKOFF_MOST_US, BACKOFF_US << min(self.falls - 1, 10))
                self.start_after = max(self.start_after, now + wait)
        while len(self.here) > self.wanted:
            self._let_go(next(reversed(self.here)))
        if now < self.start_after:
            return
        while len(self.here) < self.wanted and len(self.here) + len(self.leaving) < self.provider.offer.nodes_max:
            name = self._free_name()
            self.here[name] = None
            self.provider.start(name)

    def due_at(self) -> Micros | None:
        """Return when `turn` has something to do by itself."""
        return self.start_after if len(self.here) < self.wanted else None

    def joined(self) -> None:
        """Note that a node came up: what fell before is forgiven."""
        self.falls = 0

    def _let_go(self, name: str) -> None:
        del self.here[name]
        self.leaving[name] = None
        self.provider.stop(name)

    def _free_name(self) -> str:
        number = 0
        while True:
            name = f"{self.provider.offer.prefix}{number}"
            if name not in self.here and name not in self.leaving:
                return name
            number += 1
