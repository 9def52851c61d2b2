"""The node agent: one process on every machine that offers GPUs.

One loop polls the scheduler's connection and the Pods' descriptors and feeds the sans-IO `AgentMachine`; what the machine orders is
carried out by the Pod host, what must outlive a crash goes to the spool first. Only the DevicePlugin runs beside it, in a thread: a
driver that hangs must not look like a dead node.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from engine.protocol import messages as m
from engine.protocol.agent import AgentMachine, Effect, KillPods, Life
from engine.resources import GpuSpec, NodeSpec, ResidentModel
from engine.tasks import NEVER, FailureCause, Micros
from executors import ports, wire
from executors.agent_items import item_of, pod_order, progress_of, tail
from executors.curve import KeyPair
from executors.spool import Spool

log = logging.getLogger(__name__)

USE_EVERY_S = 5.0
STOCK_EVERY_S = 60.0
"""How often the models of a node are told though they did not change."""
SILENT_AFTER_US = 5_000_000
"""How long a scheduler may be silent before the log says so."""
_READ_AT_ONCE = 512
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """How an agent runs."""

    connect: str
    """The scheduler's address, ``tcp://host:port``."""
    node: str
    keys: KeyPair
    scheduler_public_key: str
    state_dir: Path
    cpu_milli: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    network_bps: int = 0
    labels: tuple[tuple[str, str], ...] = ()
    extra: tuple[tuple[str, int], ...] = ()
    device_poll_s: float = 1.0
    leave_within_s: float = 3600.0
    """After a SIGTERM, running attempts may go on for so long; then their Pods are killed."""
    die_with_parent: bool = False
    models: ports.ModelStock | None = None
    """Takes the orders about models, and says which are here."""
    on_joined: Callable[[Sequence[GpuSpec]], None] | None = None
    """Told once, with the devices, when the scheduler has taken this node in."""


