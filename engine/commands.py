"""Commands: imperative orders of the engine. A world performs one only after the step that ordered it is durable."""

from __future__ import annotations

from dataclasses import dataclass

from engine.resources import Demand, GpuGrant
from engine.tasks import Micros, TaskState


@dataclass(frozen=True, slots=True)
class Room:
    """Room on a node that a waiting task claims while the Pods in its way go; worlds ignore it."""

    node: str
    grants: tuple[GpuGrant, ...]
    demand: Demand
    pods: tuple[int, ...]
    """The Pods that must be gone first."""


@dataclass(frozen=True, slots=True)
class CreatePod:
    """Create a Pod on a node, on these devices. Answered by PodStarted or PodStopped."""

    pod: int
    node: str
    method: str
    model: str
    grants: tuple[GpuGrant, ...]
    demand: Demand
    """What the Pod takes of the node; `gpu_memory_bytes` is its cap per GPU."""
    slots: int = 1
    req_no: str = ""
    """The task that is bound to this Pod; empty: kept warm for whoever comes."""
    attempt: int = 0
    rank: int = 0


@dataclass(frozen=True, slots=True)
class DeletePod:
    """Stop a Pod. Answered by PodStopped; the devices stay taken until then."""

    pod: int
    reason: str
    grace_us: Micros = 0


@dataclass(frozen=True, slots=True)
class StartTask:
    """Run an attempt in a slot of a started Pod. Answered by TaskStarted, then TaskFinished or TaskFailed."""

    req_no: str
    attempt: int
    pod: int
    node: str
    rank: int = 0
    checkpoint: str = ""
    """Resume from here; empty: from the beginning."""


@dataclass(frozen=True, slots=True)
class StopTask:
    """Stop an attempt between two steps. Answered by TaskStopped (or TaskFinished, when that was faster)."""

    req_no: str
    attempt: int
    pod: int
    node: str
    rank: int = 0
    grace_us: Micros = 0
    reason: str = ""
    keep_checkpoint: bool = False


@dataclass(frozen=True, slots=True)
class PrefetchModel:
    """Bring a model's files to a node's cache ahead of need.

    Where that fails nobody is told: whoever needs the model will find out.
    """

    node: str
    model: str
    pin: bool = False
    """The files stay until they are released."""


@dataclass(frozen=True, slots=True)
class ReleaseModel:
    """Let a node's cache evict a model again."""

    node: str
    model: str
    drop: bool = False
    """Remove the files now, unless a Pod uses them."""


@dataclass(frozen=True, slots=True)
class ScaleNodes:
    """Ask whoever owns machines for this many nodes in all. Advisory, unless a fleet was configured."""

    nodes: int
    reason: str
    leave: tuple[str, ...] = ()
    """The nodes that are to drain and go."""


@dataclass(frozen=True, slots=True)
class Notify:
    """Tell SS that a task changed its state. `reason` is a `Reason` constant or a failure cause; `detail` is for people."""

    req_no: str
    state: TaskState
    attempt: int = 0
    reason: str = ""
    detail: str = ""
    result: str = ""
    node: str = ""
    at: Micros = 0
    until: Micros = 0
    """When a task in BACKOFF is tried again."""
    pod: int = 0
    """The warm Pod that `rank` of a gang waits in, while the others' Pods are being created."""
    rank: int = 0
    room: Room | None = None
    """Room that a PENDING task claims."""


Command = CreatePod | DeletePod | StartTask | StopTask | PrefetchModel | ReleaseModel | ScaleNodes | Notify
