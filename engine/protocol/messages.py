"""What the scheduler's end and a node's end say to each other: plain frozen facts, without any encoding.

Two kinds travel. *Datagrams* may be lost, doubled or reordered at no harm: HELLO, WELCOME, heartbeats, acknowledgements. *Items*
may not: orders to the node and reports from it ride in numbered streams (`Orders`, `Reports`) that are resent until acknowledged
and applied in order, each once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from engine.resources import GpuSpec, NodeSpec, ResidentModel

PROTO_MIN = 1
PROTO_MAX = 1

AttemptKey = tuple[str, int, int]
"""(req_no, attempt, rank): what fences a report."""


class NackReason(StrEnum):
    """Why an end did not do as told."""

    STALE = "stale"
    """The orders rode on a heartbeat whose lease has passed; they are sent again on a newer one."""
    UNKNOWN = "unknown"
    """This end does not know the message's kind: the other end is newer."""
    MALFORMED = "malformed"


# --- items: orders, from the scheduler to the node ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CreatePod:
    """CREATE_POD: create a Pod on these devices. `model` is opaque here: the resolved model the Pod loads."""

    pod: int
    method: str
    model: Mapping[str, Any] = field(default_factory=dict)
    gpus: tuple[str, ...] = ()
    gpu_share: int = 1000
    gpu_memory_cap_bytes: int = 0
    cpu_milli: int = 0
    memory_bytes: int = 0
    slots: int = 1


@dataclass(frozen=True, slots=True)
class DeletePod:
    """DELETE_POD: end a Pod, killed after the grace."""

    pod: int
    grace_us: int = 0


@dataclass(frozen=True, slots=True)
class Dispatch:
    """DISPATCH: run an attempt in a Pod. `parameters` is opaque here."""

    req_no: str
    attempt: int
    rank: int
    pod: int
    parameters: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str = ""
    terms: Mapping[str, Any] = field(default_factory=dict)
    """What the Pod must know beside the parameters (resolved adapters, priority); opaque here as well."""


@dataclass(frozen=True, slots=True)
class Kill:
    """KILL: stop an attempt between two steps; its Pod is killed after the grace."""

    req_no: str
    attempt: int
    rank: int
    pod: int
    grace_us: int = 0
    keep_checkpoint: bool = False


@dataclass(frozen=True, slots=True)
class Prefetch:
    """PREFETCH: bring a model's files to the node's cache ahead of need."""

    model: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Release:
    """RELEASE: let the node's cache evict a model again; with `drop` its files go now unless a Pod uses them."""

    model: str
    drop: bool = False


@dataclass(frozen=True, slots=True)
class UnknownItem:
    """An item that this end does not know or cannot read; it takes its number in the stream and is answered by a NACK."""

    tag: int
    detail: str = ""


Order = CreatePod | DeletePod | Dispatch | Kill | Prefetch | Release | UnknownItem

# --- items: reports, from the node to the scheduler -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PodUp:
    """POD_UP: the Pod loaded its model and takes attempts."""

    pod: int
    load_us: int = 0


@dataclass(frozen=True, slots=True)
class PodDown:
    """POD_DOWN: every process of the Pod is gone; unfinished attempts in it went with it."""

    pod: int
    cause: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Started:
    """STARTED: the method began to run."""

    req_no: str
    attempt: int
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Done:
    """DONE: the attempt has its result; `result` is its JSON text, with file ids in place of bytes."""

    req_no: str
    attempt: int
    rank: int = 0
    result: str = ""
    run_us: int = 0
    peak_gpu_memory_bytes: int = 0
    alone_us: int = 0
    company_permille: int = 0
    peak_host_memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """FAILED: the attempt failed, its Pod lives."""

    req_no: str
    attempt: int
    rank: int = 0
    cause: str = "crashed"
    detail: str = ""
    peak_gpu_memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Stopped:
    """STOPPED: the attempt stopped as told."""

    req_no: str
    attempt: int
    rank: int = 0
    checkpoint: str = ""


@dataclass(frozen=True, slots=True)
class Devices:
    """DEVICES: what the node's DevicePlugin sees now, and what lies in its model caches."""

    gpus: tuple[GpuSpec, ...]
    memory_used: tuple[tuple[str, int], ...] = ()
    busy_permille: tuple[tuple[str, int], ...] = ()
    resident: tuple[ResidentModel, ...] | None = None
    """All models whose files it holds; None: nothing is said about them."""
    cache_counts: tuple[tuple[str, int], ...] = ()


