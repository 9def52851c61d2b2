"""Runs `engine.ports.drive` on the SimPy clock: one turn of the loop per instant at which something happened or a wakeup is due."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.ports import Forecaster, Journal, NoForecast, Steps, drive, no_journal
from engine.tasks import SECOND, Micros
from sim.stuck import EngineStuck

if TYPE_CHECKING:
    from sim.world import SimWorld

_IDLE_TURNS = 1000
_PATIENCE_US = 90 * 86_400 * SECOND
"""How long after the last arrival a run without `until` goes on when tasks stay open, for example for want of a fitting node."""


class _Pump:
    def __init__(
        self, engine: Steps, world: SimWorld, journal: Journal, forecaster: Forecaster, step_us: Micros = 0
    ) -> None:
        self._world = world
        self._step_us = step_us
        self._turns = drive(engine, world, journal, forecaster)
        self.rung = False
        self._armed_for: Micros | None = None
        self._idle_turns = 0
        self._last: Micros = -1

    def ring(self) -> None:
        """Ask for one turn at this instant, or at the next multiple of `step_us`, after everything else that is due then."""
        wait = -self._world.now() % self._step_us if self._step_us else 0
        if wait:
            self._world.after(wait, self._answer)
        else:
            self.rung = True

    def _answer(self) -> None:
        self.rung = True

    def turn(self) -> None:
        """Go round the loop once."""
        self.rung = False
        now = self._world.now()
        self._idle_turns = self._idle_turns + 1 if now == self._last else 0
        self._last = now
        wakeup = next(self._turns)
        if wakeup is not None:
            self._arm(now, wakeup)

    def _arm(self, now: Micros, wakeup: Micros) -> None:
        if wakeup <= now and self._idle_turns > _IDLE_TURNS:
            raise EngineStuck(
                f"wakeup_at: {wakeup} us is not after now ({now} us) for {_IDLE_TURNS} turns without progress of time"
            )
        if self._armed_for is not None and now < self._armed_for <= wakeup:
            return
        self._armed_for = wakeup
        self._world.after(max(0, wakeup - now), self._wake, wakeup)

    def _wake(self, wakeup: Micros) -> None:
        if self._armed_for == wakeup:
            self._armed_for = None
            self.ring()


def run(
    engine: Steps,
    world: SimWorld,
    journal: Journal = no_journal,
    forecaster: Forecaster | None = None,
    until: Micros | None = None,
    progress: Callable[[float, str], None] | None = None,
    step_us: Micros = 0,
) -> None:
    """Simulate until every task is over, or until a simulated time.

    With `step_us` the scheduler takes what happened at most once in that time, all together, as one does that makes every step
    durable before its effects; 0: each instant has its own step.

    `progress` is called now and then with the share done and a line for people. Stops as well when nothing can happen any more; the
    world's `open_tasks` then holds what was never finished.
    """
    pump = _Pump(engine, world, journal, forecaster or NoForecast(), step_us)
    world.bell = pump.ring
    pump.ring()
    env, clock = world.env, world.clock
    limit = until if until is not None else world.last_arrival_at + _PATIENCE_US
    span = max(1, until if until is not None else world.last_arrival_at)
    turns = 0
    try:
        while True:
            at = clock.next_at()
            if pump.rung and at > clock.now():
                pump.turn()
                turns += 1
                if until is None and world.settled:
                    break
                if progress is not None and turns % 4096 == 0:
                    progress(
                        min(1.0, world.now() / span), f"{world.arrived} tasks arrived, {len(world.open_tasks)} open"
                    )
                continue
            if at > limit:
                break
            clock.step()
        if until is not None and until > env.now:
            env.run(until=until)
    finally:
        world.bell = None
    if progress is not None:
        progress(1.0, f"{world.arrived} tasks arrived, {len(world.open_tasks)} open")
