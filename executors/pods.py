"""The Pods of a node: child process groups, each with one AI method loaded, seen from the agent's loop.

Nothing here blocks: Pods are born by a nursery process, resolve their own models, store their own results, and report over
a socket.
`take` turns what came into reports, and keeps the promises that need a clock - graces, and the limit on loading.
A Pod is reported down only when nothing of its process group lives and its channel has been read to the end, so no report is lost.
The attempts in a Pod's slots run at once where its method can share the device; otherwise they are a queue inside the Pod.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.tasks import FailureCause
from executors.dfs import ObjectFileStore
from executors.limits import Box, Limiter, ProcessLimits, open_limiter
from executors.pod_main import PodSpec, log_tail
from executors.pod_models import ModelCache
from executors.pod_nursery import Nursery
from executors.pod_record import HostedPod, attempt_report, cause_of_death, gpu_cap_bytes, limits_of
from executors.pod_watch import Patience, StepWatch
from executors.pod_wire import Channel
from executors.ports import (
    AttemptStopped,
    DevicePlugin,
    PodDown,
    PodOrder,
    PodReport,
    PodUp,
)
from executors.residency.stock import NodeStock
from executors.work_dir import WorkDirectoryInUse, lock

__all__ = ["LocalPodHost", "WorkDirectoryInUse"]

LOAD_LIMIT_S = 900.0
"""A Pod that has not loaded its model by then is killed."""
TRACE_S = 1.0
"""Between asking a hung Pod where it stands and killing it."""
LOG_MAX_BYTES = 8 << 20
"""A Pod's log is cut back to nothing beyond this size."""
LOCK_WAIT_S = 10.0
"""How long to wait for a killed agent's last Pods to be gone: they hold the work directory's lock too."""
SHARED_GRACE_S = 10.0
"""Shortest grace of a stop in a Pod that holds others' attempts too: killing it at once would cost their work."""
HOUSEKEEPING_PERIOD_S = 5.0
LIGHT_METHODS = frozenset({"sleep"})
"""Methods that need no torch, and so are born by a nursery that has not imported it."""

_REQ_NO = re.compile(r"[A-Za-z0-9_-]{1,80}")


