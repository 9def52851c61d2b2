"""Inside a Pod: one process that loads one AI method and runs attempts, one after the other, until it is told to end.

The method runs in the main thread; a second thread only listens for orders, so that a stop arrives while a step is being computed.
Where a Pod has several slots and its method can share the device, a thread for each slot runs attempts, and the main thread does
the device's work for all of them.
Everything the agent needs to know leaves as a message; everything a person may want to read goes to the log.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.tasks import NOT_RETRYABLE, URGENT_PRIORITY, FailureCause
from executors.limits import limit_this_process
from executors.pod_wire import Frames, encode

if TYPE_CHECKING:
    from executors.pod_attempts import Attempts

LOG_TAIL_BYTES = 4096
PROGRESS_PERIOD_S = 0.1
"""Shortest time between two progress messages of an attempt; the last one is always sent."""
Key = tuple[str, int, int]
"""An attempt: reqNo, attempt, rank."""


@dataclass(frozen=True, slots=True)
class PodSpec:
    """What a Pod is told at birth, as the first message on its channel."""

    pod: int
    method: str
    factory: str
    """``module:callable`` of a method that is not in the registry; empty otherwise."""
    model: Mapping[str, Any]
    models: Mapping[str, Any]
    """The node's model cache, as `ModelCache.to_json` writes it."""
    store_url: str
    directory: str
    log: str
    device: str
    environment: Mapping[str, str]
    join_files: tuple[str, ...]
    data_bytes: int
    gpu_memory_cap_bytes: int
    threads: int
    slots: int = 1


@dataclass(frozen=True, slots=True)
class Order:
    """An attempt that waits for its turn."""

    key: Key
    parameters: Mapping[str, Any]
    checkpoint: str
    terms: Mapping[str, Any] = field(default_factory=dict)
    """What `executors.terms.Terms` reads."""

    @property
    def priority(self) -> int:
        """How urgent it is; nonsense counts as ordinary until whoever runs it names the fault."""
        given = self.terms.get("priority", 0)
        return given if isinstance(given, int) else 0

    @property
    def directory_name(self) -> str:
        """The attempt's directory below the Pod's; the agent has checked that a reqNo is a plain name."""
        req_no, attempt, rank = self.key
        return f"{req_no}/{attempt}.{rank}"


class Link:
    """The Pod's end of the channel: blocking, shared by both threads."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(True)
        self._end = end
        self._frames = Frames()
        self._received: deque[dict[str, Any]] = deque()
        self._sending = threading.Lock()

    def send(self, op: str, **fields: Any) -> None:
        """Send a message; the process ends when nobody listens any more."""
        packet = encode({"op": op, **fields})
        with self._sending:
            try:
                self._end.sendall(packet)
            except OSError:
                os._exit(1)

    def receive(self) -> dict[str, Any] | None:
        """Wait for a message; None when the agent is gone."""
        while not self._received:
            try:
                chunk = self._end.recv(1 << 16)
            except OSError:
                return None
            if not chunk:
                return None
            self._received.extend(self._frames.feed(chunk))
        return self._received.popleft()


@dataclass(slots=True)
class _Running:
    """What was ordered about an attempt that runs."""

    stop: bool = False
    keep_checkpoint: bool = False


class Orders:
    """The orders a Pod has, as the listening thread leaves them and the threads that run attempts take them."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._changed = threading.Condition()
        self._waiting: deque[Order] = deque()
        self._running: dict[Key, _Running] = {}
        self._ending = False

    def listen(self) -> None:
        """Take orders until the agent is gone, then end the Pod with its whole group."""
        try:
            while (message := self._link.receive()) is not None:
                self._obey(message)
        finally:
            os.killpg(0, signal.SIGKILL)

    def next(self, *, urgent: bool = False) -> Order | None:
        """Wait for an attempt to run, the most urgent first; None when the Pod is to end. Whoever takes one says when it is `over`.

        With `urgent`, only urgent ones are taken.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ending or self._best(urgent) is not None)
            order = self._best(urgent)
            if self._ending or order is None:
                return None
            self._waiting.remove(order)
            self._running[order.key] = _Running()
            return order

    def _best(self, urgent: bool) -> Order | None:
        best = max(self._waiting, key=lambda order: order.priority, default=None)
        return best if best is not None and (not urgent or best.priority >= URGENT_PRIORITY) else None

    def over(self, key: Key) -> None:
        """Forget a running attempt: its end has been reported."""
        with self._changed:
            self._running.pop(key, None)

    def end(self) -> None:
        """Run nothing more, and stop what runs."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()

    def should_stop(self, key: Key) -> bool:
        """Tell whether a running attempt is to stop."""
        running = self._running.get(key)
        return self._ending or (running is not None and running.stop)

    def keeps_checkpoint(self, key: Key) -> bool:
        """Tell whether a checkpoint of a stopped attempt is wanted."""
        running = self._running.get(key)
        return running is not None and running.keep_checkpoint

    def _obey(self, message: Mapping[str, Any]) -> None:
        with self._changed:
            match message["op"]:
                case "start":
                    key = (message["req_no"], message["attempt"], message["rank"])
                    self._waiting.append(
                        Order(key, message["parameters"], message["checkpoint"], message.get("terms") or {})
                    )
                case "stop":
                    self._stop_attempts(message["req_no"], message["attempt"], message["keep_checkpoint"])
                case "end":
                    self._ending = True
            self._changed.notify_all()

    def _stop_attempts(self, req_no: str, attempt: int, keep_checkpoint: bool) -> None:
        for order in [order for order in self._waiting if order.key[:2] == (req_no, attempt)]:
            self._waiting.remove(order)
            self._link.send("stopped", key=order.key, checkpoint=order.checkpoint)
        for key, running in self._running.items():
            if key[:2] == (req_no, attempt):
                running.keep_checkpoint = keep_checkpoint
                running.stop = True


