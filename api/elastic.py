"""A fleet on one machine: the scheduler writes how many nodes it wants, `aigc up` starts and stops agents until there are as many.

The agents are children of `aigc up`, so the scheduler may fall and come back without touching them. Whatever ends `aigc up` ends
them: the kernel does so when it is killed. The two share one small file in the state directory, replaced atomically; each order has
a number, so that none is carried out twice or missed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from api.parts import authorize_agent
from api.settings import FleetSection, Settings
from api.state_dir import StateDir, write_private
from api.supervisor import Part, command
from engine.capacity import FleetConfigured
from engine.commands import ScaleNodes
from engine.protocol.fleet import FleetKeeper, NodeOffer
from engine.tasks import SECOND

_KEPT = 64
"""Orders that the file keeps, for a reader that comes late."""


def offer_of(section: FleetSection) -> NodeOffer:
    """Return the terms of the configured fleet; raises ValueError naming the field."""
    return NodeOffer(
        section.nodes_max,
        section.nodes_min,
        section.gpus,
        round(section.start_s * SECOND),
        round(section.cool_down_s * SECOND),
        section.price_per_hour,
        section.prefix,
    )


def configured(section: FleetSection) -> FleetConfigured | None:
    """Return what the engine is told of the fleet; None where there is none."""
    if not section.nodes_max:
        return None
    offer = offer_of(section)
    return FleetConfigured(
        offer.nodes_min, offer.nodes_max, offer.gpus, offer.start_us, offer.cool_down_us, offer.prefix
    )


@dataclass(frozen=True, slots=True)
class FleetOrder:
    """What the engine wanted at one time."""

    number: int
    nodes: int
    leave: tuple[str, ...] = ()


class FleetFile:
    """The orders, in a file that one process writes and another reads."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[FleetOrder]:
        """Return the latest orders, oldest first; none where the file is absent. A damaged file counts as absent."""
        try:
            plain = json.loads(self._path.read_text(encoding="utf-8"))
            return [FleetOrder(int(number), int(nodes), tuple(map(str, leave))) for number, nodes, leave in plain]
        except (OSError, ValueError, TypeError):
            return []

    def write(self, order: ScaleNodes) -> None:
        """Add what the engine wants."""
        known = self.read()
        number = known[-1].number + 1 if known else 1
        orders = [*known, FleetOrder(number, order.nodes, order.leave)][-_KEPT:]
        write_private(self._path, json.dumps([[each.number, each.nodes, list(each.leave)] for each in orders]))


class LocalFleet:
    """A provider of nodes that are agents on this machine, and the keeper that starts and stops them.

    Only processes that it started itself are ever signalled.
    """

    def __init__(
        self,
        offer: NodeOffer,
        file: FleetFile,
        make: Callable[[str], Part],
        say: Callable[[str], None],
        stop_grace_s: float = 15.0,
    ) -> None:
        self.offer = offer
        self._file = file
        self._make = make
        self._say = say
        self._stop_grace_s = stop_grace_s
        self.parts: dict[str, Part] = {}
        """Agents that run, by node."""
        self._keeper = FleetKeeper(self)
        self._done = 0
        known = file.read()
        if known:  # what was wanted before this start: nodes that were to leave are gone already
            self._done = known[-1].number
            self._keeper.want(known[-1].nodes)

    @property
    def wanted(self) -> int:
        """How many nodes there are to be."""
        return self._keeper.wanted

    def check(self) -> None:
        """Take in new orders, see who has ended, start and stop what is lacking or too much."""
        for order in self._file.read():
            if order.number > self._done:
                self._done = order.number
                self._keeper.want(order.nodes, order.leave)
        self._keeper.turn(time.monotonic_ns() // 1000)

    def close(self) -> None:
        """Stop every agent, and wait until all have ended."""
        for part in self.parts.values():
            if part.process is not None and part.alive():
                part.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self._stop_grace_s
        for name, part in self.parts.items():
            if part.process is not None:
                try:
                    part.process.wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    os.killpg(part.process.pid, signal.SIGKILL)
                    part.process.wait()
            self._say(f"{name} stopped")
        self.parts.clear()

    # --- the provider port --------------------------------------------------------------------------------------------

    def start(self, name: str) -> None:
        """Start an agent for a node."""
        part = self.parts[name] = self._make(name)
        part.start()
        self._say(f"{name} is starting")

    def stop(self, name: str) -> None:
        """Let an agent drain its node and end; what runs there finishes first."""
        part = self.parts.get(name)
        if part is not None and part.process is not None and part.alive():
            part.process.send_signal(signal.SIGTERM)
            self._say(f"{name} drains")

    def gone(self) -> Iterable[str]:
        """Return the nodes whose agents have ended since the last call."""
        ended = [name for name, part in self.parts.items() if not part.alive()]
        for name in ended:
            part = self.parts.pop(name)
            self._say(f"{name} has ended (exit {part.process.returncode if part.process else None})")
        return ended


def local_fleet(
    settings: Settings, connect: str, environment: dict[str, str], say: Callable[[str], None]
) -> LocalFleet | None:
    """Return the fleet that the configuration describes, nothing started yet; None where there is none."""
    section = settings.fleet
    if not section.nodes_max:
        return None
    offer = offer_of(section)
    state = StateDir(settings.state_dir)

    def make(name: str) -> Part:
        keys = authorize_agent(settings, name, state.agent(name) / "keys")
        arguments = ("--name", name, "--devices", section.devices, "--connect", connect, "--keys", str(keys))
        more = command("agent", *arguments, "--die-with-parent")
        return Part(name, more, state.logs / f"{name}.log", environment)

    return LocalFleet(offer, FleetFile(state.fleet), make, say)