Report = PodUp | PodDown | Started | Done | Failed | Stopped | Devices | UnknownItem
TerminalReport = Done | Failed | Stopped
"""Reports that end an attempt; the node keeps them on disk until they are acknowledged."""

# --- datagrams, from the node ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """HELLO: a node asks for a session. It applies no order until it is welcomed, so the lists stay true."""

    proto_min: int
    proto_max: int
    node: NodeSpec
    boot: int
    """Incarnation of the node's end: grows at every start and after every self-fencing."""
    phase: int
    """Which search for a session within the boot this is; a resend keeps it."""
    n: int
    """Number of this sending; the lease of a welcome counts from when it was sent."""
    pods: tuple[int, ...] = ()
    """Pods that live."""
    pods_ended: tuple[int, ...] = ()
    """Pods whose end is reported but not acknowledged."""
    running: tuple[AttemptKey, ...] = ()
    spooled: tuple[AttemptKey, ...] = ()
    """Attempts whose end is reported but not acknowledged."""
    first_report: int = 1
    """Number of the first report that is not acknowledged."""
    carried: int = 0
    """So many of the first reports come from earlier boots: they are heard before the node joins."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """HB: the node's end is alive, and how far it has come."""

    session: int
    n: int
    applied: int
    limit: int
    free_slots: int = 0
    running: int = 0
    progress: int = 0
    """Grows with every progress of a Pod: a living agent with stuck Pods is told apart."""


@dataclass(frozen=True, slots=True)
class Reports:
    """A stretch of the node's report stream; `applied` and `limit` acknowledge orders as in `Credit`."""

    session: int
    first: int
    items: tuple[Report, ...]
    applied: int = 0
    limit: int = 0


@dataclass(frozen=True, slots=True)
class Credit:
    """CREDIT: orders up to `applied` are carried out; orders up to `limit` (cumulative) may be sent."""

    session: int
    applied: int
    limit: int


@dataclass(frozen=True, slots=True)
class Progress:
    """PROGRESS: lost ones are replaced by later ones, so each repeats the last checkpoint that the attempt saved."""

    session: int
    req_no: str
    attempt: int
    rank: int
    done: int
    total: int
    checkpoint: str = ""
    note: str = ""
    preview: str = ""


@dataclass(frozen=True, slots=True)
class Drain:
    """DRAIN: the node wants to leave; start nothing new on it."""

    session: int


@dataclass(frozen=True, slots=True)
class Bye:
    """BYE: the node has no Pod any more and leaves; no lease needs to run out."""

    session: int


# --- datagrams, from the scheduler ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Welcome:
    """WELCOME: the session's number, the lease and the first credit. Echoes `boot`, `phase` and `n` of the HELLO."""

    proto: int
    session: int
    epoch: int
    boot: int
    phase: int
    n: int
    lease_us: int
    heartbeat_us: int


@dataclass(frozen=True, slots=True)
class HeartbeatAck:
    """HBACK: renews the lease from the time heartbeat `n` was sent; reports up to `durable` may be forgotten."""

    session: int
    epoch: int
    n: int
    durable: int


@dataclass(frozen=True, slots=True)
class Orders:
    """A stretch of the order stream. Carried out only while the lease of heartbeat `lease_ref` holds on the node's own clock."""

    session: int
    epoch: int
    lease_ref: int
    first: int
    items: tuple[Order, ...]
    durable: int = 0


@dataclass(frozen=True, slots=True)
class DoneAck:
    """DONE_ACK: reports up to `durable` are in the journal and may be forgotten."""

    session: int
    epoch: int
    durable: int


@dataclass(frozen=True, slots=True)
class Rejoin:
    """The scheduler does not know this session (it restarted, or the connection is new): say HELLO. Pods go on."""

    session: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Fence:
    """The scheduler has given this boot's Pods up: kill them all, then say HELLO with a boot above `above`."""

    boot: int
    epoch: int
    above: int
    reason: str = ""


# --- either way -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Nack:
    """NACK: message or item `number` of the session was not carried out."""

    session: int
    number: int
    reason: str
    detail: str = ""


FromNode = Hello | Heartbeat | Reports | Credit | Progress | Drain | Bye | Nack
FromScheduler = Welcome | HeartbeatAck | Orders | DoneAck | Rejoin | Fence | Nack
Message = FromNode | FromScheduler


def attempt_key(item: Started | TerminalReport | Dispatch | Kill | Progress) -> AttemptKey:
    """Return what names the attempt an item speaks of."""
    return (item.req_no, item.attempt, item.rank)
