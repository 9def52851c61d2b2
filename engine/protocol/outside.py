"""What the scheduler's end asks of its surroundings and tells them: bodies, what a recovered engine believes, how nodes are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from engine import commands as c
from engine.protocol.link import Stage
from engine.tasks import FailureCause, Micros


class PayloadRefused(Exception):
    """A body cannot be made: the attempt or Pod fails with this cause instead of being ordered."""

    def __init__(self, cause: FailureCause, detail: str) -> None:
        super().__init__(detail)
        self.cause = cause
        self.detail = detail


class Payloads(Protocol):
    """Supplies what the engine does not know: models and parameters, opaque to the protocol and JSON-able."""

    def pod(self, command: c.CreatePod) -> dict[str, object]:
        """Return the resolved model of a Pod; raises PayloadRefused."""
        ...

    def task(self, command: c.StartTask) -> dict[str, object]:
        """Return the parameters of an attempt; raises PayloadRefused."""
        ...

    def prefetch(self, command: c.PrefetchModel) -> dict[str, object]:
        """Return the resolved model to bring to a node's cache; raises PayloadRefused."""
        ...


@runtime_checkable
class TermPayloads(Payloads, Protocol):
    """Payloads that also say what a Pod must know beside the parameters."""

    def terms(self, command: c.StartTask) -> dict[str, object]:
        """Return the terms of an attempt (resolved adapters, priority); raises PayloadRefused."""
        ...


@dataclass(frozen=True, slots=True)
class Outstanding:
    """What a recovered engine believes to be under way. Nothing of it is known to have reached a node."""

    nodes: tuple[str, ...] = ()
    """Nodes it believes to be there."""
    creates: tuple[c.CreatePod, ...] = ()
    """Pods that are not gone."""
    started: frozenset[int] = frozenset()
    """Those of them whose PodStarted it has seen."""
    starts: tuple[c.StartTask, ...] = ()
    """Attempts that have not ended."""
    deletes: tuple[c.DeletePod, ...] = ()
    stops: tuple[c.StopTask, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """A node as monitoring sees it."""

    name: str
    stage: Stage
    heard_at: Micros
    running: int
    progress: int
    draining: bool
    unsent_orders: int
