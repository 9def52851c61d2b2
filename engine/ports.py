"""The ports a world plugs into, and the one loop that calls the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from engine.commands import Command
from engine.events import Event
from engine.tasks import Micros


class World(Protocol):
    """Where commands take effect and events come from: a SimPy cluster or real executors."""

    def now(self) -> Micros:
        """Return the time, never less than before."""
        ...

    def take(self) -> Sequence[Event]:
        """Return the events since the last call, in the order they happened."""
        ...

    def perform(self, command: Command) -> None:
        """Begin to carry out a command; its outcome comes back as an event."""
        ...


class Steps(Protocol):
    """The face of the engine."""

    wakeup_at: Micros | None

    def step(self, now: Micros, events: Sequence[Event]) -> Sequence[Command]:
        """Apply the events, decide, and return the orders."""
        ...


class Journal(Protocol):
    """Makes a step durable before any of its effects."""

    def __call__(self, now: Micros, events: Sequence[Event], commands: Sequence[Command]) -> None:
        """Record one step; return only when it is durable."""
        ...


class Forecaster(Protocol):
    """Stands before the journal: stamps submitted tasks, learns from finished ones."""

    def stamp(self, now: Micros, events: Sequence[Event]) -> Sequence[Event]:
        """Return the events with estimates stamped on, and `TaskEstimated` events added."""
        ...


class NoForecast:
    """A forecaster that knows nothing: events pass as they are."""

    def stamp(self, now: Micros, events: Sequence[Event]) -> Sequence[Event]:
        """Return the events unchanged."""
        return events


def no_journal(now: Micros, events: Sequence[Event], commands: Sequence[Command]) -> None:
    """Record nothing: for runs that need no recovery."""


def drive(engine: Steps, world: World, journal: Journal, forecaster: Forecaster) -> Iterator[Micros | None]:
    """Run the engine in a world, for ever; the only caller of `step`.

    Yields the time of the engine's next wakeup (None: only an event wakes it). The caller waits until then or until the world has
    events: SimPy by a timeout or a bell, ZeroMQ by its poller's timeout, rounded up to whole milliseconds.
    """
    while True:
        now = world.now()
        events = forecaster.stamp(now, world.take())
        commands = engine.step(now, events)
        journal(now, events, commands)
        for command in commands:
            world.perform(command)
        yield engine.wakeup_at
