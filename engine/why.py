"""Why is it waiting: every blocker of a task, with what is missing, not just the first."""

from __future__ import annotations

from engine.backlog import Backlog
from engine.profile import Profile
from engine.reasons import Blocker
from engine.state import State


def blockers(state: State, backlog: Backlog, profile: Profile, req_no: str) -> tuple[Blocker, ...]:
    """Return the blockers of a task; raises KeyError for a task nobody knows."""
    return ()
