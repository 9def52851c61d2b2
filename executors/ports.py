"""The ports inside a node agent: file store, devices and Pods, as the agent's loop sees them.

The agent's loop is one thread that polls file descriptors; nothing here may block it for longer than a few milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from engine.resources import GpuSpec, ResidentModel
from engine.tasks import FailureCause

# --- file store (DFS) -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FileRef:
    """A stored file. `file_id` is the lower-case hex SHA-256 of its content."""

    file_id: str
    size_bytes: int
    media_type: str = "application/octet-stream"


class FileStore(Protocol):
    """Content-addressed files: equal bytes are one file, a name never changes its content."""

    def put_path(self, source: Path, media_type: str = "application/octet-stream") -> FileRef:
        """Store a file, streamed and atomic."""
        ...

    def put_bytes(self, content: bytes, media_type: str = "application/octet-stream") -> FileRef:
        """Store bytes."""
        ...

    def stat(self, file_id: str) -> FileRef | None:
        """Return what is known of a file, None when absent."""
        ...

    def read(self, file_id: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Stream bytes [start, end); raises FileNotFoundError when absent."""
        ...

    def fetch(self, file_id: str, to: Path) -> Path:
        """Copy a file to a local path, checking its SHA-256; raises FileNotFoundError, or ValueError when bytes are corrupt."""
        ...

    def delete(self, file_id: str) -> bool:
        """Delete a file; False when it was absent."""
        ...


# --- DevicePlugin ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """What a device is doing now. `processes` are the PIDs that hold memory on it."""

    uuid: str
    memory_used_bytes: int = 0
    busy_permille: int = 0
    processes: tuple[int, ...] = ()


class DevicePlugin(Protocol):
    """Lists the GPUs of this machine and their use; called about once a second."""

    def devices(self) -> tuple[GpuSpec, ...]:
        """Return the devices present now, in a stable order."""
        ...

    def use(self) -> tuple[DeviceUse, ...]:
        """Return the use of each present device."""
        ...

    def environment(self, uuids: Sequence[str]) -> Mapping[str, str]:
        """Return the environment that shows a process just these devices (CUDA_VISIBLE_DEVICES ...)."""
        ...


# --- models ---------------------------------------------------------------------------------------------------------


class ModelStock(Protocol):
    """The models of the node, beside its Pods; no call waits for a download."""

    def bring(self, model: Mapping[str, Any]) -> None:
        """Fetch a resolved model some time soon, and keep it where its ``"pin"`` is true."""
        ...

    def release(self, model_id: str, drop: bool = False) -> None:
        """Let a model be evicted; with `drop` its files go at once unless somebody uses them."""
        ...

    def resident(self) -> tuple[ResidentModel, ...]:
        """Return the models that are here, those that matter most first; may read the disk."""
        ...

    def counts(self) -> tuple[tuple[str, int], ...]:
        """Return what happened to the caches so far, by name."""
        ...


# --- Pods -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PodOrder:
    """What the agent is told to create."""

    pod: int
    method: str
    model: Mapping[str, Any] = field(default_factory=dict)
    """Resolved model: ``{"id", "base", "adapter": {name: file_id} | None, "path": str | None}``; empty for methods without one."""
    gpus: tuple[str, ...] = ()
    gpu_share: int = 1000
    gpu_memory_cap_bytes: int = 0
    cpu_milli: int = 0
    memory_bytes: int = 0
    slots: int = 1


@dataclass(frozen=True, slots=True)
class PodUp:
    """The Pod loaded its model and takes attempts."""

    pod: int
    load_us: int = 0


@dataclass(frozen=True, slots=True)
class PodDown:
    """The Pod's processes are all gone. `detail` carries the tail of its log."""

    pod: int
    cause: FailureCause
    detail: str = ""
    ordered: bool = False


@dataclass(frozen=True, slots=True)
class AttemptStarted:
    """The method began to run."""

    req_no: str
    attempt: int
    rank: int = 0


@dataclass(frozen=True, slots=True)
class AttemptProgressed:
    """`done` of `total` steps are behind the attempt; `checkpoint` names the last one that it put into the file store."""

    req_no: str
    attempt: int
    done: int
    total: int
    note: str = ""
    rank: int = 0
    checkpoint: str = ""
    preview: str = ""
    """File id of a small picture of what there is so far."""


@dataclass(frozen=True, slots=True)
class AttemptFinished:
    """The result is in the file store; `result` is its JSON-able description, `files` inside it carry file ids."""

    req_no: str
    attempt: int
    result: Mapping[str, Any]
    run_us: int = 0
    peak_gpu_memory_bytes: int = 0
    rank: int = 0
    alone_us: int = 0
    """What the run would have taken alone in its Pod, as the Pod measured; 0: it says nothing about it."""
    company_permille: int = 0
    """How many other attempts shared the steps with it, on average, in thousandths."""
    peak_host_memory_bytes: int = 0
    """The most memory that the Pod's process held on the host so far, loading included; 0: not measured."""


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """The attempt failed; its Pod lives."""

    req_no: str
    attempt: int
    cause: FailureCause
    detail: str = ""
    peak_gpu_memory_bytes: int = 0
    rank: int = 0


@dataclass(frozen=True, slots=True)
class AttemptStopped:
    """The attempt stopped between two steps, as told."""

    req_no: str
    attempt: int
    checkpoint: str = ""
    rank: int = 0


PodReport = PodUp | PodDown | AttemptStarted | AttemptProgressed | AttemptFinished | AttemptFailed | AttemptStopped


class PodHost(Protocol):
    """Runs Pods as child process groups of the agent."""

    def create(self, order: PodOrder) -> None:
        """Begin to create a Pod; PodUp or PodDown follows."""
        ...

    def start(
        self,
        pod: int,
        req_no: str,
        attempt: int,
        parameters: Mapping[str, Any],
        checkpoint: str = "",
        rank: int = 0,
        terms: Mapping[str, Any] | None = None,
    ) -> None:
        """Run an attempt in a Pod; AttemptStarted follows, or PodDown. `terms` is what `executors.terms.Terms` reads."""
        ...

    def stop(self, req_no: str, attempt: int, grace_us: int, keep_checkpoint: bool = False) -> None:
        """Stop an attempt between two steps; after the grace its Pod is killed."""
        ...

    def delete(self, pod: int, grace_us: int) -> None:
        """End a Pod, killed after the grace; PodDown follows."""
        ...

    def filenos(self) -> Sequence[int]:
        """Return the descriptors whose readability means that `take` has something."""
        ...

    def next_deadline_us(self) -> int | None:
        """Return in how many microseconds `take` has a grace to enforce; None when no clock runs."""
        ...

    def take(self) -> Sequence[PodReport]:
        """Return the reports since the last call without blocking; also reaps dead children and enforces graces."""
        ...

    def pods(self) -> Sequence[int]:
        """Return the Pods that live."""
        ...

    def close(self) -> None:
        """Kill every Pod's process group and wait for it."""
        ...
