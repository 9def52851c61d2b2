"""What a machine has and what a Pod may take of it: cgroups of either version, or resource limits where those are closed.

A cgroup is the honest limit: it counts what the whole process group touches, its out-of-memory kill is counted and so told apart
from any other SIGKILL. Where the agent may not make one, `RLIMIT_DATA` caps private memory beyond what the Pod was born with;
`RLIMIT_AS` is useless here, since torch and CUDA reserve far more addresses than they ever touch.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

CPU_PERIOD_US = 100_000
PODS_PIDS_MAX = 1024
"""Processes and threads a Pod may have, unless its limits say otherwise."""
_CONTROLLERS = ("memory", "cpu", "pids")


@dataclass(frozen=True, slots=True)
class PodLimits:
    """What a Pod may take; 0 means no limit."""

    memory_bytes: int = 0
    cpu_milli: int = 0
    pids: int = PODS_PIDS_MAX


@dataclass(frozen=True, slots=True)
class HostResources:
    """What this machine offers in all, as far as this process is allowed to use it. 0 means unknown."""

    cpu_milli: int
    memory_bytes: int
    disk_bytes: int
    network_bps: int


class Box(Protocol):
    """The limits of one Pod."""

    @property
    def join_files(self) -> tuple[str, ...]:
        """Files into which the Pod's process writes its PID to come under the limits."""
        ...

    @property
    def data_bytes(self) -> int:
        """Private memory the process may add to what it is born with, by RLIMIT_DATA; 0: no such limit."""
        ...

    def out_of_memory_kills(self) -> int:
        """Return how many processes the kernel killed because the limit was reached."""
        ...

    def kill(self) -> None:
        """Kill whatever still lives under the limits, also what left the Pod's process group."""
        ...

    def remove(self) -> bool:
        """Give the limits back; False when processes still live there, then call again."""
        ...


@dataclass(frozen=True, slots=True)
class ProcessLimits:
    """Limits without a cgroup: what setrlimit can do."""

    data_bytes: int = 0
    join_files: tuple[str, ...] = ()

    def out_of_memory_kills(self) -> int:
        """Return 0: a process over RLIMIT_DATA gets a MemoryError, it is not killed."""
        return 0

    def kill(self) -> None:
        """Do nothing: there is no list of who lives here."""

    def remove(self) -> bool:
        """Return True: the limits went with the process."""
        return True


@dataclass(frozen=True, slots=True)
class Cgroup:
    """A Pod's cgroup: one directory (version 2), or one per controller (version 1)."""

    directories: Mapping[str, Path]
    """Controller -> directory; under version 2 every controller has the same one."""
    oom_counter: tuple[Path, str] | None
    """File and key of the kernel's count of out-of-memory kills."""
    data_bytes: int = 0

    @property
    def join_files(self) -> tuple[str, ...]:
        """Files into which the Pod's process writes its PID."""
        return tuple(str(path / "cgroup.procs") for path in dict.fromkeys(self.directories.values()))

    def out_of_memory_kills(self) -> int:
        """Return the kernel's count, 0 when it keeps none."""
        if self.oom_counter is None:
            return 0
        path, key = self.oom_counter
        for line in _text(path).splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
        return 0

    def kill(self) -> None:
        """Kill every process in the cgroup."""
        for join_file in self.join_files:
            for pid in _text(Path(join_file)).split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    pass

    def remove(self) -> bool:
        """Remove the directories; False when one is still busy."""
        gone = True
        for path in dict.fromkeys(self.directories.values()):
            try:
                path.rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                gone = False
        return gone


