"""Recovery re-applies a journal without asking any policy; replay asks the policies again and names the first difference."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine.commands import Command
from engine.errors import InvalidEvent
from engine.journal import Record
from engine.limits import Limits
from engine.profile import Profile
from engine.scheduler import Engine
from engine.snapshot import restore
from engine.state import State


def refold(snapshot: bytes | None, records: Iterable[Record], limits: Limits | None = None) -> State:
    """Return the state after a snapshot (None: the beginning) and the records that follow it."""
    state = restore(snapshot) if snapshot is not None else State(limits)
    for record in records:
        if record.now < state.now:
            raise InvalidEvent(
                f"record {record.seq}: its time {record.now} us is before {state.now} us; sort the records by seq"
            )
        state.now = record.now
        for event in record.events:
            state.apply_event(record.now, event)
        for command in record.commands:
            state.apply_command(record.now, command)
        state.agenda.clear()
    return state


def recover(
    snapshot: bytes | None, records: Iterable[Record], profile: Profile | None = None, limits: Limits | None = None
) -> Engine:
    """Return an engine that goes on where the journal ends. `profile` decides from there on, `limits` only without a snapshot."""
    return Engine.from_state(profile or Profile(), refold(snapshot, records, limits))


@dataclass(frozen=True, slots=True)
class Difference:
    """The first order that came out differently."""

    seq: int
    index: int
    """Which order of that step, from 0."""
    recorded: Command | None
    """None: the replay ordered more."""
    decided: Command | None
    """None: the replay ordered less."""

    def __str__(self) -> str:
        return f"step {self.seq}, order {self.index}: the journal has {self.recorded}, the replay has {self.decided}"


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What a replay found."""

    steps: int
    orders: int
    difference: Difference | None

    @property
    def same(self) -> bool:
        """Tell whether every step was decided as recorded."""
        return self.difference is None


def replay(
    records: Iterable[Record], profile: Profile, snapshot: bytes | None = None, limits: Limits | None = None
) -> ReplayReport:
    """Decide every step anew under a profile, and stop at the first step that comes out differently."""
    engine = Engine.from_state(profile, restore(snapshot)) if snapshot is not None else Engine(profile, limits)
    steps = orders = 0
    for record in records:
        decided = engine.step(record.now, record.events)
        steps += 1
        orders += len(decided)
        for index in range(max(len(decided), len(record.commands))):
            ours = decided[index] if index < len(decided) else None
            theirs = record.commands[index] if index < len(record.commands) else None
            if ours != theirs:
                return ReplayReport(steps, orders, Difference(record.seq, index, theirs, ours))
    return ReplayReport(steps, orders, None)
