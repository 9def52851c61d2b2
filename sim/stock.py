"""What a simulated node says of the models in its caches, in the words and at the pace of real agents."""

from __future__ import annotations

from typing import Final

from engine.resources import ResidentModel, Tier
from engine.tasks import SECOND, Micros
from sim.caches import ByteCache

TELL_US: Final[Micros] = 10 * SECOND
"""How long after a change a node tells of it: agents look at their caches now and then."""
MOST_TOLD: Final = 128
"""Models that a report names."""


def resident(disk: ByteCache, memory: ByteCache) -> tuple[ResidentModel, ...]:
    """Return the models of a node's caches: pinned ones first, then the last used, those in memory before the others."""
    found = [ResidentModel(name, Tier.MEMORY, size, disk.is_pinned(name)) for name, size in memory.entries()]
    found += [
        ResidentModel(name, Tier.DISK, size, disk.is_pinned(name))
        for name, size in disk.entries()
        if name not in memory
    ]
    if disk.has_pins:
        found.sort(key=lambda each: not each.pinned)
    return tuple(found[:MOST_TOLD])