@dataclass(frozen=True, slots=True)
class Limiter:
    """Makes the limits of Pods in the best way this machine allows; `notes` say what is not limited, and why."""

    parents: Mapping[str, Path] = field(default_factory=dict)
    """Controller -> the directory that Pods' cgroups go under; empty when cgroups are closed to us."""
    version: int = 0
    """Of the cgroups: 1, 2, or 0 for none."""
    notes: tuple[str, ...] = ()

    def make(self, name: str, limits: PodLimits) -> Box:
        """Return the limits of a new Pod; a controller that refuses is left out."""
        directories: dict[str, Path] = {}
        for controller, parent in self.parents.items():
            path = parent / name
            try:
                path.mkdir(exist_ok=True)
                for file_name, value in _settings(self.version, controller, limits):
                    _write(path / file_name, value, required=file_name in _REQUIRED)
                directories[controller] = path
            except OSError:
                if path not in directories.values():
                    _remove_quietly(path)
        if not directories:
            return ProcessLimits(data_bytes=limits.memory_bytes)
        limited = "memory" in directories
        return Cgroup(directories, self._oom_counter(directories), 0 if limited else limits.memory_bytes)

    def sweep(self) -> None:
        """Remove the cgroups that an earlier run left, killing what lives in them."""
        for parent in dict.fromkeys(self.parents.values()):
            for path in parent.iterdir() if parent.is_dir() else ():
                if path.is_dir():
                    left = Cgroup({"any": path}, None)
                    left.kill()
                    left.remove()

    def close(self) -> None:
        """Remove the directories that held the Pods' cgroups."""
        for parent in dict.fromkeys(self.parents.values()):
            _remove_quietly(parent)

    def _oom_counter(self, directories: Mapping[str, Path]) -> tuple[Path, str] | None:
        if "memory" not in directories:
            return None
        return directories["memory"] / ("memory.events" if self.version == 2 else "memory.oom_control"), "oom_kill"


_REQUIRED = frozenset({"memory.max", "memory.limit_in_bytes", "cpu.max", "cpu.cfs_quota_us", "pids.max"})


