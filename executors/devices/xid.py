"""Errors that an NVIDIA GPU itself reports (Xid): the ones after which it must be reset make it ill, whatever else it answers.

An application's own faults - a wild access, an assertion - are Xid events as well, and say nothing of the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

FATAL_XIDS = frozenset({48, 62, 64, 74, 79, 95, 119, 120, 136, 140, 143})
"""Uncorrectable memory, a halted or unreachable processor, a broken link, off the bus: NVIDIA's catalogue asks for a reset."""
_AT_ONCE = 64


class XidWatch:
    """The event set of one opened NVML; where the driver has no events, nothing is ever seen."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._watched: set[str] = set()
        self._events: Any = None

    def watch(self, uuid: str, handle: Any) -> None:
        """Have the driver tell of a GPU's critical errors from now on."""
        if uuid in self._watched:
            return
        self._watched.add(uuid)
        try:
            if self._events is None:
                self._events = self._library.nvmlEventSetCreate()
            self._library.nvmlDeviceRegisterEvents(handle, self._library.nvmlEventTypeXidCriticalError, self._events)
        except (self._library.NVMLError, AttributeError):
            return  # Virtual GPUs and old drivers have no events.

    def take(self) -> Iterable[tuple[str, int]]:
        """Return (uuid, Xid) of the fatal errors since the last call, without waiting."""
        found: list[tuple[str, int]] = []
        if self._events is None:
            return found
        for _ in range(_AT_ONCE):
            try:
                event = self._library.nvmlEventSetWait_v2(self._events, 0)
                xid, uuid = int(event.eventData), self._library.nvmlDeviceGetUUID(event.device)
            except (self._library.NVMLError, AttributeError):
                break  # Nothing more to tell, or the GPU is past telling: then it is listed as ill anyway.
            if xid in FATAL_XIDS:
                found.append((uuid.decode() if isinstance(uuid, bytes) else str(uuid), xid))
        return found
