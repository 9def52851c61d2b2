"""The adapters at hand for a running batch: loaded by the threads that need them while it goes on, and kept within a budget.

An adapter that a run holds stays. Of the others the one that is worth least goes first when room is short (by uses, size and what
reading it took), deployed ones last. From a device it goes to host memory first, where the next run finds it without reading.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from executors.batching.lora import AdapterBank, PreparedAdapter
from executors.batching.requests import AdapterWeights
from executors.methods.base import GivenAdapter, InputRefused
from executors.residency.host import HostTier
from executors.residency.ledger import TierLedger

HOST_BYTES = 1 << 30
"""What adapters may take of the host's memory, where the model runs on the CPU, and where they wait beside a device."""
DEVICE_SHARE = 0.1
"""What adapters may take of a device's memory."""


@dataclass(slots=True)
class _Held:
    """An adapter on the shelf, or on its way there."""

    identity: str
    size_bytes: int = 0
    runs: int = 0
    pinned: bool = False
    cost_us: int = 0
    """What reading it took."""
    prepared: PreparedAdapter | None = None
    ready: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class _Aside:
    """An adapter in host memory, and where it belongs."""

    adapter: PreparedAdapter
    device: torch.device
    cost_us: int


def usual_host_budget(where: torch.device) -> int:
    """Return how many bytes of adapters to keep in host memory beside a device; none where that is the device."""
    return HOST_BYTES if where.type == "cuda" else 0


def usual_budget(where: torch.device) -> int:
    """Return how many bytes of adapters to keep on a device."""
    if where.type != "cuda":
        return HOST_BYTES
    return int(torch.cuda.get_device_properties(where).total_memory * DEVICE_SHARE)


class AdapterShelf:
    """Adapters in a bank, for several threads."""

    def __init__(self, bank: AdapterBank, budget_bytes: int, host_bytes: int = 0) -> None:
        self.bank = bank
        self._budget_bytes = budget_bytes
        self._changed = threading.Lock()
        self._held: dict[str, _Held] = {}
        # What is in use stays beyond the budget, so the ledger only says what goes first.
        self._ledger = TierLedger(1 << 62)
        self._host: HostTier[_Aside] = HostTier(host_bytes)
        self.loaded = 0
        """How many were read so far."""
        self.returned = 0
        """How many came back from host memory instead."""

    def __len__(self) -> int:
        return len(self._held)

    @property
    def size_bytes(self) -> int:
        """The memory that all of them take."""
        with self._changed:
            return sum(held.size_bytes for held in self._held.values())

    @contextmanager
    def holding(self, adapters: Sequence[GivenAdapter]) -> Iterator[AdapterWeights]:
        """Have adapters in the bank within this; yields them as requests name them.

        Those that are not there yet are read by the calling thread; two runs that want the same one read it once. Raises
        ModelMissing with the reason for one that cannot be used, InputRefused when one is named twice.
        """
        names = [f"{given.model}@{given.identity}" if given.identity else given.model for given in adapters]
        if len(set(names)) != len(names):
            raise InputRefused("adapters", "the same one is named twice; add up its weights instead")
        taken: list[str] = []
        try:
            for name, given in zip(names, adapters, strict=True):
                self._take(name, given)
                taken.append(name)
            yield tuple((name, given.weight) for name, given in zip(names, adapters, strict=True))
        finally:
            with self._changed:
                for name in taken:
                    self._held[name].runs -= 1
                self._make_room()

    def _take(self, name: str, given: GivenAdapter) -> None:
        """Count a run that needs an adapter, after it was read; raises what reading it raised."""
        while True:
            with self._changed:
                held = self._held.get(name)
                mine = held is None
                if held is None:
                    held = self._held[name] = _Held(given.identity)
                held.runs += 1
                held.pinned = given.pinned
                if held.ready.is_set():
                    self._ledger.use(name)
            if mine:
                self._read(name, held, given)
                return
            held.ready.wait()
            if held.error is None:
                return
            # Its reader has taken it off the shelf; this run's own files may be whole.
            with self._changed:
                held.runs -= 1

    def _read(self, name: str, held: _Held, given: GivenAdapter) -> None:
        try:
            with self._changed:
                aside = self._host.take(name)
            began = time.monotonic()
            if aside is None:
                prepared = self.bank.prepared(name, given.folder)
                held.cost_us = round((time.monotonic() - began) * 1e6)
            else:
                prepared, held.cost_us = _at(aside.adapter, aside.device), aside.cost_us
            with self._changed:
                held.size_bytes, held.prepared = prepared.size_bytes, prepared
                self._ledger.admit(name, held.size_bytes, held.cost_us)
                self._make_room()
            self.bank.insert(prepared)
            self.loaded += aside is None
            self.returned += aside is not None
        except Exception as error:
            held.error = error
            with self._changed:
                del self._held[name]
                self._ledger.drop(name)
            raise
        finally:
            held.ready.set()

    def _make_room(self) -> None:
        """Drop what nobody uses until the rest fits; what is in use stays even where it does not."""
        total = sum(held.size_bytes for held in self._held.values())
        unused = [name for name in self._ledger.order() if not self._held[name].runs]
        for name in sorted(unused, key=lambda name: self._held[name].pinned):
            if total <= self._budget_bytes:
                return
            held = self._held.pop(name)
            total -= held.size_bytes
            self._ledger.evict(name)
            self.bank.remove(name)
            if held.prepared is not None and self._host.has_room(held.size_bytes):
                self._host.put(name, _set_aside(held.prepared, held.cost_us), held.size_bytes, held.cost_us)


def _set_aside(prepared: PreparedAdapter, cost_us: int) -> _Aside:
    device = next((down.device for down, _ in prepared.pairs.values()), torch.device("cpu"))
    return _Aside(_at(prepared, torch.device("cpu")), device, cost_us)


def _at(prepared: PreparedAdapter, device: torch.device) -> PreparedAdapter:
    pairs = {key: (down.to(device), up.to(device)) for key, (down, up) in prepared.pairs.items()}
    return PreparedAdapter(prepared.name, pairs)