def run_pod(end: socket.socket) -> int:
    """Be a Pod; returns the exit status of its process. The first message on the channel is the PodSpec."""
    link = Link(end)
    first = link.receive()
    if first is None:
        return 1
    spec = PodSpec(**{**first["spec"], "join_files": tuple(first["spec"]["join_files"])})
    _settle(spec)
    orders = Orders(link)
    listener = threading.Thread(target=orders.listen, name="orders", daemon=True)
    listener.start()
    from executors.pod_attempts import Attempts, cause_of

    began = time.monotonic()
    try:
        attempts = Attempts(spec, link, orders)
    except BaseException as error:
        cause = cause_of(error)
        if cause not in NOT_RETRYABLE:
            traceback.print_exc()  # What the caller can mend needs no traceback.
        link.send("down", cause=cause, detail=f"{type(error).__name__}: {error}"[:1024])
        return 1
    shared = attempts.share(spec.slots)
    link.send("up", load_us=round((time.monotonic() - began) * 1e6), paced=attempts.paced)
    if not (_run_together(attempts, orders, spec.slots) if shared else _run_one_by_one(attempts, orders)):
        link.send(
            "down",
            cause=attempts.broken_by or FailureCause.CRASHED,
            detail="CUDA works no more in this process; see its attempt's failure",
        )
        return 1
    attempts.close()
    return 0


def _run_one_by_one(attempts: Attempts, orders: Orders, *, urgent: bool = False) -> bool:
    """Run attempts until the Pod is to end; False when the process is of no use any more."""
    while (order := orders.next(urgent=urgent)) is not None:
        sound = attempts.run(order)
        orders.over(order.key)
        if not sound:
            return False
    return True


def _run_together(attempts: Attempts, orders: Orders, slots: int) -> bool:
    """Run up to `slots` attempts at once, a thread each, and do the device's work for them in this thread.

    Where all threads are taken as many urgent attempts more may run: the batch sets ordinary pictures aside for them if it must.
    """
    threads = slots * 2
    sound = [True] * threads
    at_work = threading.Semaphore(0)

    def run(slot: int) -> None:
        try:
            sound[slot] = _run_one_by_one(attempts, orders, urgent=slot >= slots)
        finally:
            # The end of one is the end of all: it is ordered, or the process is of no use any more.
            orders.end()
            at_work.release()

    def leave() -> None:
        for _ in range(threads):
            at_work.acquire()
        attempts.leave()

    for slot in range(threads):
        threading.Thread(target=run, args=(slot,), name=f"slot-{slot}", daemon=True).start()
    threading.Thread(target=leave, name="leave", daemon=True).start()
    attempts.serve()
    return all(sound)


def log_tail(path: Path, limit_bytes: int = LOG_TAIL_BYTES) -> str:
    """Return the end of a log, whole characters only."""
    try:
        with path.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - limit_bytes))
            return log.read(limit_bytes).decode(errors="replace").strip()
    except OSError:
        return ""


def _settle(spec: PodSpec) -> None:
    """Come under the Pod's limits, environment, directory and log."""
    log = os.open(spec.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    # A crash of native code leaves where Python stood; so does the host's question to a Pod that hangs.
    faulthandler.enable(all_threads=False)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    for join_file in spec.join_files:
        Path(join_file).write_text(str(os.getpid()))
    limit_this_process(spec.data_bytes)
    os.environ.update(spec.environment)
    os.chdir(spec.directory)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(spec.threads)


def cleared(directory: Path) -> Path:
    """Return the directory, made anew and empty."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


if __name__ == "__main__":
    from executors.pod_main import run_pod as run
    from executors.pod_process import die_with_parent

    die_with_parent(int(sys.argv[2]))
    os._exit(run(socket.socket(fileno=int(sys.argv[1]))))