@dataclass(slots=True)
class _Seen:
    """What the device thread saw last, handed to the loop."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    devices: m.Devices | None = None
    stop: threading.Event = field(default_factory=threading.Event)


def run_agent(options: AgentOptions, plugin: ports.DevicePlugin, host: ports.PodHost) -> None:
    """Serve until told to leave by SIGTERM or SIGINT (a second one kills the Pods at once). The Pod host is closed at the end.

    Raises RuntimeError when another agent uses the state directory.
    """
    if options.die_with_parent:
        die_with_parent()
    with _owned(options.state_dir):
        agent = NodeAgent(options, plugin, host)
        previous = {number: signal.signal(number, agent.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            agent.run()
        finally:
            for number, action in previous.items():
                signal.signal(number, action)


def die_with_parent() -> None:
    """Have this process killed when its parent dies (Linux; elsewhere nothing happens)."""
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (AttributeError, OSError):
        return


class NodeAgent:
    """The loop around the machine; `run_agent` adds the process's duties (lock, signals)."""

    def __init__(self, options: AgentOptions, plugin: ports.DevicePlugin, host: ports.PodHost) -> None:
        self._options = options
        self._plugin = plugin
        self._host = host
        self._spool = Spool(options.state_dir / "spool")
        self._boot_file = options.state_dir / "boot"
        devices = plugin.devices()
        node = NodeSpec(
            options.node,
            devices,
            options.cpu_milli,
            options.memory_bytes,
            options.disk_bytes,
            options.network_bps,
            options.extra,
            options.labels,
        )
        self.machine = AgentMachine(node, self._next_boot(), tuple(self._spool.held.values()))
        self._saved_boot = self.machine.boot
        self._seen = _Seen()
        self._signals = 0
        self._leave_by: Micros = NEVER
        self._refusal = ""
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._wake_in.setblocking(False)

    def on_signal(self, number: int, frame: object) -> None:
        """Leave at the first signal, kill at the second."""
        self._signals += 1
        self._wake()

    def leave(self) -> None:
        """Begin to leave, from any thread."""
        self._signals = max(self._signals, 1)
        self._wake()

    def leave_now(self) -> None:
        """Kill the Pods and leave, from any thread."""
        self._signals = 2
        self._wake()

    def run(self) -> None:
        """Serve until the node has left."""
        watcher = threading.Thread(target=self._watch_devices, name="devices", daemon=True)
        context = zmq.Context()
        try:
            watcher.start()
            dealer = self._connect(context)
            self._loop(dealer)
        finally:
            self._seen.stop.set()
            self._host.close()
            self._spool.close()
            context.destroy(linger=200)
            watcher.join(timeout=5)
            self._wake_in.close()
            self._wake_out.close()

    # --- the loop -------------------------------------------------------------------------------------------------------

    def _loop(self, dealer: zmq.Socket[bytes]) -> None:
        machine = self.machine
        poller = zmq.Poller()
        poller.register(dealer, zmq.POLLIN)
        poller.register(self._wake_out, zmq.POLLIN)
        registered: set[int] = set()
        joined = self._options.on_joined
        silence = Silence(self._options)
        while machine.life is not Life.LEFT:
            registered = _register(poller, registered, self._host.filenos())
            wait_us = max(0, min(machine.next_timeout(), self._leave_by, self._spool.sync_at) - clock_us())
            wait_us = min(wait_us, self._host_deadline_us())
            ready = dict(poller.poll(-(-min(wait_us, 1_000_000) // 1000)))
            now = clock_us()
            machine.tick(now)
            if self._wake_out.fileno() in ready:
                self._woken(now)
            if dealer in ready:
                for message in self._read(dealer):
                    machine.receive(now, message)
            self._take_reports(now)
            self._take_devices(now)
            if self._signals > 1 or now >= self._leave_by:
                self._kill_pods()
                self.machine.depart(now)
            self._carry_out(now)
            self._send(dealer, now)
            silence.look(now, machine.life)
            if joined is not None and machine.life is Life.UP:
                joined(machine.node.gpus)
                joined = None
            if now >= self._spool.sync_at:
                self._spool.sync()
        self._flush_spool(clock_us())
        self._spool.sync()

    def _host_deadline_us(self) -> Micros:
        """Return in how many microseconds the host has a grace to enforce."""
        deadline = self._host.next_deadline_us()
        return NEVER if deadline is None else deadline

    def _carry_out(self, now: Micros) -> None:
        effects = self.machine.take_effects()
        if not effects:
            return
        for effect in effects:
            self._effect(now, effect)
        self._take_reports(now)

    def _send(self, dealer: zmq.Socket[bytes], now: Micros) -> None:
        self._flush_spool(now)
        if self.machine.boot != self._saved_boot:
            self._save_boot(self.machine.boot)
        if self.machine.refusal != self._refusal:
            self._refusal = self.machine.refusal
            if self._refusal:
                log.error("the scheduler at %s refused this node: %s", self._options.connect, self._refusal)
        for message in self.machine.take_outgoing(now):
            if not _offer(dealer, message):
                return

    def _read(self, dealer: zmq.Socket[bytes]) -> Iterator[m.FromScheduler]:
        for _ in range(_READ_AT_ONCE):
            try:
                message = wire.decode(dealer.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            except wire.WireError as error:
                log.warning("a frame from the scheduler was dropped: %s", error)
                reason = m.NackReason.UNKNOWN if error.tag else m.NackReason.MALFORMED
                _offer(dealer, m.Nack(0, error.tag, reason, str(error)[:200]))
                continue
            if isinstance(message, m.Hello | m.Heartbeat | m.Reports | m.Credit | m.Progress | m.Drain | m.Bye):
                continue
            yield message

    def _flush_spool(self, now: Micros) -> None:
        change = self.machine.take_spool()
        if change is not None:
            self._spool.apply(now, change)

    def _woken(self, now: Micros) -> None:
        try:
            self._wake_out.recv(4096)
        except BlockingIOError:
            pass
        if self._signals and not self.machine.leaving:
            log.info("leaving: attempts that run may go on for %.0f s", self._options.leave_within_s)
            self._leave_by = now + int(self._options.leave_within_s * 1_000_000)
            self.machine.leave(now)

    def _wake(self) -> None:
        try:
            self._wake_in.send(b"\0")
        except (BlockingIOError, OSError):
            pass

    # --- effects ----------------------------------------------------------------------------------------------------------

    def _effect(self, now: Micros, effect: Effect) -> None:
        match effect:
            case m.CreatePod():
                try:
                    self._host.create(pod_order(effect))
                except Exception as error:
                    log.exception("pod %d could not be created", effect.pod)
                    self.machine.report(now, m.PodDown(effect.pod, FailureCause.CRASHED, tail(repr(error))))
            case m.Dispatch():
                key = m.attempt_key(effect)
                try:
                    self._host.start(
                        effect.pod, key[0], key[1], effect.parameters, effect.checkpoint, key[2], effect.terms
                    )
                except ValueError as error:
                    self.machine.report(now, m.Failed(*key, FailureCause.BAD_INPUT, tail(str(error))))
                except Exception as error:
                    log.exception("attempt %s could not be started", key)
                    self.machine.report(now, m.Failed(*key, FailureCause.CRASHED, tail(repr(error))))
            case m.Kill():
                self._host.stop(effect.req_no, effect.attempt, effect.grace_us, effect.keep_checkpoint)
            case m.DeletePod():
                self._host.delete(effect.pod, effect.grace_us)
            case m.Prefetch():
                if self._options.models is not None:
                    self._options.models.bring(effect.model)
            case m.Release():
                if self._options.models is not None:
                    self._options.models.release(effect.model, effect.drop)
            case KillPods():
                log.error("killing every Pod: %s", effect.reason)
                self._kill_pods()

    def _kill_pods(self) -> None:
        for pod in list(self._host.pods()):
            self._host.delete(pod, 0)

    # --- reports ------------------------------------------------------------------------------------------------------------

    def _take_reports(self, now: Micros) -> None:
        for report in self._host.take():
            if isinstance(report, ports.AttemptProgressed):
                self.machine.progress(now, progress_of(report))
            else:
                self.machine.report(now, item_of(report))

    def _take_devices(self, now: Micros) -> None:
        with self._seen.lock:
            devices, self._seen.devices = self._seen.devices, None
        if devices is not None:
            self.machine.report(now, devices)

    def _watch_devices(self) -> None:
        """Hand over what the plugin sees: at once when devices came, went or changed, their use every few seconds."""
        known: Sequence[GpuSpec] = self.machine.node.gpus
        use_due = time.monotonic()
        stock = _StockNews(self._options.models)
        while not self._seen.stop.wait(self._options.device_poll_s):
            try:
                gpus = self._plugin.devices()
                if gpus == known and time.monotonic() < use_due:
                    continue
                use = self._plugin.use()
            except Exception:
                log.exception("the DevicePlugin failed; the last devices stay")
                continue
            known, use_due = gpus, time.monotonic() + USE_EVERY_S
            seen = m.Devices(
                gpus,
                tuple(sorted((u.uuid, u.memory_used_bytes) for u in use)),
                tuple(sorted((u.uuid, u.busy_permille) for u in use)),
                *stock.news(),
            )
            with self._seen.lock:
                self._seen.devices = seen
            self._wake()

    # --- connection and boot ------------------------------------------------------------------------------------------------

    def _connect(self, context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
        dealer = context.socket(zmq.DEALER)
        dealer.linger = 200
        dealer.setsockopt(zmq.IMMEDIATE, 1)
        dealer.setsockopt(zmq.SNDHWM, 10_000)
        dealer.setsockopt(zmq.RCVHWM, 10_000)
        dealer.setsockopt(zmq.MAXMSGSIZE, wire.MAX_BYTES)
        dealer.setsockopt(zmq.RECONNECT_IVL, 100)
        dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 2_000)
        dealer.setsockopt(zmq.HEARTBEAT_IVL, 2_000)
        dealer.setsockopt(zmq.HEARTBEAT_TIMEOUT, 8_000)
        dealer.curve_publickey = self._options.keys.public.encode("ascii")
        dealer.curve_secretkey = self._options.keys.secret.encode("ascii")
        dealer.curve_serverkey = self._options.scheduler_public_key.encode("ascii")
        try:
            dealer.connect(self._options.connect)
        except zmq.ZMQError as error:
            raise OSError(
                error.errno, f"connect {self._options.connect}: {error.strerror}; use tcp://HOST:PORT"
            ) from error
        return dealer

    def _next_boot(self) -> int:
        """Return a boot above every earlier one: the saved one counts, and the wall clock in case the disk was lost."""
        try:
            saved = int(self._boot_file.read_text("ascii"))
        except (FileNotFoundError, ValueError):
            saved = 0
        boot = max(saved + 1, time.time_ns() // 1000)
        self._save_boot(boot)
        return boot

    def _save_boot(self, boot: int) -> None:
        scratch = self._boot_file.with_suffix(".new")
        with scratch.open("w", encoding="ascii") as file:
            file.write(str(boot))
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(self._boot_file)
        self._saved_boot = boot


class Silence:
    """Says, ever less often, that no scheduler answers: where keys do not fit, silence is all that the other end gives."""

    def __init__(self, options: AgentOptions) -> None:
        self._options = options
        self._since: Micros = NEVER
        self._say_at: Micros = NEVER

    def look(self, now: Micros, life: Life) -> None:
        """Note how the session stands."""
        if life is not Life.SEEKING:
            self._since = self._say_at = NEVER
        elif self._since == NEVER:
            self._since, self._say_at = now, now + SILENT_AFTER_US
        elif now >= self._say_at:
            silent_us = now - self._since
            self._say_at = now + silent_us
            node = self._options.node
            log.warning(
                "no scheduler answers at %s for %.0f s: does it run there, and were the keys of node %s made where it runs"
                " (`aigc keys agent %s`)?",
                self._options.connect, silent_us / 1_000_000, node, node,
            )  # fmt: skip


class _StockNews:
    """What a node's models are worth telling: at once when they changed, and now and then for a scheduler that has forgotten."""

    def __init__(self, models: ports.ModelStock | None) -> None:
        self._models = models
        self._told: tuple[ResidentModel, ...] | None = None
        self._tell_at = 0.0

    def news(self) -> tuple[tuple[ResidentModel, ...] | None, tuple[tuple[str, int], ...]]:
        """Return the models, None when there is nothing new, and the counts; a cache that cannot be read is not spoken of."""
        if self._models is None:
            return None, ()
        try:
            resident, counts = self._models.resident(), self._models.counts()
        except Exception:
            log.exception("the model caches could not be looked at")
            return None, ()
        now = time.monotonic()
        if resident == self._told and now < self._tell_at:
            return None, counts
        self._told, self._tell_at = resident, now + STOCK_EVERY_S
        return resident, counts


def clock_us() -> Micros:
    """Return microseconds of a clock that counts on while the machine sleeps: leases must run out then, too."""
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)) // 1000


@contextmanager
def _owned(state_dir: Path) -> Iterator[None]:
    """Hold the state directory against a second agent."""
    state_dir.mkdir(parents=True, exist_ok=True)
    with (state_dir / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"{state_dir}: another agent uses this state directory; give each its own") from None
        yield


def _offer(dealer: zmq.Socket[bytes], message: m.FromNode) -> bool:
    """Send without waiting; False when there is no connection or no room. What matters is sent again."""
    try:
        for data in wire.encode(message):
            dealer.send(data, zmq.NOBLOCK)
    except zmq.Again:
        return False
    return True


def _register(poller: zmq.Poller, registered: set[int], filenos: Sequence[int]) -> set[int]:
    wanted = set(filenos)
    if wanted != registered:
        for fileno in registered - wanted:
            poller.unregister(fileno)
        for fileno in wanted - registered:
            poller.register(fileno, zmq.POLLIN)
    return wanted
