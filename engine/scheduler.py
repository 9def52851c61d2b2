"""The Engine: applies the facts of a step, runs the levels in order, and returns the orders."""

from __future__ import annotations

from collections.abc import Sequence

from engine import snapshot
from engine.backlog import Backlog
from engine.commands import Command
from engine.errors import InvalidEvent
from engine.events import Event
from engine.fold_events import EVENT_FOLDS
from engine.levels import binding, elasticity, near, preemption, reactions
from engine.limits import Limits
from engine.profile import Profile
from engine.reasons import Blocker, Reason
from engine.state import State, Unwatched
from engine.tasks import Micros
from engine.turn import Turn
from engine.why import blockers


class Engine:
    """The scheduler. Deterministic: the same steps give the same orders, byte for byte.

    `now` is in microseconds and never goes back. After a step, `wakeup_at` says when to call again even if nothing happens (None:
    only an event matters); a call earlier or later than that is allowed.
    """

    def __init__(self, profile: Profile, limits: Limits | None = None, state: State | None = None) -> None:
        self.profile = profile
        self.state = State(limits) if state is None else state
        self.reasons: dict[Reason, int] = {}
        """How often each reason was given since the engine was made."""
        self.wakeup_at: Micros | None = None
        self._watch()

    def _watch(self) -> None:
        self._backlog = Backlog(self.state, self.profile)
        self.state.watch = self._backlog
        self.wakeup_at = self._next_wakeup(False)

    @classmethod
    def from_state(cls, profile: Profile, state: State) -> Engine:
        """Go on from a state; it is the engine's from now on."""
        state.watch = Unwatched()
        return cls(profile, state=state)

    def step(self, now: Micros, events: Sequence[Event]) -> Sequence[Command]:
        """Apply the events, decide, and return the orders, which the state already takes for begun."""
        state = self.state
        if now < state.now:
            raise InvalidEvent(
                f"now: {now} us is before {state.now} us; time never goes back, hand in a monotonic clock"
            )
        if len(events) > state.limits.events_per_step:
            raise InvalidEvent(
                f"events: {len(events)} in one step, the limit is {state.limits.events_per_step}; split them"
            )
        state.now = now
        for event in events:
            fold = EVENT_FOLDS.get(type(event))
            if fold is None:
                raise InvalidEvent(f"events: {type(event).__name__} is no event; use the types of engine.events")
            fold(state, now, event)
        turn = Turn(state, self._backlog, self.profile, self.reasons, now)
        if state.agenda:
            reactions.work_off(turn)
        reactions.work_off_due(turn)
        binding.place(turn)
        preemption.preempt(turn)
        elasticity.keep_warm(turn)
        near.look_ahead(turn)
        elasticity.advise(turn)
        if state.agenda:
            reactions.work_off(turn)
        self.wakeup_at = self._next_wakeup(turn.more)
        return turn.commands

    def snapshot(self) -> bytes:
        """Return the state as bytes, for `replay.recover`."""
        self._backlog.look_anew()
        return snapshot.take(self.state)

    def why(self, req_no: str) -> tuple[Blocker, ...]:
        """Return everything that keeps a task from running; empty when nothing does (it runs, or it is over)."""
        return blockers(self.state, self._backlog, self.profile, req_no)

    def _next_wakeup(self, more: bool) -> Micros | None:
        earliest = self.state.now + self.state.limits.wakeup_us
        if more:
            return earliest
        due = self._backlog.timers.next_at()
        return None if due is None else max(due, earliest)