class LocalPodHost:
    """Runs Pods as child process groups of the agent; a `PodHost`. Not for use by several threads."""

    def __init__(
        self,
        plugin: DevicePlugin,
        store: ObjectFileStore,
        work_dir: Path,
        models: ModelCache | None = None,
        *,
        methods: Mapping[str, str] | None = None,
        cgroups: bool = True,
        warm: Iterable[str] = (),
        load_limit_s: float = LOAD_LIMIT_S,
        lock_wait_s: float = LOCK_WAIT_S,
        patience: Patience | None = None,
    ) -> None:
        """Take over a work directory and clear what an earlier run left in it.

        `store` must be open to other processes (`file://`, `s3://`). `models` defaults to a cache in the work directory and the
        built-in models. `methods` adds methods as ``name -> "module:factory"``. `warm` names nurseries to start now, ``torch`` or
        ``light``, otherwise the first Pod waits for the imports. `patience` says when a Pod counts as hung. Raises
        WorkDirectoryInUse, ValueError.
        """
        if not store.shared:
            raise ValueError(
                f"file store {store.url}: Pods are processes of their own and cannot see it; use file:///dir or s3://..."
            )
        self._plugin = plugin
        self._store = store
        self._work_dir = work_dir.resolve()
        self._pods_dir = self._work_dir / "pods"
        self._lock = lock(self._work_dir, lock_wait_s)
        shutil.rmtree(self._pods_dir, ignore_errors=True)
        self._pods_dir.mkdir()
        self.models = models or ModelCache(self._work_dir / "models", store.url)
        self._methods = dict(methods or {})
        tag = hashlib.sha256(str(self._work_dir).encode()).hexdigest()[:12]
        self.limiter = open_limiter(f"aigc-{tag}") if cgroups else Limiter(notes=("cgroup: switched off",))
        self.limiter.sweep()
        self._load_limit_s = load_limit_s
        self._pods: dict[int, HostedPod] = {}
        self._watch = StepWatch(patience or Patience())
        self._nurseries: dict[str, Nursery] = {}
        self._reports: list[PodReport] = []
        self._unremoved: list[Box] = []
        self._housekeeping_at = 0.0
        self.stock = NodeStock(self.models)
        """What lies on this node beside its Pods, and the orders about it."""
        for kind in warm:
            self._nursery(kind)

    # --- orders -----------------------------------------------------------------------------------------------------

    def create(self, order: PodOrder) -> None:
        """Begin to create a Pod; PodUp or PodDown follows. A Pod that is there already is left alone."""
        if order.pod in self._pods:
            return
        present = {gpu.uuid: gpu for gpu in self._plugin.devices()}
        missing = [uuid for uuid in order.gpus if uuid not in present]
        if missing:
            self._reports.append(
                PodDown(order.pod, FailureCause.GPU_LOST, f"GPU {missing[0]} is not on this node any more")
            )
            return
        try:
            self._begin(order)
        except OSError as error:
            self._reports.append(PodDown(order.pod, FailureCause.POD_LOST, f"the Pod cannot be created: {error}"))

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
        """Run an attempt in a Pod; AttemptStarted follows, or PodDown. Starting what is started changes nothing."""
        if not _REQ_NO.fullmatch(req_no):
            raise ValueError(
                f"req_no {req_no[:100]!r}: only letters, digits, '-' and '_', at most 80, name an attempt's directory"
            )
        known = self._pods.get(pod)
        if known is None:
            self._reports.append(PodDown(pod, FailureCause.POD_LOST, "the Pod is not on this node"))
            return
        key = (req_no, attempt, rank)
        if key in known.attempts:
            return
        known.attempts[key] = None
        order = {
            "req_no": req_no,
            "attempt": attempt,
            "rank": rank,
            "parameters": dict(parameters),
            "checkpoint": checkpoint,
            "terms": dict(terms or {}),
        }
        known.channel.send({"op": "start", **order})

    def stop(self, req_no: str, attempt: int, grace_us: int, keep_checkpoint: bool = False) -> None:
        """Stop an attempt between two steps; after the grace its Pod is killed. Nothing happens when it is not here any more.

        Where other attempts run in the Pod the grace is SHARED_GRACE_S at least.
        """
        for pod in self._pods.values():
            mine = [key for key in pod.attempts if key[:2] == (req_no, attempt)]
            others = any(at is None for key, at in pod.attempts.items() if key not in mine)
            grace_s = max(grace_us / 1e6, SHARED_GRACE_S if others else 0.0)
            for key in mine:
                deadline = time.monotonic() + grace_s
                pod.attempts[key] = min(deadline, pod.attempts[key] or deadline)
            if mine:
                order = {"req_no": req_no, "attempt": attempt, "keep_checkpoint": keep_checkpoint}
                pod.channel.send({"op": "stop", **order})

    def delete(self, pod: int, grace_us: int) -> None:
        """End a Pod, killed after the grace; PodDown follows, also when the Pod was gone already."""
        known = self._pods.get(pod)
        if known is None:
            self._reports.append(PodDown(pod, FailureCause.POD_LOST, "the Pod was gone already", ordered=True))
            return
        deadline = time.monotonic() + grace_us / 1e6
        if known.ordered and known.kill_at is not None:
            deadline = min(deadline, known.kill_at)
        known.ordered, known.kill_at = True, deadline
        if grace_us > 0:
            known.channel.send({"op": "end"})
        else:
            self._kill(known)

    def prefetch(self, model: Mapping[str, Any]) -> None:
        """Bring a model to this node ahead of need, in the background; failures are logged, the Pod that needs it will tell."""
        self.stock.bring(model)

    # --- reports ----------------------------------------------------------------------------------------------------

    def filenos(self) -> Sequence[int]:
        """Return the descriptors whose readability means that `take` has something."""
        nurseries = [nursery.fileno() for nursery in self._nurseries.values() if not nursery.closed]
        return [*nurseries, *(pod.channel.fileno() for pod in self._pods.values() if not pod.channel.closed)]

    def next_deadline_us(self) -> int | None:
        """Return in how many microseconds `take` has a grace to enforce; None when no clock runs."""
        deadlines = [
            at
            for pod in self._pods.values()
            if not pod.killed
            for at in (pod.kill_at, self._watch.hangs_at(pod.order.pod), *pod.attempts.values())
            if at
        ]
        return max(0, round((min(deadlines) - time.monotonic()) * 1e6)) if deadlines else None

    def take(self) -> Sequence[PodReport]:
        """Return the reports since the last call without blocking; also enforces graces and removes what dead Pods left."""
        for pod in self._pods.values():
            pod.channel.flush()
            self._listen(pod)
        for kind, nursery in list(self._nurseries.items()):
            nursery.flush()
            for report in nursery.receive():
                self._hear(nursery, report)
            if nursery.closed:
                self._lose(kind, nursery)
        now = time.monotonic()
        for pod in self._pods.values():
            self._enforce(pod, now)
        if now >= self._housekeeping_at:
            self._keep_house()
            self._housekeeping_at = now + HOUSEKEEPING_PERIOD_S
        reports, self._reports = self._reports, []
        return reports

    def pods(self) -> Sequence[int]:
        """Return the Pods that live, or that are not yet known to be gone."""
        return sorted(self._pods)

    def close(self) -> None:
        """Kill every Pod's process group and wait for it; the work directory is free then."""
        self.stock.close()
        for nursery in self._nurseries.values():
            nursery.close()
        self._nurseries.clear()
        for pod in list(self._pods.values()):
            pod.box.kill()
            pod.ordered = True
            self._bury(pod, None)
        deadline = time.monotonic() + 2.0
        while self._unremoved and time.monotonic() < deadline:
            self._keep_house()
        self.limiter.close()
        self._lock.close()

    # --- inside -----------------------------------------------------------------------------------------------------

    def _begin(self, order: PodOrder) -> None:
        environment = self._plugin.environment(order.gpus)
        device = "cuda" if order.gpus and environment.get("CUDA_VISIBLE_DEVICES") else "cpu"
        directory = self._pods_dir / str(order.pod)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        limits = limits_of(order, device)
        box = self.limiter.make(str(order.pod), limits)
        if device == "cuda" and isinstance(box, ProcessLimits):
            box = ProcessLimits()  # CUDA reserves more private memory than it uses: RLIMIT_DATA would forbid it.
        ours, theirs = socket.socketpair()
        nursery = self._nursery("light" if order.method in LIGHT_METHODS or order.method in self._methods else "torch")
        pod = HostedPod(order, nursery, Channel(ours), box, limits, directory, time.monotonic() + self._load_limit_s)
        self._pods[order.pod] = pod
        pod.channel.send({"op": "spec", "spec": asdict(self._spec(pod, environment, device))})
        nursery.create(order.pod, theirs)

    def _nursery(self, kind: str) -> Nursery:
        nursery = self._nurseries.get(kind)
        if nursery is None or nursery.closed:
            nursery = Nursery(kind, self._work_dir / f"nursery-{kind}.log", held=(self._lock.fileno(),))
            self._nurseries[kind] = nursery
        return nursery

    def _spec(self, pod: HostedPod, environment: Mapping[str, str], device: str) -> PodSpec:
        order = pod.order
        return PodSpec(
            pod=order.pod,
            method=order.method,
            factory=self._methods.get(order.method, ""),
            model=dict(order.model),
            models=self.models.to_json(),
            store_url=self._store.url,
            directory=str(pod.directory),
            log=str(pod.directory / "pod.log"),
            device=device,
            environment=dict(environment),
            join_files=pod.box.join_files,
            data_bytes=pod.box.data_bytes,
            gpu_memory_cap_bytes=gpu_cap_bytes(order),
            threads=1 if device == "cpu" else max(1, order.cpu_milli // 1000),
            slots=order.slots,
        )

    def _listen(self, pod: HostedPod) -> None:
        for message in pod.channel.receive():
            op = message["op"]
            if op == "up":
                pod.up = True
                if not pod.ordered:
                    pod.kill_at = None
                if message.get("paced", False):
                    self._watch.follow(pod.order.pod, (pod.order.method, str(pod.order.model.get("id", ""))))
                self._reports.append(PodUp(pod.order.pod, message["load_us"]))
            elif op == "down":
                pod.told = (FailureCause(message["cause"]), message["detail"])
            else:
                self._note_pace(pod, message)
                self._reports.append(attempt_report(pod, message))

    def _note_pace(self, pod: HostedPod, message: Mapping[str, Any]) -> None:
        number, now = pod.order.pod, time.monotonic()
        key = tuple(message["key"])
        match message["op"]:
            case "started":
                pod.begun.add(key)
                self._watch.began(number, now)
            case "progress":
                self._watch.stepped(number, now)
            case "finished" | "failed" | "stopped" if key in pod.begun:
                pod.begun.discard(key)
                self._watch.ended(number, now)

    def _hear(self, nursery: Nursery, report: Mapping[str, Any]) -> None:
        pod = self._pods.get(int(report["pod"]))
        if pod is None or pod.nursery is not nursery:
            return
        if report["op"] == "born":
            pod.pid = int(report["pid"])
        else:
            self._listen(pod)
            self._bury(pod, int(report["status"]))

    def _lose(self, kind: str, nursery: Nursery) -> None:
        """The nursery is gone: its Pods got the kernel's signal. The next order starts a new one."""
        nursery.close()
        del self._nurseries[kind]
        for pod in [pod for pod in self._pods.values() if pod.nursery is nursery]:
            pod.box.kill()
            self._listen(pod)
            tail = log_tail(self._work_dir / f"nursery-{kind}.log")
            pod.told = pod.told or (FailureCause.CRASHED, f"the {kind} nursery ended, its Pods with it\n{tail}")
            self._bury(pod, None)

    def _bury(self, pod: HostedPod, status: int | None) -> None:
        """Report the end of a Pod of which nothing lives, and clear away what it had."""
        number = pod.order.pod
        for (req_no, attempt, rank), deadline in pod.attempts.items():
            if deadline is not None:
                self._reports.append(AttemptStopped(req_no, attempt, rank=rank))
        cause, detail = cause_of_death(pod, status)
        if cause is FailureCause.CRASHED and (gone := self._device_gone(pod.order)):
            cause, detail = FailureCause.GPU_LOST, f"{gone}; the Pod {detail}"
        tail = "" if pod.ordered else log_tail(pod.directory / "pod.log")
        self._reports.append(PodDown(number, cause, f"{detail}\n{tail}".strip(), ordered=pod.ordered))
        pod.channel.close()
        self._watch.forget(number)
        if not pod.box.remove():
            self._unremoved.append(pod.box)
        shutil.rmtree(pod.directory, ignore_errors=True)
        del self._pods[number]

    def _enforce(self, pod: HostedPod, now: float) -> None:
        if pod.killed:
            return
        overdue = [key for key, deadline in pod.attempts.items() if deadline is not None and deadline <= now]
        if overdue:
            pod.why, pod.why_detail = (
                FailureCause.POD_LOST,
                f"attempt {overdue[0][1]} of {overdue[0][0]} did not stop within its grace",
            )
            pod.ordered = True
            self._kill(pod)
        elif pod.kill_at is not None and pod.kill_at <= now:
            self._kill(pod)
        elif pod.kill_at is None and (hangs_at := self._watch.hangs_at(pod.order.pod)) and hangs_at <= now:
            # Its threads write into the log where they stand, if they still can; then it is killed.
            pod.why, pod.why_detail = FailureCause.HUNG, self._watch.verdict(pod.order.pod, now)
            pod.nursery.trace(pod.order.pod)
            pod.kill_at = now + TRACE_S

    def _device_gone(self, order: PodOrder) -> str:
        """Return which GPU of a Pod is gone or ill; empty when all are well."""
        if not order.gpus:
            return ""
        seen = {gpu.uuid: gpu for gpu in self._plugin.devices()}
        for uuid in order.gpus:
            if uuid not in seen:
                return f"GPU {uuid} is not on this node any more"
            if not seen[uuid].healthy:
                return f"GPU {uuid} is ill"
        return ""

    def _kill(self, pod: HostedPod) -> None:
        pod.killed = True
        pod.nursery.kill(pod.order.pod)

    def _keep_house(self) -> None:
        self._unremoved = [box for box in self._unremoved if not box.remove()]
        for pod in self._pods.values():
            log = pod.directory / "pod.log"
            try:
                if log.stat().st_size > LOG_MAX_BYTES:
                    with log.open("r+b") as full:
                        full.truncate(0)
            except FileNotFoundError:
                continue
