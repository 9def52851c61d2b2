"""What the scheduler's end knows of one node: its session, the two streams, and the ledger of what was ordered and has not ended.

The ledger, not a log of sent messages, is what survives a broken session: when the node says HELLO again, its own lists are
compared with the ledger and only what it never received is ordered again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from engine import commands as c
from engine import events as e
from engine.protocol import messages as m
from engine.protocol.streams import Receiver, Sender
from engine.resources import NodeSpec
from engine.tasks import NEVER, FailureCause, Micros

FIRST_CREDIT = 64


class Stage(StrEnum):
    """How far a node has come in joining."""

    ABSENT = "absent"
    """No session: never seen, lost, or left."""
    CARRYING = "carrying"
    """Welcomed; results from before its restart are heard first."""
    ANNOUNCED = "announced"
    """Its NodeJoined waits to be taken by the engine; orders decided before that may not leave."""
    JOINED = "joined"


@dataclass(slots=True)
class ExpectedPod:
    """A Pod that was ordered and is not known to be gone."""

    order: m.CreatePod
    started: bool = False
    delete: m.DeletePod | None = None


@dataclass(slots=True)
class ExpectedAttempt:
    """An attempt that was ordered and is not known to have ended."""

    order: m.Dispatch
    stop: m.Kill | None = None
    checkpoint: str = ""
    """The last one that it told of while it ran."""


class Link:
    """One node as the scheduler's end sees it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stage = Stage.ABSENT
        self.known = False
        """The engine believes that the node is there."""
        self.peer: str | None = None
        self.spec: NodeSpec | None = None
        self.boot = 0
        """Latest boot seen in this life of the scheduler; 0: none yet."""
        self.fenced_boot = 0
        """Boots up to this one were given up."""
        self.phase = 0
        self.session = 0
        self.hello: m.Hello | None = None
        self.fresh = False
        """The joining boot is known to hold nothing that was ordered before."""
        self.last_n = 0
        self.lost_at: Micros = NEVER
        self.heard_at: Micros = 0
        self.stale = False
        """Orders came too late for their lease; they go again on the next heartbeat."""
        self.doomed = False
        """Its loss is among the events and not taken yet."""
        self.draining = False
        self.joined_pods: tuple[int, ...] = ()
        self.carried_until = 0
        self.orders: Sender[m.Order] = Sender(limit=FIRST_CREDIT)
        self.reports = Receiver()
        self.taken = 0
        """Reports up to here were handed to the engine."""
        self.durable = 0
        """Reports up to here are in the journal."""
        self.running = 0
        self.progress = 0
        self.pods: dict[int, ExpectedPod] = {}
        self.attempts: dict[m.AttemptKey, ExpectedAttempt] = {}

    # --- the ledger -------------------------------------------------------------------------------------------------

    def forget_pod(self, pod: int) -> bool:
        """Take a Pod that is gone, and its attempts, out of the ledger; False when it was not in it."""
        if self.pods.pop(pod, None) is None:
            return False
        for key in [key for key, attempt in self.attempts.items() if attempt.order.pod == pod]:
            del self.attempts[key]
        return True

    def forget_all(self) -> None:
        """Empty the ledger: the node holds nothing of it any more."""
        self.pods.clear()
        self.attempts.clear()

    def unexpected(self, hello: m.Hello) -> bool:
        """Tell whether the node holds Pods or attempts that the ledger does not know."""
        if self.boot and hello.boot != self.boot:
            return bool(hello.pods or hello.running)
        if any(pod not in self.pods for pod in hello.pods):
            return True
        return any(key not in self.attempts for key in hello.running)

    # --- sessions ---------------------------------------------------------------------------------------------------

    def open(self, hello: m.Hello, peer: str, session: int) -> None:
        """Begin a session; the caller has decided that the HELLO is good."""
        same_boot = hello.boot == self.boot
        if not same_boot:
            self.fresh = self.boot != 0 or not self.known
            self.reports = Receiver(hello.first_report - 1)
            self.taken = self.durable = hello.first_report - 1
            self.carried_until = hello.first_report - 1 + hello.carried
            self.stage = Stage.CARRYING
        self.reports.applied = max(self.reports.applied, hello.first_report - 1)
        self.boot, self.phase, self.session = hello.boot, hello.phase, session
        self.hello, self.spec, self.peer = hello, hello.node, peer
        self.orders = Sender(limit=FIRST_CREDIT)
        self.stale = False
        self.last_n = hello.n

    def close(self) -> None:
        """End the session for good: what this boot held is given up."""
        self.stage = Stage.ABSENT
        self.fenced_boot = max(self.fenced_boot, self.boot)
        self.session = 0
        self.peer = None
        self.lost_at = NEVER
        self.orders = Sender(limit=FIRST_CREDIT)

    def announce(self) -> None:
        """Fix which Pods the NodeJoined names; Pods ordered until it is taken are added then."""
        self.stage = Stage.ANNOUNCED
        hello = self.hello
        if self.fresh or hello is None:
            self.joined_pods = ()
            return
        reported = {*hello.pods, *hello.pods_ended}
        self.joined_pods = tuple(pod for pod, expected in self.pods.items() if pod in reported or not expected.started)

    def join(self) -> tuple[int, ...]:
        """Complete the joining as the engine takes it: settle the ledger and return the Pods that go on."""
        pods: set[int] = set()
        if self.fresh:
            self.forget_all()
        else:
            pods = {*self.joined_pods, *(pod for pod, expected in self.pods.items() if not expected.started)}
            for pod in [pod for pod in self.pods if pod not in pods]:
                self.forget_pod(pod)
        self.stage = Stage.JOINED
        self.known = True
        return tuple(sorted(pods))

    def reorder(self) -> Iterator[e.Event]:
        """Fill the session's order stream with what the node never received; yield the ends of what never began."""
        hello = self.hello
        if hello is None:
            return
        pods = {*hello.pods, *hello.pods_ended}
        attempts = {*hello.running, *hello.spooled}
        for pod, expected in list(self.pods.items()):
            if pod in pods:
                if expected.delete is not None:
                    self.orders.push(expected.delete)
            elif expected.delete is not None:
                self.forget_pod(pod)
                yield e.PodStopped(pod, FailureCause.POD_LOST, "deleted before it was created")
            else:
                self.orders.push(expected.order)
        for key, attempt in list(self.attempts.items()):
            if key in attempts:
                if attempt.stop is not None:
                    self.orders.push(attempt.stop)
            elif attempt.stop is not None:
                del self.attempts[key]
                yield e.TaskStopped(*key)
            else:
                self.orders.push(attempt.order)


def create_order(command: c.CreatePod, model: dict[str, object]) -> m.CreatePod:
    """Return the order for an engine's CreatePod; `model` is the resolved model."""
    grants = command.grants
    return m.CreatePod(
        pod=command.pod,
        method=command.method,
        model=model,
        gpus=tuple(grant.uuid for grant in grants),
        gpu_share=grants[0].share if grants else 0,
        gpu_memory_cap_bytes=command.demand.gpu_memory_bytes,
        cpu_milli=command.demand.cpu_milli,
        memory_bytes=command.demand.memory_bytes,
        slots=command.slots,
    )
