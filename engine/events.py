"""Events: frozen facts in the past tense, the only input of the engine besides time.

`req_no` + `attempt` (+ `rank` inside a gang) fence every report of an executor: a report of an old attempt changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.capacity import CapacityChecked, DemandForecast, FleetConfigured
from engine.resources import Demand, GpuSpec, NodeSpec, ResidentModel
from engine.tasks import Estimate, FailureCause, Micros, TaskSpec

# --- from customers, through SS -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TaskSubmitted:
    """A request entered. Submitting a known `req_no` again changes nothing."""

    task: TaskSpec
    estimate: Estimate | None = None


@dataclass(frozen=True, slots=True)
class TaskCancelRequested:
    """The customer wants no result any more."""

    req_no: str


@dataclass(frozen=True, slots=True)
class TaskEstimated:
    """A later, better estimate of a waiting or running task."""

    req_no: str
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class TaskRevived:
    """An operator runs a dead-lettered task again, with its attempts given back."""

    req_no: str


# --- from operators -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TenantConfigured:
    """Weight and limits of a tenant; 0 means no limit."""

    tenant: str
    weight: int = 1
    max_pending: int = 0
    max_running: int = 0


@dataclass(frozen=True, slots=True)
class ModelDeployed:
    """Keep `pods` warm Pods that hold this model."""

    model: str
    method: str
    demand: Demand
    slots: int = 1
    pods: int = 1
    adapter: str = ""
    """The personalised model that wants them, where it shares the Pods of its base `model`: as many are kept as the one wants that
    wants most. Empty: the model itself."""


@dataclass(frozen=True, slots=True)
class ModelUndeployed:
    """The model needs no warm Pod any more."""

    model: str
    method: str
    adapter: str = ""
    """The personalised model that wants none any more, where it shares the Pods of its base `model`."""


@dataclass(frozen=True, slots=True)
class NodeDrainRequested:
    """Start nothing new on the node, or on one of its GPUs; what runs there finishes."""

    node: str
    gpu: str | None = None
    leaving: bool = False
    """The node drains itself because its agent is about to end; it takes work again when it joins again."""


@dataclass(frozen=True, slots=True)
class NodeUncordoned:
    """The node, or one of its GPUs, takes work again."""

    node: str
    gpu: str | None = None


@dataclass(frozen=True, slots=True)
class ModelUnloadRequested:
    """A model's idle Pods and files are to leave a node; what is in use or deployed stays."""

    node: str
    model: str


# --- from agents ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NodeJoined:
    """A node said hello. A known node that joins again was restarted: its Pods are gone unless `pods` names them."""

    node: NodeSpec
    pods: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeReported:
    """What the node's DevicePlugin sees now: GPUs may have come, gone or fallen ill."""

    node: str
    gpus: tuple[GpuSpec, ...]
    gpu_memory_used: tuple[tuple[str, int], ...] = ()
    gpu_busy_permille: tuple[tuple[str, int], ...] = ()
    resident: tuple[ResidentModel, ...] | None = None
    """All models whose files it holds, those that matter most first; None: nothing is said about them."""
    cache_counts: tuple[tuple[str, int], ...] = ()
    """What happened to its model caches since they were made, for monitoring (`disk_hits`, `disk_bytes_in` ...)."""


@dataclass(frozen=True, slots=True)
class NodeLost:
    """The node's lease ran out: its Pods and attempts are known to be fenced."""

    node: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PodStarted:
    """The Pod has its model loaded and takes tasks."""

    pod: int


@dataclass(frozen=True, slots=True)
class PodStopped:
    """The Pod is known to be gone: ordered, crashed, or never started. Unfinished attempts in it have failed with `cause`."""

    pod: int
    cause: FailureCause = FailureCause.POD_LOST
    detail: str = ""


@dataclass(frozen=True, slots=True)
class TaskStarted:
    """The executor began to run the attempt."""

    req_no: str
    attempt: int
    rank: int = 0


@dataclass(frozen=True, slots=True)
class TaskProgressed:
    """`done` of `total` steps are behind the attempt; `checkpoint` names the last one that it saved while it ran on.

    `note` is the method's own word about the last step (a training's loss), for people; nothing is decided by it.
    """

    req_no: str
    attempt: int
    done: int
    total: int
    rank: int = 0
    checkpoint: str = ""
    note: str = ""
    preview: str = ""
    """File-store id of a small picture of what there is so far; nothing is decided by it."""


@dataclass(frozen=True, slots=True)
class TaskFinished:
    """The attempt has its result; `result` is an opaque reference (a file-store id), never bytes."""

    req_no: str
    attempt: int
    rank: int = 0
    result: str = ""
    run_us: Micros = 0
    peak_gpu_memory_bytes: int = 0
    alone_us: Micros = 0
    """What the run would have taken alone in its Pod, as the Pod measured; 0: it says nothing about it."""
    company_permille: int = 0
    """How many other tasks shared the Pod's steps with it, on average, in thousandths."""
    peak_host_memory_bytes: int = 0
    """The most memory that the Pod's process held on the host, loading included; 0: not measured."""


@dataclass(frozen=True, slots=True)
class TaskFailed:
    """The attempt failed but its Pod lives (a dead Pod is reported by `PodStopped`)."""

    req_no: str
    attempt: int
    cause: FailureCause
    rank: int = 0
    detail: str = ""
    peak_gpu_memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class TaskStopped:
    """A StopTask took effect; `checkpoint` names what can be resumed, empty when nothing was saved."""

    req_no: str
    attempt: int
    rank: int = 0
    checkpoint: str = ""


Event = (
    TaskSubmitted
    | TaskCancelRequested
    | TaskEstimated
    | TaskRevived
    | TenantConfigured
    | ModelDeployed
    | ModelUndeployed
    | NodeDrainRequested
    | NodeUncordoned
    | ModelUnloadRequested
    | NodeJoined
    | NodeReported
    | NodeLost
    | PodStarted
    | PodStopped
    | TaskStarted
    | TaskProgressed
    | TaskFinished
    | TaskFailed
    | TaskStopped
    | DemandForecast
    | FleetConfigured
    | CapacityChecked
)
