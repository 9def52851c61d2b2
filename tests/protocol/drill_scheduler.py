"""The scheduler's process in the drill: the real engine and its end of the protocol, killed in the worst windows of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drill_plan import LIMITS

from api.sm.loop import outstanding_of
from engine import commands as c
from engine import events as e
from engine import invariants, profiles
from engine.journal import Record
from engine.protocol import messages as m
from engine.protocol.controller import Controller
from engine.replay import recover
from engine.scheduler import Engine
from engine.tasks import SECOND, Micros

if TYPE_CHECKING:
    from drill import Drill


class SimScheduler:
    """The scheduler's process: recovered from the disk, killed without warning."""

    def __init__(self, drill: Drill) -> None:
        self.drill = drill
        self.dead = False
        self.epoch = drill.epoch
        self.engine: Engine = recover(None, drill.disk, profiles.load("fifo"), LIMITS)
        self.controller = Controller(self.epoch, self, sweep_us=SECOND // 4)
        if drill.disk:
            self.controller.restore(drill.env.now, outstanding_of(self.engine.state))
        self._busy = False
        self._rung = False
        self._sweep_at: Micros | None = None
        self._wakeup: Micros | None = None
        self.ring()

    def pod(self, command: c.CreatePod) -> dict[str, object]:
        return {"id": command.model}

    def task(self, command: c.StartTask) -> dict[str, object]:
        return {}

    def prefetch(self, command: c.PrefetchModel) -> dict[str, object]:
        return {}

    def receive(self, peer: str, message: m.FromNode) -> None:
        """Take a message, as the I/O thread does while the engine may be in the middle of a step."""
        if self.dead:
            return
        self.controller.receive(self.drill.env.now, peer, message)
        self._send()
        if self.controller.has_events():
            self.ring()

    def ring(self) -> None:
        """Ask for a step."""
        if not self._rung and not self.dead:
            self._rung = True
            self.drill.after(100, self._step)

    def _step(self) -> None:
        if self.dead or self._busy:
            return
        self._rung = False
        self._busy = True
        now = self.drill.env.now
        self.controller.durable()
        events = [*self.drill.inbox.values(), *self.controller.take_events()]
        entered = list(self.drill.inbox)
        commands = list(self.engine.step(now, events))
        invariants.check(self.engine.state)
        step = len(self.drill.disk)
        wait = 500 + int(self.drill.dice.draw("fsync", self.epoch, step) ** 3 * 60_000)
        crash = 0.0 if self.drill.calm else self.drill.plan.window_crash
        if self.drill.dice.draw("before", self.epoch, step) < crash / 2:
            self.drill.after(wait // 2, lambda: None if self.dead else self.drill.crash_scheduler(SECOND))
        self.drill.after(wait, lambda: self._durable(now, events, entered, commands))

    def _durable(self, now: Micros, events: list[e.Event], entered: list[str], commands: list[c.Command]) -> None:
        if self.dead:
            return
        drill = self.drill
        if events or commands:
            record = Record(len(drill.disk) + 1, now, tuple(events), tuple(commands))
            drill.disk.append(record)
            drill.journaled(record)
        for key in entered:
            drill.inbox.pop(key, None)
        crash = 0.0 if drill.calm else drill.plan.window_crash
        cut = len(commands)
        if commands and drill.dice.draw("after", self.epoch, len(drill.disk)) < crash:
            cut = drill.dice.whole(0, len(commands), "cut", self.epoch, len(drill.disk))
        for index, command in enumerate(commands):
            if index == cut:
                drill.crash_scheduler(SECOND)
                return
            self.controller.perform(drill.env.now, command)
        self._busy = False
        self._send()
        if self._rung or self.controller.has_events() or drill.inbox:
            self._rung = False
            self.ring()
        wakeup = self.engine.wakeup_at
        if wakeup is not None and wakeup != self._wakeup:
            self._wakeup = wakeup
            drill.after(wakeup - drill.env.now, self._woken)
        self.drill.after(20_000, self._settle)

    def _woken(self) -> None:
        self._wakeup = None
        self.ring()

    def _settle(self) -> None:
        if not self.dead and not self._busy:
            self.controller.durable()
            self._send()

    def _send(self) -> None:
        drill = self.drill
        for peer, message in self.controller.take_outgoing(drill.env.now):
            if isinstance(message, m.Fence):
                drill.counts.fences += 1
            agent = drill.agents[int(peer.split("-")[1])]
            if not agent.deaf:
                drill.send("s", peer, message, lambda a=agent, g=message: a.hear(g))  # type: ignore[misc]
        due = self.controller.next_timeout()
        if due != self._sweep_at and due < 2**61:
            self._sweep_at = due
            drill.after(due - drill.env.now, self._sweep)

    def _sweep(self) -> None:
        if self.dead or self._sweep_at is None or self.drill.env.now < self._sweep_at:
            return
        self.controller.tick(self.drill.env.now)
        self._send()
        if self.controller.has_events():
            self.ring()
