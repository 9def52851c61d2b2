"""What an event may call for. The fold notes these in `State.agenda`; the engine works them off in the same step."""

from __future__ import annotations

from typing import Final

SUBMITTED: Final = 0
"""A task wants to enter."""
CANCEL: Final = 1
"""A task's customer wants it no more."""
ENDED: Final = 2
"""A task's attempt is over without a result."""
POD_STARTED: Final = 3
DOOMED: Final = 4
"""A Pod lost a device."""
STOP_REST: Final = 5
"""One member of a gang failed while others still run."""
RUNNING: Final = 6
FINISHED: Final = 7
ORPHAN: Final = 8
"""A node named a Pod that nobody ordered; the item is its number."""
ROOMY: Final = 9
"""A claim waits for nothing any more."""
NODE_CHANGED: Final = 10
POD_UNUSED: Final = 11
"""A Pod that may not be used again became empty."""
UNLOAD: Final = 13
"""A model is to leave a node."""
CAPACITY: Final = 12
"""Time to look whether nodes and warm Pods are as many as wanted."""
