"""The warm parent of Pods: a process that has imported what methods need, and forks a Pod in milliseconds instead of seconds.

It runs apart from the agent, has one thread, holds no model and no GPU, and so may fork safely. It is the parent of its Pods: it
reaps them, sees to it that nothing of a Pod's process group is left, and dies with the agent, taking every Pod along. The agent's
end is `Nursery`; `python -m executors.pod_nursery FD PRELOAD` is the process.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from executors.pod_process import adopt_orphans, children, die_with_parent, group_exists, is_single_threaded, kill_group

_ALWAYS = ("executors.pod_main", "executors.pod_attempts", "executors.methods.sleep")
_SCHEDULERS = (
    "ddim",
    "ddpm",
    "deis_multistep",
    "dpmsolver_multistep",
    "dpmsolver_singlestep",
    "edm_euler",
    "euler_ancestral_discrete",
    "euler_discrete",
    "flow_match_euler_discrete",
    "heun_discrete",
    "k_dpm_2_ancestral_discrete",
    "k_dpm_2_discrete",
    "lcm",
    "lms_discrete",
    "pndm",
    "unipc_multistep",
)
PRELOADS: Mapping[str, tuple[str, ...]] = {
    "light": _ALWAYS,
    "torch": (
        *_ALWAYS,
        "torch",
        "diffusers",
        "transformers",
        "peft",
        "executors.methods.text_to_image",
        "executors.methods.dreambooth",
        "executors.batching.shared",
        # Imported by the libraries only once a pipeline is read, in every Pod anew: four fifths of loading a small model.
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
        "diffusers.pipelines.stable_diffusion.safety_checker",
        "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
        "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
        "diffusers.pipelines.flux.pipeline_flux",
        "diffusers.models.autoencoders.autoencoder_tiny",
        "diffusers.guiders",
        *(f"diffusers.schedulers.scheduling_{name}" for name in _SCHEDULERS),
    ),
}
"""Kind of nursery -> what it imports before its first Pod. A Pod that only sleeps comes from a light one."""
GROUP_GONE_LIMIT_S = 5.0
"""How long to wait for killed members of a Pod's group; only one stuck in the kernel takes longer."""
_PACKET_BYTES = 1 << 16
_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}


class Nursery:
    """The agent's end: orders go out, births and deaths come in, nothing blocks."""

    def __init__(self, kind: str, log: Path, held: Sequence[int] = ()) -> None:
        """Start the process; it and its Pods hold the descriptors `held` open for as long as they live."""
        if kind not in PRELOADS:
            raise ValueError(f"nursery: kind {kind!r} is unknown; choose one of {sorted(PRELOADS)}")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "executors.pod_nursery", str(theirs.fileno()), kind]
        with theirs, log.open("ab") as out:
            self._process = subprocess.Popen(
                command,
                pass_fds=(theirs.fileno(), *held),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env={**os.environ, **_OFFLINE, **_ONE_THREAD, **_QUIET, "PYTHONPATH": _python_path()},
            )
        ours.setblocking(False)
        self._end = ours
        self._unsent: deque[tuple[bytes, socket.socket | None]] = deque()
        self.closed = False
        """The process is gone, and every Pod of it is dead or dying."""

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._end.fileno()

    def create(self, pod: int, end: socket.socket) -> None:
        """Give birth to a Pod that talks over this end of a socket pair; the end is closed here."""
        self._send({"op": "create", "pod": pod}, end)

    def kill(self, pod: int) -> None:
        """Kill a Pod's process group."""
        self._send({"op": "kill", "pod": pod}, None)

    def trace(self, pod: int) -> None:
        """Have a Pod write into its log where each of its threads stands."""
        self._send({"op": "trace", "pod": pod}, None)

    def flush(self) -> None:
        """Send what waits."""
        while self._unsent:
            packet, end = self._unsent[0]
            try:
                if end is None:
                    self._end.send(packet)
                else:
                    socket.send_fds(self._end, [packet], [end.fileno()])
            except BlockingIOError:
                return
            except OSError:
                self.closed = True
            self._unsent.popleft()
            if end is not None:
                end.close()

    def receive(self) -> list[dict[str, Any]]:
        """Return ``{"op": "born", "pod", "pid"}`` and ``{"op": "dead", "pod", "status"}`` since the last call."""
        reports: list[dict[str, Any]] = []
        while True:
            try:
                packet = self._end.recv(_PACKET_BYTES)
            except BlockingIOError:
                return reports
            except OSError:
                packet = b""
            if not packet:
                self.closed = True
                return reports
            reports.append(json.loads(packet))

    def close(self, limit_s: float = 10.0) -> None:
        """End the process and its Pods, and wait for it."""
        self.closed = True
        for _, end in self._unsent:
            if end is not None:
                end.close()
        self._unsent.clear()
        self._end.close()
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, order: Mapping[str, Any], end: socket.socket | None) -> None:
        self._unsent.append((json.dumps(order).encode(), end))
        self.flush()


