"""Why a task is refused, waits, or was moved: constants that can be counted, and blockers that say what is missing."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """A constant for every decision that a person may ask about."""

    # refused at admission
    INVALID = "invalid"
    QUEUE_FULL = "queue_full"
    TENANT_PENDING_QUOTA = "tenant_pending_quota"
    IMPOSSIBLE = "impossible"
    DEADLINE_PASSED = "deadline_passed"
    # waiting
    TENANT_RUNNING_QUOTA = "tenant_running_quota"
    QUEUE_QUOTA = "queue_quota"
    RESERVED_FOR_OTHER = "reserved_for_other"
    NO_NODE = "no_node"
    NODE_DOWN = "node_down"
    NODE_DRAINING = "node_draining"
    NODE_EXCLUSIVE = "node_exclusive"
    NODE_NOT_EMPTY = "node_not_empty"
    NO_GPU = "no_gpu"
    NO_GPU_MODEL = "no_gpu_model"
    NO_GPU_SHARE = "no_gpu_share"
    NO_GPU_MEMORY = "no_gpu_memory"
    NO_CPU = "no_cpu"
    NO_MEMORY = "no_memory"
    NO_DISK = "no_disk"
    NO_NETWORK = "no_network"
    NO_EXTRA = "no_extra"
    GROUP_NODE = "group_node"
    NO_WARM_SLOT = "no_warm_slot"
    GANG_INCOMPLETE = "gang_incomplete"
    ORDER = "order"
    BACKING_OFF = "backing_off"
    ROOM_CLAIMED = "room_claimed"
    POD_CREATING = "pod_creating"
    START_UNCONFIRMED = "start_unconfirmed"
    STOPPING = "stopping"
    # moved or stopped
    CANCELLED = "cancelled"
    PREEMPTED = "preempted"
    OUTRANKED = "outranked"
    RUN_LIMIT = "run_limit"
    GANG_FAILED = "gang_failed"
    ATTEMPTS_USED = "attempts_used"
    NOT_RETRYABLE = "not_retryable"
    START_DEADLINE = "start_deadline"
    DRAINED = "drained"
    RETRY = "retry"
    # Pods
    IDLE = "idle"
    ROOM = "room"
    GPU_LOST = "gpu_lost"
    UNRESPONSIVE = "unresponsive"
    DEPLOYED = "deployed"
    UNKNOWN_POD = "unknown_pod"
    # elasticity
    PENDING_WORK = "pending_work"
    FORECAST = "forecast"


@dataclass(frozen=True, slots=True)
class Blocker:
    """One thing that keeps a task waiting."""

    reason: Reason
    detail: str
    """A sentence for people."""
    nodes: int = 0
    """How many nodes are ruled out by this."""
    missing: int = 0
    """The smallest amount that is lacking on any of these nodes, in the resource's own unit."""
    node: str = ""
    """The node where the least is lacking, or the node meant."""
    until: int = 0
    """When this blocker goes by itself, in microseconds; 0: unknown."""
