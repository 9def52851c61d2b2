"""Bounds on everything the engine holds, repeats or waits for, in one place."""

from __future__ import annotations

from dataclasses import dataclass, fields

from engine.tasks import SECOND, Micros


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds; each is at least 1 unless it says otherwise."""

    pending: int = 200_000
    """Tasks that wait, over all tenants; more are rejected."""
    remembered: int = 100_000
    """Terminal tasks whose identity is still known, so that a second submission is recognised."""
    groups: int = 100_000
    """Groups without a live task whose binding is still known."""
    attempts: int = 20
    """Cap on every task's own `max_attempts`."""
    preemptions_per_task: int = 3
    preemptions_per_step: int = 64
    commands_per_step: int = 200_000
    """A step that has given this many orders ends, and the next one goes on at once."""
    events_per_step: int = 1_000_000
    claims: int = 1_000
    """Tasks for which room is being made at one time."""
    reclaims_per_step: int = 1_000
    backoff_us: Micros = 1 * SECOND
    """Wait before the second attempt; doubles with each further one."""
    backoff_cap_us: Micros = 300 * SECOND
    grace_us: Micros = 10 * SECOND
    """How long a stopped attempt may take to save its checkpoint."""
    idle_ttl_us: Micros = 600 * SECOND
    """An idle Pod that no deployment keeps goes after this time."""
    pod_start_us: Micros = 1_800 * SECOND
    """A Pod that is not started by then is deleted."""
    start_us: Micros = 120 * SECOND
    """An attempt whose start is not confirmed by then loses its Pod."""
    stop_us: Micros = 60 * SECOND
    """An attempt that is not stopped this long after its grace loses its Pod."""
    look_us: Micros = 100_000
    """Pods that are due for a look (idle for too long, late, over their run limit) are looked at once in this time."""
    wakeup_us: Micros = 1_000
    """The engine asks for no wakeup sooner than this."""
    gang_members: int = 1_024
    gpu_faults: int = 3
    """A GPU that fails so many pieces of work in a row is cordoned."""
    gpu_faults_us: Micros = 900 * SECOND
    """Faults longer ago than this do not count."""
    gpu_rest_us: Micros = 60 * SECOND
    """After a hung step a GPU takes nothing new for so long where others do, so that the attempt is tried elsewhere."""
    models_per_node: int = 64
    """Model names remembered per node as probably in its cache."""

    def __post_init__(self) -> None:
        """Refuse bounds that are no bounds."""
        for each in fields(self):
            value = getattr(self, each.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Limits.{each.name}: {value!r} is no bound; use a whole number of at least 1")