class _Parent:
    """The process's own side."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._groups: dict[int, int] = {}
        """Pod -> the PID of its first process, which names its group."""
        self._dead: dict[int, tuple[int, int, float]] = {}
        """Pod -> group, status and time, once its first process is reaped."""
        self._wake, wake_writer = os.pipe()
        for descriptor in (self._wake, wake_writer):
            os.set_blocking(descriptor, False)
        self._wake_writer = wake_writer
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)

    def run(self) -> None:
        """Serve until the agent's end is closed, then kill every Pod and wait for it."""
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        serving = True
        while serving or self._groups or self._dead:
            ready = dict(poller.poll(10 if self._dead or not serving else None))
            if self._wake in ready:
                os.read(self._wake, 4096)
            if serving and self._control.fileno() in ready:
                serving = self._obey()
                if not serving:
                    poller.unregister(self._control)
                    for group in self._groups.values():
                        self._kill(group)
            self._reap()
            self._bury(tell=serving)

    def _obey(self) -> bool:
        try:
            packet, descriptors, _, _ = socket.recv_fds(self._control, _PACKET_BYTES, 4)
        except OSError:
            return False
        if not packet:
            return False
        order = json.loads(packet)
        pod = int(order["pod"])
        match order["op"]:
            case "create":
                self._create(pod, descriptors[0])
            case "kill" if pod in self._groups:
                self._kill(self._groups[pod])
            case "trace" if pod in self._groups:
                os.kill(self._groups[pod], signal.SIGUSR1)
        return True

    def _create(self, pod: int, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        try:
            self._groups[pod] = self._give_birth(descriptor)
        except OSError as error:
            os.close(descriptor)
            print(f"nursery: Pod {pod} cannot be born: {error}", file=sys.stderr, flush=True)
            self._tell({"op": "dead", "pod": pod, "status": 1})
            return
        self._tell({"op": "born", "pod": pod, "pid": self._groups[pod]})

    def _give_birth(self, descriptor: int) -> int:
        if not is_single_threaded():
            return _spawn(descriptor)
        parent = os.getpid()
        pid = os.fork()
        if pid:
            os.close(descriptor)
            return pid
        status = 1
        try:
            os.setsid()
            die_with_parent(parent)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            for inherited in (self._wake, self._wake_writer, self._control.detach()):
                os.close(inherited)
            from executors.pod_main import run_pod

            status = run_pod(socket.socket(fileno=descriptor))
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except OSError:
                    pass
            os._exit(status)

    @staticmethod
    def _kill(first: int) -> None:
        """Kill a Pod whose first process is not reaped yet; it may not have come as far as founding its group."""
        kill_group(first)
        os.kill(first, signal.SIGKILL)

    def _reap(self) -> None:
        pods = {group: pod for pod, group in self._groups.items()}
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in pods:
                pod = pods[pid]
                self._dead[pod] = (self._groups.pop(pod), status, time.monotonic())

    def _bury(self, *, tell: bool) -> None:
        """Report a Pod as dead once nothing of it lives: neither its group nor a process that left the group and was orphaned."""
        for pod, (group, status, since) in list(self._dead.items()):
            kill_group(group)
            for pid in self._orphans():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            self._reap()
            gone = not group_exists(group) and not self._orphans()
            if gone or time.monotonic() - since > GROUP_GONE_LIMIT_S:
                del self._dead[pod]
                if tell:
                    self._tell({"op": "dead", "pod": pod, "status": os.waitstatus_to_exitcode(status)})

    def _orphans(self) -> set[int]:
        return set(children()) - set(self._groups.values())

    def _tell(self, report: Mapping[str, Any]) -> None:
        try:
            self._control.send(json.dumps(report).encode())
        except OSError:
            pass  # The agent is gone; the next read says so.


def _spawn(descriptor: int) -> int:
    """Start a Pod as a fresh program: slower, but sound where an import has left threads behind."""
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "executors.pod_main", "3", str(os.getpid())],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, descriptor, 3)],
        setsid=True,
    )
    os.close(descriptor)
    return pid


def _python_path() -> str:
    return os.pathsep.join(dict.fromkeys(path or os.getcwd() for path in sys.path))


def _preload(kind: str) -> None:
    for name in PRELOADS[kind]:
        try:
            importlib.import_module(name)
        except Exception as error:
            print(f"nursery: {name} cannot be imported ahead of time: {error}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> None:
    """Run the process: the descriptor of the control socket, and the kind."""
    control = socket.socket(fileno=int(arguments[0]))
    os.set_inheritable(control.fileno(), False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    adopt_orphans()
    _preload(arguments[1])
    gc.collect()
    gc.freeze()
    _Parent(control).run()


if __name__ == "__main__":
    main(sys.argv[1:])