def open_limiter(
    name: str, root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> Limiter:
    """Find out which limits this process may set; Pods' cgroups will lie in a directory `name` under its own cgroup."""
    own = _own_cgroups(membership)
    if (root / "cgroup.controllers").is_file():
        return _open_v2(root / own.get("", "/").strip("/"), name)
    parents: dict[str, Path] = {}
    notes: list[str] = []
    for controller in _CONTROLLERS:
        parent = root / controller / own.get(controller, "/").strip("/") / name
        try:
            parent.mkdir(exist_ok=True)
            parents[controller] = parent
        except OSError as error:
            notes.append(f"{controller}: no cgroup ({error.strerror or error})")
    if "memory" not in parents:
        notes.append("memory: capped by RLIMIT_DATA only")
    return Limiter(parents, 1 if parents else 0, tuple(notes))


def host_resources(
    disk: Path = Path("/"), cgroup_root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")
) -> HostResources:
    """Return what this machine offers, cut down to the limits of the cgroup this process lives in."""
    own = _own_cgroups(proc / "self" / "cgroup")
    version_2 = (cgroup_root / "cgroup.controllers").is_file()
    cpu_milli = len(os.sched_getaffinity(0)) * 1000
    memory_bytes = _meminfo_total(proc / "meminfo")
    for path in _lineage(cgroup_root, own, "cpu", version_2):
        quota, period = _cpu_quota(path, version_2)
        if quota > 0 and period > 0:
            cpu_milli = min(cpu_milli, max(1, quota * 1000 // period))
    for path in _lineage(cgroup_root, own, "memory", version_2):
        limit = _text(path / ("memory.max" if version_2 else "memory.limit_in_bytes")).strip()
        if limit.isdigit():
            memory_bytes = min(memory_bytes, int(limit)) if memory_bytes else int(limit)
    return HostResources(cpu_milli, memory_bytes, shutil.disk_usage(disk).total, _network_bps())


def limit_this_process(data_bytes: int) -> None:
    """Set the limits of a Pod's own process: no core dumps, `data_bytes` of private memory beyond what it has (0: no limit)."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if data_bytes > 0:
        cap = _private_bytes() + data_bytes
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if hard != resource.RLIM_INFINITY:
            cap = min(cap, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))


def _open_v2(own: Path, name: str) -> Limiter:
    parent = own / name
    needed = "+" + " +".join(_CONTROLLERS)
    try:
        if not set(_CONTROLLERS) <= set(_text(own / "cgroup.subtree_control").split()):
            # Processes may not live beside cgroups that share out resources: go into a leaf first, but move nobody else.
            if set(_text(own / "cgroup.procs").split()) - {str(os.getpid())}:
                return Limiter(
                    notes=(
                        "cgroup: others live in this process's cgroup; give the agent its own (systemd: Delegate=yes)",
                    )
                )
            (own / "agent").mkdir(exist_ok=True)
            _write(own / "agent" / "cgroup.procs", str(os.getpid()), required=True)
            _write(own / "cgroup.subtree_control", needed, required=True)
        parent.mkdir(exist_ok=True)
        _write(parent / "cgroup.subtree_control", needed, required=True)
    except OSError as error:
        return Limiter(
            notes=(f"cgroup: closed to us ({error.strerror or error}); memory is capped by RLIMIT_DATA only",)
        )
    return Limiter(dict.fromkeys(_CONTROLLERS, parent), 2)


def _settings(version: int, controller: str, limits: PodLimits) -> list[tuple[str, str]]:
    match controller, version:
        case "memory", 2 if limits.memory_bytes:
            return [("memory.max", str(limits.memory_bytes)), ("memory.swap.max", "0"), ("memory.oom.group", "1")]
        case "memory", 1 if limits.memory_bytes:
            amount = str(limits.memory_bytes)
            return [("memory.limit_in_bytes", amount), ("memory.memsw.limit_in_bytes", amount)]
        case "cpu", 2 if limits.cpu_milli:
            return [("cpu.max", f"{max(1000, limits.cpu_milli * CPU_PERIOD_US // 1000)} {CPU_PERIOD_US}")]
        case "cpu", 1 if limits.cpu_milli:
            quota = max(1000, limits.cpu_milli * CPU_PERIOD_US // 1000)
            return [("cpu.cfs_period_us", str(CPU_PERIOD_US)), ("cpu.cfs_quota_us", str(quota))]
        case "pids", _ if limits.pids:
            return [("pids.max", str(limits.pids))]
        case _:
            return []


def _lineage(root: Path, own: Mapping[str, str], controller: str, version_2: bool) -> list[Path]:
    """List this process's cgroup and all above it: the tightest limit of them counts."""
    base = root if version_2 else root / controller
    path = base / own.get("" if version_2 else controller, "/").strip("/")
    return [path, *(above for above in path.parents if above == base or base in above.parents)]


def _own_cgroups(membership: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in _text(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            found[controller] = path
    return found


def _cpu_quota(path: Path, version_2: bool) -> tuple[int, int]:
    if version_2:
        quota, _, period = _text(path / "cpu.max").strip().partition(" ")
    else:
        quota, period = _text(path / "cpu.cfs_quota_us").strip(), _text(path / "cpu.cfs_period_us").strip()
    return (int(quota), int(period)) if quota.isdigit() and period.isdigit() else (0, 0)


def _meminfo_total(path: Path) -> int:
    for line in _text(path).splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return 0


def _network_bps(interfaces: Path = Path("/sys/class/net")) -> int:
    """Return the speed of the fastest interface that is up; virtual ones often do not tell theirs."""
    fastest = 0
    for path in interfaces.iterdir() if interfaces.is_dir() else ():
        if path.name != "lo" and _text(path / "operstate").strip() == "up":
            megabits = _text(path / "speed").strip()
            fastest = max(fastest, int(megabits) * 1_000_000 if megabits.isdigit() else 0)
    return fastest


def _private_bytes() -> int:
    for line in _text(Path("/proc/self/status")).splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _write(path: Path, value: str, *, required: bool) -> None:
    try:
        path.write_text(value)
    except OSError:
        if required:
            raise


def _remove_quietly(path: Path) -> None:
    try:
        path.rmdir()
    except OSError:
        pass
